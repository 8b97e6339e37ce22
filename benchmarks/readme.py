"""`python -m fused_res.benchmarks.readme [--check] README.md`: figures in README come from committed result files only.

What stands between `<!-- results:begin FILE.jsonl -->` and `<!-- results:end -->` is rewritten from FILE.jsonl, a path relative to
the README. With --check nothing is written, and the exit code is 1 if anything would be.
"""

import argparse
import re
import sys
from pathlib import Path

from fused_res.benchmarks import report, results

_SECTION = re.compile(r"(<!-- results:begin (?P<file>\S+) -->\n)(?P<body>.*?)(<!-- results:end -->)", re.DOTALL)


def rewritten(text: str, folder: Path) -> str:
    """The text with every section rendered anew from its result file."""
    pairs = len(_SECTION.findall(text))
    if any(text.count(f"<!-- results:{marker}") != pairs for marker in ("begin", "end")):
        raise ValueError("expected pairs of <!-- results:begin FILE.jsonl --> and <!-- results:end -->")

    def render(match: re.Match) -> str:
        name = match["file"]
        document = results.load(folder / name)
        picture = Path(name).with_suffix(".png")
        shown = picture.as_posix() if (folder / picture).is_file() else None
        return f"{match[1]}\n{report.markdown(document, shown)}\n\n{match[4]}"

    return _SECTION.sub(render, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_res.benchmarks.readme", description=__doc__)
    parser.add_argument("readme", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the file differs from its result files")
    options = parser.parse_args(argv)
    try:
        text = options.readme.read_text()
        wanted = rewritten(text, options.readme.parent)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if text == wanted:
        return 0
    if options.check:
        repair = f"python -m fused_res.benchmarks.readme {options.readme}"
        print(f"{options.readme} differs from its result files; run {repair}", file=sys.stderr)
        return 1
    options.readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
