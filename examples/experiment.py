"""What the experiments of this folder share: images, batches, a progress bar, the picture, and the file of what was found.

Not a script: degradation.py, gradient_flow.py and identity_start.py are.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_res

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110


def fail(message: str) -> NoReturn:
    raise SystemExit(f"{Path(sys.argv[0]).name}: {message}")


def require(module: str, package: str) -> ModuleType:
    """Import a module of a package that not every run needs."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        fail(f"this needs the package {package}: pip install {package}")


def parser(description: str, name: str, **defaults: object) -> argparse.ArgumentParser:
    """The options that all experiments have, with the defaults of one: size, epochs, batch, lr and seeds."""
    options = argparse.ArgumentParser(f"{name}.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="where torchvision has put MNIST or CIFAR-10, or folders train and val with one for each class (default: digits)",
    )
    options.add_argument("--size", type=int, default=defaults["size"], help="pixels a side (default %(default)s)")
    options.add_argument("--width", type=int, default=defaults.get("width", 16), help="channels of the first stage (%(default)s)")
    options.add_argument("--epochs", type=int, default=defaults["epochs"], help="default %(default)s")
    options.add_argument("--batch", type=int, default=defaults["batch"], help="images in a step (default %(default)s)")
    options.add_argument("--lr", type=float, default=defaults["lr"], help="the highest learning rate (default %(default)s)")
    options.add_argument("--seeds", type=int, default=defaults["seeds"], help="runs of each network (default %(default)s)")
    options.add_argument("--device", type=torch.device, help="default: the GPU if there is one")
    options.add_argument(
        "--output",
        type=Path,
        default=Path(f"{name}.png"),
        help="the picture; beside it a JSON file says what was found (%(default)s)",
    )
    return options


def parsed(options: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    args = options.parse_args(argv)
    for name in ("size", "width", "epochs", "batch", "seeds"):
        if getattr(args, name) < 1:
            options.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    args.commit = _commit()  # as the run began
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return args


@dataclass
class Images:
    """Normalised images [N, C, size, size] and labels, for training and for testing; flips: whether mirrored ones are as good."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int
    flips: bool

    @property
    def channels(self) -> int:
        return self.train[0].shape[1]


def _digits() -> tuple[str, list[tuple[Tensor, Tensor]]]:
    datasets, selection = require("sklearn.datasets", "scikit-learn"), require("sklearn.model_selection", "scikit-learn")
    images, labels = datasets.load_digits(return_X_y=True)
    parts = selection.train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    return "scikit-learn's digits", [
        (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y)) for x, y in zip(parts[:2], parts[2:], strict=True)
    ]


def _folder(folder: Path, size: int) -> tuple[str, list[tuple[Tensor, Tensor]]]:
    datasets = require("torchvision.datasets", "torchvision")
    if (folder / "MNIST").is_dir():
        found = [datasets.MNIST(folder, train=training) for training in (True, False)]
        return "MNIST", [(part.data.unsqueeze(1).float(), part.targets) for part in found]
    if (folder / "cifar-10-batches-py").is_dir():
        found = [datasets.CIFAR10(folder, train=training) for training in (True, False)]
        return "CIFAR-10", [(torch.from_numpy(part.data).permute(0, 3, 1, 2).float(), torch.tensor(part.targets)) for part in found]
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        transforms = require("torchvision.transforms", "torchvision")
        steps = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])
        found = [datasets.ImageFolder(folder / part, steps) for part in ("train", "val")]
        return folder.name, [
            (torch.stack([image for image, _ in part]).float(), torch.tensor([label for _, label in part])) for part in found
        ]
    fail(f"--data: expected MNIST, cifar-10-batches-py, or train and val, in {folder}")


def load(args: argparse.Namespace) -> Images:
    """The images of a run, whole in the device's memory."""
    name, parts = _digits() if args.data is None else _folder(args.data, args.size)
    pixels = parts[0][0]
    mean, deviation = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)
    ready = []
    for images, labels in parts:
        images = (images - mean) / deviation
        if images.shape[-1] != args.size:
            images = F.interpolate(images, (args.size, args.size), mode="bilinear", antialias=True)
        ready.append((images.to(args.device, memory_format=torch.channels_last), labels.to(args.device)))
    return Images(name, *ready, int(parts[0][1].max()) + 1, flips=name not in ("scikit-learn's digits", "MNIST"))


