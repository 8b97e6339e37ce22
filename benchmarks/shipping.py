"""`python -m fused_res.benchmarks.shipping RESULTS... --output FOLDER`: plans to ship, from result files of one GPU.

Of every block that was measured in training at `bn_act` and at other levels: the level with the least median, if that is less
than `fused_res.tuning.trials.GAIN` of `bn_act`'s, as in tuning. A level that failed there, or whose times are void since its tests
failed (`--outcomes`), is left out, and a file whose tree had changes that are in no commit is refused.
"""

import argparse
import json
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from fused_res import shipped
from fused_res.benchmarks import report, results
from fused_res.benchmarks.cases import SUITES
from fused_res.benchmarks.outcomes import load
from fused_res.benchmarks.peers import level_peer
from fused_res.benchmarks.void import by_tests, is_void
from fused_res.block.levels import LEVELS
from fused_res.tuning.trials import GAIN

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def _plans(document: dict, void: Collection[tuple[str, str]]) -> Iterator[dict]:
    cases = {case.name: case for suite in SUITES.values() for case in suite if not case.is_network}
    for (name, batch, dtype, mode), peers in report.measured(document):
        ran = report.ran(peers)
        levels = {level: ran[level_peer(level)] for level in LEVELS if level_peer(level) in ran}
        ms = {level: row["ms"]["median"] for level, row in levels.items() if not row.get("failed") and not is_void(row, void)}
        if mode != "train" or LEVELS[0] not in ms or len(ms) < 2:
            continue
        best = min(ms, key=ms.__getitem__)
        level = best if ms[best] < GAIN * ms[LEVELS[0]] else LEVELS[0]
        rounded = {level: round(found, 4) for level, found in ms.items()}
        yield {
            "case": f"{name}, batch {batch}",
            "dtype": _DTYPES[dtype],
            "block": cases[name].geometry(batch).numbers,
            "level": level,
            "ms": rounded,
        }


def plans(documents: Sequence[dict], void: Collection[tuple[str, str]] = ()) -> dict:
    """The contents of one GPU's file.

    Raises:
        ValueError: the documents are not of one GPU, one set of versions and one commit without changes.
    """
    heads = [(d["gpu"]["name"], json.dumps(shipped.matters(d["versions"])), d["git"]["commit"]) for d in documents]
    if len(set(heads)) != 1:
        raise ValueError(f"results: expected one GPU, versions and commit, got {sorted(map(str, set(heads)))}")
    if any(document["git"]["dirty"] for document in documents):
        raise ValueError("results: expected a commit without local changes")
    first = documents[0]
    return {
        "format": shipped.FORMAT,
        "gpu": first["gpu"]["name"],
        "versions": shipped.matters(first["versions"]),
        "source": {"commit": first["git"]["commit"], "commands": [document["command"] for document in documents]},
        "plans": [plan for document in documents for plan in _plans(document, void)],
    }


def text(found: dict) -> str:
    """As JSON, a plan to a line."""
    *head, (_, lines) = found.items()
    parts = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head]
    parts.append(' "plans": [\n' + ",\n".join(f"  {json.dumps(plan)}" for plan in lines) + "\n ]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_res.benchmarks.shipping", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument(
        "--outcomes", type=Path, nargs="*", default=[], metavar="FILE", help="outcomes of tests, as make gpu leaves them"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args(arguments)
    outcomes = {}
    for path in options.outcomes:
        outcomes |= load(path)
    try:
        documents = [document for document in map(results.load, options.results) if document["gpu"] is not None]
        if not documents:
            print("nothing to ship: measured on no GPU")
            return 0
        found = plans(documents, by_tests(outcomes))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / shipped.file_name(found["gpu"])
    path.write_text(text(found))
    print(f"written: {path}, {len(found['plans'])} plans")
    return 0


if __name__ == "__main__":
    sys.exit(main())
