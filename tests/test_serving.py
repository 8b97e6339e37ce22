"""What docs/serving.md promises: examples/serve.py, and a package that examples/host.cpp runs without Python."""

import copy
import importlib.util
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import fused_res
import serve

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ("--size", "32", "--classes", "7", "--requests", "6", "--threads", "2")

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:fused_res")]

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnxruntime", "onnxscript")),
    reason="onnxruntime and onnxscript are not installed",
)


def answers_of_the_original(options, name="resnet18", state=None):
    """What the model that nobody has fused makes of the requests that the script makes up."""
    args = serve.arguments(options)
    torch.manual_seed(0)
    model = serve.build(name, args.classes).eval()
    if state is not None:
        model.load_state_dict(state)
    images = torch.randn(args.requests, args.batch, 3, args.size, args.size)
    with torch.no_grad():
        return [model(batch) for batch in images]


@pytest.mark.parametrize(
    "run",
    [
        "module",
        pytest.param("compile", marks=pytest.mark.long),
        pytest.param("program", marks=pytest.mark.slow),
        pytest.param("aoti", marks=pytest.mark.long),
        pytest.param("onnx", marks=[pytest.mark.slow, needs_onnx]),
    ],
)
@pytest.mark.timeout(900)
def test_every_way_of_serving_gives_the_originals_answers_and_prints_latencies(torchvision_resnet, tmp_path, capsys, dynamo, run):
    options = [*TINY, "--run", run, "--output", str(tmp_path), "--batch", "2"]
    got = serve.main(options)
    for one, other in zip(got, answers_of_the_original(options), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    said = capsys.readouterr().out
    assert f"{run}: 6 requests of 2 images, 2 at a time: p50 " in said
    assert "layer4.1" in said


def test_weights_are_loaded_from_a_checkpoint_and_again_halfway(timm_resnet, tmp_path):
    torch.manual_seed(1)
    state = serve.build("timm:test_resnet", 7).state_dict()
    torch.save({"model": state, "epochs_done": 3}, tmp_path / "checkpoint.pt")
    options = [*TINY, "--model", "timm:test_resnet", "--weights", str(tmp_path / "checkpoint.pt"), "--reload"]
    for one, other in zip(serve.main(options), answers_of_the_original(options, "timm:test_resnet", state), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("words", [["--batch", "0"], ["--run", "aoti", "--reload"]])
def test_what_cannot_be_done_is_said(words, capsys):
    with pytest.raises(SystemExit):
        serve.main([*TINY, *words])
    assert "serve.py: error: --" in capsys.readouterr().err


class Swapped(nn.Sequential):
    """Blocks of both kinds, whose weights can be told from their output."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        super().__init__(fused_res.BasicBlock(8, 8), fused_res.BasicBlock(8, 16, 2, down), fused_res.Bottleneck(16, 4))
        for norm in self.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.uniform_(norm.running_var, 0.5, 2)
                nn.init.uniform_(norm.running_mean, -0.5, 0.5)


@pytest.mark.parametrize("compiled", [False, True])
def test_threads_that_hammer_a_model_get_answers_of_the_old_weights_or_of_the_new_ones(dynamo, compiled):
    models = [Swapped(seed).eval() for seed in (0, 1)]
    x = torch.randn(2, 8, 12, 12)
    with torch.no_grad(), fused_res.use_backend("eager"):
        expected = [model(x) for model in models]
    served = copy.deepcopy(models[0])
    model = torch.compile(served, backend="eager", fullgraph=True) if compiled else served
    with torch.inference_mode():
        model(x)
    seen, stop = [], threading.Event()
    with serve.Server(model, threads=4, module=served) as server:

        def hammer():
            while not stop.is_set():
                asked = swaps[0]
                out = server.submit(x).result()
                if asked == swaps[0] and asked % 2 == 0:  # no swap began or ended meanwhile
                    seen.append((asked // 2 % 2, out))
                else:
                    seen.append((None, out))

        swaps = [0]
        clients = [threading.Thread(target=hammer) for _ in range(4)]
        for client in clients:
            client.start()
        for turn in range(1, 21):
            before = len(seen)
            swaps[0] += 1
            server.load(models[turn % 2].state_dict())
            swaps[0] += 1
            while len(seen) < before + 12 and any(client.is_alive() for client in clients):
                stop.wait(0.001)
        stop.set()
        for client in clients:
            client.join()
    close = [[torch.allclose(out, one, rtol=1e-4, atol=1e-5) for one in expected] for _, out in seen]
    assert len(seen) >= 200
    assert all(any(which) for which in close), "an answer of neither weights"
    known = [(turn, which) for (turn, _), which in zip(seen, close, strict=True) if turn is not None]
    assert {turn for turn, _ in known} == {0, 1}
    assert all(which[turn] and not which[1 - turn] for turn, which in known), "an answer of weights that had been replaced"


def build_host(folder):
    """The command of docs/serving.md."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("needs g++")
    torch_folder = Path(torch.__file__).parent
    program = folder / "host"
    command = ["g++", "-std=c++20", "-O1", str(EXAMPLES / "host.cpp"), "-o", str(program), "-pthread"]
    command += [f"-I{torch_folder}/include", f"-I{torch_folder}/include/torch/csrc/api/include"]
    command += [f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    return program


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_package_of_a_fused_resnet18_runs_in_a_host_without_python(torchvision_resnet, tmp_path):
    from torch._inductor import aoti_compile_and_package

    host = build_host(tmp_path)
    torch.manual_seed(0)
    model = fused_res.fuse(serve.build("resnet18", 1000).eval(), strict=True)
    images = torch.randn(3, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    package = aoti_compile_and_package(serve.exported(model, images), package_path=str(tmp_path / "model.pt2"))
    libraries = subprocess.run(["ldd", str(host)], check=True, capture_output=True, text=True).stdout
    assert "libtorch_cpu" in libraries
    assert "python" not in libraries.replace(str(Path(torch.__file__).parent), "")
    for n in (1, 3):
        torch.save(images[:n].clone(memory_format=torch.preserve_format), tmp_path / "images.pt")
        command = [str(host), package, str(tmp_path / "images.pt"), str(tmp_path / "output.pt"), "6"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"})
        assert f"6 requests of {n} images, 2 at a time: p50 " in done.stdout
        with torch.no_grad():
            truth = model(images[:n])
        torch.testing.assert_close(torch.load(tmp_path / "output.pt"), truth, rtol=1e-4, atol=1e-5)
