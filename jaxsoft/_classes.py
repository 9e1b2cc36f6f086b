"""Some classes of each position: their logits, and values in their place."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._dtypes import widen
from jaxsoft._meshes import stated_names, stated_sharding
from jaxsoft._shards import AxisName, sum_shards


def put(array: Array, classes: Array, values: Array, axis: int) -> Array:
    """`array` with other values at some classes of each position; of classes outside of the block nothing is put."""
    values = jnp.broadcast_to(values, classes.shape).astype(array.dtype)
    if any(stated_names(array)):
        is_class = _is_class(array, classes, axis)
        new = jnp.sum(jnp.where(is_class, jnp.expand_dims(values, axis + 1), 0), axis, dtype=array.dtype)
        return jnp.where(jnp.any(is_class, axis), new, array)
    inside = jnp.where((classes >= 0) & (classes < array.shape[axis]), classes, array.shape[axis])
    return jnp.put_along_axis(array, inside, values, axis, mode="drop", inplace=False)


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
