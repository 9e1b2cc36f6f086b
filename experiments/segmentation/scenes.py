"""Scenes of handwritten digits on textured backgrounds, each determined by (seed, index)."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageFilter
from sklearn.model_selection import train_test_split

DIGITS = Path(__file__).parents[2] / "data" / "digits.csv"
NAMES = ("background", *"0123456789")
VOID = 255


class Pair(NamedTuple):
    """An image and the class of each of its pixels."""

    image: UInt8[np.ndarray, "h w 3"]
    labels: UInt8[np.ndarray, "h w"]


@dataclass(frozen=True)
class Scenes:
    """Random access to `count` square scenes; scene n is always the same."""

    pixels: UInt8[np.ndarray, "digits 8 8"]
    digits: Int[np.ndarray, " digits"]
    size: int
    seed: tuple[int, ...]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Pair:
        rng = np.random.default_rng((*self.seed, index))
        scene, labels = texture(rng, self.size), np.zeros((self.size, self.size), np.uint8)
        for _ in range(rng.integers(2, 3 + self.size // 16)):
            n = rng.integers(len(self.digits))
            place(rng, self.pixels[n], 1 + self.digits[n], scene, labels)
        if rng.random() < 0.5:
            scene = 1 - scene  # dark ink on light paper
        noisy = scene + rng.normal(0, 0.03, scene.shape)
        return Pair((255 * noisy.clip(0, 1)).astype(np.uint8), labels)


def read_digits(path: Path = DIGITS) -> tuple[UInt8[np.ndarray, "digits 8 8"], Int[np.ndarray, " digits"]]:
    table = pd.read_csv(path).to_numpy()
    return np.asarray(15.9375 * table[:, 1:], np.uint8).reshape(-1, 8, 8), table[:, 0]


def digit_scenes(seed: int, size: int, held_out: int) -> tuple[Scenes, Scenes]:
    """An endless supply of training scenes and `held_out` test scenes, of different digits."""
    pixels, digits = read_digits()
    train, test = train_test_split(np.arange(digits.size), test_size=0.3, stratify=digits, random_state=seed)
    return (
        Scenes(pixels[train], digits[train], size, (seed, 0), 2**31),
        Scenes(pixels[test], digits[test], size, (seed, 1), held_out),
    )


def texture(rng: np.random.Generator, size: int) -> Float[np.ndarray, "size size 3"]:
    """Coloured noise of three grains, at most half bright."""
    total = np.zeros((size, size, 3))
    for grain in (3, 8, 24):
        noise = Image.fromarray(rng.integers(0, 256, (grain, grain, 3), np.uint8))
        total += rng.uniform(0, 0.17) * np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC)) / 255
    return total


def place(rng: np.random.Generator, digit: UInt8[np.ndarray, "8 8"], label: int, scene, labels) -> None:
    """Paint a digit and the void border around it, or nothing if it would hide too much of other digits."""
    size = len(labels)
    height, width = rng.integers(18, 31, 2)
    top, left = rng.integers(0, size - height + 1), rng.integers(0, size - width + 1)
    canvas = Image.new("L", (size, size))
    canvas.paste(
        Image.fromarray(digit).resize((int(width), int(height)), Image.Resampling.BICUBIC), (int(left), int(top))
    )
    ink = np.asarray(canvas) / 255
    core = canvas.point([255 * (value > 100) for value in range(256)])
    inner, outer = np.asarray(core) > 0, np.asarray(core.filter(ImageFilter.MaxFilter(3))) > 0
    if np.mean(labels[outer] > 0) > 0.15:
        return
    labels[outer] = VOID
    labels[inner] = label
    scene += ink[..., None] * (rng.uniform(0.65, 1, 3) - scene)
