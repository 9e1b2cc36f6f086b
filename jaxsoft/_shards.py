"""A class axis laid in contiguous blocks over the devices of a mesh axis, inside `jax.shard_map`."""

from collections.abc import Hashable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._jax_internals import manual_axes

AxisName = Hashable | Sequence[Hashable] | None  # one mesh axis or several; None where the classes are not sharded
Tree = TypeVar("Tree")


def as_axis_name(axis_name: AxisName, name: str, array: Array) -> AxisName:
    """`axis_name`, or a ValueError where it is no axis over which a `shard_map` has laid the classes of `array`."""
    if axis_name is None:
        return None
    names = tuple(axis_name) if isinstance(axis_name, list | tuple) else (axis_name,)
    try:
        tracked = manual_axes(lax.axis_index(names))
    except NameError:
        tracked = frozenset()
    # Untracked, JAX would divide the cotangent of a loss that is equal on all shards by their number.
    if not tracked:
        raise ValueError(
            "axis_name: expected a mesh axis of an enclosing jax.shard_map with check_vma=True, its default "
            "(linear_cross_entropy takes that of a mesh set by jax.set_mesh too), "
            f"got {axis_name!r}"
        )
    if not tracked <= manual_axes(array):
        raise ValueError(
            f"{name}: expected one block of the classes on each device along {axis_name!r}, got copies of all"
        )
    return names


def first_class(classes: int, axis_name: AxisName) -> Array | int:
    """The index of the first of a shard's `classes` among those of all shards."""
    return 0 if axis_name is None else lax.axis_index(axis_name) * classes


def all_classes(classes: int, axis_name: AxisName) -> int:
    return classes if axis_name is None else lax.axis_size(axis_name) * classes


def sum_shards(array: Array, axis_name: AxisName) -> Array:
    return array if axis_name is None else lax.psum(array, axis_name)


def max_shards(array: Array, axis_name: AxisName) -> Array:
    """The largest on any shard, and NaN where one is NaN, which XLA's CPU would pass over beside a larger number."""
    if axis_name is None:
        return array
    largest, is_nan = lax.pmax(jnp.stack([array, jnp.isnan(array).astype(array.dtype)]), axis_name)
    return largest + 0 / jnp.where(is_nan > 0, 0, 1).astype(array.dtype)  # `debug_nans` stops at a literal NaN


def unsharded(axes: frozenset, axis_name: AxisName) -> frozenset:
    """Those of `axes` over which a sum over the shards of `axis_name` still differs."""
    return axes - frozenset(axis_name if isinstance(axis_name, tuple) else ())


def is_whole(array: Array, axis_name: AxisName) -> bool:
    """Whether an array of each position's own is the same on all shards, not one block of something on each."""
    return isinstance(axis_name, tuple) and not manual_axes(array) & frozenset(axis_name)


def vary(tree: Tree, axes: frozenset) -> Tree:
    """`tree` with every array typed as differing over `axes`; in reverse mode the gradients are summed over them."""

    def cast(leaf: Array) -> Array:
        missing = tuple(axes - manual_axes(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)
