#!/usr/bin/env python3
"""Deeper plain networks train worse than shallow ones; deeper residual ones do not (https://arxiv.org/abs/1512.03385, figure 6).

    python examples/degradation.py
    python examples/degradation.py --data cifar --size 32 --epochs 160 --batch 128 --depths 20 56

Trains plain and residual networks of two depths on the same images in the same order, and draws their training and test errors.
Beside them, how large the loss's gradient is at each convolution's weight before the first step.
"""

import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from experiment import (
    Images,
    band,
    batches,
    convolutions,
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
)
from torch import nn

COLOURS = {("plain", 0): "#e0912f", ("plain", 1): "#a63d12", ("residual", 0): "#7fb2ec", ("residual", 1): "#174f96"}
WATCH = (
    "Left and middle: of the plain networks the deeper one should end with the higher error, in training already, so that it is no "
    "overfitting; of the residual ones it should not. Right: along a plain network the gradient grows from the last convolution to "
    "the first, from the deeper one all the more; along a residual network it stays of one size."
)


def gradients(model: nn.Module, images: Images, batch: int, seed: int, count: int = 4) -> list[float]:
    """The norm of the loss's gradient at each convolution's weight, over that weight's own, the median of a few batches."""
    generator, layers, norms = torch.Generator().manual_seed(seed), convolutions(model), []
    for _, (x, labels) in zip(range(count), batches(images, batch, generator), strict=False):
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        norms.append([float(layer.weight.grad.norm() / layer.weight.detach().norm()) for layer in layers])
    model.zero_grad()
    return [statistics.median(values) for values in zip(*norms, strict=True)]


def train(model: nn.Module, images: Images, args, seed: int, advance: Callable[[], None]) -> tuple[list[float], list[float]]:
    """Errors on the training images, as they are trained on, and on the test images, for each epoch."""
    steps = len(images.train[0]) // args.batch
    sgd, schedule = optimiser(model, args.lr, steps * args.epochs)
    generator, found = torch.Generator().manual_seed(seed), ([], [])
    for _ in range(args.epochs):
        wrong = 0
        for x, labels in batches(images, args.batch, generator):
            sgd.zero_grad()
            out = model(x)
            F.cross_entropy(out, labels).backward()
            sgd.step()
            schedule.step()
            wrong += int((out.argmax(1) != labels).sum())
            advance()
        found[0].append(wrong / (steps * args.batch))
        found[1].append(error(model, *images.test))
    return found


def main(argv: Sequence[str] | None = None) -> dict:
    options = parser(__doc__, "degradation", size=8, epochs=12, batch=64, lr=0.1, seeds=2)
    options.add_argument("--depths", type=int, nargs=2, default=[20, 56], help="6n + 2 each (default %(default)s)")
    args = parsed(options, argv)
    images = load(args)
    steps = len(images.train[0]) // args.batch * args.epochs
    kinds = [(kind, i) for kind in ("plain", "residual") for i in range(2)]
    curves, norms = {}, {}
    with progress(steps * len(kinds) * args.seeds) as advance:
        for kind, i in kinds:
            for seed in range(args.seeds):
                label = f"{kind} {args.depths[i]}, seed {seed}"
                model = initialised(network(args.depths[i], images, args.width, residual=kind == "residual"), seed, args.device)
                norms.setdefault((kind, i), []).append(gradients(model, images, args.batch, seed))
                model = initialised(network(args.depths[i], images, args.width, residual=kind == "residual"), seed, args.device)
                run = train(model, images, args, seed, lambda label=label: advance(label))
                curves.setdefault((kind, i), []).append(run)

    drawn, (left, middle, right) = figure(3, f"{images.name}: plain and residual networks")
    for (kind, i), runs in curves.items():
        name, colour = f"{kind} {args.depths[i]}", COLOURS[kind, i]
        for ax, which in ((left, 0), (middle, 1)):
            band(ax, [[100 * value for value in run[which]] for run in runs], name, colour)
        places = [place / (len(norms[kind, i][0]) - 1) for place in range(len(norms[kind, i][0]))]
        band(right, norms[kind, i], name, colour, places)
    left.set(title="training error, %", xlabel="epoch", ylim=(0, None))
    middle.set(title="test error, %", xlabel="epoch", ylim=(0, None))
    right.set(title="gradient at the start, over the weight", xlabel="convolution, from the first to the last", yscale="log")
    left.legend(fontsize=8)

    def last(kind: str, i: int, which: int) -> float:
        return 100 * statistics.fmean(run[which][-1] for run in curves[kind, i])

    def ratio(kind: str, i: int) -> float:
        """The first convolutions' gradient over the last ones'."""
        ends = [(statistics.fmean(n[1:4]), statistics.fmean(n[-3:])) for n in norms[kind, i]]
        return statistics.fmean(first / end for first, end in ends)

    shallow, deep = args.depths
    numbers = {
        f"{kind} {args.depths[i]}": {
            "training error": last(kind, i, 0),
            "test error": last(kind, i, 1),
            "gradient of the first convolutions over the last": ratio(kind, i),
        }
        for kind, i in kinds
    }
    found = [
        f"Training error after {args.epochs} epochs: plain {last('plain', 0, 0):.1f} % with {shallow} layers and "
        f"{last('plain', 1, 0):.1f} % with {deep}; residual {last('residual', 0, 0):.1f} % and {last('residual', 1, 0):.1f} %.",
        f"Test error: plain {last('plain', 0, 1):.1f} % and {last('plain', 1, 1):.1f} %; residual "
        f"{last('residual', 0, 1):.1f} % and {last('residual', 1, 1):.1f} %.",
        f"The gradient at the first convolutions over that at the last ones, before the first step: plain {ratio('plain', 0):.1f} "
        f"with {shallow} layers and {ratio('plain', 1):.0f} with {deep}; residual {ratio('residual', 0):.1f} and "
        f"{ratio('residual', 1):.1f}.",
    ]
    return finish(args, "degradation", drawn, WATCH, found, numbers)


if __name__ == "__main__":
    main()
