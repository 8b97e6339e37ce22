"""What a step keeps for backward, and the most it holds."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fused_res.benchmarks.peers import Peer, Setup


def saved_bytes(forward: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes that a forward keeps for backward, each storage once.

    Parameters and buffers are left out, and the output, which is the next block's input and counted there. Nothing of the forward
    stays: a hook that returned the tensor itself would close a circle where a node saves its own result, as a ReLU does, and keep
    the autograd graph for good, with the AccumulateGrad nodes of all leaves. Those belong to the stream that they were made on,
    and no later backward could be captured on another one.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    own = {tensor.untyped_storage().data_ptr() for tensor in (out, *module.parameters(), *module.buffers())}
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)


def peak_bytes(step: Callable[[], object], device: torch.device) -> int | None:
    """The most GPU memory a step holds beyond what was held before it; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure(peer: Peer, setup: Setup) -> dict[str, int | None]:
    """Both figures [bytes] of a peer's step; None where there is none: no backward, or no GPU."""
    saves = peer.forward is not None and setup.mode != "eval"
    return {
        "saved_bytes": saved_bytes(lambda: peer.forward(0), peer.module) if saves else None,
        "peak_bytes": peak_bytes(lambda: peer.step(0), setup.device),
    }
