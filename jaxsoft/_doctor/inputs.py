"""Check the user's arrays and read them in float64."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from jaxsoft._arrays.checks import MARKERS, refuse_mask, refuse_strings, refuse_values
from jaxsoft._doctor.comparison import TOLERANCE
from jaxsoft._doctor.problem import Vectors
from jaxsoft._jax_internals import Tracer


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
