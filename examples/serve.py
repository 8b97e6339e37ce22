#!/usr/bin/env python3
"""Serve an image classifier to several threads at once, its blocks fused, and print the latencies of its requests.

    python examples/serve.py --model resnet50 --threads 2
    python examples/serve.py --model timm:resnet50d --weights checkpoints/checkpoint.pt --reload
    python examples/serve.py --run aoti --output served

Two lines are about fused_res: its import, and `fused_res.fuse(model.eval())`, which is all that a server needs. `--run` says what
answers: the fused module; the module through torch.compile; a program of torch.export, written to a file and loaded again; a
package of AOTInductor, which examples/host.cpp runs without Python; or a model for ONNX Runtime. docs/serving.md compares them.

Requests are made up: random images. With --reload the weights are loaded anew halfway through, between two requests.
"""

import argparse
import importlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import fused_res

RUNS = ("module", "compile", "program", "aoti", "onnx")
Model = Callable[[Tensor], Tensor]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("serve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="torchvision's name, or timm:NAME (default %(default)s)")
    parser.add_argument("--classes", type=int, default=1000, help="of the model (default %(default)s)")
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="a state dict, or train.py's checkpoint (default: random ones)"
    )
    parser.add_argument("--run", choices=RUNS, default="module", help="what answers the requests (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("served"), metavar="DIR", help="for its files (default %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="pixels a side (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images in a request (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="requests that are answered at once (default %(default)s)")
    parser.add_argument("--requests", type=int, default=100, help="default %(default)s")
    parser.add_argument("--reload", action="store_true", help="load the weights again halfway through")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default %(default)s")
    args = parser.parse_args(argv)
    for name in ("classes", "size", "batch", "threads", "requests"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected a positive number, got {getattr(args, name)}")
    if args.reload and args.run not in ("module", "compile"):
        parser.error(f"--reload goes with --run module or compile: the file of {args.run} holds its weights")
    return args


def build(name: str, classes: int) -> nn.Module:
    library, _, model = name.rpartition(":")
    try:
        if library == "timm":
            return importlib.import_module("timm").create_model(model, num_classes=classes)
        return importlib.import_module("torchvision.models").get_model(model, num_classes=classes)
    except ModuleNotFoundError as error:
        raise SystemExit(f"serve.py: --model {name} needs the package {error.name}") from error


def weights(file: Path) -> dict[str, Tensor]:
    found = torch.load(file, map_location="cpu", weights_only=True)
    return found.get("model", found)


class Gate:
    """Any number of requests at once, or one change to the model."""

    def __init__(self) -> None:
        self._condition, self._inside, self._closed = threading.Condition(), 0, False

    @contextmanager
    def request(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._closed)
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                self._condition.notify_all()

    @contextmanager
    def change(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._closed)
            self._closed = True
            self._condition.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            with self._condition:
                self._closed = False
                self._condition.notify_all()


class Server:
    """A model that answers in a pool of threads.

    Args:
        model: takes images [N, 3, H, W], whatever it is; it may be called by several threads at once.
        module: whose weights `load` changes.
    """

    def __init__(self, model: Model, threads: int, module: nn.Module | None = None) -> None:
        self.model, self.module, self.seconds, self._gate = model, module, [], Gate()
        # Threads of PyTorch's own work inside each request: together no more than there are CPUs.
        inner = max(1, torch.get_num_threads() // threads)
        self._pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(inner,))

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def submit(self, images: Tensor) -> Future[Tensor]:
        return self._pool.submit(self._answer, images)

    def _answer(self, images: Tensor) -> Tensor:
        with self._gate.request(), torch.inference_mode():
            start = time.perf_counter()
            out = self.model(images)
            if out.is_cuda:
                torch.cuda.synchronize(out.device)
            self.seconds.append(time.perf_counter() - start)
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        """Change the weights in place, between two requests: each is answered by the old ones or by the new ones."""
        with self._gate.change():
            self.module.load_state_dict(state)

    def latencies(self) -> str:
        if len(self.seconds) < 2:
            return "p50 and p95 need two requests"
        cuts = statistics.quantiles(self.seconds, n=20, method="inclusive")
        return f"p50 {cuts[9] * 1e3:.2f} ms, p95 {cuts[18] * 1e3:.2f} ms"


def exported(module: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """The model for any number of images. Two are traced: a size of 1 would be taken for a constant."""
    two = images[:1].expand(2, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        return torch.export.export(module, (two,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=256)},))


def onnx_runtime(file: Path) -> Model:
    session = importlib.import_module("onnxruntime").InferenceSession(file)
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.contiguous().numpy()})[0])


def runnable(module: nn.Module, run: str, images: Tensor, folder: Path) -> Model:
    """What answers requests: the module itself, or what has been made of it, by way of a file in the folder."""
    if run == "module":
        return module
    if run == "compile":
        return torch.compile(module, fullgraph=True)
    folder.mkdir(parents=True, exist_ok=True)
    program = exported(module, images)
    if run == "program":
        torch.export.save(program, folder / "model.pt2")
        return torch.export.load(folder / "model.pt2").module()
    if run == "aoti":
        from torch._inductor import aoti_compile_and_package, aoti_load_package

        file = aoti_compile_and_package(program, package_path=str(folder / "model-aoti.pt2"))
        return aoti_load_package(file, run_single_threaded=False)
    torch.onnx.export(program, dynamo=True, verbose=False).save(folder / "model.onnx")
    return onnx_runtime(folder / "model.onnx")


def main(argv: Sequence[str] | None = None) -> list[Tensor]:
    """Serves what the command line asks for, and returns the answers in the order of the requests."""
    args = arguments(argv)
    torch.manual_seed(0)
    module = build(args.model, args.classes)
    if args.weights:
        module.load_state_dict(weights(args.weights))
    module = module.to(args.device, memory_format=torch.channels_last)
    fused_res.fuse(module.eval())
    images = torch.randn(args.requests, args.batch, 3, args.size, args.size, device=args.device)
    images = [batch.contiguous(memory_format=torch.channels_last) for batch in images]
    print(fused_res.explain(module, images[0]))
    model = runnable(module, args.run, images[0], args.output)
    with torch.inference_mode():
        model(images[0])  # what is compiled, planned or allocated at the first call is not for a request to wait for
    with Server(model, args.threads, module) as server:
        start = time.perf_counter()
        answers = [server.submit(batch) for batch in images]
        if args.reload:
            answers[args.requests // 2].result()
            server.load(weights(args.weights) if args.weights else module.state_dict())
        outputs = [answer.result() for answer in answers]
        passed = time.perf_counter() - start
    print(f"{args.run}: {args.requests} requests of {args.batch} images, {args.threads} at a time: {server.latencies()}, ", end="")
    print(f"{args.requests * args.batch / passed:.1f} images/s")
    return outputs


if __name__ == "__main__":
    main()
