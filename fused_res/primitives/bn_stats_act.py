"""`bn_stats_act`: a BN by the batch's statistics, and what follows it: `bn_stats`, `bn_finalize` and `bn_act`."""

from torch import Tensor

from fused_res.primitives.bn_act import bn_act, check_bn_act
from fused_res.primitives.bn_finalize import bn_stats_finalize, checked_parameters
from fused_res.primitives.run import Run


def bn_stats_act(
    y: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    residual_scale: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    y2: Tensor | None = None,
    vectors2: Tensor | None = None,
    keep_signs: bool = False,
    relu: bool = True,
    run: Run,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`bn_act` of y [P, C] with the vectors of `bn_stats_finalize`; for all arguments see there.

    Returns:
        The vectors [5, C], and `out` [P, C] and `signs` of `bn_act`.
    """
    own = run.find_joined("bn_stats_act", y.device)
    if own is None:
        vectors = bn_stats_finalize(y, gamma, beta, eps, residual_scale, run=run)
        ends = {"skip": skip, "y2": y2, "vectors2": vectors2, "keep_signs": keep_signs, "relu": relu}
        return vectors, *bn_act(y, vectors, **ends, run=run)
    check_bn_act(y, skip, y2, vectors2, keep_signs, relu)
    return own(y, *checked_parameters(gamma, beta, residual_scale, y), eps, residual_scale, skip, y2, vectors2, keep_signs, relu)
