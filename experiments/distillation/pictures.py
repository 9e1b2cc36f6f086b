"""A picture of what was learnt from how many bytes."""

from pathlib import Path

import pandas as pd

from experiments._style import BLUE, ORANGE, PALE, WIDE, plt, save


def plot_students(table: pd.DataFrame, path: Path) -> None:
    """The perplexity of each network, and next to it its loss and its entropy."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 3.6), sharey=True)
    rows = range(len(table))
    left.scatter(table["perplexity"], rows, color=BLUE)
    for row, perplexity in zip(rows, table["perplexity"], strict=True):
        left.annotate(f"{perplexity:.4g}", (perplexity, row), (7, 0), textcoords="offset points", va="center")
    left.set(title="perplexity of known held-out tokens", xscale="log", xlim=(None, 3 * table["perplexity"].max()))
    stored = table["bytes_a_word"].map(lambda count: "" if pd.isna(count) else f", {count:.0f} bytes")
    left.set_yticks(rows, table["network"] + stored)
    left.invert_yaxis()
    right.hlines(rows, table["loss"], table["entropy"], color=PALE, linewidth=3, zorder=0)
    right.scatter(table["loss"], rows, color=BLUE, label="loss")
    right.scatter(table["entropy"], rows, color=ORANGE, marker="D", label="entropy: the loss it expects")
    right.set(title="nats per known held-out token", xlim=(0, None))
    figure.legend(loc="outside lower right", ncols=2)
    for axes in (left, right):
        axes.grid(axis="x")
    save(figure, path)
