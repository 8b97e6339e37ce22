"""The experiments in examples/: what they write, and what they find with cheap settings at fixed seeds."""

import json

import degradation
import experiment
import gradient_flow
import identity_start
import pytest
import torch
from torch import nn

from fused_res import explain
from fused_res.benchmarks import readme

CPU = ("--device", "cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def images(size=8):
    options = experiment.parser("", "test", size=size, epochs=1, batch=64, lr=0.1, seeds=1)
    return experiment.load(experiment.parsed(options, list(CPU)))


@pytest.mark.parametrize(
    ("script", "options"),
    [
        (degradation, ("--width", "2", "--depths", "8", "14", "--batch", "512")),
        (gradient_flow, ("--width", "2", "--batch", "256", "--size", "16")),
        (identity_start, ("--width", "2", "--depth", "8", "--batch", "512")),
    ],
    ids=lambda value: value.__name__ if hasattr(value, "main") else "",
)
def test_a_script_writes_its_picture_and_what_it_found(script, options, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    name = script.__name__
    said = script.main([*CPU, *options, "--epochs", "1", "--seeds", "1", "--output", str(tmp_path / "out" / f"{name}.png")])
    written = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert written == json.loads(json.dumps(said))
    assert (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    shown = capsys.readouterr().out
    assert script.WATCH in shown
    assert all(f"- {line}" in shown for line in said["found"])
    assert f"examples/{name}.py" in said["command"]
    assert "--epochs 1" in said["command"]
    page = tmp_path / "page.md"
    page.write_text(f"<!-- experiment:begin out/{name}.json -->\n<!-- experiment:end -->\n")
    assert readme.main([str(page)]) == 0
    assert f"![{name.replace('_', ' ')}](out/{name}.png)" in page.read_text()
    assert f"- {said['found'][0]}" in page.read_text()
    assert readme.main(["--check", str(page)]) == 0


@pytest.mark.parametrize("residual", [True, False])
def test_networks_have_the_depth_they_say_and_run_fused(residual):
    data = images()
    network = experiment.network(20, data, 4, residual=residual)
    assert len(experiment.convolutions(network)) == 19
    rows = explain(network, data.train[0][:2]).rows
    assert len(rows) == 1 + 9
    assert {row.reason for row in rows} == {None}
    assert {row.shortcut for row in rows[1:]} == ({"identity", "projection"} if residual else {"none"})
    with pytest.raises(ValueError, match="depth: expected 6n"):
        experiment.network(21, data, 4)


def test_gradients_through_and_around_add_up_to_that_of_what_comes_before():
    torch.manual_seed(0)
    data = images(16)
    model = gradient_flow.Network(data, 16, 2)
    before = []
    model.front.register_forward_hook(lambda module, inputs, out: before.append(out) or out.retain_grad())
    nn.functional.cross_entropy(model(data.train[0][:8]), data.train[1][:8]).backward()
    torch.testing.assert_close(model.x_in.grad + model.x_res.grad, before[0].grad)


def test_a_crossing_is_the_step_from_which_on_more_flows_through():
    run = {gradient_flow.X_IN: [1, 3, 1, 1, 3, 3, 3], gradient_flow.X_RES: [2] * 7}
    assert gradient_flow.crossing(run, window=1) == 5
    assert gradient_flow.crossing({**run, gradient_flow.X_RES: [9] * 7}, window=1) is None
    assert gradient_flow.crossing({**run, gradient_flow.X_RES: [0] * 7}, window=1) == 1


def test_one_epoch_has_every_image_at_most_once_and_the_same_ones_for_a_seed():
    data = images()
    data.train = data.train[0], torch.arange(len(data.train[0]))
    drawn = [torch.cat([y for _, y in experiment.batches(data, 64, torch.Generator().manual_seed(seed))]) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert len(set(drawn[0].tolist())) == len(drawn[0]) == len(data.train[0]) // 64 * 64


def test_images_come_from_folders_too(tmp_path, libraries):
    pil = pytest.importorskip("PIL.Image")
    libraries("torchvision", "torchvision")
    for part, count in (("train", 3), ("val", 2)):
        for name, colour in (("blue", (0, 0, 250)), ("red", (250, 0, 0))):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                shade = tuple(max(0, c - i) for c in colour)
                pil.new("RGB", (20, 30), shade).save(tmp_path / part / name / f"{i}.png")
    options = experiment.parser("", "test", size=16, epochs=1, batch=2, lr=0.1, seeds=1)
    found = experiment.load(experiment.parsed(options, [*CPU, "--data", str(tmp_path)]))
    assert (found.name, found.classes, found.channels, found.flips) == (tmp_path.name, 2, 3, True)
    assert found.train[0].shape == (6, 3, 16, 16)
    assert found.test[1].tolist() == [0, 0, 1, 1]
    assert next(experiment.batches(found, 2, torch.Generator().manual_seed(0)))[0].shape == (2, 3, 16, 16)
    with pytest.raises(SystemExit, match="expected MNIST, cifar-10-batches-py, or train and val"):
        experiment.load(experiment.parsed(options, [*CPU, "--data", str(tmp_path / "train")]))


def run(script, tmp_path, *options):
    pytest.importorskip("matplotlib")
    return script.main([*CPU, *options, "--output", str(tmp_path / "out.png")])["numbers"]


@pytest.mark.long
def test_deeper_plain_networks_train_worse_and_their_gradients_grow_towards_the_front(tmp_path):
    """Of residual networks so deep the digits, in so few steps, show less of it: not that the deeper one is the better one."""
    found = run(degradation, tmp_path, "--depths", "8", "38", "--width", "4", "--epochs", "4", "--seeds", "2")
    plain, residual = ([found[f"{kind} {depth}"] for depth in (8, 38)] for kind in ("plain", "residual"))
    assert plain[1]["training error"] > plain[0]["training error"] + 25
    assert plain[1]["test error"] > plain[0]["test error"] + 25
    assert residual[1]["training error"] < plain[1]["training error"] - 8
    front = "gradient of the first convolutions over the last"
    assert plain[1][front] > 30 > plain[0][front]
    assert residual[1][front] < plain[1][front] / 4


@pytest.mark.slow
def test_more_flows_around_the_block_first_and_through_it_later(tmp_path):
    found = run(gradient_flow, tmp_path, "--size", "16", "--width", "8", "--epochs", "8", "--seeds", "2", "--lr", "1e-3")
    ratio = found["around over through"]
    assert ratio["start"] > 4
    assert ratio["end"] < 1
    assert all(step is not None and step > 30 for step in found["crossings"])


@pytest.mark.long
def test_every_scale_leaves_zero_and_the_start_costs_nothing(tmp_path):
    found = run(identity_start, tmp_path, "--depth", "14", "--width", "4", "--epochs", "4", "--seeds", "2")
    assert found["|a| at the end"]["least"] > 0.02
    assert found["a from 0"]["loss of the last tenth"] < 1.1 * found["usual"]["loss of the last tenth"]
