"""Pictures of the training and its predictions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import UInt8
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from experiments._style import BLUE, GREEN, GREY, ORANGE, PALE, WIDE, many_colors, plt, save
from experiments.segmentation.coding import Coding
from experiments.segmentation.scenes import VOID, Pair

ROWS = 4
"""The number of images shown."""
WRONG, RIGHT = ((255 * np.array(to_rgb(color))).astype(np.uint8) for color in (BLUE, PALE))

Palette = UInt8[np.ndarray, "256 3"]


def digits_palette() -> Palette:
    """Black for the background, white for void, and colours far apart between them."""
    return (255 * np.array([*map(to_rgb, ("black", *many_colors(254), "white"))])).astype(np.uint8)


def voc_palette() -> Palette:
    """PASCAL VOC's palette, computed from the bits of a label: cream for void."""
    bits = np.arange(256)[:, None, None] >> np.arange(24).reshape(8, 3) & 1  # label, place, channel
    return (bits << np.arange(7, -1, -1)[:, None]).sum(1).astype(np.uint8)


def palette_of(coding: Coding) -> Palette:
    """The colours of the masks, or VOC's if they have none."""
    colors = voc_palette()
    for colour, label in zip(coding.colours, coding.table, strict=False):
        colors[label] = colour
    return colors


def plot_examples(
    pairs: Sequence[Pair],
    predictions: Sequence[UInt8[np.ndarray, "h w"]],
    names: Sequence[str],
    colors: Palette,
    path: Path,
) -> None:
    """Image, truth, prediction and errors, one row per image."""
    heights = [pair.labels.shape[0] / pair.labels.shape[1] for pair in pairs]
    figure, axes = plt.subplots(
        len(pairs), 4, figsize=(WIDE, 2 * sum(heights) + 1.3), height_ratios=heights, squeeze=False,
        subplot_kw={"xticks": [], "yticks": []},
    )  # fmt: skip
    for row, pair, predicted in zip(axes, pairs, predictions, strict=True):
        valid = pair.labels != VOID
        errors = np.where((predicted != pair.labels)[..., None], WRONG, RIGHT)
        errors[~valid] = 255
        share = np.mean(predicted[valid] == pair.labels[valid]) if valid.any() else np.nan
        for axis, picture in zip(row, (pair.image, colors[pair.labels], colors[predicted], errors), strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.spines[:].set_visible(False)
        row[-1].set_xlabel(f"{1 - share:.1%} wrong")
    for axis, title in zip(axes[0], ("held-out image", "truth", "prediction", "errors in blue"), strict=True):
        axis.set_title(title)
    shown = np.unique(np.concatenate([x.ravel() for x in (*predictions, *(pair.labels for pair in pairs))]))
    entries = [
        Patch(facecolor=tuple(colors[label] / 255), edgecolor=GREY, label="void" if label == VOID else names[label])
        for label in shown
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=6)
    save(figure, path)


def plot_loss(table: pd.DataFrame, held_out: dict[str, float], path: Path) -> None:
    """The curves of training, per batch and smoothed, and the held-out scores."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 4.2))
    smooth = table[["loss", "pixel_accuracy", "mean_iou"]].rolling(max(1, len(table) // 50), min_periods=1).mean()
    left.semilogy(table["step"], table["loss"], color=PALE, lw=1, label="each batch")
    left.semilogy(table["step"], smooth["loss"], color=BLUE, label="running mean")
    left.set(title="training loss", xlabel="step", ylabel="cross-entropy per pixel (nats)")
    left.legend()
    for name, color in (("pixel_accuracy", GREEN), ("mean_iou", ORANGE)):
        words = "pixel accuracy" if name == "pixel_accuracy" else "mean IoU"
        right.plot(table["step"], smooth[name], color=color, lw=1, label=f"{words}, mean of training batches")
        on_the_way = table.dropna(subset=f"held_out_{name}")
        right.plot(on_the_way["step"], on_the_way[f"held_out_{name}"], "o--", ms=3, color=color,
                   label=f"{words}, held out ({held_out[name]:.3f} at the end)")  # fmt: skip
    right.set(title="scores", xlabel="step", ylabel="fraction", ylim=(0, 1.02))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    save(figure, path)


def plot_classes(shares: Sequence[float | None], names: Sequence[str], mean: float, path: Path) -> None:
    """Intersection over union of each class that occurs, the best first."""
    met = sorted((share, name) for share, name in zip(shares, names, strict=True) if share is not None)
    figure, axes = plt.subplots(figsize=(6.4, 1.2 + 0.24 * len(met)))
    bars = axes.barh([name for _, name in met], [share for share, _ in met], color=BLUE)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    axes.axvline(mean, color=ORANGE, linestyle="--", label=f"mean: {mean:.2f}")
    axes.set(title="held-out images, by class", xlabel="intersection over union", xlim=(0, 1.08))
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower right")
    save(figure, path)
