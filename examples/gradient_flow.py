#!/usr/bin/env python3
"""What flows back through a residual block, and what flows around it, while it learns (https://gestalt.ink/residual).

    python examples/gradient_flow.py
    python examples/gradient_flow.py --data mnist --epochs 1

A small network without normalisation: three convolutions, 4x4 max-pool, a residual block of two, 4x4 max-pool, linear. At every
step it notes the norm of the loss's gradient at x_in, the input of the block, and at x_res, what is added to its output.
"""

import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from experiment import Images, band, batches, figure, finish, load, parsed, parser, progress, smooth
from torch import Tensor, nn

import fused_res

X_IN, X_RES = "x_in, through the block", "x_res, around it"
COLOURS = {X_IN: "#2f7d4f", X_RES: "#b13e26"}
WATCH = (
    "Left: at first hardly anything comes back through the block, and the layers in front learn from what comes around it. Once "
    "the block has learnt something, its share grows: where the lines cross, it has become the larger one. Right: the loss."
)


class Network(nn.Module):
    """The block has no BNs, so that `Residual` runs it as it is; what flows through it can be told from what flows around it."""

    def __init__(self, images: Images, size: int, width: int) -> None:
        super().__init__()
        wide = 4 * width
        self.front = nn.Sequential(
            *(nn.Conv2d(images.channels, width, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(width, wide, 1), nn.MaxPool2d(4)),
        )
        block = (nn.Conv2d(wide, wide, 3, padding=1), nn.ReLU(), nn.Conv2d(wide, wide, 3, padding=1), nn.ReLU())
        self.residual = fused_res.Residual(nn.Sequential(*block))
        self.end = nn.Sequential(nn.MaxPool2d(4), nn.Flatten(), nn.Linear(wide * (size // 16) ** 2, images.classes))
        self.x_in = self.x_res = None
        self.residual.block.register_forward_pre_hook(self._note)

    def _note(self, block: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        """The block is given a tensor of its own, whose gradient is that of this way alone."""
        self.x_in = inputs[0].view_as(inputs[0])
        self.x_in.retain_grad()
        return self.x_in

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        self.x_res = self.residual(x)  # a sum passes the gradient of its result on as it is
        self.x_res.retain_grad()
        return self.end(self.x_res)


def train(args, images: Images, seed: int, advance) -> dict[str, list[float]]:
    """Norms and losses of all steps."""
    torch.manual_seed(seed)
    model = Network(images, args.size, args.width).to(args.device, memory_format=torch.channels_last)
    adam, generator = torch.optim.Adam(model.parameters(), lr=args.lr), torch.Generator().manual_seed(seed)
    found = {X_IN: [], X_RES: [], "loss": []}
    for _ in range(args.epochs):
        for x, labels in batches(images, args.batch, generator):
            adam.zero_grad()
            loss = F.cross_entropy(model(x), labels)
            loss.backward()
            adam.step()
            for name, value in ((X_IN, model.x_in.grad.norm()), (X_RES, model.x_res.grad.norm()), ("loss", loss.detach())):
                found[name].append(float(value))
            advance()
    return found


def crossing(run: dict[str, list[float]], window: int = 15) -> int | None:
    """The step from which on more flows through the block than around it, each smoothed; None where that does not come."""
    through, around = (smooth(run[name], window) for name in (X_IN, X_RES))
    behind = [step for step, (a, b) in enumerate(zip(through, around, strict=True), 1) if a <= b]
    last = behind[-1] if behind else 0
    return last + 1 if last < len(through) else None


def main(argv: Sequence[str] | None = None) -> dict:
    args = parsed(parser(__doc__, "gradient_flow", size=32, epochs=8, batch=32, lr=1e-3, seeds=3), argv)
    if args.size % 16:
        raise SystemExit(f"gradient_flow.py: --size: expected a multiple of 16, got {args.size}")
    images = load(args)
    steps = len(images.train[0]) // args.batch * args.epochs
    with progress(steps * args.seeds) as advance:
        runs = [train(args, images, seed, lambda seed=seed: advance(f"seed {seed}")) for seed in range(args.seeds)]

    drawn, (left, right) = figure(2, f"{images.name}: gradients through and around a residual block")
    for name, colour in COLOURS.items():
        band(left, [smooth(run[name]) for run in runs], name, colour)
    band(right, [smooth(run["loss"]) for run in runs], "loss", "#52606d")
    left.set(title="norm of the gradient", xlabel="step", ylim=(0, None))
    right.set(title="loss", xlabel="step", ylim=(0, None))
    crossings = [crossing(run) for run in runs]
    for step in filter(None, crossings):
        left.axvline(step, color="#9aa5b1", linewidth=0.7, linestyle=":")
    left.legend(fontsize=8)

    early = max(1, steps // 20)
    ratios = {
        "start": statistics.fmean(statistics.fmean(run[X_RES][:early]) / statistics.fmean(run[X_IN][:early]) for run in runs),
        "end": statistics.fmean(statistics.fmean(run[X_RES][-early:]) / statistics.fmean(run[X_IN][-early:]) for run in runs),
    }
    crossed = [step for step in crossings if step is not None]
    met = (
        f"From step {statistics.fmean(crossed):.0f} on, on average ({min(crossed)} to {max(crossed)} of {steps}), more flows "
        f"through the block than around it, in {len(crossed)} of {len(runs)} runs."
        if crossed
        else f"In none of {len(runs)} runs of {steps} steps does more flow through the block than around it in the end."
    )
    found = [
        f"In the first {early} steps the gradient around the block is {ratios['start']:.1f} times the one through it, in the last "
        f"{early} it is {ratios['end']:.2f} times.",
        met,
    ]
    return finish(args, "gradient_flow", drawn, WATCH, found, {"around over through": ratios, "crossings": crossings})


if __name__ == "__main__":
    main()
