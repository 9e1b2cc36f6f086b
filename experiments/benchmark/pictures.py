"""Two pictures: how much faster or slower the peers are, and how close everyone comes to the machine's ceilings."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from experiments.benchmark.measure import Ceilings
from experiments.benchmark.report import timed_peers

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# By the beginning of an implementation's name.
COLORS = {
    "jaxsoft": "tab:blue", "jax.nn": "tab:orange", "optax": "gold", "formula": "tab:pink", "PyTorch": "tab:red",
    "NumPy": "tab:gray", "jax-cce": "tab:green", "tokamax": "tab:olive", "Liger": "tab:purple", "QuACK": "tab:brown",
}  # fmt: skip
MARKERS = {
    "softmax": "o", "softmax + VJP": "s", "log_softmax": "^", "log_softmax + VJP": "<", "logsumexp": ">",
    "logsumexp + VJP": "p", "cross-entropy": "v", "cross-entropy + gradient": "D",
    "linear cross-entropy": "P", "linear cross-entropy + gradient": "*",
}  # fmt: skip
SMALL = 1.0
"""Megabytes below which a call's fixed cost, not the machine's ceilings, is most of its time."""


def color(implementation: str) -> str:
    return next(color for name, color in COLORS.items() if implementation.startswith(name))


def handles(table: pd.DataFrame) -> list[Line2D]:
    names = [name for name in COLORS if any(x.startswith(name) for x in table["implementation"])]
    return [Line2D([], [], marker="o", linestyle="", color=COLORS[name], label=name) for name in names]


def plot_ratios(table: pd.DataFrame, path: Path) -> None:
    """For each case a bar to the fastest peer, with the middle half of the rounds, and a mark for every other one."""
    peers = timed_peers(table)
    names = peers["case"] + " " + peers["shape"] + " " + peers["dtype"].replace("float32", "")
    groups = list(peers.groupby(names, sort=False))
    figure, axis = plt.subplots(figsize=(11, 1.5 + 0.26 * len(groups)), layout="constrained")
    for row, (_, group) in enumerate(groups):
        best = group.loc[group["ratio"].idxmin()].to_dict()
        axis.barh(row, best["ratio"] - 1, left=1, color=color(best["implementation"]), alpha=0.7)
        axis.plot([best["ratio low"], best["ratio high"]], [row, row], color="black", linewidth=1)
        axis.scatter(group["ratio"], [row] * len(group), s=12, c=[color(x) for x in group["implementation"]], zorder=3)
        text = f"{best['implementation']} {best['ratio']:.2f}"
        axis.annotate(text, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=7)
    axis.axvline(1, color="black", linewidth=1)
    axis.set(title="time of the peers over ours: right of 1 ours is faster", xlabel="ratio, a bar for the fastest peer")
    axis.set(xscale="log", ylim=(len(groups) - 0.5, -0.5))
    axis.xaxis.set_major_locator(LogLocator(base=2, numticks=20))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_yticks(range(len(groups)), [str(name) for name, _ in groups], fontsize=7)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(axis="x", which="both", alpha=0.3)
    figure.legend(handles=handles(peers), loc="outside lower center", ncols=len(COLORS), fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_roofline(table: pd.DataFrame, ceilings: Ceilings, path: Path) -> None:
    """Operations a second over operations a byte, under the ceilings that were measured."""
    timed = table.loc[table["ratio"].notna() & (table["MB"] > SMALL)]
    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    for row in timed.to_dict("records"):
        ours, own = row["implementation"] == "jaxsoft", color(row["implementation"])
        # Ours a little to the left, so that neither hides the other.
        x, marker = 1e3 * row["GFLOP"] / row["MB"] * (0.97 if ours else 1.03), MARKERS[row["case"].split(",")[0]]
        axis.scatter(x, row["TFLOP/s"], marker=marker, facecolors=own if ours else "none", edgecolors=own)
    intensity = np.geomspace(0.3, max([100, *(2e3 * timed["GFLOP"] / timed["MB"])]), 200)
    for (dtype, speed), style in zip(ceilings.gemm.items(), ("-", "--"), strict=False):
        roof = np.minimum(ceilings.copy * intensity, speed) / 1e12
        axis.plot(intensity, roof, color="black", linestyle=style, label=f"copy, and matrix product in {dtype}")
    tasks = [task for task in MARKERS if task in {case.split(",")[0] for case in timed["case"]}]
    marks = [Line2D([], [], marker=MARKERS[task], linestyle="", color="gray", label=task) for task in tasks]
    axis.legend(handles=[*axis.get_lines(), *marks, *handles(timed)], fontsize=7, loc="lower right")
    axis.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s")
    axis.set(title=f"roofline of the cases that move more than {SMALL:g} MB: ours filled, peers open")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
