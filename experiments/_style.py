"""One style for all pictures: legible at a width of 800 pixels, in colours that colour-blind readers can tell apart.

A picture is at most `WIDE` inches wide, of which 800 pixels show 100 each: its smallest letters are 12 pixels high.
"""

from pathlib import Path

import matplotlib
import numpy as np
from cycler import cycler

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

WIDE = 8.0
BLACK, GREY, PALE = "#000000", "#767676", "#d9d9d9"
# M. Okabe and K. Ito, "Color universal design" (2008); the yellow is for areas, too pale for lines and marks.
BLUE, ORANGE, GREEN, RED, SKY, PINK, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442",
)  # fmt: skip
COLORS = BLUE, ORANGE, GREEN, RED, SKY, PINK

plt.rcParams.update(
    {
        "figure.figsize": (WIDE, 3.6),
        "figure.constrained_layout.use": True,
        "savefig.dpi": 150,
        "font.size": 10,
        "axes.titlesize": 10.5,
        "figure.titlesize": 10.5,
        "axes.labelsize": 10,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.fontsize": 9,
        "legend.title_fontsize": 9,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "axes.prop_cycle": cycler(color=COLORS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": PALE,
        "grid.linewidth": 0.6,
    }
)


def mix(color: str, ground: str, share: float) -> str:
    """A colour mixed with a share of another."""
    red, green, blue = share * np.array(to_rgb(color)) + (1 - share) * np.array(to_rgb(ground))
    return to_hex((red, green, blue))


def tint(color: str, share: float = 0.3) -> str:
    """A lighter colour, for areas behind black letters or marks."""
    return mix(color, "white", share)


def many_colors(count: int) -> list[str]:
    """So many colours for areas: every hue, then all lighter, then all darker, and from the start again.

    The first ten can be told apart beside black and white.
    """
    hues = BLUE, ORANGE, GREEN, RED, SKY, PINK, YELLOW, "#999999", "#882255", mix(GREEN, "white", 0.35)
    shades = [*hues, *(mix(hue, "white", 0.45) for hue in hues), *(mix(hue, "black", 0.5) for hue in hues)]
    return [shades[n % len(shades)] for n in range(count)]


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)
