"""Two pictures: how much faster or slower the peers are, and how close everyone comes to the machine's ceilings."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from experiments._style import BLACK, BLUE, GREEN, GREY, ORANGE, PALE, PINK, RED, SKY, WIDE, plt, save, tint
from experiments.benchmark.measure import Ceilings
from experiments.benchmark.report import timed_peers


class Mark(NamedTuple):
    """How an implementation is drawn: ten need more than colours."""

    color: str
    shape: str


# By the beginning of an implementation's name.
MARKS = {
    "jaxsoft": Mark(BLUE, "o"), "jax.nn": Mark(ORANGE, "s"), "optax": Mark(GREEN, "D"), "formula": Mark(PINK, "v"),
    "PyTorch": Mark(RED, "^"), "NumPy": Mark(GREY, "X"), "jax-cce": Mark(SKY, "P"), "tokamax": Mark(BLACK, "*"),
    "Liger": Mark(GREY, "<"), "QuACK": Mark(BLACK, ">"),
}  # fmt: skip
SMALL = 1.0
"""Megabytes below which a call's fixed cost, not the machine's ceilings, is most of its time."""
LINEAR = "linear"
"""What the tasks with a matrix product begin with, which do a thousand times the operations a byte."""


def mark(implementation: str) -> Mark:
    return next(mark for name, mark in MARKS.items() if implementation.startswith(name))


def handles(table: pd.DataFrame) -> list[Line2D]:
    names = [name for name in MARKS if any(x.startswith(name) for x in table["implementation"])]
    return [Line2D([], [], color=MARKS[n].color, marker=MARKS[n].shape, linestyle="", label=n) for n in names]


def name_rows(axis: Axes, names: Sequence[tuple[str, str]]) -> list[int]:
    """Name rows by the second part of each name, below the first in bold where it changes; tell their heights."""
    heights, row = [], 0
    for n, (case, _) in enumerate(names):
        if not n or case != names[n - 1][0]:
            box = {"color": "white", "pad": 1}
            axis.text(
                0, row, case, transform=axis.get_yaxis_transform(), va="center", weight="bold", bbox=box, zorder=4
            )
            row += 1
        heights.append(row)
        row += 1
    axis.set_yticks(heights, [name for _, name in names])
    axis.set_ylim(row - 0.5, -0.7)
    axis.tick_params(axis="y", length=0)
    axis.figure.set_size_inches(WIDE, 1.2 + 0.2 * row)
    return heights


def plot_ratios(table: pd.DataFrame, path: Path) -> None:
    """For each case a bar to the fastest peer, with the middle half of the rounds, and a mark for every one."""
    peers = timed_peers(table)
    groups = list(peers.groupby(["case", "shape", "dtype"], sort=False))
    figure, axis = plt.subplots()
    rows = name_rows(axis, [(case, f"{shape} {dtype}") for (case, shape, dtype), _ in groups])  # pyright: ignore
    for row, (_, group) in zip(rows, groups, strict=True):
        best = group.loc[group["ratio"].idxmin()].to_dict()
        axis.barh(row, best["ratio"] - 1, left=1, color=tint(mark(best["implementation"]).color, 0.5))
        axis.plot([best["ratio low"], best["ratio high"]], [row, row], color="black", linewidth=1)
        for ratio, name in zip(group["ratio"], group["implementation"], strict=True):
            axis.scatter(ratio, row, 22, color=mark(name).color, marker=mark(name).shape, zorder=3)
        axis.annotate(f"{best['ratio']:.2f}", (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axis.axvline(1, color="black", linewidth=1)
    axis.set(
        title="time of the peers over ours: right of 1 ours is faster", xlabel="ratio; written, the fastest peer's"
    )
    axis.set(xscale="log")
    axis.xaxis.set_major_locator(LogLocator(base=2, numticks=20))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(axis="x")
    figure.legend(handles=handles(peers), loc="outside lower center", ncols=6)
    save(figure, path)


def plot_roofline(table: pd.DataFrame, ceilings: Ceilings, path: Path) -> None:
    """Operations a second over operations a byte, under the ceilings that were measured."""
    everyone = pd.concat([table.loc[table["implementation"] == "jaxsoft"], timed_peers(table)])
    timed = everyone.loc[everyone["ratio"].notna() & (everyone["MB"] > SMALL)]
    timed = timed.assign(intensity=1e3 * timed["GFLOP"] / timed["MB"])
    figure, panels = draw_panels(timed, "TFLOP/s")
    for axis, intensity in panels:
        for (dtype, speed), style in zip(ceilings.gemm.items(), ("-", "--"), strict=False):
            roof = np.minimum(ceilings.copy * intensity, speed) / 1e12
            axis.plot(intensity, roof, color="black", linestyle=style, label=f"matrix product, {dtype}")
        if panels[0][0] is not axis or len(panels) == 1:
            axis.legend(loc="lower right")
    panels[0][0].set(ylabel="TFLOP/s")
    figure.suptitle(f"cases that move more than {SMALL:g} MB, below what copying and a matrix product reach")
    figure.legend(handles=handles(timed), loc="outside lower center", ncols=6)
    save(figure, path)


def draw_panels(table: pd.DataFrame, rate: str) -> tuple[plt.Figure, list[tuple[Axes, np.ndarray]]]:
    """Marks at (intensity, rate) with the tasks named above them; the panels, each with intensities for a roof.

    Dense functions and linear heads are three powers of ten apart, and have a panel each.
    """
    linear = table["case"].str.startswith(LINEAR)
    parts = [part for part in (table.loc[~linear], table.loc[linear]) if len(part)]
    widths = [1 if part is parts[-1] and len(parts) > 1 else 2.2 for part in parts]
    figure, axes = plt.subplots(1, len(parts), figsize=(WIDE, 6), width_ratios=widths, squeeze=False)
    panels = []
    for axis, part in zip(axes[0], parts, strict=True):
        shown = [name for name in MARKS if any(x.startswith(name) for x in part["implementation"])]
        span = 1.15 * part["intensity"].max() / (0.87 * part["intensity"].min())
        for row in part.to_dict("records"):
            # Each implementation a little to one side, so that none hides another.
            aside = next(n for n, name in enumerate(shown) if row["implementation"].startswith(name))
            x = row["intensity"] * span ** (0.012 * (aside - (len(shown) - 1) / 2))
            axis.scatter(x, row[rate], 26, color=mark(row["implementation"]).color,
                         marker=mark(row["implementation"]).shape, linewidths=0, zorder=3)  # fmt: skip
        tasks: dict[str, dict[str, None]] = {}
        for case, intensity in zip(part["case"], part["intensity"], strict=True):
            tasks.setdefault(f"{intensity:.2g}", {})[case.split(",")[0].removeprefix(f"{LINEAR} ")] = None
        top = axis.secondary_xaxis("top")
        top.xaxis.set_major_locator(FixedLocator([float(intensity) for intensity in tasks]))
        top.set_xticklabels([", ".join(names) for names in tasks.values()], rotation=40, ha="left", fontsize=9)
        axis.set(xscale="log", yscale="log", xlabel="operations a byte", title="")
        for scale in (axis.xaxis, top.xaxis):
            scale.set_minor_locator(NullLocator())
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_formatter("{x:g}")
        axis.grid(color=PALE)
        panels.append((axis, np.geomspace(0.87 * part["intensity"].min(), 1.15 * part["intensity"].max(), 100)))
    return figure, panels
