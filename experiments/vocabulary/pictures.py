"""Pictures of what was learnt, and of what it takes."""

from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"fused": "tab:blue", "unfused": "tab:orange"}


def plot_loss(table: pd.DataFrame, summary: dict[str, Any], path: Path) -> None:
    """The curve of training, batch by batch and smoothed, beside the held-out losses of network and guess."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    smooth = table["loss"].rolling(max(1, len(table) // 50), min_periods=1).mean()
    axes.plot(table["step"], table["loss"], color="tab:blue", alpha=0.3, label="training, each batch")
    axes.plot(table["step"], smooth, color="tab:blue", label="training, running mean")
    axes.axhline(summary["loss"], color="tab:green", linestyle="--", label="held out at the end")
    axes.axhline(summary["frequency_loss"], color="grey", linestyle=":", label="held out, by frequency alone")
    axes.set(title="loss of the next word", xlabel="step", ylabel="cross-entropy per known word (nats)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_heads(table: pd.DataFrame, words: int, features: int, memory_budget: int, path: Path) -> None:
    """Temporaries and time over the size of the vocabulary."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for name, rows in table.groupby("head"):
        left.plot(rows["vocabulary"], rows["temporary_bytes"] / 2**20, "o-", color=COLORS[str(name)], label=name)
        right.plot(rows["vocabulary"], 1e3 * rows["seconds"], "o-", color=COLORS[str(name)], label=name)
    left.axhline(memory_budget / 2**20, color="grey", linestyle=":", label="budget of fused")
    left.set(title="memory beside arguments and results", ylabel="temporaries (MiB)")
    right.set(title="loss and gradients", ylabel="milliseconds")
    for axes in (left, right):
        axes.set(xlabel="classes in the vocabulary", xscale="log")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(table["vocabulary"].unique(), [f"{size:,}" for size in table["vocabulary"].unique()])
        axes.minorticks_off()
        axes.legend(title="head")
    figure.suptitle(f"the head alone: {words} words of {features} features")
    figure.savefig(path, dpi=120)
    plt.close(figure)
