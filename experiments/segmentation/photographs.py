"""A folder in the layout of PASCAL VOC, checked file by file before anything is trained on it.

    JPEGImages/NAME.jpg or .png
    SegmentationClass/NAME.png      palette or greyscale: the class of each pixel, 255 = void
    ImageSets/Segmentation/train.txt and val.txt, a NAME a line
    classes.txt                     where there is one: what label 0, 1, ... is called, a line each

after M. Everingham et al., "The PASCAL visual object classes challenge: a retrospective" (2015).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from experiments._door import InputError
from experiments.segmentation.coding import DEFAULT, Coding, check_two_classes, check_values, sentence
from experiments.segmentation.files import is_turned, read_mask, read_photograph
from experiments.segmentation.scenes import Pair

NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "table", "dog",
    "horse", "motorbike", "person", "plant", "sheep", "sofa", "train", "monitor",
)  # fmt: skip
"""What VOC calls its classes."""


CLASSES = "classes.txt"


class Files(NamedTuple):
    """An image and its mask."""

    image: Path
    mask: Path


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


def read_folder(folder: Path, coding: Coding = DEFAULT, classes: int | None = None) -> Folder:
    """With as many classes as are given, or else up to the last that occurs."""
    lists = {list_of(folder, name): listed(folder, name) for name in ("train", "val")}
    train, test = lists.values()
    with tqdm(dict.fromkeys((*train, *test)), unit="image", desc="checking") as bar:
        counts = {files: count_values(files, coding, classes) for files in bar}
    taught, held_out = (np.sum([counts[files] for files in part], 0) for part in (train, test))
    for path, total in zip(lists, (taught, held_out), strict=True):
        if not coding.occurring(total):
            values = sentence(map(coding.word, np.flatnonzero(total)))
            raise InputError(f"{path}: expected a labelled pixel in its masks, got {values} everywhere")
    check_two_classes(list_of(folder, "train"), taught, coding)
    met = coding.occurring(taught + held_out)
    names = class_names(folder, classes or len(coding.values) or 1 + met[-1], coding)
    if len(met) < len(names):
        shown = ", ".join(names[label] for label in met)
        numbered = not classes and names == tuple(map(str, DEFAULT.classes[: len(names)]))
        remedy = f"; --values {' '.join(names[label] for label in met)} keeps these alone" if numbered else ""
        print(f"{len(met)} of {len(names)} classes occur: {shown}{remedy}")
    if untaught := [names[label] for label in met if label not in coding.occurring(taught)]:
        print(f"held out, but never trained on: {', '.join(untaught)}")
    return Folder(Photographs(train, coding), Photographs(test, coding), names)


def class_names(folder: Path, classes: int, coding: Coding = DEFAULT) -> tuple[str, ...]:
    """From the colours or classes.txt; without them VOC's own, where there are as many; else what masks hold."""
    words = tuple(coding.word(value) for value in coding.classes[:classes])
    path = folder / CLASSES
    if any(coding.names):
        return tuple(coding.names[value] or word for value, word in zip(coding.classes, words, strict=True))
    if not path.is_file():
        return NAMES if coding == DEFAULT and classes == len(NAMES) else words
    try:
        names = tuple(path.read_text().strip().splitlines())
    except UnicodeDecodeError:
        raise InputError(f"{path}: expected text, a name a line") from None
    if len(names) != classes:
        raise InputError(f"{path}: expected the names of {classes} classes, a line each, got {len(names)}")
    return names


def list_of(folder: Path, part: str) -> Path:
    return folder / "ImageSets" / "Segmentation" / f"{part}.txt"


def listed(folder: Path, part: str) -> tuple[Files, ...]:
    path = list_of(folder, part)
    try:
        names = [(number, line.strip()) for number, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
    except UnicodeDecodeError:
        raise InputError(f"{path}: expected text, a name a line") from None
    if not names:
        raise InputError(f"{path}: expected at least one name, got an empty list")
    files = []
    for number, name in names:
        images = [folder / "JPEGImages" / f"{name}{ending}" for ending in (".jpg", ".png")]
        mask = folder / "SegmentationClass" / f"{name}.png"
        image = next((image for image in images if image.is_file()), images[0])
        for file in (image, mask):
            if not file.is_file():
                raise InputError(f"{file}: no such file, listed in {path}, line {number}")
        files.append(Files(image, mask))
    return tuple(files)


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
