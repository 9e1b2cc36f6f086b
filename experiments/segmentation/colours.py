"""Masks in colours, and the table of the colours' classes.

    0 0 0 void
    128 64 128 road
    0 0 192

One line per class, in their order: red, green, blue and perhaps a name. Lines named void are no class.
"""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from experiments._door import InputError
from experiments.segmentation.coding import Coding, Colour, in_words, sentence
from experiments.segmentation.layouts import read_lines

SHOWN = 4


def read_colours(path: Path) -> Coding:
    """Read the table of colours; the value of a pixel is then the line of its colour."""
    written = enumerate(read_lines(path, "a line 'R G B name' for each class"), 1)
    lines = {number: line.split(maxsplit=3) for number, line in written if line.strip()}
    table: dict[Colour, str] = {}
    for number, (*parts, name) in ((number, [*line, ""][:4]) for number, line in lines.items()):
        if len(parts) != 3 or not all(part.isdecimal() and int(part) <= 255 for part in parts):
            got = " ".join([*parts, name]).strip()
            raise InputError(f"{path}, line {number}: expected 'R G B name', three integers from 0 to 255, got '{got}'")
        red, green, blue = colour = tuple(map(int, parts))
        if colour in table:
            raise InputError(f"{path}, line {number}: expected each colour once, got {in_words(colour)} again")
        table[red, green, blue] = name.strip()
    void = [n for n, name in enumerate(table.values()) if name.casefold() == "void"]
    values = [n for n in range(len(table)) if n not in void]
    if not 2 <= len(values) <= 255 or len(table) > 256:
        raise InputError(f"{path}: expected the colours of 2 to 255 classes, one per line, got {len(values)}")
    return Coding(tuple(values), tuple(void), tuple(table), tuple(table.values()))


def index_colours(
    pixels: UInt8[np.ndarray, "h w 3"], colours: tuple[Colour, ...], path: Path
) -> UInt8[np.ndarray, "h w"]:
    """The line of each pixel's colour."""
    table, codes = np.array([number(np.array(colour)) for colour in colours]), number(pixels)
    order = np.argsort(table)
    found = order[np.searchsorted(table, codes, sorter=order).clip(max=len(table) - 1)]
    if (wrong := table[found] != codes).any():
        row, column = np.argwhere(wrong)[0]
        got = f"{in_words(pixels[row, column])} in row {row}, column {column}"
        raise InputError(f"{path}: expected only the colours of --colours, got {got}, and {wrong.sum()} such pixels")
    return found.astype(np.uint8)


def number(colours: np.ndarray) -> np.ndarray:
    """One number for each colour."""
    return colours.astype(int) @ [1 << 16, 1 << 8, 1]


def in_short(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    """The number of colours, and some of them, for messages."""
    colours = np.unique(pixels.reshape(-1, 3), axis=0)
    shown = [in_words(colour) for colour in colours[:SHOWN]]
    return sentence(shown) if len(colours) <= SHOWN else f"{', '.join(shown)} and {len(colours) - SHOWN} more"
