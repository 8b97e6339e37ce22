"""The plot of a result document: how far each peer is from the time of the block's bare convolutions, and the training losses."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from fused_res import planner
from fused_res.benchmarks import sums
from fused_res.benchmarks.peers import BARE, OURS, is_ours
from fused_res.benchmarks.report import conditions, measured, ran
from fused_res.console import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI, MOST_COLUMNS = 150, 5
COLOURS = {
    "eager NCHW": "#9aa5b1",
    "eager channels_last": "#52606d",
    "torch.compile": "#e0912f",
    "torch.compile max-autotune": "#b5651d",
    "cuDNN graphs": "#6a994e",
    "inplace_abn": "#a98467",
    "ONNX Runtime": "#8e6bbf",
    "OpenVINO": "#4f9d9d",
    OURS: "#1f6fd0",
}
LEVELS = ("#7fb2ec", "#4a90d9", "#174f96", "#0b2f5e")


def colour(name: str) -> str:
    """A peer's; fused_res's levels have shades of its own."""
    if name in COLOURS or not is_ours(name):
        return COLOURS.get(name, "#c3c9d0")
    level = name.removeprefix(f"{OURS} ")
    return LEVELS[planner.LEVELS.index(level) % len(LEVELS)] if level in planner.LEVELS else LEVELS[0]


def is_of(path: Path, digest: str) -> bool:
    """Whether the plot is there and was drawn from the result file with this digest."""
    return path.is_file() and f"Source\0{digest}".encode() in path.read_bytes()


def draw(document: dict, path: Path, digest: str = "") -> None:
    """Write the plot as PNG; `digest` of the result file goes with it."""
    figure(document).savefig(path, dpi=DPI, facecolor="white", metadata={"Source": digest})


def figure(document: dict) -> "Figure":
    """The plot, a figure of matplotlib."""
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [(key, ran(peers)) for key, peers in measured(document) if BARE in ran(peers)]
    digits = document.get("digits")
    with_losses = bool(digits and digits.get("losses"))
    height = 1.9 + 0.95 * max(len(groups), 3)
    drawn = Figure(figsize=(14 if with_losses else 8.5, min(height, 40)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots(1, 2, width_ratios=(3, 2), squeeze=False)[0] if with_losses else [drawn.subplots()]
    _blocks(axes[0], groups)
    _legend(drawn, *axes[0].get_legend_handles_labels())
    if with_losses:
        _losses(axes[1], digits)
    wrapped = textwrap.fill(conditions(document), 170 if with_losses else 100)
    drawn.suptitle(wrapped, fontsize=9, color="#52606d", x=0.01, ha="left")
    return drawn


def _legend(drawn: "Figure", handles: list, labels: list[str]) -> None:
    """Below the plot, in as many columns as there is room for."""
    for columns in range(min(MOST_COLUMNS, len(labels)), 0, -1):
        legend = drawn.legend(handles, labels, loc="outside lower left", ncols=columns, fontsize=8.5, frameon=False)
        if columns == 1 or legend.get_window_extent(drawn.canvas.get_renderer()).width <= drawn.bbox.width:
            return
        legend.remove()


def _blocks(axes, groups: list) -> None:
    """Horizontal bars, grouped by case, with the 20 % to 80 % quantiles as error bars."""
    names = list(dict.fromkeys(name for _, peers in groups for name in peers if name != BARE))
    thickness, labels = 0.8 / max(len(names), 1), []
    shown = set()
    for g, ((case, batch, dtype, mode), peers) in enumerate(groups):
        labels.append(f"{case}\nbatch {batch}, {dtype}, {mode}")
        for n, name in enumerate(names):
            at = g + (n - (len(names) - 1) / 2) * thickness
            if name not in peers:
                axes.text(0.02, at, f"{name}: not run", va="center", fontsize=7, color="#9aa5b1", style="italic")
                continue
            ratio = sums.ratio(peers[name], peers[BARE])
            middle = ratio["median"]
            axes.barh(
                at,
                middle,
                height=thickness * 0.92,
                color=colour(name),
                xerr=[[max(0.0, middle - ratio["q20"])], [max(0.0, ratio["q80"] - middle)]],
                error_kw={"elinewidth": 1.2, "capsize": 2.5, "ecolor": "#1f2933"},
                label=None if name in shown else _label(name, groups),
            )
            shown.add(name)
            weight = "bold" if is_ours(name) else "normal"
            axes.annotate(
                f"{middle:.2f}",
                (max(middle, ratio["q80"]), at),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                fontweight=weight,
            )
    axes.axvline(1.0, color="#c0392b", linewidth=1.4, linestyle="--", label=f"{BARE} = 1")
    axes.set_yticks(range(len(labels)), labels, fontsize=8.5)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    axes.set_xlabel("block time / time of its bare convolutions: medians, 20 % to 80 % quantiles (lower is better)")
    axes.set_title("Time over that of the bare convolutions", loc="left", fontsize=12, fontweight="bold")
    axes.grid(axis="x", color="#e4e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _label(name: str, groups: list) -> str:
    """A peer's name; fused_res with what it ran as."""
    if name != OURS:
        return name
    backends = dict.fromkeys(peers[OURS]["backend"] for _, peers in groups if OURS in peers)
    return f"{OURS} ({'; '.join(backends)})"


def _losses(axes, digits: dict) -> None:
    """Losses of eager and fused over the steps: two curves that should cover each other."""
    losses, accuracy = digits["losses"], digits["accuracy"]
    steps = range(1, len(losses["eager"]) + 1)
    label = f"eager, {100 * accuracy['eager']:.1f} % test accuracy"
    axes.semilogy(steps, losses["eager"], color="#9aa5b1", linewidth=4.0, alpha=0.9, label=label)
    label = f"fused_res, {100 * accuracy['fused']:.1f} % test accuracy"
    axes.semilogy(range(1, len(losses["fused"]) + 1), losses["fused"], color=COLOURS[OURS], linewidth=1.1, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.set_title("Training on 8x8 digits, same seed and batches", loc="left", fontsize=12, fontweight="bold")
    axes.grid(color="#e4e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", fontsize=8.5, frameon=False)
