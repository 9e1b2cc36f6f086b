"""One picture: the difference of each framework's calls from jaxsoft's."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from experiments._style import BLUE, GREY, ORANGE, PALE, WIDE, save

LEAST = 1e-17  # results that are equal to the last bit are drawn here


def plot_differences(table: pd.DataFrame, path: Path) -> None:
    """One line per framework, with one dot for the value and one for the gradient of each of its calls."""
    names = list(dict.fromkeys(table["framework"]))
    figure, axes = plt.subplots(figsize=(WIDE, 0.9 + 0.27 * len(names)))
    for name, color, shift in (("value", BLUE, -0.14), ("gradient", ORANGE, 0.14)):
        seen = table[np.isfinite(table[name])]
        heights = [names.index(framework) + shift for framework in seen["framework"]]
        filled = [color if not why else "white" for why in seen["differs"]]
        axes.scatter(seen[name].clip(LEAST), heights, 22, filled, edgecolors=color, label=name, zorder=3)
    for eps, label in ((2.0**-52, "float64"), (2.0**-23, "float32")):
        axes.axvline(eps, color=GREY, linewidth=1, linestyle="--")
        axes.text(eps, -0.9, f" {label}", color=GREY, fontsize=9)
    axes.set(xscale="log", xlim=(LEAST / 2, 100), ylim=(len(names) - 0.4, -1.1))
    axes.set_yticks(range(len(names)), names)
    axes.grid(axis="y", color=PALE)
    axes.set_xlabel("largest difference from jaxsoft (hollow: the table has a remark)")
    axes.legend(loc="lower right")
    save(figure, path)
