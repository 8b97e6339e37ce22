"""One of `fusions` as a cuDNN graph: its plans timed beside PyTorch, and the fastest judged by what it computes."""

import collections
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fused_res.benchmarks.agreement import relative_error
from fused_res.benchmarks.clocks import Clock
from fused_res.benchmarks.cudnn_graphs import Graph, data_types
from fused_res.benchmarks.foreign import needed
from fused_res.benchmarks.fusions import SLICE, Fusion, slice_of
from fused_res.benchmarks.peers import CannotRunError
from fused_res.benchmarks.sums import summary
from fused_res.environment import temporarily

RUNS = 5
BARE, UNFUSED = "bare convolution", "unfused"
WARM_UP = 3


class Trial:
    """A fusion and its graph, of up to `plans` engines' plans. It uses the GPU only from `allocate` on.

    Raises:
        CannotRunError: cuDNN is not installed, or has no plan that it can build.
    """

    def __init__(self, fusion: Fusion, batch: int, dtype: torch.dtype, handle: object, plans: int) -> None:
        cudnn, io = needed("cudnn", "nvidia-cudnn-frontend"), data_types()[dtype]
        self.fusion, self.batch, self.dtype = fusion, batch, dtype
        views = fusion.views(fusion.inputs(batch, dtype, "meta"))

        def wire(graph: object, nodes: dict) -> dict:
            return fusion.wire(cudnn, graph, nodes, io)

        self.graph = Graph(handle, views, fusion.outputs(batch, dtype, "meta"), wire, most=plans)

    def allocate(self, device: torch.device) -> None:
        torch.manual_seed(0)
        self.inputs = self.fusion.inputs(self.batch, self.dtype, device)
        self.outputs = self.fusion.outputs(self.batch, self.dtype, device)
        self.tensors = self.fusion.views(self.inputs) | self.outputs

    def run(self, plan: int) -> None:
        self.graph.run(self.tensors, plan)

    def run_on(self, plan: int, value: float) -> dict[str, Tensor]:
        """The outputs of a run that finds `value` in them, signs the largest byte; copies."""
        for output in self.outputs.values():
            output.fill_(value if output.is_floating_point() else 255)
        self.run(plan)
        return {name: output.clone() for name, output in self.outputs.items()}

    def judge(self, name: str) -> dict:
        """Everything but time about a plan. An error that is not finite is None."""
        plan = next(index for index, other in self.graph.plans.items() if other == name)
        over_nan = self.run_on(plan, float("nan"))
        overwrites = not any(bool(t.isnan().any()) for t in over_nan.values())
        start = float("nan") if overwrites else 0.0
        got = self.run_on(plan, start)
        again = [self.run_on(plan, start) for _ in range(RUNS - 1)]
        differ = [key for key, t in got.items() if not all(torch.equal(t, other[key]) for other in again)]
        # float64 has no part in the timing: its convolutions need not be the fastest that a search finds.
        with temporarily(torch.backends.cudnn, benchmark=False):
            errors = self._errors(got)
            nan = {image: self._nan(plan, image, start) for image in self.fusion.images if image != "mask"}
        return {
            "overwrites": overwrites,
            **errors,
            "runs": RUNS,
            "runs_differ_in": differ,
            "nan": nan,
        }

    def _errors(self, got: dict[str, Tensor]) -> dict:
        """Relative L2 errors: of the convolution's output against float64, of the others against float64 from that output."""
        name, first = next(iter(got.items()))
        exact = self.fusion.exact(self.fusion.ends(self.inputs))
        near = first if self.fusion.is_product else slice_of(first)
        errors = {name: relative_error(near, exact)}
        derived = self.fusion.derived(self.inputs, first)
        errors |= {other: relative_error(got[other], value) for other, value in derived.items()}
        found = {"error": {key: _finite(value) for key, value in errors.items()}}
        if self.fusion.R > 1:
            edges = [(..., 0, slice(None)), (..., -1, slice(None)), (..., 0), (..., -1)]
            border = [torch.cat([t[edge].flatten() for edge in edges]) for t in (near, exact)]
            found["border_error"] = _finite(relative_error(*border))
        return found

    def _nan(self, plan: int, name: str, start: float) -> str:
        """Whether outputs are NaN where PyTorch's are, with one NaN in the first image of an input."""
        image = self.inputs[name]
        place = (0, 1, self.fusion.H // 2, self.fusion.H // 2)
        before = image[place].clone()
        image[place] = float("nan")
        got = self.run_on(plan, start)
        part = {key: t[: 2 * SLICE] if key in self.fusion.images else t for key, t in self.inputs.items()}
        exact = self.fusion.exact(part)
        wanted = {next(iter(got)): exact} | self.fusion.derived(part, exact)
        image[place] = before
        verdicts = []
        for key, truth in wanted.items():
            if not got[key].is_floating_point():
                continue
            value, nan = got[key], truth.isnan()
            if value.shape != truth.shape:
                value = value[: truth.shape[0]]
            lost, more = int((nan & ~value.isnan()).sum()), int((value.isnan() & ~nan).sum())
            if lost or more:
                verdicts.append(f"{key}: {lost} of {int(nan.sum())} lost, {more} more")
        return "; ".join(verdicts) or "kept"

    def times(self, clock: Clock, rounds: int) -> dict:
        """Times of all plans and of PyTorch, interleaved; `plan` and `ms` are of the plan that is fastest."""
        calls = {BARE: self.fusion.bare(self.inputs), UNFUSED: self.fusion.unfused(self.inputs)}
        for call in calls.values():
            self._warm_up(call)
        for index, name in list(self.graph.plans.items()):
            run = functools.partial(self.run, index)
            try:
                self._warm_up(run)
            except Exception as error:
                self.graph.failures[name] = f"it does not run: {error}"[:300]
                del self.graph.plans[index]
            else:
                calls[name] = run
        if not self.graph.plans:
            raise CannotRunError(f"no plan runs: {self.graph.failures}")
        samples = collections.defaultdict(list)
        for _ in range(rounds):
            for name, call in calls.items():
                samples[name].append(clock.time(call).ms)
        found = {name: summary(values) for name, values in samples.items()}
        plans = [
            {"plan": name, "workspace": self.graph.workspace_size(index), "ms": found[name]}
            for index, name in self.graph.plans.items()
        ]
        best = min(plans, key=lambda plan: plan["ms"]["median"])
        return {"plan": best["plan"], "ms": best["ms"], "bare_ms": found[BARE], "unfused_ms": found[UNFUSED], "plans": plans}

    def _warm_up(self, call: Callable[[], object]) -> None:
        for _ in range(WARM_UP):
            call()
        if self.inputs["x"].is_cuda:
            torch.cuda.synchronize()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
