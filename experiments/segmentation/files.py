"""Read the pixels of photographs and masks."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

from experiments._door import InputError
from experiments.segmentation.coding import Colour
from experiments.segmentation.colours import in_short, index_colours

LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
"""Lossy formats: at the border of two classes they create pixels of other classes."""


def read_photograph(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """A photograph rotated by its EXIF orientation, with three channels of 8 bits: the upper 8 of 16, grey repeated."""
    with opened(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("I", "F"):
            raise InputError(f"{path}: expected 8 or 16 bits per channel, got 32: save the photograph with 8 or 16")
        if upright.mode.startswith("I;16"):
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return np.asarray(upright.convert("RGB"))


def read_mask(path: Path, colours: tuple[Colour, ...] = ()) -> UInt8[np.ndarray, "h w"]:
    """The values as stored: a palette's indices, or grey values of 1, 2 or 4 bits without scaling.

    Where there are colours, the place of each pixel's among them.
    """
    with opened(path) as image:
        if image.format in LOSSY:
            raise InputError(
                f"{path}: expected a mask in a lossless format such as PNG, got {image.format}, which changes "
                "the values: export the mask again"
            )
        levels = 2 ** stored_bits(image) - 1
        upright = ImageOps.exif_transpose(image)
    if colours:
        return index_colours(np.asarray(upright.convert("RGB")), colours, path)
    if upright.mode == "1":
        return np.asarray(upright).astype(np.uint8)
    if upright.mode not in ("P", "L"):
        raise InputError(f"{path}: expected a palette or 8-bit greyscale mask, got {describe(upright)}")
    return np.asarray(upright) // (255 // levels)


def describe(mask: Image.Image) -> str:
    """Why a file is not a mask, and how to read or store masks."""
    if mask.mode in ("RGB", "RGBA"):
        found = f"{len(mask.mode)} channels of the colours {in_short(np.asarray(mask.convert('RGB')))}"
        return f"{found}: pass --colours FILE with a line 'R G B name' for each"
    return f"Pillow's mode {mask.mode}: save it in mode L, 8 bits per pixel"


def stored_bits(image: Image.Image) -> int:
    """The bits per grey pixel in the file, before Pillow scales them to 8."""
    tiles = getattr(image, "tile", ()) if image.mode == "L" else ()
    raw = re.search(r"\bL;([24])\b", str(tiles))
    return int(raw[1]) if raw else 8


def is_turned(path: Path) -> bool:
    """Whether a photograph is displayed in a different orientation than it is stored in."""
    with opened(path) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: expected an image, got a folder") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot read the image: {error}") from None
