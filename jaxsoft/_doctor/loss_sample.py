"""The arrays that a loss is computed from, in float64 and with one row per position."""

from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Int

from jaxsoft._arrays.checks import as_integer
from jaxsoft._doctor.inputs import as_labels, concrete, read, read_logits, read_targets
from jaxsoft._doctor.problem import logsumexp

Rows = Float[np.ndarray, "positions classes"]
Numbers = Float[np.ndarray, " positions"]


class Sample(NamedTuple):
    """The inputs of a loss; a mistake changes them."""

    z: Rows
    t: Rows  # targets before smoothing, zero where a position is ignored
    live: Bool[np.ndarray, " positions"]  # not ignored
    present: Bool[np.ndarray, " positions"]  # counted, because not cut off at an edge
    w: Numbers
    c: Float[np.ndarray, " classes"]
    epsilon: float  # of the smoothing that was asked for
    labels: Int[np.ndarray, " positions"] | None  # as given, also at ignored positions
    shape: tuple[int, ...]  # of the positions
    axis: int  # of the classes in the logits as given
    groups: int  # how many numbers were given: 1, or one per example, or one per position

    @property
    def classes(self) -> int:
        return self.z.shape[-1]

    @property
    def has_weights(self) -> bool:
        return bool((self.w != 1).any())

    @property
    def has_class_weights(self) -> bool:
        return bool((self.c != 1).any())

    @property
    def has_ignored(self) -> bool:
        return not self.live.all()

    @property
    def has_examples(self) -> bool:
        """Whether the first axis has examples of several positions."""
        return len(self.shape) > 1 and self.shape[0] < len(self.w)

    def label_weights(self) -> Numbers:
        """The class weight of each position's target: its label's, or a distribution's mean."""
        return self.t @ self.c

    def total(self, numbers: np.ndarray) -> Numbers:
        """Sums over the positions of each given number, repeated for each of these positions."""
        sums = numbers.reshape(self.groups, -1).sum(1, dtype=np.float64)
        return np.repeat(sums, len(numbers) // self.groups)

    def reduced(self, numbers: np.ndarray) -> Float[np.ndarray, " groups"]:
        return numbers.reshape(self.groups, -1).sum(1)


class Options(NamedTuple):
    """The options that the loss should have."""

    ignore_index: int | None
    weights: ArrayLike | None
    class_weights: ArrayLike | None
    label_smoothing: float


def read_sample(logits: ArrayLike, targets: ArrayLike, axis: int, groups: int, options: Options) -> tuple[Sample, bool]:
    """The sample, and whether its labels were counted from 1."""
    given, labels = concrete("logits", logits), concrete("targets", targets)
    z = np.moveaxis(read_logits(given), axis, -1)
    index = None if options.ignore_index is None else as_integer("ignore_index", options.ignore_index)
    labels = as_labels(labels, given.shape, axis)
    t, from_one = read_targets(labels, given.shape, axis, index)
    shape, classes = z.shape[:-1], z.shape[-1]
    t = t.reshape(-1, classes)
    is_hot = labels.shape != given.shape
    w = _numbers("weights", options.weights, shape).reshape(-1)
    epsilon = float(options.label_smoothing)
    if not 0 <= epsilon <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {epsilon}")
    return Sample(
        z=z.reshape(-1, classes),
        t=t,
        live=np.asarray(t.any(-1)),
        present=np.ones(len(t), bool),
        w=w,
        c=_numbers("class_weights", options.class_weights, (classes,)),
        epsilon=epsilon,
        labels=labels.reshape(-1).astype(np.int64) - int(from_one) if is_hot else None,
        shape=shape,
        axis=axis,
        groups=groups,
    ), from_one


def _numbers(name: str, value: ArrayLike | None, shape: tuple[int, ...]) -> np.ndarray:
    """Weights in float64, ones by default."""
    if value is None:
        return np.ones(shape)
    numbers = concrete(name, value)
    numbers = read(name, numbers.astype(np.int8) if numbers.dtype == np.bool_ else numbers)
    try:
        numbers = np.broadcast_to(numbers, shape)
    except ValueError:
        raise ValueError(f"{name}: expected shape {shape}, got {numbers.shape}") from None
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return numbers


def log_softmax(z: np.ndarray, axis: int | None = -1) -> np.ndarray:
    return z - logsumexp(z, axis)
