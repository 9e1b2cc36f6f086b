"""The classes of each position: along one axis; some of them, their logits, and values in their place."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._checks import as_axes, as_axis
from jaxsoft._dtypes import widen
from jaxsoft._meshes import stated_names, stated_sharding
from jaxsoft._shards import AxisName, sum_shards

Axis = int | Sequence[int] | None


def along_one_axis(axis: Axis, axis_name: AxisName, logits: Array, *others: Any) -> tuple[int, Array, Any]:
    """The class axis, and arrays with all classes along it: several axes become one at the end, the last the fastest.

    Of the others what has not the logits' rank, as labels have not, stays as it is.
    """
    if not isinstance(axis, Sequence) and axis is not None:
        return as_axis(axis, logits.ndim), logits, others
    axes = as_axes(axis, logits.ndim)
    if axis_name is not None:
        raise ValueError(f"axis: expected one axis where the classes are laid over {axis_name!r}, got {axis!r}")
    positions = [n for n in range(logits.ndim) if n not in axes]

    def merged(array: Any) -> Any:
        if getattr(array, "ndim", None) != logits.ndim:
            return array
        return lax.collapse(jnp.transpose(array, (*positions, *axes)), len(positions))

    return len(positions), merged(logits), tuple(map(merged, others))


def put(array: Array, classes: Array, values: Array, axis: int) -> Array:
    """`array` with other values at some classes of each position; of classes outside of the block nothing is put."""
    values = jnp.broadcast_to(values, classes.shape).astype(array.dtype)
    if any(stated_names(array)):
        is_class = _is_class(array, classes, axis)
        new = jnp.sum(jnp.where(is_class, jnp.expand_dims(values, axis + 1), 0), axis, dtype=array.dtype)
        return jnp.where(jnp.any(is_class, axis), new, array)
    inside = jnp.where((classes >= 0) & (classes < array.shape[axis]), classes, array.shape[axis])
    # Not by `put_along_axis`, which takes no symbolic sizes.
    index = (lax.broadcasted_iota(inside.dtype, inside.shape, n) for n in range(array.ndim))
    return array.at[tuple(inside if n == axis else i for n, i in enumerate(index))].set(values, mode="drop")


def take(logits: Array, classes: Array, axis: int, axis_name: AxisName) -> tuple[Array, Array]:
    """The logits at some classes of each position, and whether there is such a class, on any shard."""
    size, z = logits.shape[axis], widen(logits)
    inside = (classes >= 0) & (classes < size)
    if any(stated_names(logits)):
        at = jnp.sum(jnp.where(_is_class(z, classes, axis), jnp.expand_dims(z, axis), 0), axis + 1)
    else:
        at = jnp.take_along_axis(z, jnp.clip(classes, 0, size - 1), axis, mode="promise_in_bounds")
    if axis_name is not None:
        sums = jnp.concatenate([jnp.where(inside, at, 0), inside.astype(at.dtype)], axis)
        at, found = jnp.split(sum_shards(sums, axis_name), 2, axis)
        inside = found > 0
    return at, inside


def _is_class(array: Array, classes: Array, axis: int) -> Array:
    """(…, K, classes, …): no gather and no scatter looks on several devices, but a comparison is on each."""
    index = lax.broadcasted_iota(classes.dtype, array.shape, axis, out_sharding=stated_sharding(array))
    return jnp.expand_dims(classes, axis + 1) == jnp.expand_dims(index, axis)
