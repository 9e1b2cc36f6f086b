"""Two pictures: how much faster or slower other libraries are, and how close all come to the machine's ceilings."""

from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from experiments._style import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, WIDE, plt, save, tint
from experiments.benchmark.measure import Ceilings
from experiments.benchmark.report import timed_others


class Mark(NamedTuple):
    """The style of an implementation: ten need more than colours."""

    color: str
    shape: str


# The keys are beginnings of implementations' names.
MARKS = {
    "jaxsoft": Mark(BLUE, "o"), "jax.nn": Mark(ORANGE, "s"), "optax": Mark(GREEN, "D"), "formula": Mark(PINK, "v"),
    "PyTorch": Mark(RED, "^"), "NumPy": Mark(GREY, "X"), "jax-cce": Mark(SKY, "P"), "tokamax": Mark(BLACK, "*"),
    "Liger": Mark(GREY, "<"), "QuACK": Mark(BLACK, ">"),
}  # fmt: skip
SMALL = 1.0
"""Below this many megabytes the fixed cost of a call, not the machine's ceilings, is most of its time."""


def mark(implementation: str) -> Mark:
    return next(mark for name, mark in MARKS.items() if implementation.startswith(name))


def handles(table: pd.DataFrame) -> list[Line2D]:
    names = [name for name in MARKS if any(x.startswith(name) for x in table["implementation"])]
    return [Line2D([], [], color=MARKS[n].color, marker=MARKS[n].shape, linestyle="", label=n) for n in names]


def rows_of(
    table: pd.DataFrame, columns: list[str], height: float = 0.2
) -> tuple[Figure, Axes, list[tuple[int, pd.DataFrame]]]:
    """A figure with a line, so many inches high, for each case and what the columns say; and what belongs on which.

    Those of a case are together, below its name in bold.
    """
    figure, axis = plt.subplots()
    bold = {"transform": axis.get_yaxis_transform(), "va": "center", "weight": "bold", "zorder": 4}
    rows, names, place = [], [], 0
    for case, of_case in table.groupby("case", sort=False):
        axis.text(0, place, str(case), bbox={"color": "white", "pad": 1}, **bold)
        for name, group in of_case.groupby(columns, sort=False):
            place += 1
            rows.append((place, group))
            names.append(" ".join(map(str, name)).strip())  # pyright: ignore[reportArgumentType]
        place += 1
    axis.set_yticks([row for row, _ in rows], names)
    axis.set_ylim(place - 0.5, -0.7)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    figure.set_size_inches(WIDE, 1.2 + height * place)
    return figure, axis, rows


def plot_ratios(table: pd.DataFrame, path: Path) -> None:
    """For each case a bar to the fastest other library, the middle half of the rounds, and a mark for every library."""
    others = timed_others(table)
    figure, axis, rows = rows_of(others, ["shape", "dtype"])
    for row, group in rows:
        best = group.loc[group["ratio"].idxmin()].to_dict()
        axis.barh(row, best["ratio"] - 1, left=1, color=tint(mark(best["implementation"]).color, 0.5))
        axis.plot([best["ratio low"], best["ratio high"]], [row, row], color="black", linewidth=1)
        for ratio, name in zip(group["ratio"], group["implementation"], strict=True):
            axis.scatter(ratio, row, 22, color=mark(name).color, marker=mark(name).shape, zorder=3)
        axis.annotate(f"{best['ratio']:.2f}", (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axis.axvline(1, color="black", linewidth=1)
    axis.set(
        title="time of other libraries divided by jaxsoft's: right of 1 jaxsoft is faster",
        xlabel="ratio; the number is the fastest library's",
    )
    axis.set(xscale="log")
    axis.xaxis.set_major_locator(LogLocator(base=2, numticks=20))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(axis="x")
    figure.legend(handles=handles(others), loc="outside lower center", ncols=6)
    save(figure, path)


def plot_roofline(table: pd.DataFrame, ceilings: Ceilings, path: Path) -> None:
    """For each task the share of its ceiling that every implementation reaches, in every case that moves enough.

    Dense functions do about one operation a byte and linear heads hundreds: over these, a roofline is two crowds
    with nothing between.
    """
    everyone = pd.concat([table.loc[table["implementation"] == "jaxsoft"], timed_others(table)])
    timed = everyone.loc[everyone["ratio"].notna() & (everyone["MB"] > SMALL)]
    timed = timed.assign(case=timed["case"].str.split(",").str[0])
    shown = handles(timed)
    figure, axis, rows = rows_of(timed, ["dtype"], height=0.35)
    for row, group in rows:
        for share, name in zip(group["of ceiling"], group["implementation"], strict=True):
            # Each implementation has its own height, so that none hides another.
            place = next(n for n, handle in enumerate(shown) if name.startswith(str(handle.get_label())))
            aside = 0.75 * (place / max(1, len(shown) - 1) - 0.5)
            axis.scatter(share, row + aside, 22, color=mark(name).color, marker=mark(name).shape, linewidths=0)
    products = " and ".join(f"{speed / 1e12:.3g} TFLOP/s in {dtype}" for dtype, speed in ceilings.gemm.items())
    axis.axvline(1, color="black", linewidth=1)
    figure.suptitle(
        f"how close cases of more than {SMALL:g} MB come to what this machine does at best:\n"
        f"copy {ceilings.copy / 1e9:.3g} GB/s, and for linear heads multiply, {products}"
    )
    axis.set(xscale="log", xlabel="share of the ceiling")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(axis="x")
    figure.legend(handles=shown, loc="outside lower center", ncols=6)
    save(figure, path)
