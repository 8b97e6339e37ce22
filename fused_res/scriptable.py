"""A block as TorchScript understands it: its own child modules, called as eager calls them."""

from torch import Tensor, nn


class _Scriptable(nn.Module):
    """`relu(a * main(x) + shortcut(x))`; children and parameters are the block's, under the same names."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "conv3"):
            out = self.bn3(self.conv3(self.relu(out)))
        if hasattr(self, "residual_scale"):
            out = self.residual_scale * out
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        return self.relu((out + x).to(out.dtype))


def scriptable(block: nn.Module) -> nn.Module:
    """The block's children and parameters in a module that torch.jit.script compiles."""
    found = _Scriptable()
    for name, child in block.named_children():
        found.add_module(name, child)
    for name, parameter in block.named_parameters(recurse=False):
        found.register_parameter(name, parameter)
    found.training = block.training
    return found
