"""The roofline of a device, and how far below it the compiled programs stay."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from experiments.benchmark.pictures import MARKERS, color, handles
from experiments.compile.targets import Target

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_roofline(table: pd.DataFrame, target: Target, path: Path) -> None:
    """The operations a case needs a second of its roofline time, over the operations a byte that it has to move."""
    table = table.loc[table["roofline ms"].notna()]
    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    for row in table.to_dict("records"):
        ours, own = row["implementation"].startswith("jaxsoft"), color(row["implementation"])
        # Ours a little to the left, so that neither hides the other.
        x = 1e3 * row["least GFLOP"] / row["least MB"] * (0.96 if ours else 1.04)
        marker = MARKERS[row["case"].split(",")[0]]
        rate = row["least GFLOP"] / row["roofline ms"]
        axis.scatter(x, rate, marker=marker, facecolors=own if ours else "none", edgecolors=own, zorder=3)
    reach = (1e3 * table["least GFLOP"] / table["least MB"]).agg(["min", "max"])
    intensity = np.geomspace(reach["min"] / 2, max(2 * reach["max"], 4 * target.half / target.bandwidth), 200)
    label = f"{target.bandwidth / 1e12:.3g} TB/s, {target.half / 1e12:.4g} TFLOP/s in bfloat16"
    axis.plot(intensity, np.minimum(target.bandwidth * intensity, target.half) / 1e12, color="black", label=label)
    tasks = [task for task in MARKERS if task in {case.split(",")[0] for case in table["case"]}]
    marks = [Line2D([], [], marker=MARKERS[task], linestyle="", color="gray", label=task) for task in tasks]
    axis.legend(handles=[*axis.get_lines(), *marks, *handles(table)], fontsize=7, loc="lower right")
    axis.set(xscale="log", yscale="log", xlabel="operations a byte, at the least", ylabel="TFLOP/s at the roofline")
    axis.set(title=f"{target.kind}, compiled for and not run on: ours filled, peers open")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
