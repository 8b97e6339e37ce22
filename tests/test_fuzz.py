"""A few of the cases that `make fuzz` has without end, the same at every run, and those that failed once."""

import pytest
import torch
from fuzz.draws import SCOPES, Scope
from fuzz.kept import KEPT
from fuzz.targets import BLOCKS, PRIMITIVES
from hypothesis import HealthCheck, Phase, given, settings

from fused_res.primitives import bn_act_backward

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # numpy, under the interpreter, warns of NaN that is on its way on purpose; torch, of operators that are not deterministic.
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:.*deterministic:UserWarning"),
]
TARGETS = PRIMITIVES | BLOCKS
# A case takes milliseconds, and a hundred times that in the interpreter.
EXAMPLES = {"reference": 8, "native": 12, "triton": 1}


def few(examples, shrink=True):
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    quiet = list(HealthCheck)
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, phases=phases, suppress_health_check=quiet
    )


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_cases(name, backend):
    if backend == "triton" and name in BLOCKS:
        pytest.skip("takes seconds; make fuzz")
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the cases lie on the CPU, where Triton is interpreted")
    target = TARGETS[name]

    @few(EXAMPLES[backend])
    @given(target.cases(SCOPES[backend]))
    def run(case):
        target.check(case, backend)

    run()


@pytest.mark.parametrize(("name", "backend_name", "case"), KEPT, ids=[f"{i}-{name}-{on}" for i, (name, on, _) in enumerate(KEPT)])
def test_what_failed_once(name, backend_name, case, poisoned_memory, request):
    if backend_name == "triton":
        pytest.importorskip("triton")
        request.getfixturevalue("proven_interpreter")
    TARGETS[name].check(case, backend_name)


@pytest.mark.parametrize("name", ["bn_act_backward", "blocks"])
def test_a_thousandth_too_much_does_not_pass(name, monkeypatch):
    right = bn_act_backward.plain_reduce
    monkeypatch.setattr(bn_act_backward, "plain_reduce", lambda *args: right(*args) * 1.001)

    @few(20, shrink=False)
    @given(TARGETS[name].cases(Scope(("f64",))))
    def run(case):
        TARGETS[name].check(case, "reference")

    with pytest.raises(AssertionError):
        run()
