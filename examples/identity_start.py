#!/usr/bin/env python3
"""Residual blocks that start as the identity: y = a * block(x) + x with a learnable a from 0, beside the usual start.

    python examples/identity_start.py
    python examples/identity_start.py --data cifar --size 32 --depth 56 --epochs 40 --batch 128

Trains one residual network from three starts: the usual one; a = 0 in every block (`residual_scale=0.0`); and no a, but the last
BN's gamma 0 (`fused_res.zero_init_residual`, https://arxiv.org/abs/1706.02677). It draws the losses, and how each a grows.
"""

import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from experiment import (
    Images,
    band,
    batches,
    error,
    figure,
    finish,
    initialised,
    load,
    network,
    optimiser,
    parsed,
    parser,
    progress,
    smooth,
)

import fused_res

USUAL, SCALE, GAMMA = "usual", "a from 0", "last gamma from 0"
COLOURS = {USUAL: "#52606d", SCALE: "#1f6fd0", GAMMA: "#e0912f"}
WATCH = (
    "Left: all three should end alike; the starts at 0 have blocks that are the identity, or its ReLU, in their first steps. "
    "Right: every a leaves 0, as fast as what its block has to add is worth."
)


def start(name: str, args, images: Images, seed: int) -> torch.nn.Module:
    options = {"residual_scale": 0.0} if name == SCALE else {}
    model = initialised(network(args.depth, images, args.width, **options), seed, args.device)
    return fused_res.zero_init_residual(model) if name == GAMMA else model


def train(model: torch.nn.Module, args, images: Images, seed: int, advance) -> dict:
    """Losses of all steps, every a after each, and the error on the test images at the end."""
    steps = len(images.train[0]) // args.batch * args.epochs
    sgd, schedule = optimiser(model, args.lr, steps)
    generator, losses, scales = torch.Generator().manual_seed(seed), [], []
    parameters = [p for name, p in model.named_parameters() if name.endswith("residual_scale")]
    for _ in range(args.epochs):
        for x, labels in batches(images, args.batch, generator):
            sgd.zero_grad()
            loss = F.cross_entropy(model(x), labels)
            loss.backward()
            sgd.step()
            schedule.step()
            losses.append(float(loss.detach()))
            scales.append([float(p.detach()) for p in parameters])
            advance()
    return {"losses": losses, "scales": scales, "error": error(model, *images.test)}


def main(argv: Sequence[str] | None = None) -> dict:
    options = parser(__doc__, "identity_start", size=8, epochs=12, batch=64, lr=0.1, seeds=3)
    options.add_argument("--depth", type=int, default=20, help="6n + 2 (default %(default)s)")
    args = parsed(options, argv)
    images = load(args)
    steps = len(images.train[0]) // args.batch * args.epochs
    runs: dict[str, list[dict]] = {name: [] for name in COLOURS}
    with progress(steps * len(runs) * args.seeds) as advance:
        for name, found in runs.items():
            for seed in range(args.seeds):
                label = f"{name}, seed {seed}"
                found.append(train(start(name, args, images, seed), args, images, seed, lambda label=label: advance(label)))

    drawn, (left, right) = figure(2, f"{images.name}: {args.depth} layers from three starts")
    for name, found in runs.items():
        band(left, [smooth(run["losses"]) for run in found], name, COLOURS[name])
    left.set(title="loss", xlabel="step", yscale="log")
    left.legend(fontsize=8)
    blocks = len(runs[SCALE][0]["scales"][0])
    for i in range(blocks):
        shade = f"#{round(0x7F - 0x68 * i / blocks):02x}{round(0xB2 - 0x63 * i / blocks):02x}ec"
        band(right, [[step[i] for step in run["scales"]] for run in runs[SCALE]], f"block {i + 1}", shade)
    right.set(title="a of each block", xlabel="step")
    right.legend(fontsize=7, ncols=3)

    early = max(1, steps // 10)
    numbers = {
        name: {
            "loss of the first tenth": statistics.fmean(statistics.fmean(run["losses"][:early]) for run in found),
            "loss of the last tenth": statistics.fmean(statistics.fmean(run["losses"][-early:]) for run in found),
            "test error": 100 * statistics.fmean(run["error"] for run in found),
        }
        for name, found in runs.items()
    }
    ends = [abs(a) for run in runs[SCALE] for a in run["scales"][-1]]
    numbers["|a| at the end"] = {"least": min(ends), "mean": statistics.fmean(ends), "most": max(ends)}

    def three(what: str, digits: int) -> str:
        return ", ".join(f"{numbers[name][what]:.{digits}f} ({name})" for name in COLOURS)

    found = [
        f"Loss of the first {early} steps: {three('loss of the first tenth', 2)}; of the last {early}: "
        f"{three('loss of the last tenth', 3)}.",
        f"Test error: {three('test error', 1)}, in percent.",
        f"|a| at the end: {min(ends):.2f} to {max(ends):.2f} in {blocks} blocks of {len(runs[SCALE])} runs.",
    ]
    return finish(args, "identity_start", drawn, WATCH, found, numbers)


if __name__ == "__main__":
    main()
