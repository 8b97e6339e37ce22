#!/usr/bin/env python3
"""Train a Faster R-CNN of torchvision's for a few steps, the residual blocks of its backbone fused or not.

    python examples/detect.py --fuse
    python examples/detect.py --backbone resnet50 --pretrained --fuse

It needs torchvision with its compiled operators (non-maximum suppression, RoIAlign): the build that was made for the torch that is
installed. Images are made up: bright rectangles, tall or wide, on noise, so that nothing is downloaded but with --pretrained.

The BNs of a detector's backbone are frozen, `FrozenBatchNorm2d`: they keep the statistics that the backbone was trained with.
A fused block computes just that.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fused_res
from fused_res.planner import LEVELS

try:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import FrozenBatchNorm2d, nms
except ModuleNotFoundError as error:
    raise SystemExit("detect.py: this needs the package torchvision: pip install torchvision") from error
except RuntimeError as error:  # one whose compiled operators were made for another torch
    raise SystemExit(f"detect.py: torchvision cannot be imported beside torch {torch.__version__}: {error}") from error

CLASSES = ("background", "tall", "wide")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("detect.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18", help="any ResNet of torchvision's (default %(default)s)")
    parser.add_argument(
        "--pretrained", action="store_true", help="download its weights for ImageNet, and train its last three stages"
    )
    parser.add_argument("--fuse", action="store_true", help="run its residual blocks as one operator each: fused_res.fuse(model)")
    parser.add_argument("--level", choices=LEVELS, help="fused_res's level of fusion, with --fuse (default: its own choice)")
    parser.add_argument("--steps", type=int, default=30, help="default %(default)s")
    parser.add_argument("--batch", type=int, default=4, help="default %(default)s")
    parser.add_argument("--size", type=int, default=128, help="pixels a side (default %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-4, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--device", type=torch.device, help="default: the GPU if there is one")
    args = parser.parse_args(argv)
    if args.level and not args.fuse:
        parser.error("--level goes with --fuse")
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return args


def scene(size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """An image with one to three rectangles, and what a detector is told about it."""
    image, boxes, labels = torch.rand(3, size, size) * 0.3, [], []
    for _ in range(int(torch.randint(1, 4, ()))):
        short, long = (int(torch.randint(size // low, size // high, ())) for low, high in ((8, 5), (4, 2)))
        label = int(torch.randint(1, 3, ()))
        width, height = (short, long) if CLASSES[label] == "tall" else (long, short)
        x, y = (int(torch.randint(0, size - side, ())) for side in (width, height))
        image[:, y : y + height, x : x + width] = 0.7 + 0.3 * torch.rand(3, 1, 1)
        boxes.append([x, y, x + width, y + height])
        labels.append(label)
    return image, {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)}


def batch(args: argparse.Namespace) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    scenes = [scene(args.size) for _ in range(args.batch)]
    images = [image.to(args.device) for image, _ in scenes]
    return images, [{name: value.to(args.device) for name, value in target.items()} for _, target in scenes]


def backbone(name: str, pretrained: bool, size: int) -> nn.Module:
    """A ResNet with frozen BNs, and a feature pyramid on top.

    Without the statistics of a training, frozen BNs would do nothing, and a deep network's activations grow from block to block:
    then the same network with ordinary BNs takes them from some images first.
    """
    if pretrained:
        return resnet_fpn_backbone(backbone_name=name, weights="DEFAULT", norm_layer=FrozenBatchNorm2d, trainable_layers=3)
    frozen, measuring = (
        resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=norm, trainable_layers=5)
        for norm in (FrozenBatchNorm2d, nn.BatchNorm2d)
    )
    for module in measuring.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        measuring(torch.stack([scene(size)[0] for _ in range(8)]))
    frozen.load_state_dict(measuring.state_dict())
    return frozen


def detector(args: argparse.Namespace) -> nn.Module:
    few = {"rpn_pre_nms_top_n_train": 200, "rpn_post_nms_top_n_train": 100, "box_batch_size_per_image": 32}  # few objects to find
    body = backbone(args.backbone, args.pretrained, args.size)
    return FasterRCNN(body, len(CLASSES), min_size=args.size, max_size=args.size, **few)


def train(model: nn.Module, args: argparse.Namespace) -> list[float]:
    """The sum of the detector's losses in each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    losses = []
    for step in range(args.steps):
        loss = sum(model(*batch(args)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 5 == 0 or step == args.steps - 1:
            print(f"step {step + 1:3}  loss {losses[-1]:.4f}", flush=True)
    return losses


def main(argv: Sequence[str] | None = None) -> list[float]:
    """The losses of all steps."""
    args = arguments(argv)
    try:
        nms(torch.zeros(0, 4, device=args.device), torch.zeros(0, device=args.device), 0.5)
    except (NotImplementedError, RuntimeError) as error:
        raise SystemExit(f"detect.py: torchvision's compiled operators cannot run here: {error}") from error
    torch.manual_seed(args.seed)
    model = detector(args).to(args.device).train()
    if args.fuse:
        fused_res.fuse(model, level=args.level)
        print(fused_res.explain(model, *batch(args)))
    torch.manual_seed(args.seed)  # the same images, fused or not
    return train(model, args)


if __name__ == "__main__":
    main()
