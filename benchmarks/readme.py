"""`python -m fused_res.benchmarks.readme [--check] README.md`: figures in README come from committed result files only.

What stands between `<!-- results:begin FILE.jsonl -->` and `<!-- results:end -->` is rewritten from that file, a path relative to
the text, and the plot beside the file is drawn anew where it is of other results; with `summary` in place of `results`, a line for
each case and no plot. What stands between `<!-- predicted:begin SUITE MODE DTYPE BATCH -->` and `<!-- predicted:end -->` comes from
`fused_res.benchmarks.model`. With --check nothing is written, and the exit code is 1 if anything would be.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

from fused_res.benchmarks import model, plot, report, results, summary

_SECTION = re.compile(
    r"(?P<begin><!-- (?P<kind>results|summary|predicted):begin (?P<what>[^\n]+?) -->\n).*?(?P<end><!-- (?P=kind):end -->)",
    re.DOTALL,
)


def _measured(name: str, folder: Path) -> str:
    return report.markdown(results.load(folder / name), Path(name).with_suffix(".png").as_posix())


def _predicted(what: str, folder: Path) -> str:
    suite, mode, dtype, batch = what.split()
    return model.markdown(suite, model.predict(suite, mode, int(batch), dtype))


def _summary(name: str, folder: Path) -> str:
    return summary.section(results.load(folder / name))


_RENDER = {"results": _measured, "summary": _summary, "predicted": _predicted}


def rewritten(text: str, folder: Path) -> str:
    """The text with every section rendered anew."""
    found = Counter(match["kind"] for match in _SECTION.finditer(text))
    for kind in _RENDER:
        if any(text.count(f"<!-- {kind}:{marker}") != found[kind] for marker in ("begin", "end")):
            raise ValueError(f"expected pairs of <!-- {kind}:begin … --> and <!-- {kind}:end -->")
    return _SECTION.sub(lambda match: f"{match['begin']}\n{_RENDER[match['kind']](match['what'], folder)}\n\n{match['end']}", text)


def stale_plots(text: str, folder: Path) -> list[Path]:
    """Result files whose plot is missing or of other results."""
    files = [folder / match["what"] for match in _SECTION.finditer(text) if match["kind"] == "results"]
    return [file for file in files if not plot.is_of(file.with_suffix(".png"), results.digest(file))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_res.benchmarks.readme", description=__doc__)
    parser.add_argument("readme", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the file differs from its result files")
    options = parser.parse_args(argv)
    try:
        text = options.readme.read_text()
        wanted, stale = rewritten(text, options.readme.parent), stale_plots(text, options.readme.parent)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if text == wanted and not stale:
        return 0
    if options.check:
        repair = f"python -m fused_res.benchmarks.readme {options.readme}"
        print(f"{options.readme} differs from its result files; run {repair}", file=sys.stderr)
        return 1
    options.readme.write_text(wanted)
    for file in stale:
        plot.draw(results.load(file), file.with_suffix(".png"), results.digest(file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
