"""Two pictures: how far the compiled programs stay below a device's roofline, and how far above the least time."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from experiments.benchmark.pictures import MARKERS, color, handles
from experiments.compile.targets import Target

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def is_ours(row: dict[str, Any]) -> bool:
    return row["implementation"].startswith("jaxsoft")


def plot_roofline(table: pd.DataFrame, target: Target, path: Path) -> None:
    """The operations a case needs a second of its roofline time, over the operations a byte that it has to move.

    Dense functions and linear heads are three powers of ten apart, and have a panel each.
    """
    known = table.loc[table["roofline ms"].notna()]
    known = known.assign(intensity=1e3 * known["least GFLOP"] / known["least MB"])
    linear = known["case"].str.startswith("linear")
    panels = [part for part in (known.loc[~linear], known.loc[linear]) if len(part)]
    figure, axes = plt.subplots(1, len(panels), figsize=(2 + 5 * len(panels), 6), layout="constrained", squeeze=False)
    for axis, part in zip(axes[0], panels, strict=True):
        draw_roof(axis, target, part["intensity"])
        for row in part.to_dict("records"):
            ours, own = is_ours(row), color(row["implementation"])
            # Ours a little to the left, so that neither hides the other.
            x, marker = row["intensity"] * (0.97 if ours else 1.03), MARKERS[row["case"].split(",")[0]]
            rate = row["least GFLOP"] / row["roofline ms"]
            axis.scatter(x, rate, s=40, marker=marker, facecolors=own if ours else "none", edgecolors=own, zorder=3)
        axis.set_ylim(top=1.3 * axis.get_ylim()[1])
    axes[0, 0].set(ylabel="TFLOP/s at the roofline")
    tasks = [task for task in MARKERS if task in {case.split(",")[0] for case in table["case"]}]
    marks = [Line2D([], [], marker=MARKERS[task], linestyle="", color="gray", label=task) for task in tasks]
    figure.legend(handles=[*marks, *handles(table)], fontsize=8, loc="outside lower center", ncols=5)
    figure.suptitle(f"{target.kind}, compiled for and not run on: ours filled, peers open")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_roof(axis: Axes, target: Target, intensities: pd.Series) -> None:
    intensity = np.geomspace(0.6 * intensities.min(), 1.7 * intensities.max(), 200)
    roof = np.minimum(target.bandwidth * intensity, target.half) / 1e12
    axis.plot(intensity, roof, color="black")
    speed = f"{target.bandwidth / 1e12:.3g} TB/s" if roof[0] < roof[-1] else f"{target.half / 1e12:.4g} TFLOP/s"
    axis.annotate(speed, (intensity[60], roof[60]), xytext=(0, 8), textcoords="offset points", ha="right")
    axis.set(xscale="log", yscale="log", xlabel="operations a byte, at the least")
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
        scale.set_major_formatter("{x:g}")
        scale.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)


def plot_excess(table: pd.DataFrame, target: Target, path: Path) -> None:
    """For each case the roofline time of each implementation, over the least time that the case can take."""
    known = table.loc[table["over least"].notna()]
    names = known["case"] + " " + known["shape"] + " " + known["dtype"] + " " + known["mesh"]
    groups = list(known.groupby(names, sort=False))
    figure, axis = plt.subplots(figsize=(11, 1.5 + 0.26 * len(groups)), layout="constrained")
    for height, (_, group) in enumerate(groups):
        for row in sorted(group.to_dict("records"), key=is_ours):  # ours last, and so on top
            own = color(row["implementation"])
            face = own if is_ours(row) else "none"
            axis.scatter(row["over least"], height, s=40, facecolors=face, edgecolors=own, zorder=3)
    axis.axvline(1, color="black", linewidth=1)
    axis.set(title=f"{target.kind}, compiled for and not run on: ours filled, peers open")
    axis.set(xscale="log", xlabel="roofline time over the least that the case can take", ylim=(len(groups) - 0.5, -0.5))
    axis.set_yticks(range(len(groups)), [str(name).strip() for name, _ in groups], fontsize=7)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="x", which="both", labelsize=8)
    axis.grid(which="both", alpha=0.3)
    figure.legend(handles=handles(known), loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
