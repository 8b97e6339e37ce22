"""Training a small ResNet on scikit-learn's 8x8 digits twice, eager and fused, from one seed and through the same batches.

Floating-point training is chaotic: sooner or later a pre-activation near 0 takes the other sign, and two right implementations
part by leaps. How far is measured by eager itself, started one ulp away (NUDGES times, in random directions) and run in the
other memory layout. Over the first WINDOW steps fused must not differ more than DRIFT times the largest of those differences.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_res import BasicBlock, Bottleneck, use_backend
from fused_res.console import require
from fused_res.environment import one_thread, temporarily

EPOCHS, BATCH, ACCURACY = 12, 64, 0.97
WINDOW, NUDGES, DRIFT = 20, 6, 4.0
TRAIN_IMAGES = 1437
FLOOR = 8 * 2.0**-24
"""Relative difference of losses that is rounding alone, in fp32."""


def data(device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images [TRAIN_IMAGES, 1, 8, 8] and labels, test images [360, 1, 8, 8] and labels; stratified, normalised."""
    datasets, selection = require("sklearn.datasets", "scikit-learn"), require("sklearn.model_selection", "scikit-learn")
    images, labels = datasets.load_digits(return_X_y=True)
    parts = selection.train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32, device=device).view(-1, 1, 8, 8) for part in parts[:2])
    train_y, test_y = (torch.tensor(part, dtype=torch.int64, device=device) for part in parts[2:])
    mean, std = train_x.mean(), train_x.std()
    return (train_x - mean) / std, train_y, (test_x - mean) / std, test_y


def network(seed: int = 0) -> nn.Sequential:
    """Stem, two BasicBlocks (16 and 32 channels), one Bottleneck (64 channels), pooling, classifier."""

    def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            BasicBlock(16, 16),
            BasicBlock(16, 32, 2, projection(16, 32, 2)),
            Bottleneck(32, 16, 2, projection(32, 64, 2)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


def nudge(model: nn.Module, seed: int) -> nn.Module:
    """Every element of every parameter one ulp up or down, at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            up = torch.rand(parameter.shape, generator=generator) < 0.5
            parameter.copy_(torch.nextafter(parameter, torch.where(up, float("inf"), float("-inf"))))
    return model


def train(
    model: nn.Module,
    samples: tuple[Tensor, Tensor, Tensor, Tensor],
    backend: str | None = None,
    memory_format: torch.memory_format = torch.channels_last,
    steps: int | None = None,
    epochs: int = EPOCHS,
    seed: int = 0,
    advance: Callable[[str], None] = lambda label: None,
) -> tuple[list[float], float]:
    """Losses of all steps, and the accuracy on the test images; `backend` None is fused_res's own choice."""
    train_x, train_y, test_x, test_y = samples
    model = model.to(train_x.device, memory_format=memory_format).train()
    per_epoch = len(train_x) // BATCH
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=epochs * per_epoch)
    order, losses = torch.Generator().manual_seed(seed), []
    label = backend or "fused_res"
    with use_backend(backend) if backend else nullcontext():
        for _ in range(epochs):
            chosen = torch.randperm(len(train_x), generator=order).to(train_x.device)
            for batch in chosen[: per_epoch * BATCH].split(BATCH):
                if steps is not None and len(losses) >= steps:
                    break
                advance(label)
                loss = F.cross_entropy(model(train_x[batch].contiguous(memory_format=memory_format)), train_y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
        model.eval()
        with torch.no_grad():
            accuracy = (model(test_x.contiguous(memory_format=memory_format)).argmax(1) == test_y).double().mean()
    return [float(loss) for loss in losses], float(accuracy)


def largest_difference(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference over the steps both have."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=False))


def run(
    device: torch.device,
    steps: int | None = None,
    epochs: int = EPOCHS,
    window: int = WINDOW,
    nudges: int = NUDGES,
    advance: Callable[[str], None] = lambda label: None,
) -> dict:
    """Train eager and fused in full (or `steps` steps), and the disturbed eager runs over the window.

    The result holds the losses, the test accuracies, the largest relative loss differences from eager over the window and over
    the whole run, `natural` (the largest of the disturbed runs' over the window), `limit`, and `passed`: fused within the limit,
    and, for a full run, both accuracies at least ACCURACY.
    """
    samples, nhwc = data(device), torch.channels_last
    first = window if steps is None else min(window, steps)
    losses, accuracy = {}, {}
    with one_thread(device), temporarily(torch.backends.cudnn, deterministic=True, benchmark=False, allow_tf32=False):
        losses["eager"], accuracy["eager"] = train(network(), samples, "eager", nhwc, steps, epochs, advance=advance)
        losses["fused"], accuracy["fused"] = train(network(), samples, None, nhwc, steps, epochs, advance=advance)
        disturbed = {
            f"eager, nudge {n}": train(nudge(network(), n), samples, "eager", nhwc, first, epochs, advance=advance)[0]
            for n in range(nudges)
        }
        disturbed["eager, NCHW"], _ = train(network(), samples, "eager", torch.contiguous_format, first, epochs, advance=advance)
    reference = losses["eager"][:first]
    difference = {name: largest_difference(run, reference) for name, run in disturbed.items()}
    natural = max(difference.values())
    difference["fused"] = largest_difference(losses["fused"][:first], reference)
    difference["fused, whole run"] = largest_difference(losses["fused"], losses["eager"])
    limit = max(DRIFT * natural, FLOOR)
    accurate = steps is not None or min(accuracy.values()) >= ACCURACY
    return {
        "losses": losses,
        "accuracy": accuracy,
        "window": first,
        "difference": difference,
        "natural": natural,
        "limit": limit,
        "required_accuracy": None if steps is not None else ACCURACY,
        "passed": accurate and difference["fused"] <= limit,
    }


def total_steps(steps: int | None = None, epochs: int = EPOCHS, window: int = WINDOW, nudges: int = NUDGES) -> int:
    """How often `run` calls `advance`."""
    full = epochs * (TRAIN_IMAGES // BATCH) if steps is None else steps
    return 2 * full + (nudges + 1) * min(window, full)