def batches(images: Images, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch, each batch moved by up to an eighth, and mirrored where that is as good."""
    x, labels = images.train
    reach = x.shape[-1] // 8
    for chosen in torch.randperm(len(x), generator=generator)[: len(x) // size * size].split(size):
        batch = x[chosen.to(x.device)]
        down, right = (int(torch.randint(2 * reach + 1, (), generator=generator)) for _ in range(2))
        batch = F.pad(batch, (reach,) * 4)[:, :, down : down + x.shape[-2], right : right + x.shape[-1]]
        if images.flips and torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(-1)
        yield batch.contiguous(memory_format=torch.channels_last), labels[chosen.to(x.device)]


def initialised(network: nn.Module, seed: int, device: torch.device) -> nn.Module:
    """Weights as He et al. draw them (https://arxiv.org/abs/1502.01852), from a seed; norms as they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * (2 / fan_in) ** 0.5)
                if module.bias is not None:
                    module.bias.zero_()
    return network.to(device, memory_format=torch.channels_last)


@torch.no_grad()
def error(network: nn.Module, x: Tensor, labels: Tensor) -> float:
    """The share of images that are taken for something else, in evaluation mode."""
    network.eval()
    wrong = sum(int((network(a).argmax(1) != b).sum()) for a, b in zip(x.split(512), labels.split(512), strict=True))
    network.train()
    return wrong / len(x)


def block(into: int, out: int, stride: int, *, residual: bool = True, **options: object) -> nn.Module:
    """Two 3x3 convolutions with BNs and ReLUs, and around them a residual connection or none; one operator either way."""
    if residual:
        shortcut = None
        if stride != 1 or into != out:
            shortcut = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        return fused_res.BasicBlock(into, out, stride, shortcut, **options)
    convolutions = (nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.Conv2d(out, out, 3, padding=1, bias=False))
    return fused_res.Chain(*[layer for conv in convolutions for layer in (conv, nn.BatchNorm2d(out), nn.ReLU())])


def network(depth: int, images: Images, width: int, **options: object) -> nn.Sequential:
    """He et al.'s network for CIFAR-10 (https://arxiv.org/abs/1512.03385, section 4.2), of 6n + 2 layers.

    Three stages of n blocks with width, 2 * width and 4 * width channels, the image halved from each to the next.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth: expected 6n + 2, such as 20 or 56, got {depth}")
    layers: list[nn.Module] = [
        fused_res.Chain(nn.Conv2d(images.channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    ]
    into = width
    for stage in range(3):
        for i in range(depth // 6):
            out = width << stage
            layers.append(block(into, out, 2 if stage and not i else 1, **options))
            into = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, images.classes))


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    """Those of the main path, in order: projections are no layers of depth."""
    return [module for module in network.modules() if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)]


def optimiser(network: nn.Module, lr: float, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """SGD with momentum, its rate up for a tenth of the steps, and down along a cosine."""
    sgd = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    return sgd, torch.optim.lr_scheduler.OneCycleLR(sgd, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False)


@contextmanager
def progress(total: int) -> Iterator[object]:
    """`advance(label)`, once for each of so many steps, moves a bar where rich is installed and there is a terminal."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        yield lambda label: None
        return
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda label: bar.update(task, advance=1, description=label)


def spread(values: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation over runs, at each place."""
    columns = list(zip(*values, strict=True))
    return [statistics.fmean(column) for column in columns], [statistics.pstdev(column) for column in columns]


def smooth(values: Sequence[float], steps: int = 9) -> list[float]:
    """The mean of so many values around each."""
    reach = steps // 2
    return [statistics.fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def figure(columns: int, title: str) -> tuple["Figure", list]:
    require("matplotlib", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(4.6 * columns, 3.7), dpi=DPI, layout="constrained")
    FigureCanvasAgg(drawn)
    drawn.suptitle(title, fontsize=11)
    axes = drawn.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return drawn, list(axes)


def band(ax: object, runs: Sequence[Sequence[float]], label: str, colour: str, x: Sequence[float] | None = None, **style) -> None:
    """A line of means with the spread over the runs behind it."""
    mean, deviation = spread(runs)
    places = range(1, len(mean) + 1) if x is None else x
    ax.plot(places, mean, label=label, color=colour, **style)
    low, high = ([m + sign * d for m, d in zip(mean, deviation, strict=True)] for sign in (-1, 1))
    ax.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        asked = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def finish(args: argparse.Namespace, name: str, drawn: "Figure", watch: str, found: Sequence[str], numbers: dict) -> dict:
    """Writes the picture and, beside it, what was found with the machine, versions, commit and command. Prints what to look for."""
    args.output.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(args.output, facecolor="white")
    unsaid = ("device", "output", "data", "commit")
    shown = {key: value if isinstance(value, list) else [value] for key, value in vars(args).items() if key not in unsaid}
    options = " ".join(f"--{key.replace('_', '-')} {' '.join(map(str, values))}" for key, values in shown.items())
    settings = "".join(f"{key}={value} " for key, value in sorted(os.environ.items()) if key.startswith("FUSED_RES_"))
    document = {
        "experiment": name,
        "found": list(found),
        "command": f"{settings}python examples/{name}.py {options}" + (" --data DIR" if args.data else ""),
        "machine": _machine(args.device),
        "versions": {"torch": torch.__version__, "fused_res": fused_res.__version__, "python": platform.python_version()},
        "commit": args.commit,
        "numbers": numbers,
    }
    args.output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{watch}\n")
    for line in found:
        print(f"- {line}")
    print(f"\n{args.output}")
    return document
