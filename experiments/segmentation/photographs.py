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
"""What VOC calls its classes."""


CLASSES = "classes.txt"


@dataclass(frozen=True)
class Photographs:
    """Random access to the images and masks of a list, of whatever sizes they are."""

    files: tuple[Files, ...]
    coding: Coding

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Pair:
        image, mask = self.files[index]
        return Pair(read_photograph(image), self.coding.labels(read_mask(mask, self.coding.colours)))


class Folder(NamedTuple):
    """What to train on, what to test on and what the classes are called."""

    train: Photographs
    test: Photographs
    names: tuple[str, ...]


def read_folder(folder: Path, coding: Coding = DEFAULT, classes: int | None = None, seed: int = 0) -> Folder:
    """With as many classes as are given, or else up to the last that occurs."""
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
    """How many classes occur; which, where some do not; and, if these are their values, how to keep these alone."""
    said = f"{len(met)} of {len(names)} classes occur"
    if len(met) == len(names):
        return said
    values = [names[label] for label in met]
    remedy = numbered and names == tuple(map(str, DEFAULT.classes[: len(names)]))
    alone = f" (--values {' '.join(values)} keeps these alone)" if remedy else ""
    return f"{said}: {', '.join(values)}{alone}"


def void_share(counts: Int[np.ndarray, " 256"], coding: Coding) -> str:
    """How much is no class: none of it, where masks have another value for it than is said."""
    void = np.flatnonzero(coding.table == VOID).tolist()
    share = f"{counts[void].sum() / counts.sum():.1%} of the pixels are void"
    return f"{share} ({sentence(map(coding.word, void))})" if void else "no value is void"


def class_names(folder: Path, classes: int, coding: Coding = DEFAULT) -> tuple[str, ...]:
    """From the colours or classes.txt; without them VOC's own, where there are as many; else what masks hold."""
    words = tuple(coding.word(value) for value in coding.classes[:classes])
    path = folder / CLASSES
    if any(coding.names):
        return tuple(coding.names[value] or word for value, word in zip(coding.classes, words, strict=True))
    if not path.is_file():
        return NAMES if coding == DEFAULT and classes == len(NAMES) else words
    names = tuple(line.strip() for line in read_lines(path, "a name a line") if line.strip())
    if len(names) != classes:
        raise InputError(f"{path}: expected the names of {classes} classes, one per line, got {len(names)}")
    return names


def count_values(files: Files, coding: Coding, classes: int | None) -> Int[np.ndarray, " 256"]:
    """How many pixels have each value in the mask of a pair that fits together."""
    image, values = read_photograph(files.image), read_mask(files.mask, coding.colours)
    if values.shape != image.shape[:2]:
        height, width = values.shape
        remedy = (
            ": its EXIF orientation turns the photograph, and has to turn the mask" if is_turned(files.image) else ""
        )
        expected = f"expected the size of {files.image}, {image.shape[1]}×{image.shape[0]}"
        raise InputError(f"{files.mask}: {expected}, got {width}×{height}{remedy}")
    counts = np.bincount(values.ravel(), minlength=256)
    check_values(files.mask, np.flatnonzero(counts), coding, classes)
    return counts
