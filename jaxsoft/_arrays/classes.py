"""The class axis: several axes merged into one, logits read at some classes, values written at some classes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxsoft._arrays.checks import as_axes, as_axis, as_floating, as_mask
from jaxsoft._arrays.dtypes import widen
from jaxsoft._arrays.sharding import AxisName, as_axis_name, explicit_names, explicit_sharding, shard_like, sum_together

Axis = int | Sequence[int] | None


class Dense(NamedTuple):
    """The logits of a dense function with all classes along one axis."""

    logits: Array
    axis: int
    mask: Array | None  # False at masked classes
    axis_name: AxisName
    others: tuple[Any, ...]


def dense_arguments(logits: ArrayLike, axis: Axis, where: ArrayLike | None, axis_name: AxisName, *others: Any) -> Dense:
    """The arguments of all dense functions, checked. Several class axes become one at the end, the last the fastest.

    The class axes of `others` are merged likewise, except in arrays of another rank than the logits, such as labels.
    """
    z = as_floating("logits", logits)
    mask = None if where is None else shard_like(as_mask("where", where, z.shape), z)
    if not isinstance(axis, Sequence) and axis is not None:
        class_axis = as_axis(axis, z.ndim)
    else:
        axes, rank = as_axes(axis, z.ndim), z.ndim
        if axis_name is not None:
            raise ValueError(f"axis: expected one axis where the classes are sharded over {axis_name!r}, got {axis!r}")
        positions = [n for n in range(rank) if n not in axes]

        def merged(array: Any) -> Any:
            if getattr(array, "ndim", None) != rank:
                return array
            return lax.collapse(jnp.transpose(array, (*positions, *axes)), len(positions))

        class_axis, z, mask, others = len(positions), merged(z), merged(mask), tuple(map(merged, others))
    if z.shape[class_axis] == 0:
        raise ValueError(f"logits: expected at least one class along axis {class_axis}, got shape {z.shape}")
    return Dense(z, class_axis, mask, as_axis_name(axis_name, "logits", z), others)


def remove_classes(logits: Array, mask: Array | None) -> Array:
    return logits if mask is None else jnp.where(mask, logits, -jnp.inf)


def is_label(logits: Array, label: Array, axis: int) -> Array:
    """A mask by comparison, not a scatter: it fuses on every platform."""
    return _class_index(logits, label.dtype, axis) == label


def put(array: Array, classes: Array, values: Array, axis: int) -> Array:
    """`array` with other values at some classes of each position; classes outside the block are skipped."""
    values = jnp.broadcast_to(values, classes.shape).astype(array.dtype)
    if any(explicit_names(array)):
        is_class = _is_class(array, classes, axis)
        new = jnp.sum(jnp.where(is_class, jnp.expand_dims(values, axis + 1), 0), axis, dtype=array.dtype)
        return jnp.where(jnp.any(is_class, axis), new, array)
    inside = jnp.where((classes >= 0) & (classes < array.shape[axis]), classes, array.shape[axis])
    # Not by `put_along_axis`, which takes no symbolic sizes.
    index = (lax.broadcasted_iota(inside.dtype, inside.shape, n) for n in range(array.ndim))
    return array.at[tuple(inside if n == axis else i for n, i in enumerate(index))].set(values, mode="drop")


def take(logits: Array, classes: Array, axis: int, axis_name: AxisName) -> tuple[Array, Array]:
    """The logits at some classes of each position, and whether any shard has such a class."""
    size, z = logits.shape[axis], widen(logits)
    inside = (classes >= 0) & (classes < size)
    if any(explicit_names(logits)):
        at = jnp.sum(jnp.where(_is_class(z, classes, axis), jnp.expand_dims(z, axis), 0), axis + 1)
    else:
        at = jnp.take_along_axis(z, jnp.clip(classes, 0, size - 1), axis, mode="promise_in_bounds")
    if axis_name is not None:
        at, count = sum_together((jnp.where(inside, at, 0), inside.astype(at.dtype)), axis, axis_name)
        inside = count > 0
    return at, inside


def _is_class(array: Array, classes: Array, axis: int) -> Array:
    """(…, K, classes, …): a gather or scatter cannot read several devices, but each device can compare."""
    index = _class_index(array, classes.dtype, axis)
    return jnp.expand_dims(classes, axis + 1) == jnp.expand_dims(index, axis)


def _class_index(array: Array, dtype: jnp.dtype, axis: int) -> Array:
    return lax.broadcasted_iota(dtype, array.shape, axis % array.ndim, out_sharding=explicit_sharding(array))
