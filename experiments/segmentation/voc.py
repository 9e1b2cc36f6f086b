"""A folder in the layout of PASCAL VOC, checked file by file before anything is trained on it.

    JPEGImages/NAME.jpg or .png
    SegmentationClass/NAME.png      palette or 8-bit greyscale: the class of each pixel, 255 = void
    ImageSets/Segmentation/train.txt and val.txt, a NAME a line
    classes.txt                     where there is one: what label 0, 1, ... is called, a line each

after M. Everingham et al., "The PASCAL visual object classes challenge: a retrospective" (2015).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from experiments._door import InputError
from experiments.segmentation.scenes import VOID, Pair

NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "table", "dog",
    "horse", "motorbike", "person", "plant", "sheep", "sofa", "train", "monitor",
)  # fmt: skip
"""What VOC calls its classes."""


class Files(NamedTuple):
    """An image and its mask."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class Photographs:
    """Random access to the images and masks of a list, of whatever sizes they are."""

    files: tuple[Files, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Pair:
        image, mask = self.files[index]
        return Pair(read_pixels(image, "RGB"), read_mask(mask))


def voc_folder(folder: Path, classes: int | None) -> tuple[Photographs, Photographs, int]:
    """What to train on, what to test on and the number of classes: the masks' largest label + 1 unless given."""
    train, test = listed(folder, "train"), listed(folder, "val")
    with tqdm(dict.fromkeys((*train, *test)), unit="image", desc="checking") as bar:
        highest = {files: check(files, classes) for files in bar}
    for name, part in (("train", train), ("val", test)):
        if max(highest[files] for files in part) < 0:
            raise InputError(f"{list_of(folder, name)}: expected a labelled pixel in its masks, got {VOID} everywhere")
    found = classes or 1 + max(highest.values())
    if found < 2:
        raise InputError(f"{folder / 'SegmentationClass'}: expected masks of at least two classes, got one")
    return Photographs(train), Photographs(test), found


def class_names(folder: Path, classes: int) -> tuple[str, ...]:
    """From classes.txt; without one VOC's own, where there are as many, and else the labels."""
    path = folder / "classes.txt"
    if not path.is_file():
        return NAMES if classes == len(NAMES) else tuple(map(str, range(classes)))
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


def check(files: Files, classes: int | None) -> int:
    """The largest label of a pair that fits together, -1 where all is void."""
    image, labels = read_pixels(files.image, "RGB"), read_mask(files.mask)
    if labels.shape != image.shape[:2]:
        height, width = labels.shape
        raise InputError(
            f"{files.mask}: expected the size of {files.image}, {image.shape[1]}×{image.shape[0]}, got {width}×{height}"
        )
    highest = int(labels[labels != VOID].max(initial=0)) if (labels != VOID).any() else -1
    if classes is not None and highest >= classes:
        raise InputError(f"{files.mask}: expected labels below --classes {classes} or {VOID} (void), got {highest}")
    return highest


def read_mask(path: Path) -> UInt8[np.ndarray, "h w"]:
    labels = read_pixels(path, None)
    if labels.ndim != 2 or labels.dtype != np.uint8:
        kind = f"{labels.shape[-1]} channels" if labels.ndim == 3 else f"pixels of {labels.dtype}"
        raise InputError(f"{path}: expected a palette or 8-bit greyscale mask, got {kind}")
    return labels


def read_pixels(path: Path, mode: str | None) -> np.ndarray:
    """Every pixel decoded; a palette image gives its indices unless a mode is asked for."""
    try:
        with Image.open(path) as image:
            return np.asarray(image if mode is None else image.convert(mode))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot read the image: {error}") from None
