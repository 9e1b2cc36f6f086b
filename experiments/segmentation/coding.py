"""The meaning of the values in masks: a class each, or void."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from experiments._door import InputError
from experiments.segmentation.scenes import VOID

NEITHER = -1

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Coding:
    """The values of class 0, 1, ..., and the void values; without class values, all other values in their order."""

    values: tuple[int, ...] = ()
    void: tuple[int, ...] = (VOID,)
    colours: tuple[Colour, ...] = ()
    """The colour of value 0, 1, ..., if masks have colours in place of values."""
    names: tuple[str, ...] = ()
    """The name of value 0, 1, ...; empty if it has none."""

    @cached_property
    def classes(self) -> tuple[int, ...]:
        """The value of each class."""
        return self.values or tuple(value for value in range(256) if value not in self.void)

    @cached_property
    def table(self) -> Int[np.ndarray, " 256"]:
        """The label of each value. A value that is listed as a class is not void."""
        table = np.full(256, NEITHER)
        table[list(self.void)] = VOID
        table[list(self.classes)] = np.arange(len(self.classes))
        return table

    def labels(self, values: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
        return self.table[values].astype(np.uint8)

    def occurring(self, counts: Int[np.ndarray, " 256"]) -> list[int]:
        """The classes that have pixels, from the number of pixels of each value."""
        return sorted({int(label) for label in self.table[counts > 0]} - {VOID})

    def word(self, value: int) -> str:
        """The name of a value, for messages."""
        return in_words(self.colours[value]) if self.colours else str(value)

    def describe(self, value: int) -> str:
        label = self.table[value]
        return f"{self.word(value)} ({'void' if label == VOID else f'class {label}'})"


DEFAULT = Coding()


def check_coding(coding: Coding, classes: int | None) -> None:
    """Refuse options that define no classes."""
    for name, values in (("values", coding.values), ("void", coding.void)):
        for value in values:
            if not 0 <= value <= 255:
                raise InputError(f"--{name}: expected integers from 0 to 255, as masks hold, got {value}")
        if len(set(values)) < len(values):
            raise InputError(f"--{name}: expected each value once, got {sentence(map(str, values))}")
    if coding.colours and classes not in (None, len(coding.values)):
        raise InputError(f"--classes: --colours has the colours of {len(coding.values)}, got {classes}")
    if coding.values and not 2 <= len(coding.values) <= VOID:
        raise InputError(f"--values: expected 2 to {VOID} values, got {len(coding.values)}")
    if coding.values and classes not in (None, len(coding.values)):
        raise InputError(f"--classes: --values gives the values of {len(coding.values)}, got {classes}")


def check_values(path: Path, values: Iterable[int], coding: Coding, classes: int | None) -> None:
    """Refuse a mask with values that are neither a class nor void."""
    for value in values:
        label = coding.table[value]
        void = " or ".join(str(value) for value in coding.void if coding.table[value] == VOID)
        allowed = (
            f"--values {' '.join(map(str, coding.values))}" if coding.values else f"labels below --classes {classes}"
        )
        if label == NEITHER or (label != VOID and classes is not None and label >= classes):
            moved = "" if coding.values or label == value else f", which is class {label} without {void}"
            raise InputError(f"{path}: expected {allowed}{f' or {void} (void)' if void else ''}, got {value}{moved}")


def check_two_classes(source: Path, counts: Int[np.ndarray, " 256"], coding: Coding) -> None:
    """Refuse to train on masks with a single class, for which every score would be perfect."""
    values = [int(value) for value in np.flatnonzero(counts)]
    if len(coding.occurring(counts)) >= 2:
        return
    kind = ("colour" if coding.colours else "value") + "s" * (len(values) > 1)
    found = f"the {kind} {sentence(map(coding.describe, values))}"
    remedy = (
        f"where each value is a class, pass --values {' '.join(map(str, values))}"
        if len(values) > 1 and not coding.colours
        else "label everything that is not the class, too"
    )
    raise InputError(f"{source}: its masks hold {found}, fewer than two classes: {remedy}")


def sentence(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def in_words(colour: Iterable[int]) -> str:
    return " ".join(map(str, colour))
