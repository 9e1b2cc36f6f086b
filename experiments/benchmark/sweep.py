"""Random cases: shapes, axes, dtypes and tasks, after the worst cases that were found in this way."""

import math

import numpy as np

from experiments.benchmark.cases import Case

TASKS = [
    "softmax", "softmax + VJP", "log_softmax", "log_softmax + VJP", "logsumexp", "logsumexp + VJP",
    "cross-entropy", "cross-entropy + gradient",
]  # fmt: skip
CLASSES, ROWS, ELEMENTS = 300_000, 1_000_000, 20_000_000
"""The most of them."""
ONE = 0.2
"""The probability of an axis of length one between two axes."""
CLIFFS = [
    Case("logsumexp + VJP", (448, 377, 1), "bfloat16", 1, swept=True),
    Case("log_softmax + VJP", (144911, 1), "bfloat16", 0, swept=True),
    Case("log_softmax + VJP", (144911, 1), "float32", 0, swept=True),
    Case("cross-entropy", (131072, 64), "float32", 0, swept=True),
    Case("cross-entropy", (304615, 2), "bfloat16", swept=True),
    Case("cross-entropy", (1000000, 2), swept=True),
    Case("cross-entropy", (300000, 10), swept=True),
    Case("cross-entropy", (110655, 18), swept=True),
    Case("cross-entropy", (163941, 5), "float32", 0, swept=True),
    Case("cross-entropy", (1, 32000, 23), "float32", 1, swept=True),
    Case("cross-entropy", (2, 36121), "float32", 0, swept=True),
]
"""Cases in which an earlier version was many times slower than jax.nn or optax."""


def sweep(count: int, seed: int) -> list[Case]:
    """The cliffs, and `count` random cases; a longer sweep begins with the cases of a shorter one."""
    return CLIFFS + [draw_case(np.random.default_rng([seed, n])) for n in range(count)]


def draw_case(rng: np.random.Generator) -> Case:
    """Classes and rows uniform in their logarithms, the rows as up to three axes around the class axis."""
    classes = log_uniform(rng, 2, CLASSES)
    rows = log_uniform(rng, 1, min(ROWS, ELEMENTS // classes))
    lengths = []
    for _ in range(rng.integers(3)):
        lengths.append(log_uniform(rng, 1, rows))
        rows //= lengths[-1]
    lengths.append(rows)
    for place in reversed(range(len(lengths) + 1)):
        if rng.random() < ONE:
            lengths.insert(place, 1)
    axis = int(rng.integers(len(lengths) + 1))
    shape = (*lengths[:axis], classes, *lengths[axis:])
    task, dtype = str(rng.choice(TASKS)), str(rng.choice(["float32", "bfloat16"]))
    return Case(task, shape, dtype, -1 if axis == len(lengths) else axis, swept=True)


def log_uniform(rng: np.random.Generator, least: int, most: int) -> int:
    return round(math.exp(rng.uniform(math.log(least), math.log(most))))
