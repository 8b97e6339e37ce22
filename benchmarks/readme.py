"""`python -m fused_res.benchmarks.readme [--check] README.md docs/*.md`: documents get their figures from committed result files.

What stands between `<!-- KIND:begin WHAT -->` and `<!-- KIND:end -->` is rendered from WHAT, by KIND:

results     a result file, its path relative to the document: table, findings and plot
summary     a result file: a line for each case, and the sums
plot        a result file: the plot beside it
serving     a result file of the suite serving: our time over that of each peer, and the goals; or that it is not measured yet
goals       the same file: the goals alone
headline    a result file of a network's blocks: one sentence about all of them
predicted   SUITE MODE DTYPE BATCH: the least times that `fused_res.benchmarks.model` says; with GPUs behind it, the times to be
            expected on them
beside      a result file: what the model expects beside what was measured, with the instructions in loops.csv beside it
experiment  a file that a script of examples/ has written: the picture beside it, and what was found
replays     a file that `tests/fake_gpu.py time` has written: what a step takes the host without a GPU

A plot is drawn anew where it is of other results than the file beside it. With --check nothing is written, and the exit code is 1
if anything would be.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from fused_res.benchmarks import calibration, headline, model, plot, report, results, serving, summary
from fused_res.cost.predict import nearest


def _measured(name: str, folder: Path) -> str:
    return report.markdown(results.load(folder / name), _picture(name))


def _predicted(what: str, folder: Path) -> str:
    suite, mode, dtype, batch, *gpus = what.split()
    rows = model.predict(suite, mode, int(batch), dtype, gpus or model.SHOWN, at_least=not gpus)
    return model.markdown(suite, rows)


def _beside(name: str, folder: Path) -> str:
    document = results.load(folder / name)
    return model.beside_markdown(document, nearest(document["gpu"]["name"]).name, calibration.counts((folder / name).parent))


def _summary(name: str, folder: Path) -> str:
    return summary.section(results.load(folder / name))


def _serving(name: str, folder: Path) -> str:
    if not (folder / name).is_file():
        return serving.MISSING
    return serving.section(results.load(folder / name))


def _goals(name: str, folder: Path) -> str:
    if not (folder / name).is_file():
        return serving.MISSING
    document = results.load(folder / name)
    return "\n".join((f"{report.conditions(document)}:", "", *serving.met(document)))


def _picture(name: str) -> str:
    return Path(name).with_suffix(".png").as_posix()


def _plot(name: str, folder: Path) -> str:
    return f"![{report.PLOTTED}]({_picture(name)})"


def _headline(name: str, folder: Path) -> str:
    return headline.sentence(results.load(folder / name), name)


def _experiment(name: str, folder: Path) -> str:
    said = json.loads((folder / name).read_text())
    versions = ", ".join(f"{package} {version}" for package, version in said["versions"].items())
    source = f"`{said['command']}` on {said['machine']}; {versions}; commit {said['commit']} ([{Path(name).name}]({name}))."
    found = "\n".join(f"- {line}" for line in said["found"])
    return f"![{said['experiment'].replace('_', ' ')}]({_picture(name)})\n\n{found}\n\n{source}"


def _replays(name: str, folder: Path) -> str:
    said = json.loads((folder / name).read_text())
    lines = [
        "| block | level | launches | calls made by Python, us | by the compiled library, us |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in said["rows"]:
        times = f"{row['us']['Python']:.0f} | {row['us']['library']:.0f}"
        lines.append(f"| {row['case']} | {row['level']} | {row['launches']} | {times} |")
    versions = ", ".join(f"{package} {version}" for package, version in said["versions"].items() if version)
    where = f"{said['machine']['cpu']}, one thread; {versions}; commit {said['git']['commit'][:12]}"
    return "\n".join([*lines, "", f"`{said['command']}` on {where} ([{Path(name).name}]({name}))."])


RENDER = {
    "results": _measured,
    "summary": _summary,
    "serving": _serving,
    "goals": _goals,
    "plot": _plot,
    "headline": _headline,
    "predicted": _predicted,
    "beside": _beside,
    "experiment": _experiment,
    "replays": _replays,
}
DRAWN = ("results", "plot")
MEASURED = ("results", "summary", "serving", "goals", "plot", "headline", "beside")
"""The kinds whose files `fused-res bench` has written."""
_SECTION = re.compile(
    rf"(?P<begin><!-- (?P<kind>{'|'.join(RENDER)}):begin (?P<what>[^\n]+?) -->\n).*?(?P<end><!-- (?P=kind):end -->)", re.DOTALL
)


def rewritten(text: str, folder: Path) -> str:
    """The text with every section rendered anew."""
    found = Counter(match["kind"] for match in _SECTION.finditer(text))
    for kind in RENDER:
        if any(text.count(f"<!-- {kind}:{marker}") != found[kind] for marker in ("begin", "end")):
            raise ValueError(f"expected pairs of <!-- {kind}:begin … --> and <!-- {kind}:end -->")
    return _SECTION.sub(lambda match: f"{match['begin']}\n{RENDER[match['kind']](match['what'], folder)}\n\n{match['end']}", text)


def shown(text: str, folder: Path, kinds: Collection[str] = MEASURED) -> list[Path]:
    """The result files that sections of these kinds show, each once."""
    sections = [match for match in _SECTION.finditer(text) if match["kind"] in kinds]
    return [file for file in dict.fromkeys(folder / match["what"] for match in sections) if file.is_file()]


def stale_plots(text: str, folder: Path) -> list[Path]:
    """Result files whose plot is missing or of other results."""
    return [file for file in shown(text, folder, DRAWN) if not plot.is_of(file.with_suffix(".png"), results.digest(file))]


def update(document: Path, check: bool) -> bool:
    """Render a document anew, or with `check` only say whether that would change anything. Returns whether it does.

    Raises:
        OSError, ValueError: a file cannot be read, or a section cannot be rendered from it.
    """
    text, folder = document.read_text(), document.parent
    wanted, stale = rewritten(text, folder), stale_plots(text, folder)
    if not check and text != wanted:
        document.write_text(wanted)
    for file in () if check else stale:
        plot.draw(results.load(file), file.with_suffix(".png"), results.digest(file))
    return text != wanted or bool(stale)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fused_res.benchmarks.readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("documents", type=Path, nargs="+", metavar="DOCUMENT")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document differs from its result files")
    options = parser.parse_args(argv)
    differ = []
    for document in options.documents:
        try:
            if update(document, options.check):
                differ.append(str(document))
        except (OSError, ValueError) as error:
            print(f"error: {document}: {error}", file=sys.stderr)
            return 2
    if not options.check or not differ:
        return 0
    print(f"differs from its result files: {', '.join(differ)}; make figures writes them anew", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
