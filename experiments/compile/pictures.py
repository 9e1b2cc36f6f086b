"""Two pictures: how far the compiled programs stay below a device's roofline, and how far above the least time."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import NullLocator

from experiments._style import plt, save
from experiments.benchmark.pictures import draw_panels, handles, mark, name_rows
from experiments.compile.targets import Target


def plot_roofline(table: pd.DataFrame, target: Target, path: Path) -> None:
    """The operations a case needs a second of its roofline time, over the operations a byte that it has to move."""
    known = table.loc[table["roofline ms"].notna()]
    known = known.assign(
        intensity=1e3 * known["least GFLOP"] / known["least MB"], rate=known["least GFLOP"] / known["roofline ms"]
    )
    figure, panels = draw_panels(known, "rate")
    for axis, intensity in panels:
        roof = np.minimum(target.bandwidth * intensity, target.half) / 1e12
        axis.plot(intensity, roof, color="black")
        speed = f"{target.bandwidth / 1e12:.3g} TB/s" if roof[0] < roof[-1] else f"{target.half / 1e12:.4g} TFLOP/s"
        axis.annotate(speed, (intensity[35], roof[35]), xytext=(0, 8), textcoords="offset points", ha="right")
        axis.set(xlabel="operations a byte, at the least")
        axis.set_ylim(top=1.3 * axis.get_ylim()[1])
    panels[0][0].set(ylabel="TFLOP/s at the roofline")
    figure.suptitle(f"{target.kind}, compiled for and not run on")
    figure.legend(handles=handles(known), loc="outside lower center", ncols=6)
    save(figure, path)


def plot_excess(table: pd.DataFrame, target: Target, path: Path) -> None:
    """For each case the roofline time of each implementation, over the least time that the case can take."""
    known = table.loc[table["over least"].notna()]
    groups = list(known.groupby(["case", "shape", "dtype", "mesh"], sort=False))
    figure, axis = plt.subplots()
    heights = name_rows(axis, [(case, f"{shape} {dtype} {mesh}".strip()) for (case, shape, dtype, mesh), _ in groups])  # pyright: ignore
    for height, (_, group) in zip(heights, groups, strict=True):
        axis.axhline(height, color="#d9d9d9", linewidth=0.6)
        for over, name in zip(group["over least"], group["implementation"], strict=True):
            ours = name.startswith("jaxsoft")  # on top, and smaller than a peer beneath it
            axis.scatter(
                over, height, 16 if ours else 40, color=mark(name).color, marker=mark(name).shape, zorder=3 + ours
            )
    axis.axvline(1, color="black", linewidth=1)
    axis.set(title=f"{target.kind}, compiled for and not run on")
    axis.set(xscale="log", xlabel="roofline time over the least that the case can take")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    last = known["over least"].max()
    axis.set_xticks([n for n in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128) if n < 1.1 * last])
    axis.grid(axis="x")
    figure.legend(handles=handles(known), loc="outside lower center", ncols=6)
    save(figure, path)
