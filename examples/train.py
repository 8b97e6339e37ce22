#!/usr/bin/env python3
"""Train an image classifier on a folder of images, or on scikit-learn's digits without a download, its blocks fused or not.

    python examples/train.py --fuse
    python examples/train.py --data imagenet --model resnet50 --fuse --amp bf16 --epochs 90 --warmup 5 --label-smoothing 0.1
    torchrun --nproc-per-node 8 examples/train.py --data imagenet --model timm:resnet50d --fuse --amp bf16
    python examples/train.py --resume checkpoints/checkpoint.pt --fuse

Two lines are about fused_res: `fused_res.fuse(model)`, and `fused_res.explain(model, images)`, which says what has come of it. All
else is as it would be without, checkpoints included: what was trained fused goes on unfused, and the other way round.

A run that is resumed ends bit by bit as if it had not been interrupted: after each epoch everything is saved that the next one
depends on, and the order of the images follows from the seed and the epoch. On a GPU that needs --deterministic. With three
processes or more, DistributedDataParallel may add gradients up in another order in its first step after a start.
"""

import argparse
import ast
import difflib
import importlib
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

import fused_res
from fused_res.planner import LEVELS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
RESNETS = {  # torchvision's, by block, number of blocks in each stage, and options
    "resnet18": ("BasicBlock", [2, 2, 2, 2], {}),
    "resnet34": ("BasicBlock", [3, 4, 6, 3], {}),
    "resnet50": ("Bottleneck", [3, 4, 6, 3], {}),
    "resnet101": ("Bottleneck", [3, 4, 23, 3], {}),
    "resnet152": ("Bottleneck", [3, 8, 36, 3], {}),
    "resnext50_32x4d": ("Bottleneck", [3, 4, 6, 3], {"groups": 32, "width_per_group": 4}),
    "wide_resnet50_2": ("Bottleneck", [3, 4, 6, 3], {"width_per_group": 128}),
}


def fail(message: str) -> NoReturn:
    raise SystemExit(f"train.py: {message}")


def require(module: str, package: str) -> ModuleType:
    """Import a module of a package that not every run needs."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        fail(f"this needs the package {package}: pip install {package}")
    except RuntimeError as error:  # a torchvision whose compiled operators were made for another torch
        fail(f"{package} cannot be imported beside torch {torch.__version__}: {error}. Is it the torchvision for this torch?")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise ValueError
        return value

    def option(text: str) -> tuple[str, object]:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError
        try:
            return name, ast.literal_eval(value)
        except (SyntaxError, ValueError):
            return name, value

    positive.__name__, option.__name__ = "positive number", "NAME=VALUE"
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", type=Path, metavar="DIR", help="folders train and val, in each one for each class (default: digits)"
    )
    data.add_argument("--size", type=positive, help="pixels a side (default 224; 32 for digits)")
    data.add_argument("--batch", type=positive, default=32, help="images in a forward pass of a process (default %(default)s)")
    data.add_argument("--accumulate", type=positive, default=1, metavar="N", help="N batches make an optimiser step (default 1)")
    data.add_argument("--workers", type=int, help="processes that load images (default: 8 or the CPUs there are; 0 for digits)")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        default="resnet18",
        help="torchvision's name, such as resnet50; timm:NAME; or fused_res:NAME, torchvision's ResNet with blocks of fused_res: "
        f"{', '.join(RESNETS)} (default %(default)s; fused_res alone is resnet50)",
    )
    model.add_argument(
        "--model-args", nargs="+", type=option, default=[], metavar="NAME=VALUE", help="for its constructor: drop_rate=0.1, …"
    )
    model.add_argument("--fuse", action="store_true", help="run its residual blocks as one operator each: fused_res.fuse(model)")
    model.add_argument("--level", choices=LEVELS, help="fused_res's level of fusion, with --fuse (default: its own choice)")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=positive, default=10, help="default %(default)s")
    training.add_argument("--steps-per-epoch", type=positive, metavar="N", help="stop each epoch after N steps, to try things out")
    training.add_argument("--lr", type=float, default=0.1, help="for 256 images a step, and in proportion (default %(default)s)")
    training.add_argument("--warmup", type=float, metavar="EPOCHS", help="rising, before the cosine (default: a tenth; 5 at most)")
    training.add_argument("--momentum", type=float, default=0.9, help="default %(default)s")
    training.add_argument("--weight-decay", type=float, default=5e-5, help="not of biases and norms (default %(default)s)")
    training.add_argument("--label-smoothing", type=float, default=0.0, help="such as 0.1 (default %(default)s)")
    training.add_argument("--seed", type=int, default=0, help="for weights, order and variation of images (default %(default)s)")
    running = parser.add_argument_group("running")
    running.add_argument("--device", type=torch.device, help="default: the GPU if there is one")
    running.add_argument("--amp", choices=DTYPES, help="autocast to it, fp16 with a GradScaler (default: float32 throughout)")
    running.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True, help="layout (default: it is)")
    running.add_argument("--deterministic", action="store_true", help="bitwise repeatable on a GPU, and slower; a CPU is anyway")
    running.add_argument(
        "--output", type=Path, default=Path("checkpoints"), metavar="DIR", help="for checkpoint.pt (default %(default)s)"
    )
    running.add_argument("--resume", type=Path, metavar="FILE", help="go on after the epoch of this checkpoint")
    args = parser.parse_args(argv)
    if args.level and not args.fuse:
        parser.error("--level goes with --fuse")
    args.warmup = min(5, args.epochs / 10) if args.warmup is None else args.warmup
    if not 0 <= args.warmup < args.epochs:
        parser.error(f"--warmup: expected fewer epochs than the {args.epochs} of --epochs, got {args.warmup:g}")
    args.size = args.size or (224 if args.data else 32)
    if args.workers is None:
        args.workers = min(8, os.cpu_count() or 1) if args.data else 0
    return args


@dataclass
class Process:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def say(self, *text: object) -> None:
        if self.first:
            print(*text, flush=True)


@contextmanager
def joined(asked: torch.device | None) -> Iterator[Process]:
    """Alone, or one of those that torchrun has started."""
    device = asked or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        fail("--device: this torch sees no CUDA GPU")
    if not dist.is_torchelastic_launched():
        yield Process(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


class Digits(Dataset):
    """scikit-learn's 8x8 digits as colour images, in training moved by up to one of the 8 pixels at random."""

    def __init__(self, size: int, training: bool):
        datasets, selection = require("sklearn.datasets", "scikit-learn"), require("sklearn.model_selection", "scikit-learn")
        parts = selection.train_test_split(*datasets.load_digits(return_X_y=True), test_size=0.2, random_state=0)
        images, labels = (parts[0], parts[2]) if training else (parts[1], parts[3])
        pixels = F.pad(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8), (1, 1, 1, 1))
        self.images = (pixels - 4.9) / 6.0  # mean and standard deviation of them all
        self.labels, self.classes = labels.tolist(), [str(digit) for digit in range(10)]
        self.size, self.training = size, training

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        down, right = (random.randrange(3), random.randrange(3)) if self.training else (1, 1)
        image = self.images[index : index + 1, :, down : down + 8, right : right + 8]
        return F.interpolate(image, size=(self.size, self.size), mode="bilinear")[0].expand(3, -1, -1), self.labels[index]


