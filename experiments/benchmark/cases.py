"""The cases of the benchmark as data, their inputs, and how their work is counted."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

IGNORE = -100  # the default ignored label of PyTorch, and of code written for it
IGNORED, SMOOTHING, Z_LOSS = 0.05, 0.1, 1e-4


# FLOPs per logit, and for a linear head per feature of a logit; an exponential counts as one.
OPERATIONS = {
    "softmax": 5, "softmax + VJP": 9, "log_softmax": 5, "log_softmax + VJP": 9, "logsumexp": 4, "logsumexp + VJP": 6,
    "cross-entropy": 4, "cross-entropy + gradient": 6,
    "linear cross-entropy": 2, "linear cross-entropy + gradient": 6, "Iris, 1000 steps": math.nan,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One row group of the table."""

    task: str  # a key of OPERATIONS
    shape: tuple[int, ...]  # of the logits; (positions, features, classes) of a linear head
    dtype: str = "float32"
    axis: int = -1
    ignored: bool = False
    smooth: bool = False  # with label smoothing and z-loss
    swept: bool = False  # a case of a sweep, compared only with jax.nn and optax, on unchanged data

    @property
    def name(self) -> str:
        name = self.task if self.axis == -1 else f"{self.task}, axis {self.axis}"
        return name + f", {IGNORED:.0%} ignored" * self.ignored + ", smoothing and z-loss" * self.smooth

    @property
    def label(self) -> str:
        return f"{self.name} {self.shape} {self.dtype}"

    @property
    def base(self) -> str:
        return self.task.removesuffix(" + VJP").removesuffix(" + gradient")

    @property
    def gradient(self) -> bool:
        return self.task != self.base

    @property
    def is_loss(self) -> bool:
        return self.base.endswith("cross-entropy")

    @property
    def is_linear(self) -> bool:
        return self.base.startswith("linear")

    @property
    def is_training(self) -> bool:
        return self.task.startswith("Iris")

    @property
    def flops(self) -> float:
        return OPERATIONS[self.task] * math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of the inputs."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.eval_shape(self.draw, jax.random.key(0)))

    @property
    def memory(self) -> int:
        """Bytes of the inputs, of two results of their size to compare, and of four float32 temporaries."""
        return 3 * self.size + 4 * 4 * math.prod(self.shape) // (self.shape[1] if self.is_linear else 1)

    def draw(self, key: jax.Array) -> tuple[jax.Array, ...]:
        """The variables, then the labels or the cotangent if there are any."""
        if self.is_training:
            return ()
        first, second, third = jax.random.split(key, 3)
        logits = (self.shape[0], self.shape[2]) if self.is_linear else self.shape
        axis = self.axis % len(logits)
        positions = logits[:axis] + logits[axis + 1 :]
        result = positions if self.base == "logsumexp" else logits
        array = jax.random.normal(first, self.shape[:2] if self.is_linear else logits, self.dtype)
        other = jax.random.normal(second, self.shape[1:] if self.is_linear else result, self.dtype)
        if not self.is_loss:
            return (3 * array, 3 * other) if self.gradient else (3 * array,)
        labels = jax.random.randint(third, positions, 0, logits[axis])
        if self.ignored:
            labels = jnp.where(jax.random.bernoulli(second, IGNORED, positions), IGNORE, labels)
        return (array, other / math.sqrt(self.shape[1]), labels) if self.is_linear else (3 * array, labels)


def cases(kinds: list[dict[str, Any]], shapes: list[Any], dtypes: Iterable[str]) -> list[Case]:
    return [Case(shape=shape, dtype=dtype, **kind) for kind, shape, dtype in itertools.product(kinds, shapes, dtypes)]


DENSE: list[dict[str, Any]] = [
    {"task": "softmax"},
    {"task": "softmax + VJP"},
    {"task": "log_softmax"},
    {"task": "cross-entropy"},
    {"task": "cross-entropy + gradient"},
    {"task": "cross-entropy + gradient", "smooth": True},
    {"task": "cross-entropy + gradient", "ignored": True},
]
SPATIAL = [DENSE[0], DENSE[1], DENSE[6]]
FIRST = [kind | {"axis": 1} for kind in SPATIAL]
LINEAR = [{"task": "linear cross-entropy"}, {"task": "linear cross-entropy + gradient"}]
SHAPES = [(150, 3), (4096, 1000), (512, 32768), (512, 50257)]
LARGE = [(65536, 128), (2048, 131072), (8192, 131072)]
IMAGES = [(1, 21, 300, 500), (8, 150, 64, 64)]
HEADS = [(1024, 256, 32768), (2048, 512, 32768), (8192, 4096, 131072)]
RAGGED = [(2048, 512, 32003)]  # not a multiple of any block; in bfloat16 rounding would hide wrong results
BOTH = "float32", "bfloat16"
IRIS = Case("Iris, 1000 steps", (105, 4))
SUITES = {
    "quick": [
        *cases(DENSE, SHAPES, BOTH[:1]),
        *cases(DENSE, SHAPES[1:2], BOTH[1:]),
        *cases(FIRST, IMAGES, BOTH[:1]),
        *cases(SPATIAL, [(1, 300, 500, 21)], BOTH[:1]),
        *cases(LINEAR, HEADS[:1], BOTH[:1]),
        IRIS,
    ],
    "full": [
        *cases(DENSE, SHAPES + LARGE, BOTH),
        *cases(FIRST, IMAGES, BOTH),
        *cases(SPATIAL, [(1, 300, 500, 21)], BOTH),
        *cases(LINEAR, HEADS, BOTH),
        *cases(LINEAR, RAGGED, BOTH[:1]),
        IRIS,
    ],
}
