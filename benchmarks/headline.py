"""One sentence about a network's blocks: all of them in fused_res, over eager and over their convolutions alone."""

from pathlib import Path

from fused_res import environment
from fused_res.benchmarks import report, results, sums
from fused_res.benchmarks.cases import NETWORKS

STEPS = {
    "train": "a training step (forward and backward) of",
    "forward": "the forward of training of",
    "eval": "the forward in evaluation of",
}


def sentence(document: dict, name: str) -> str:
    """A sentence in markdown; `name` is where the file is, for a link.

    Raises:
        ValueError: the file's suite is no network's blocks, or it lacks some of them.
    """
    network = document["suite"]
    if network not in NETWORKS:
        raise ValueError(f"{name}: expected the blocks of one of {', '.join(NETWORKS)}, got the suite {network}")
    found = sums.whole(document, network)
    over = {of: report.interval(found[of] | {"median": found[of]["ratio"]}) for of in ("eager", "bare")}
    dtype = str(environment.DTYPES[found["dtype"]]).removeprefix("torch.")
    kept = "" if found["saved"] is None else f", and {found['saved']:.2f} times the activations are kept for backward"
    return (
        f"On {results.device_name(document)}: {STEPS[found['mode']]} the {found['blocks']} blocks of {network}, in "
        f"{dtype} at batch {found['batch']}, takes {over['eager']} times as long as eager in the faster memory "
        f"layout, {over['bare']} times as long as the blocks' convolutions alone{kept} "
        f"([{Path(name).name}]({name}), commit {document['git']['commit'][:12]})."
    )
