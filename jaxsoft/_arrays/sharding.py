"""How arrays are sharded over a mesh: in blocks inside `jax.shard_map`, or by their types on explicit axes."""

import functools
from collections.abc import Hashable, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxsoft._arrays.dtypes import nan_unless
from jaxsoft._jax_internals import manual_axes, type_sharding

AxisName = Hashable | Sequence[Hashable] | None  # one mesh axis or several; None where the classes are not sharded
Names = tuple[str, ...]
Tree = TypeVar("Tree")
Typed = Array | jax.ShapeDtypeStruct

# The type of a field declares how its array is sharded over a mesh.
PerPosition = Annotated[Array, "positions"]
PerClass = Annotated[Array, "classes"]
Kernel = Annotated[Array, "kernel"]
Replicated = Annotated[Array, "replicated"]


def field_specs(arrays: Any, specs: dict[str, PartitionSpec]) -> Any:
    """The spec of each array of a NamedTuple, as its field declares; None if there is no array."""
    layouts = _layouts(type(arrays))
    return type(arrays)(*(a if a is None else specs[layouts[name]] for name, a in arrays._asdict().items()))


@functools.cache
def _layouts(kind: type) -> dict[str, str]:
    layouts = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        declared = [layout for part in (hint, *get_args(hint)) for layout in getattr(part, "__metadata__", ())]
        if not declared:
            raise TypeError(f"{kind.__name__}.{name}: expected a type of _arrays/sharding.py, such as PerPosition")
        layouts[name] = declared[0]
    return layouts


# ---- Explicit axes, whose sharding the types state.


def explicit_sharding(array: Typed) -> NamedSharding | None:
    """The sharding that an array's type states; None if no axis of its mesh is explicit."""
    sharding = None if isinstance(array, jax.ShapeDtypeStruct) else type_sharding(array)
    return sharding if sharding is not None and AxisType.Explicit in sharding.mesh.axis_types else None


def explicit_names(array: Typed) -> tuple[Names, ...]:
    """For each axis, the names of the explicit mesh axes over which it is sharded."""
    sharding = explicit_sharding(array)
    if sharding is None:
        return ((),) * array.ndim
    return tuple(map(as_names, (*sharding.spec, *(None for _ in range(array.ndim - len(sharding.spec))))))


def as_names(entry: Any) -> Names:
    """The names in one entry of a `PartitionSpec`."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def shard_like(array: Array, like: Typed, *absent: int) -> Array:
    """`array` sharded as `like`, whose axes it has except the `absent`; axes of length one are replicated."""
    if explicit_sharding(like) is None:
        return array
    names = [names for axis, names in enumerate(explicit_names(like)) if axis not in absent]
    sizes = [size for axis, size in enumerate(like.shape) if axis not in absent]
    each = zip(names, sizes, array.shape, strict=True)
    return _reshard(array, like, [name if size == length else () for name, size, length in each])


def shard_like_except(array: Array, like: Typed, axis: int) -> Array:
    """`array` sharded as `like`, except along one axis, which may have another length."""
    return _reshard(array, like, [() if n == axis else names for n, names in enumerate(explicit_names(like))])


def replicate(array: Array) -> Array:
    """`array` as a whole on every device, if its type says that it is sharded."""
    return _reshard(array, array, []) if any(explicit_names(array)) else array


def _reshard(array: Array, like: Typed, names: Sequence[Names]) -> Array:
    sharding = explicit_sharding(like)
    if sharding is None:
        return array
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, PartitionSpec(*(name or None for name in names))))


def broadcast_like(array: Array, like: Array) -> Array:
    """`array` broadcast to the shape of `like` and sharded as it: JAX requires both of the cases of a select."""
    return jnp.broadcast_to(array, like.shape, out_sharding=explicit_sharding(like))


def look_up(table: Array, indices: Array) -> Array:
    """`table[indices]`, sharded as the indices are."""
    sharding = explicit_sharding(indices)
    return table[indices] if sharding is None else table.at[indices].get(out_sharding=sharding)


# ---- A class axis in contiguous blocks over a mesh axis, inside `jax.shard_map`.


def as_axis_name(axis_name: AxisName, name: str, array: Array) -> AxisName:
    """`axis_name`, or a ValueError if no `shard_map` has sharded the classes of `array` over it."""
    if axis_name is None:
        return None
    names = tuple(axis_name) if isinstance(axis_name, list | tuple) else (axis_name,)
    try:
        tracked = manual_axes(lax.axis_index(names))
    except NameError:
        tracked = frozenset()
    # Without tracking, JAX would divide the cotangent of a loss that is equal on all shards by their number.
    if not tracked:
        raise ValueError(
            "axis_name: expected a mesh axis of an enclosing jax.shard_map with check_vma=True, its default "
            "(linear_cross_entropy also takes an axis of a mesh set by jax.set_mesh), "
            f"got {axis_name!r}"
        )
    if not tracked <= manual_axes(array):
        raise ValueError(
            f"{name}: expected one block of the classes on each device along {axis_name!r}, got copies of all"
        )
    return names


def first_class(classes: int, axis_name: AxisName) -> Array | int:
    """The index of the first of a shard's `classes` among the classes of all shards."""
    return 0 if axis_name is None else lax.axis_index(axis_name) * classes


def all_classes(classes: int, axis_name: AxisName) -> int:
    return classes if axis_name is None else lax.axis_size(axis_name) * classes


def sum_shards(array: Array, axis_name: AxisName) -> Array:
    return array if axis_name is None else lax.psum(array, axis_name)


def sum_together(arrays: Sequence[Array], axis: int, axis_name: AxisName) -> Sequence[Array]:
    """The sum over the shards of each array in one all-reduce; the arrays are concatenated along an axis."""
    if axis_name is None:
        return arrays
    return jnp.split(lax.psum(jnp.concatenate(arrays, axis), axis_name), len(arrays), axis)


def max_shards(array: Array, axis_name: AxisName) -> Array:
    """The largest on any shard, or NaN if one is NaN: XLA's CPU all-reduce would ignore the NaN."""
    if axis_name is None:
        return array
    largest, is_nan = lax.pmax(jnp.stack([array, jnp.isnan(array).astype(array.dtype)]), axis_name)
    return largest * nan_unless(is_nan == 0, array.dtype)


def axes_after_psum(axes: frozenset, axis_name: AxisName) -> frozenset:
    """The `axes` over which a sum over the shards of `axis_name` still differs."""
    return axes - frozenset(axis_name if isinstance(axis_name, tuple) else ())


def is_replicated(array: Array, axis_name: AxisName) -> bool:
    """Whether an array is the same on all shards, not one block of something on each."""
    return isinstance(axis_name, tuple) and not manual_axes(array) & frozenset(axis_name)


def pvary(tree: Tree, axes: frozenset) -> Tree:
    """`tree` with every array typed as varying over `axes`; in reverse mode the gradients are summed over them."""

    def cast(leaf: Array) -> Array:
        missing = tuple(axes - manual_axes(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)