def datasets(folder: Path | None, size: int) -> tuple[Dataset, Dataset]:
    """For training and for evaluation."""
    if folder is None:
        return Digits(size, training=True), Digits(size, training=False)
    for part in (folder, folder / "train", folder / "val"):
        if not part.is_dir():
            fail(f"--data: {part} is not a folder")
    transforms, folders = require("torchvision.transforms", "torchvision"), require("torchvision.datasets", "torchvision")
    end = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    varied = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *end]
    plain = [transforms.Resize(size * 256 // 224), transforms.CenterCrop(size), *end]
    try:
        train, val = (
            folders.ImageFolder(str(folder / part), transforms.Compose(steps))
            for part, steps in (("train", varied), ("val", plain))
        )
    except FileNotFoundError as error:  # no class, or a class without images
        fail(f"--data: {error}")
    if train.classes != val.classes:
        fail(f"--data: the classes in {folder / 'train'} and {folder / 'val'} are not the same")
    return train, val


def loaders(args: argparse.Namespace, process: Process) -> tuple[DataLoader, DataLoader, int]:
    """Batches for training and for evaluation, of this process, and the number of classes."""
    train, val = datasets(args.data, args.size)
    order = DistributedSampler(train, process.world, process.rank, shuffle=True, seed=args.seed, drop_last=True)
    mine = Subset(val, range(process.rank, len(val), process.world))  # each image once, whatever their number
    # Workers start anew in each epoch, with seeds drawn from this process's random state: that makes a resumed run the same.
    common = {"batch_size": args.batch, "num_workers": args.workers, "pin_memory": process.device.type == "cuda"}
    return DataLoader(train, sampler=order, drop_last=True, **common), DataLoader(mine, **common), len(train.classes)


def build(name: str, options: dict, classes: int) -> nn.Module:
    """The network of this name."""
    source, _, short = name.rpartition(":")
    if source == "timm":
        timm = require("timm", "timm")
        known, make = timm.list_models(), timm.create_model
    elif source == "fused_res" or name == "fused_res":
        resnet, short = require("torchvision.models.resnet", "torchvision"), short if source else "resnet50"
        known = list(RESNETS)

        def make(short: str, **options: object) -> nn.Module:
            block, layers, more = RESNETS[short]
            return resnet.ResNet(getattr(fused_res, block), layers, **more, **options)

    elif source == "":
        models = require("torchvision.models", "torchvision")
        known, make = models.list_models(module=models), models.get_model
    else:
        fail(f"--model: expected NAME, timm:NAME or fused_res:NAME, got {name}")
    if short.partition(".")[0] not in known:  # timm's weights, which this does not load, come after a dot
        close = difflib.get_close_matches(short, known)
        fail(f"--model: {source or 'torchvision'} has no {short}" + (f"; close to it: {', '.join(close)}" if close else ""))
    try:
        return make(short, num_classes=classes, **options)
    except (TypeError, ValueError) as error:
        fail(f"--model {name}, --model-args: {error}")


def optimizer_for(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """SGD, without weight decay for what is no matrix: biases, and the weights of norms."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, nesterov=args.momentum > 0)


def learning_rate(step: int, per_epoch: int, args: argparse.Namespace, world: int) -> float:
    """Of this step, counted from 0 over all epochs: there is no scheduler whose state would have to be kept."""
    peak = args.lr * args.batch * args.accumulate * world / 256
    warmup, total = args.warmup * per_epoch, args.epochs * per_epoch
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


@contextmanager
def progress(title: str, steps: int, process: Process) -> Iterator[Callable[[int, Tensor], None]]:
    """A bar, where there is a terminal and the package rich: call it after each step with the images so far and the last loss."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        Console = None
    if Console is None or not process.first or not sys.stderr.isatty():
        yield lambda images, loss: None
        return
    text = TextColumn("{task.fields[loss]} {task.fields[speed]} left:")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), text, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task, start, done = bar.add_task(title, total=steps, loss="", speed=""), time.perf_counter(), 0

        def advance(images: int, loss: Tensor) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done)
            if done % 10 == 1 or done == steps:  # reading the loss waits for a GPU: not in each step
                value, speed = loss.item(), images / (time.perf_counter() - start)
                bar.update(task, loss=f"loss {value:.3f}", speed=f"{speed:.0f} images/s")

        yield advance


@dataclass
class Trainer:
    """What changes from step to step, and what is done with it."""

    args: argparse.Namespace
    process: Process
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    per_epoch: int

    def __post_init__(self) -> None:
        self.parallel = self.model
        if self.process.world > 1:
            self.parallel = DistributedDataParallel(
                self.model, [self.process.device] if self.process.device.type == "cuda" else None
            )
        self.layout = torch.channels_last if self.args.channels_last else torch.contiguous_format
        self.epochs_done = 0
        self.history: dict[str, list[float]] = {"losses": [], "accuracies": [], "images_per_second": []}

    def precision(self) -> torch.autocast:
        return torch.autocast(self.process.device.type, DTYPES.get(self.args.amp), enabled=self.args.amp is not None)

    def put(self, images: Tensor) -> Tensor:
        return images.to(self.process.device, memory_format=self.layout, non_blocking=True)

    def step(self, batches: Iterator[tuple[Tensor, Tensor]], number: int) -> Tensor:
        """One step of the optimiser, over `--accumulate` batches; returns the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, self.per_epoch, self.args, self.process.world)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.process.device)
        for left in reversed(range(self.args.accumulate)):
            images, labels = next(batches)
            labels = labels.to(self.process.device, non_blocking=True)
            # Gradients are exchanged between processes once, with those of the last batch.
            with self.parallel.no_sync() if left and self.process.world > 1 else nullcontext():
                with self.precision():
                    loss = F.cross_entropy(self.parallel(self.put(images)), labels, label_smoothing=self.args.label_smoothing)
                    loss = loss / self.args.accumulate
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total

    def train_epoch(self, loader: DataLoader) -> None:
        self.parallel.train()
        loader.sampler.set_epoch(self.epochs_done)
        batches, losses, world, start = iter(loader), [], self.process.world, time.perf_counter()
        images = self.args.batch * self.args.accumulate * world
        with progress(f"epoch {self.epochs_done + 1}", self.per_epoch, self.process) as advance:
            for number in range(self.per_epoch):
                losses.append(self.step(batches, self.epochs_done * self.per_epoch + number))
                advance(images * len(losses), losses[-1])
        found = torch.stack(losses)
        if world > 1:
            dist.all_reduce(found)
        self.history["losses"] += (found / world).tolist()
        self.history["images_per_second"].append(images * len(losses) / (time.perf_counter() - start))

    @torch.inference_mode()
    def evaluate(self, loader: DataLoader) -> None:
        """Accuracy over the images of all processes, with the first one's running statistics."""
        counts = torch.zeros(2, dtype=torch.int64, device=self.process.device)
        if self.process.world > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        self.model.eval()
        for images, labels in loader:
            with self.precision():
                found = self.model(self.put(images)).argmax(1)
            counts[0] += (found == labels.to(self.process.device)).sum()
            counts[1] += len(labels)
        if self.process.world > 1:
            dist.all_reduce(counts)
        self.history["accuracies"].append(counts[0].item() / counts[1].item())

    def save(self, file: Path) -> None:
        """What the next epoch depends on; the random states are those of all processes."""
        mine = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if self.process.device.type == "cuda":
            mine["cuda"] = torch.cuda.get_rng_state(self.process.device)
        states = [mine]
        if self.process.world > 1:
            states = [None] * self.process.world
            dist.all_gather_object(states, mine)
        if not self.process.first:
            return
        content = {
            "epochs_done": self.epochs_done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": states,
            "history": self.history,
            "arguments": self._decisive(),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)  # so that an interruption leaves the last one whole

    def _decisive(self) -> dict[str, object]:
        """The arguments that have a part in the result, as text."""
        found = {name: str(value) for name, value in vars(self.args).items() if name not in ("data", "output", "resume")}
        return {**found, "device": self.process.device.type, "processes": str(self.process.world)}

    def resume(self, file: Path) -> None:
        if not file.is_file():
            fail(f"--resume: there is no file {file}")
        content = torch.load(file, map_location="cpu", weights_only=True)
        before, now = content["arguments"], self._decisive()
        changed = [f"{name} was {before.get(name)}, is {now[name]}" for name in now if now[name] != before.get(name)]
        if before["model"] != now["model"] or before["model_args"] != now["model_args"]:
            fail(f"--resume: {file} is of another network: {'; '.join(changed)}")
        if changed:
            self.process.say(f"resumed, but not bit by bit: {'; '.join(changed)}")
        try:
            self.model.load_state_dict(content["model"])
        except RuntimeError as error:  # another number of classes
            fail(f"--resume: {file} does not fit: {error}")
        self.optimizer.load_state_dict(content["optimizer"])
        if self.scaler.is_enabled() and content["scaler"]:
            self.scaler.load_state_dict(content["scaler"])
        self.epochs_done, self.history = content["epochs_done"], content["history"]
        if len(content["random"]) == self.process.world:
            state = content["random"][self.process.rank]
            torch.set_rng_state(state["torch"])
            random.setstate(state["python"])
            if self.process.device.type == "cuda" and "cuda" in state:
                torch.cuda.set_rng_state(state["cuda"], self.process.device)


def run(args: argparse.Namespace, process: Process) -> dict[str, list[float]]:
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = not args.deterministic
    torch.manual_seed(args.seed)
    train, val, classes = loaders(args, process)
    model = build(args.model, dict(args.model_args), classes)
    if args.fuse:
        fused_res.fuse(model, level=args.level)
    model.to(process.device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    per_epoch = min(len(train) // args.accumulate, args.steps_per_epoch or len(train))
    if per_epoch == 0:
        fail(f"--batch, --accumulate: a step takes more images than the {len(train.dataset)} there are")
    scaler = torch.amp.GradScaler(process.device.type, enabled=args.amp == "fp16")
    trainer = Trainer(args, process, model, optimizer_for(model, args), scaler, per_epoch)
    # From here on each process draws its own numbers: for what it does to images, and for dropout.
    torch.manual_seed(args.seed + 1_000_003 * (process.rank + 1))
    random.seed(args.seed + process.rank)
    if args.resume:
        trainer.resume(args.resume)
    if process.first and (args.fuse or args.model.startswith("fused_res")):
        with trainer.precision():
            explanation = fused_res.explain(model, trainer.put(torch.zeros(args.batch, 3, args.size, args.size)))
        print(explanation if explanation.rows else f"{args.model} has no residual block that fused_res knows", flush=True)
    while trainer.epochs_done < args.epochs:
        trainer.train_epoch(train)
        trainer.evaluate(val)
        trainer.epochs_done += 1
        trainer.save(args.output / "checkpoint.pt")
        losses, accuracies, speeds = trainer.history.values()
        process.say(
            f"epoch {trainer.epochs_done:3}  loss {sum(losses[-per_epoch:]) / per_epoch:.4f}  accuracy {accuracies[-1]:.2%}  "
            f"{speeds[-1]:.0f} images/s"
        )
    return trainer.history


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Losses of all steps, and the accuracy and the images per second of all epochs."""
    args = arguments(argv)
    with joined(args.device) as process:
        return run(args, process)


if __name__ == "__main__":
    main()
