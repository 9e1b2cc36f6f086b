"""Check the user's arrays and read them in float64: of a gradient in their shape, of a loss with a row per position."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Int

from jaxsoft._arrays.checks import MARKERS, as_integer, refuse_mask, refuse_strings, refuse_values
from jaxsoft._doctor.problem import TOLERANCE, Vectors
from jaxsoft._jax_internals import Tracer

Rows = Float[np.ndarray, "positions classes"]
Numbers = Float[np.ndarray, " positions"]

COUNTED_FROM_ONE = (
    "Label {label} is outside [0, {label}), and no label is 0: these labels count the classes from 1, and here the "
    "first class is 0. Subtract 1 from all of them. The {judged}, for the labels minus 1: "
)


def concrete(name: str, value: ArrayLike) -> np.ndarray:
    if isinstance(value, Tracer):
        raise TypeError(f"{name}: expected a concrete array, got a traced one; call this outside jit, grad and vmap")
    refuse_mask(name, value)
    return np.asarray(value)


def as_labels(t: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Labels as integers without the class axis: Keras keeps the axis with length one, Caffe and MXNet use floats."""
    if t.shape != shape and t.shape == (*shape[:axis], 1, *shape[axis + 1 :]):
        t = t.squeeze(axis)
    is_label = t.shape == shape[:axis] + shape[axis + 1 :] and np.issubdtype(t.dtype, np.floating)
    return t.astype(np.int64) if is_label and (t == np.trunc(t)).all() and (np.abs(t) < 2**53).all() else t


def fitting_axes(z: np.ndarray, t: np.ndarray) -> list[int]:
    """The axes that may be the targets' class axis: labels lack it, distributions sum to one or 0 along it.

    Along an axis of length one every target sums to itself, so such an axis is taken only if no other fits.
    """
    axes = range(z.ndim)
    if t.shape != z.shape:
        return [n for n in axes if t.shape == z.shape[:n] + z.shape[n + 1 :]]
    sums = [t.astype(np.float64).sum(n) for n in axes]
    fitting = [n for n in axes if sums[n].any() and (np.isclose(sums[n], 1, atol=1e-2) | (sums[n] == 0)).all()]
    # A sum of 0 may be an ignored position, or, along another axis, a class that does not occur.
    full = [n for n in fitting if (sums[n] != 0).all()] or fitting
    return [n for n in full if z.shape[n] > 1] or [n for n in fitting if z.shape[n] > 1] or full


def floating_dtype(name: str, array: np.ndarray) -> np.dtype:
    """The dtype whose rounding to expect: at most float64, as which integers are read too."""
    if not jnp.issubdtype(array.dtype, jnp.floating) or jnp.finfo(array.dtype).nmant > 52:
        return np.dtype(np.float64)
    if jnp.finfo(array.dtype).nmant not in TOLERANCE:
        raise TypeError(f"{name}: expected at least the precision of bfloat16, got dtype {array.dtype}")
    return array.dtype


def read(name: str, array: np.ndarray) -> np.ndarray:
    refuse_strings(name, array)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    return array.astype(np.float64)


def read_logits(logits: np.ndarray) -> Float[np.ndarray, "..."]:
    z = read("logits", logits)
    if not np.isfinite(z).all():
        raise ValueError("logits: expected finite numbers, got NaN or infinity")
    if z.size == 0:
        raise ValueError(f"logits: expected at least one position and class, got shape {z.shape}")
    return z


def read_targets(t: np.ndarray, shape: tuple[int, ...], axis: int, ignore_index: int | None) -> tuple[Vectors, bool]:
    """The targets as a distribution in float64 with the classes last, and whether labels were counted from 1."""
    positions = shape[:axis] + shape[axis + 1 :]
    if np.issubdtype(t.dtype, np.integer) and t.shape != shape:
        if t.shape != positions:
            expected = f"integer labels of shape {positions} or one-hot of {shape}"
            raise ValueError(f"targets: expected {expected}, got {t.shape}")
        return _read_labels(t, shape[axis], ignore_index)
    t = read("targets", t.astype(np.int8) if t.dtype == np.bool_ else t)
    if t.shape != shape:
        remark = "; labels must be integers" if t.shape == positions else ""
        raise ValueError(f"targets: expected the logits' shape {shape}, got {t.shape}{remark}")
    if ignore_index is not None:
        raise ValueError("ignore_index: expected None with a distribution, where a vector of zeros is ignored")
    if not np.isfinite(t).all():
        raise ValueError("targets: expected finite numbers, got NaN or infinity")
    return np.moveaxis(t, axis, -1), False


def _read_labels(labels: np.ndarray, classes: int, ignore_index: int | None) -> tuple[Vectors, bool]:
    inside = (labels >= 0) & (labels < classes)
    ignored = np.isin(labels, MARKERS) & ~inside if ignore_index is None else labels == ignore_index
    live = labels[~ignored]
    counted_from_one = bool(live.size and live.min() >= 1 and live.max() == classes)
    if not counted_from_one:
        named = "an ignored one (name it with ignore_index)" if ignore_index is None else f"ignore_index={ignore_index}"
        refuse_values("targets", labels, inside | ignored, f"a label in [0, {classes}) or {named}")
    hot = np.arange(classes) + int(counted_from_one) == labels[..., None]
    return np.where(ignored[..., None], 0.0, hot), counted_from_one


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
