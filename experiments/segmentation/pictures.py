"""Pictures of what was learnt."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from jaxtyping import UInt8
from matplotlib.patches import Patch

from experiments.segmentation.scenes import VOID, Pair

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROWS = 6
"""Images shown."""
RED, GREY = np.array([215, 40, 40], np.uint8), np.array([225, 225, 225], np.uint8)


def palette() -> UInt8[np.ndarray, "256 3"]:
    """Black for class 0, white for void, and between them twenty colours in turn."""
    colors = matplotlib.colormaps["tab20"](np.r_[0:20:2, 1:20:2])[:, :3]
    return (255 * np.concatenate([np.zeros((1, 3)), np.resize(colors, (254, 3)), np.ones((1, 3))])).astype(np.uint8)


def plot_examples(
    pairs: Sequence[Pair], predictions: Sequence[UInt8[np.ndarray, "h w"]], names: Sequence[str], path: Path
) -> None:
    """Image, truth, prediction and errors, a row an image."""
    colors = palette()
    figure, axes = plt.subplots(
        len(pairs), 4, figsize=(8, 2 * len(pairs) + 1), layout="constrained", squeeze=False,
        subplot_kw={"xticks": [], "yticks": []},
    )  # fmt: skip
    for n, (pair, predicted) in enumerate(zip(pairs, predictions, strict=True)):
        valid = pair.labels != VOID
        wrong = np.where((predicted != pair.labels)[..., None], RED, GREY)
        wrong[~valid] = 255
        share = np.mean(predicted[valid] == pair.labels[valid]) if valid.any() else np.nan
        pictures = {
            "image": pair.image,
            "truth": colors[pair.labels],
            "prediction": colors[predicted],
            f"errors ({1 - share:.1%})": wrong,
        }
        for axis, (title, picture) in zip(axes[n], pictures.items(), strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(title, fontsize=9)
    shown = np.unique(np.concatenate([x.ravel() for x in (*predictions, *(pair.labels for pair in pairs))]))
    entries = [
        Patch(facecolor=tuple(colors[label] / 255), edgecolor="grey", label="void" if label == VOID else names[label])
        for label in shown
    ]
    figure.suptitle("held-out images; errors in red, void in white")
    figure.legend(handles=entries, loc="outside lower center", ncols=6, fontsize=8, title="class")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_loss(table: pd.DataFrame, held_out: dict[str, float], path: Path) -> None:
    """The curves of training, batch by batch and smoothed, beside the held-out scores at the end."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    smooth = table.rolling(max(1, len(table) // 50), min_periods=1).mean()
    left.semilogy(table["step"], table["loss"], color="tab:blue", alpha=0.3, label="each batch")
    left.semilogy(table["step"], smooth["loss"], color="tab:blue", label="running mean")
    left.set(title="training loss", xlabel="step", ylabel="cross-entropy per pixel (nats)")
    left.legend()
    for name, color in (("pixel_accuracy", "tab:green"), ("mean_iou", "tab:orange")):
        words = "pixel accuracy" if name == "pixel_accuracy" else "mean IoU"
        right.plot(table["step"], smooth[name], color=color, label=f"{words}, training batches")
        right.axhline(held_out[name], color=color, linestyle="--", label=f"{words}, held out at the end")
    right.set(title="scores", xlabel="step", ylabel="fraction", ylim=(0, 1.02))
    right.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
