"""A picture of what was learnt from how many bytes."""

from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = ("tab:blue", "tab:green", "tab:orange", "tab:red", "tab:olive", "tab:purple")


def plot_students(table: pd.DataFrame, path: Path) -> None:
    """Perplexity over bytes a word, and beside it the loss and what each network expects it to be."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    students = table[table["bytes_a_word"].notna()]
    teacher = table[table["bytes_a_word"].isna()].iloc[0]
    for color, (_, row) in zip(COLORS, students.iterrows(), strict=True):
        left.plot(row["bytes_a_word"], row["perplexity"], "o", color=color, markersize=9, label=row["network"])
    left.axhline(teacher["perplexity"], color="grey", linestyle=":", label="teacher")
    left.set(
        title="what was learnt, from what was stored",
        xlabel="bytes stored a word",
        ylabel="perplexity of known held-out words",
        xscale="log",
        yscale="log",
    )
    left.legend(title="learnt from", fontsize=8)
    for offset, name in ((-0.2, "loss"), (0.2, "entropy")):
        bars = right.bar([n + offset for n in range(len(table))], table[name], 0.38, label=name)
        right.bar_label(bars, fmt="%.2f", fontsize=7)
    right.set_xticks(range(len(table)), [str(name).replace("-", "\n") for name in table["network"]], fontsize=8)
    right.set(title="loss, and the entropy each network expects it to be", ylabel="nats per known held-out word")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
