"""Where in a folder the photographs and their masks are.

    JPEGImages/NAME.jpg                       PASCAL VOC: photographs,
    SegmentationClass/NAME.png                the class of each pixel in a palette or in grey, 255 where it has none,
    ImageSets/Segmentation/train.txt, val.txt      and what to train on and to hold out, a NAME a line

    train.txt, val.txt                        SegNet: a line "path/photograph.png path/mask.png" for each photograph

    images/NAME.jpg                           without lists: of photographs a fifth, drawn by the seed, is held out
    masks/NAME.png or labels/NAME.png

The first is after M. Everingham et al., "The PASCAL visual object classes challenge: a retrospective" (2015), the
second after V. Badrinarayanan, A. Kendall and R. Cipolla, "SegNet" (2017).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments._door import InputError

IMAGES, MASKS = ("JPEGImages", "images"), ("SegmentationClass", "masks", "labels")
EXPECTED = (
    "JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/train.txt and val.txt with one NAME per line; or "
    "train.txt and val.txt with a line 'photograph.png mask.png' for each; or images/NAME.jpg and masks/NAME.png or "
    "labels/NAME.png"
)
PHOTOGRAPHS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
LABELLED = (".png", ".tif", ".tiff", ".bmp", ".gif", ".jpg", ".jpeg", ".webp")
"""The last three are found too, so that they are refused as lossy and not as missing."""
PAIR = re.compile(r"(\S.*\.(?:{0}))\s+(\S.*\.(?:{0}))".format("|".join(x[1:] for x in LABELLED)), re.IGNORECASE)
HELD_OUT = 1 / 5
ENTRIES = 6


class Files(NamedTuple):
    """A photograph and its mask."""

    image: Path
    mask: Path


class Part(NamedTuple):
    """A folder's layout, and the lists or patterns that select its files."""

    source: Path
    files: tuple[Files, ...]


class Parts(NamedTuple):
    """The files to train on and to hold out."""

    train: Part
    test: Part


def find_parts(folder: Path, seed: int) -> Parts:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, given by --data")
    for lists in (folder / "ImageSets" / "Segmentation", folder):
        if any((lists / name).is_file() for name in ("train.txt", "val.txt")):
            return Parts(*(Part(lists / name, listed(folder, lists / name)) for name in ("train.txt", "val.txt")))
    if all(any((folder / name).is_dir() for name in names) for names in (IMAGES, MASKS)):
        return drawn(folder, seed)
    entries = sorted(f"{path.name}{'/' * path.is_dir()}" for path in folder.iterdir() if path.name[0] != ".")
    found = ", ".join(entries[:ENTRIES]) or "nothing"
    more = f" and {len(entries) - ENTRIES} more" if len(entries) > ENTRIES else ""
    raise InputError(f"{folder}: expected {EXPECTED}; got {found}{more}")


def listed(folder: Path, path: Path) -> tuple[Files, ...]:
    """The files of a list; each line has a name or two paths."""
    if not path.is_file():
        raise InputError(f"{path}: no such list; train.txt and val.txt say what to train on and what to hold out")
    written = enumerate(read_lines(path, "one name per line"), 1)
    lines = [(number, line.strip()) for number, line in written if line.strip()]
    if not lines:
        raise InputError(f"{path}: expected at least one name, got an empty list")
    found = []
    for number, line in lines:
        files = pair(folder, *match.groups()) if (match := PAIR.fullmatch(line)) else named(folder, line)
        for file in files:
            if not file.is_file():
                raise InputError(f"{file}: no such file, listed in {path}, line {number}")
        found.append(files)
    return tuple(found)


def pair(folder: Path, image: str, mask: str) -> Files:
    return Files(inside(folder, image), inside(folder, mask))


def inside(folder: Path, path: str) -> Path:
    """The file of a list's path, without the leading folders of the machine where the list was written."""
    parts = Path(path.replace("\\", "/")).parts
    tails = (folder.joinpath(*parts[n:]) for n in range(len(parts)))
    return next((tail for tail in tails if tail.is_file()), folder / path)


def named(folder: Path, name: str) -> Files:
    """Files in the two subfolders; a name in the list may have an ending."""
    bare = str(Path(name).with_suffix("")) if Path(name).suffix.lower() in PHOTOGRAPHS else name
    return Files(
        with_ending(subfolder(folder, IMAGES), bare, PHOTOGRAPHS), with_ending(subfolder(folder, MASKS), bare, LABELLED)
    )


def subfolder(folder: Path, names: Sequence[str]) -> Path:
    return next((folder / name for name in names if (folder / name).is_dir()), folder / names[0])


def with_ending(folder: Path, name: str, endings: Sequence[str]) -> Path:
    """The file with a name; its ending may be in capitals. If there is no file, the path with the first ending."""
    paths = [folder / f"{name}{written}" for ending in endings for written in (ending, ending.upper())]
    return next((path for path in paths if path.is_file()), paths[0])


def drawn(folder: Path, seed: int) -> Parts:
    """Hold out a fifth; each photograph needs a mask, and each mask a photograph."""
    images, masks = subfolder(folder, IMAGES), subfolder(folder, MASKS)
    names, labelled = stems(images, PHOTOGRAPHS), stems(masks, LABELLED)
    if alone := sorted(names ^ labelled):
        here, there = (images, masks) if alone[0] in names else (masks, images)
        raise InputError(f"{here}: expected a file of the same name in {there} for each, got none for {alone[0]}")
    if len(names) < 2:
        raise InputError(f"{images}: expected two photographs or more, one to be held out, got {len(names)}")
    files = [named(folder, name) for name in sorted(names)]
    order = np.random.default_rng(seed).permutation(len(files))
    count = max(1, round(HELD_OUT * len(files)))
    print(f"{len(files) - count} photographs to train on, {count} held out, drawn by --seed {seed}")
    test, train = (tuple(files[n] for n in sorted(numbers)) for numbers in (order[:count], order[count:]))
    return Parts(Part(masks, train), Part(masks, test))


def stems(folder: Path, endings: Sequence[str]) -> set[str]:
    return {path.stem for path in folder.iterdir() if path.suffix.lower() in endings and path.name[0] != "."}


def read_lines(path: Path, expected: str) -> list[str]:
    """The lines of a text, which on Windows may begin with a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: expected text, {expected}") from None
