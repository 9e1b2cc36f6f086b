"""A folder of photographs and masks, checked file by file before anything is trained on it."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from experiments._door import InputError
from experiments.segmentation.coding import DEFAULT, Coding, check_two_classes, check_values, sentence
from experiments.segmentation.files import is_turned, read_mask, read_photograph
from experiments.segmentation.layouts import Files, find_parts, read_lines
from experiments.segmentation.scenes import VOID, Pair

NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "table", "dog",
    "horse", "motorbike", "person", "plant", "sheep", "sofa", "train", "monitor",
)  # fmt: skip
"""The names of VOC's classes."""


CLASSES = "classes.txt"


@dataclass(frozen=True)
class Photographs:
    """Random access to the images and masks of a list, of any sizes."""

    files: tuple[Files, ...]
    coding: Coding

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Pair:
        image, mask = self.files[index]
        return Pair(read_photograph(image), self.coding.labels(read_mask(mask, self.coding.colours)))


class Folder(NamedTuple):
    """The training images, the test images and the names of the classes."""

    train: Photographs
    test: Photographs
    names: tuple[str, ...]


def read_folder(folder: Path, coding: Coding = DEFAULT, classes: int | None = None, seed: int = 0) -> Folder:
    """Read a folder, with the given number of classes, or else up to the last class that occurs."""
    parts = find_parts(folder, seed)
    with tqdm(dict.fromkeys((*parts.train.files, *parts.test.files)), unit="image", desc="checking") as bar:
        counts = {files: count_values(files, coding, classes) for files in bar}
    taught, held_out = (np.sum([counts[files] for files in part.files], 0) for part in parts)
    for part, total in zip(parts, (taught, held_out), strict=True):
        if not coding.occurring(total):
            values = sentence(map(coding.word, np.flatnonzero(total).tolist()))
            raise InputError(f"{part.source}: expected a labelled pixel in its masks, got {values} everywhere")
    check_two_classes(parts.train.source, taught, coding)
    met = coding.occurring(taught + held_out)
    names = class_names(folder, classes or len(coding.values) or 1 + met[-1], coding)
    print(f"{occurrence(met, names, numbered=not classes)}; {void_share(taught + held_out, coding)}")
    if untaught := [names[label] for label in met if label not in coding.occurring(taught)]:
        print(f"held out, but never trained on: {', '.join(untaught)}")
    return Folder(Photographs(parts.train.files, coding), Photographs(parts.test.files, coding), names)


def occurrence(met: list[int], names: tuple[str, ...], numbered: bool) -> str:
    """How many classes occur; if not all do, which ones, and which option keeps only these."""
    said = f"{len(met)} of {len(names)} classes occur"
    if len(met) == len(names):
        return said
    values = [names[label] for label in met]
    remedy = numbered and names == tuple(map(str, DEFAULT.classes[: len(names)]))
    alone = f" (--values {' '.join(values)} keeps these alone)" if remedy else ""
    return f"{said}: {', '.join(values)}{alone}"


def void_share(counts: Int[np.ndarray, " 256"], coding: Coding) -> str:
    """The share of void pixels; "no value is void" if the options name none."""
    void = np.flatnonzero(coding.table == VOID).tolist()
    share = f"{counts[void].sum() / counts.sum():.1%} of the pixels are void"
    return f"{share} ({sentence(map(coding.word, void))})" if void else "no value is void"


def class_names(folder: Path, classes: int, coding: Coding = DEFAULT) -> tuple[str, ...]:
    """The names in the colours or classes.txt; without them VOC's names if their number fits, else the mask values."""
    words = tuple(coding.word(value) for value in coding.classes[:classes])
    path = folder / CLASSES
    if any(coding.names):
        return tuple(coding.names[value] or word for value, word in zip(coding.classes, words, strict=True))
    if not path.is_file():
        return NAMES if coding == DEFAULT and classes == len(NAMES) else words
    names = tuple(line.strip() for line in read_lines(path, "one name per line") if line.strip())
    if len(names) != classes:
        raise InputError(f"{path}: expected the names of {classes} classes, one per line, got {len(names)}")
    return names


def count_values(files: Files, coding: Coding, classes: int | None) -> Int[np.ndarray, " 256"]:
    """The number of pixels of each value in a mask, which must fit its photograph."""
    image, values = read_photograph(files.image), read_mask(files.mask, coding.colours)
    if values.shape != image.shape[:2]:
        height, width = values.shape
        remedy = (
            ": the photograph's EXIF orientation rotates it, so rotate the mask too" if is_turned(files.image) else ""
        )
        expected = f"expected the size of {files.image}, {image.shape[1]}×{image.shape[0]}"
        raise InputError(f"{files.mask}: {expected}, got {width}×{height}{remedy}")
    counts = np.bincount(values.ravel(), minlength=256)
    check_values(files.mask, np.flatnonzero(counts), coding, classes)
    return counts
