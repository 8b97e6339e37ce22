"""Two result files, case by case: is the second slower than the first?

Compared is a peer's time over that of the bare convolutions in the same run where both files have it, else its time. The interval
is the middle 95 % of the ratio under resampling of the rounds of both files. A case has regressed where all of it is above
1 + tolerance, improved where all of it is below 1 - tolerance.
"""

import random
import statistics
from collections.abc import Sequence

from fused_res.benchmarks.peers import BARE
from fused_res.benchmarks.report import conditions, measured, ran, sum_lines
from fused_res.console import table, wrapped

RESAMPLES, TOLERANCE = 1000, 0.03


def ratio_of_medians(old: Sequence[float], new: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, float]:
    """`median(new) / median(old)` as `ratio`, with the 2.5 % and 97.5 % quantiles of its bootstrap distribution."""
    generator = random.Random(seed)

    def drawn(values: Sequence[float]) -> float:
        return statistics.median(generator.choices(values, k=len(values)))

    found = sorted(drawn(new) / drawn(old) for _ in range(resamples))
    edge = int(0.025 * resamples)
    return {"ratio": statistics.median(new) / statistics.median(old), "low": found[edge], "high": found[-1 - edge]}


def verdict(value: dict[str, float], tolerance: float) -> str:
    if value["low"] > 1 + tolerance:
        return "REGRESSED"
    return "improved" if value["high"] < 1 - tolerance else ""


def compare(old: dict, new: dict, tolerance: float = TOLERANCE, names: Sequence[str] | None = None) -> list[dict]:
    """A row for each case and peer that both documents have: what is compared, the ratio and its interval, and the verdict.

    Raises:
        ValueError: they have nothing in common.
    """
    before, rows = {key: ran(peers) for key, peers in measured(old)}, []
    for key, peers in measured(new):
        mine, theirs = ran(peers), before.get(key, {})
        bare = BARE in mine and BARE in theirs
        for name in (name for name in mine if name in theirs and (names is None or name in names)):
            relative = bare and name != BARE
            pairs = [(found[name]["times"], found[BARE]["times"] if relative else None) for found in (theirs, mine)]
            values = [times if over is None else [a / b for a, b in zip(times, over, strict=True)] for times, over in pairs]
            value = ratio_of_medians(*values)
            head = dict(zip(("case", "batch", "dtype", "mode"), key, strict=True)) | {"peer": name}
            rows.append(head | {"of": "x bare" if relative else "ms"} | value | {"verdict": verdict(value, tolerance)})
    if not rows:
        raise ValueError("the two files have no case and peer in common")
    return rows


def text(old: dict, new: dict, rows: list[dict], tolerance: float) -> str:
    """Conditions of both runs, the table, and how many have changed."""
    head = ("case", "batch", "dtype", "mode", "peer", "of", "new / old", "95 % interval", "")
    lines = []
    for row in rows:
        named = (row[name] for name in ("case", "batch", "dtype", "mode", "peer", "of"))
        lines.append((*named, f"{row['ratio']:.3f}", f"{row['low']:.3f}-{row['high']:.3f}", row["verdict"]))
    regressed, improved = (sum(row["verdict"] == name for row in rows) for name in ("REGRESSED", "improved"))
    counts = f"{regressed} regressed, {improved} improved, of {len(rows)}; tolerance {100 * tolerance:g} %."
    found = [wrapped(f"old: {conditions(old)}"), wrapped(f"new: {conditions(new)}"), "", table(head, lines, shared=4), ""]
    for name, document in (("old", old), ("new", new)):
        found += [wrapped(f"{name}: {line}") for line in sum_lines(document)]
    return "\n".join([*found, counts])
