"""A picture: how far the compiled programs are above the least time."""

from pathlib import Path

import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from experiments._style import GREY, PALE, save
from experiments.benchmark.pictures import handles, mark, rows_of
from experiments.compile.targets import Target

IN_FLOAT32 = "in float32", "full logits"
"""The end of the names of implementations that convert half-precision logits first."""


def plot_excess(table: pd.DataFrame, target: Target, path: Path) -> None:
    """For each case the roofline time of each implementation, divided by the least time of the case."""
    known = table.loc[table["over least"].notna()]
    figure, axis, rows = rows_of(known, ["shape", "dtype", "mesh"])
    for row, group in rows:
        axis.axhline(row, color=PALE, linewidth=0.6)
        for over, name in zip(group["over least"], group["implementation"], strict=True):
            ours = name.startswith("jaxsoft")  # on top, and smaller than the dot of another library beneath it
            color = mark(name).color
            axis.scatter(
                over, row, 16 if ours else 40, marker=mark(name).shape, zorder=3 + ours, edgecolor=color,
                facecolor="none" if name.endswith(IN_FLOAT32) else color,
            )  # fmt: skip
    axis.axvline(1, color="black", linewidth=1)
    axis.set(title=f"{target.kind}, compiled for and not run on")
    axis.set(xscale="log", xlabel="roofline time over the least that the case can take: smaller is better")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    last = known["over least"].max()
    axis.set_xticks([n for n in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128) if n < 1.1 * last])
    axis.grid(axis="x")
    hollow = Line2D([], [], linestyle="", marker="D", markerfacecolor="none", color=GREY, label="logits in float32")
    figure.legend(handles=[*handles(known), hollow], loc="outside lower center", ncols=6)
    save(figure, path)
