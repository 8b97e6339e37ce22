"""What is left of the blocks' time beyond their bare convolutions, summed over a suite: ours over eager's.

    ratio = sum_c n_c (ours_c - bare_c) / sum_c n_c (eager_c - bare_c)

over the cases c of one batch size, n_c = 1, or as often as the block occurs in the network of the suite; eager is in every case
the faster of its two layouts. 0 means normalisation, activation and skip for free, 1 as slow as eager.
"""

import statistics
from collections.abc import Iterator, Sequence

from fused_res.benchmarks.cases import NETWORKS, occurrences
from fused_res.benchmarks.peers import BARE, OURS, is_ours
from fused_res.benchmarks.results import row_key

EAGERS = ("eager channels_last", "eager NCHW")
ONCE = "each block once"


def measured(document: dict) -> Iterator[tuple[tuple, dict[str, dict]]]:
    """`(case, batch, dtype, mode)` and its rows by peer, in the order of the file."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in document["rows"]:
        groups.setdefault(row_key(row), {})[row["peer"]] = row
    yield from groups.items()


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median with 20 % and 80 % quantiles."""
    if len(values) == 1:
        return {"median": values[0], "q20": values[0], "q80": values[0]}
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "q20": tenths[1], "q80": tenths[7]}


def ratio(row: dict, other: dict) -> dict[str, float]:
    """A peer's time over another's, taken round by round and then summarised."""
    return summary([a / b for a, b in zip(row["times"], other["times"], strict=True)])


def eager_of(peers: dict[str, dict]) -> str | None:
    """The faster of the eager layouts."""
    ran = [name for name in EAGERS if name in peers and peers[name]["reason"] is None]
    return min(ran, key=lambda name: peers[name]["ms"]["median"], default=None)


def _ratio_of_sums(cases: list[tuple[int, list[float], list[float], list[float]]]) -> dict[str, float] | None:
    """Of `(count, ours, eager, bare)`: the ratio of the medians' sums, and quantiles of the ratios round by round.

    None where eager is not slower than its bare convolutions, in sum or in a fifth of the rounds: there is nothing to divide by.
    """
    middle = [(count, *map(statistics.median, times)) for count, *times in cases]
    below = sum(count * (eager - bare) for count, _, eager, bare in middle)
    rounds = min(len(bare) for *_, bare in cases)
    values = []
    for r in range(rounds):
        over = sum(count * (ours[r] - bare[r]) for count, ours, _, bare in cases)
        under = sum(count * (eager[r] - bare[r]) for count, _, eager, bare in cases)
        if under > 0:
            values.append(over / under)
    if below <= 0 or len(values) < 0.8 * rounds:
        return None
    spread = summary(values)
    above = sum(count * (ours - bare) for count, ours, _, bare in middle)
    return {"ratio": above / below, "q20": spread["q20"], "q80": spread["q80"]}


def whole(document: dict, network: str) -> dict:
    """All blocks of a network in fused_res, at the largest batch size of a document that has each of them.

    `eager` and `bare` are the ratios of its time to that of the faster eager layouts, and of the bare convolutions (`ratio`, `q20`
    and `q80`); `saved` is the ratio of what is kept for backward to what the faster eager layouts keep, None where nothing is.

    Raises:
        ValueError: fused_res, an eager layout or the bare convolutions did not run in one of the blocks.
    """
    counts = {case.name: count for case, count in occurrences(network).items()}
    batch = max(row["batch"] for row in document["rows"])
    found = {case: peers for (case, size, *_), peers in measured(document) if size == batch}
    cases = []
    for case, count in counts.items():
        peers = {name: row for name, row in found.get(case, {}).items() if row["reason"] is None}
        eager = eager_of(peers)
        if eager is None or not {OURS, BARE} <= peers.keys():
            raise ValueError(f"{case} at batch {batch}: expected {OURS}, eager and {BARE}, got {', '.join(peers) or 'nothing'}")
        cases.append((count, peers[OURS], peers[eager], peers[BARE]))

    def over(which: int) -> dict[str, float]:
        return _ratio_of_sums(
            [(count, ours["times"], rest[which]["times"], [0.0] * ours["rounds"]) for count, ours, *rest in cases]
        )

    kept = [sum(count * (rows[i]["saved_bytes"] or 0) for count, *rows in cases) for i in (0, 1)]
    first = cases[0][1]
    return {
        "blocks": sum(counts.values()),
        "batch": batch,
        "dtype": first["dtype"],
        "mode": first["mode"],
        "eager": over(0),
        "bare": over(1),
        "saved": kept[0] / kept[1] if kept[1] else None,
    }


def sums(document: dict, suite: str) -> list[dict]:
    """A row for each batch size, way of counting, and peer of ours that ran in all cases.

    Of blocks alone: a network's bare convolutions run in another order, on memory of another state. `value` has `ratio`, `q20` and
    `q80`, or is None where eager's own excess is not positive.
    """
    groups: dict[tuple, list[tuple[str, dict]]] = {}
    for (case, *key), peers in measured(document):
        if any(row.get("is_network") for row in peers.values()):
            continue
        groups.setdefault(tuple(key), []).append((case, peers))
    weights = {ONCE: dict.fromkeys({row["case"] for row in document["rows"]}, 1)}
    if suite in NETWORKS:
        counts = {case.name: count for case, count in occurrences(suite).items()}
        weights |= {f"as often as in {suite}": counts} if weights[ONCE].keys() <= counts.keys() else {}
    rows = []
    for (batch, dtype, mode), cases in groups.items():
        for name in dict.fromkeys(name for _, peers in cases for name in peers if is_ours(name)):
            complete = [
                (case, peers[name], peers[eager_of(peers)], peers[BARE])
                for case, peers in cases
                if all(n in peers and peers[n]["reason"] is None for n in (name, BARE)) and eager_of(peers)
            ]
            if len(complete) < len(cases):
                continue
            for counting, counts in weights.items():
                parts = [(counts[case], *(row["times"] for row in rest)) for case, *rest in complete]
                found = {"batch": batch, "dtype": dtype, "mode": mode, "peer": name, "cases": len(parts), "counting": counting}
                rows.append(found | {"value": _ratio_of_sums(parts)})
    return rows
