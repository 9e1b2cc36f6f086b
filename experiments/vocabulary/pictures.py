"""Pictures of the training, and of the head's memory and time."""

from pathlib import Path
from typing import Any

import pandas as pd

from experiments._style import BLUE, GREY, ORANGE, PALE, RED, WIDE, plt, save

STYLES = {"fused": (BLUE, "o"), "unfused": (ORANGE, "s")}


def plot_loss(table: pd.DataFrame, summary: dict[str, Any], path: Path) -> None:
    """The training loss per batch and smoothed, and the held-out losses of the network and of guessing by frequency."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    smooth = table["loss"].rolling(max(1, len(table) // 50), min_periods=1).mean()
    axes.plot(table["step"], table["loss"], color=PALE, lw=1, label="training, each batch")
    axes.plot(table["step"], smooth, color=BLUE, label="training, running mean")
    axes.axhline(summary["loss"], color=RED, linestyle="--", label="held out at the end")
    axes.axhline(summary["frequency_loss"], color=GREY, linestyle=":", label="held out, by frequency alone")
    axes.set(title="loss of the next token", xlabel="step", ylabel="cross-entropy per known token (nats)")
    axes.legend(loc="upper right")
    save(figure, path)


def plot_heads(table: pd.DataFrame, words: int, features: int, memory_budget: int, path: Path) -> None:
    """Temporary memory and time over the size of the vocabulary."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 3.8))
    for name, rows in table.groupby("head"):
        color, shape = STYLES[str(name)]
        style = {"color": color, "marker": shape, "label": name}
        left.plot(rows["vocabulary"], rows["temporary_bytes"] / 2**20, **style)
        right.plot(rows["vocabulary"], 1e3 * rows["seconds"], **style)
    left.axhline(memory_budget / 2**20, color=GREY, linestyle=":", label="budget of fused")
    left.set(title="temporary memory", ylabel="temporaries (MiB)")
    right.set(title="loss and gradients", ylabel="milliseconds")
    for axes in (left, right):
        axes.set(xlabel="classes in the vocabulary", xscale="log")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(table["vocabulary"].unique(), [f"{size:,}" for size in table["vocabulary"].unique()])
        axes.minorticks_off()
        axes.grid()
        axes.legend(title="head")
    figure.suptitle(f"the head alone: {words:,} words of {features} features")
    save(figure, path)
