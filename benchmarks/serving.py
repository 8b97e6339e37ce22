"""What a document shows of models beside the engines that serve them: our time over each of theirs, and which goals are met."""

from collections.abc import Iterator
from typing import NamedTuple

from fused_res.benchmarks import report, sums
from fused_res.benchmarks.peers import OURS, is_ours

EAGER, COMPILED, FROZEN = "eager channels_last", "torch.compile", "torch.compile freezing"
_NAMED = 6
"""Cases in which a goal is missed that are named; the table has all."""
MISSING = "Not measured yet: `make serving` does it."
"""What stands for a result file that is not there."""


class Goal(NamedTuple):
    """The time of one of ours over that of a peer (None: of the fastest of the others) is to be at most `most`, and the 80 %
    quantile of that at most `surely`.
    """

    mode: str
    ours: str
    peer: str | None
    most: float
    surely: float | None = None

    def words(self) -> str:
        if self.surely is not None:
            return (
                f"{self.ours} {1 / self.most:.3g} times as fast as {self.peer}, {1 / self.surely:.3g} times in four of five rounds"
            )
        return f"{self.ours} at most {self.most:g} times the time of {self.peer or 'the fastest of the others'}"

    def is_met(self, ratio: dict[str, float]) -> bool:
        return ratio["median"] <= self.most and (self.surely is None or ratio["q80"] <= self.surely)


GOALS = (
    Goal("eval", OURS, EAGER, 1 / 1.3, 1 / 1.15),
    Goal("eval", OURS, FROZEN, 1.05),
    Goal("eval", OURS, None, 1.05),
    Goal("eval", f"{OURS} compiled freezing", FROZEN, 1.0),
    Goal("train", f"{OURS} compiled", COMPILED, 1.0),
)


def _cases(document: dict) -> Iterator[tuple[str, int, dict[str, dict]]]:
    """The cases that fused_res ran in, with batch size and the rows of what ran, by peer."""
    for (case, batch, *_), everyone in report.measured(document):
        ran = report.ran(everyone)
        if OURS in ran:
            yield case, batch, ran


def _fastest(ran: dict[str, dict]) -> str | None:
    """Of those that are not ours."""
    others = [name for name in ran if not is_ours(name)]
    return min(others, key=lambda name: ran[name]["ms"]["median"], default=None)


def _ratio(ran: dict[str, dict], ours: str, peer: str | None) -> dict[str, float] | None:
    """The time of one of ours over a peer's, or over that of the fastest of the others; None where either did not run."""
    peer = _fastest(ran) if peer is None else peer
    return sums.ratio(ran[ours], ran[peer]) if ours in ran and peer in ran else None


def table(document: dict) -> list[str]:
    """A line for each case: our time, and that over every peer's, over the fastest's in bold; then ours compiled over theirs."""
    names = list(dict.fromkeys(row["peer"] for row in document["rows"]))
    pairs = [(OURS, name) for name in names if not is_ours(name)]
    pairs += [(name, name.replace(f"{OURS} compiled", COMPILED)) for name in names if name.startswith(f"{OURS} compiled")]
    heads = [f"x {peer}" if ours == OURS else f"{ours} x {peer}" for ours, peer in pairs]
    lines = [f"| case | batch | ms | {' | '.join(heads)} |", f"| --- | ---: |{' ---: |' * (len(heads) + 1)}"]
    for case, batch, ran in _cases(document):
        cells = [case, str(batch), f"{ran[OURS]['ms']['median']:.3g}"]
        for ours, peer in pairs:
            found = _ratio(ran, ours, peer)
            shown = "" if found is None else report.interval(found)
            cells.append(f"**{shown}**" if ours == OURS and peer == _fastest(ran) else shown)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def met(document: dict) -> list[str]:
    """For each goal in how many cases it is met, and where not, the farthest first."""
    modes, lines = {row["mode"] for row in document["rows"]}, []
    for goal in GOALS:
        found = [(f"{case}, batch {batch}", _ratio(ran, goal.ours, goal.peer)) for case, batch, ran in _cases(document)]
        found = [(name, ratio) for name, ratio in found if ratio is not None and goal.mode in modes]
        missed = sorted((one for one in found if not goal.is_met(one[1])), key=lambda one: -one[1]["median"])
        missed = [f"{name} ({report.interval(ratio)})" for name, ratio in missed]
        if found:
            more = f"; and {len(missed) - _NAMED} more" if len(missed) > _NAMED else ""
            where = f" Not in {'; '.join(missed[:_NAMED])}{more}." if missed else ""
            lines.append(f"- {goal.words()}: in {len(found) - len(missed)} of {len(found)} cases.{where}")
    return lines


def engines(document: dict) -> str | None:
    """Which engines of others ran, with their versions; None where there were none."""
    found = {row["peer"]: row["backend"] for row in document["rows"] if row["reason"] is None and not is_ours(row["peer"])}
    named = [f"{peer}: {backend}" for peer, backend in found.items() if backend not in ("eager", "inductor", None)]
    return "; ".join(named) + "." if named else None


def section(document: dict) -> str:
    """Conditions, the table, the goals, what did not run, and the command."""
    lines = [f"{report.conditions(document)}.", "", *table(document), "", *met(document)]
    for note in (engines(document), *report.reasons(document), f"`{document['command']}`"):
        lines += [] if note is None else ["", note]
    return "\n".join(lines)
