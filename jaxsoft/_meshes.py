"""Arrays laid over the devices of a mesh outside `shard_map`: by their types (explicit axes), or by a user's word."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxsoft._jax_internals import type_sharding
from jaxsoft._shards import AxisName

BatchAxes = str | Sequence[str] | PartitionSpec | None
Names = tuple[str, ...]


def stated_sharding(array: Array | jax.ShapeDtypeStruct) -> NamedSharding | None:
    """What an array's type says of its sharding; None where no axis of its mesh is explicit."""
    if isinstance(array, jax.ShapeDtypeStruct):
        return None
    sharding = type_sharding(array)
    return sharding if sharding is not None and AxisType.Explicit in sharding.mesh.axis_types else None


def lay_like(array: Array, like: Array | jax.ShapeDtypeStruct, *absent: int) -> Array:
    """`array` laid as `like` is, whose axes it has but for the `absent`; axes of length one are on every device."""
    sharding = stated_sharding(like)
    if sharding is None:
        return array
    kept = [axis for axis in range(like.ndim) if axis not in absent]
    names = stated_names(like)
    spec = (names[axis] if size == like.shape[axis] else None for axis, size in zip(kept, array.shape, strict=True))
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def lay_beside(array: Array, like: Array | jax.ShapeDtypeStruct, axis: int) -> Array:
    """`array` laid as `like` is, but whole along one axis, in which it may have another length."""
    sharding = stated_sharding(like)
    if sharding is None:
        return array
    names = stated_names(like)
    spec = PartitionSpec(*names[:axis], None, *names[axis + 1 :])
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, spec))


def broadcast_like(array: Array, like: Array) -> Array:
    """`array` broadcast to the shape of `like`, and laid as it is: of the cases of a choice JAX asks for both."""
    return jnp.broadcast_to(array, like.shape, out_sharding=stated_sharding(like))


def look_up(table: Array, indices: Array) -> Array:
    """`table[indices]`, laid as the indices are."""
    sharding = stated_sharding(indices)
    return table[indices] if sharding is None else table.at[indices].get(out_sharding=sharding)


def stated_names(array: Array | jax.ShapeDtypeStruct) -> tuple[Names, ...]:
    """For each axis, the names of the explicit mesh axes over which it is laid."""
    sharding = stated_sharding(array)
    if sharding is None:
        return ((),) * array.ndim
    return tuple(map(_names, (*sharding.spec, *(None for _ in range(array.ndim - len(sharding.spec))))))


def _names(entry: Any) -> Names:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


class Layout(NamedTuple):
    """How a linear head's arrays lie over a mesh: nothing of it is automatic inside a `shard_map` over `axes`."""

    mesh: Mesh | AbstractMesh
    positions: tuple[Names, ...]  # of each axis of the features but the last
    gathered: tuple[Names, Names]  # of each axis of the kernel, which every device uses as a whole
    classes: Names  # of the class axis, where each uses a block

    @property
    def axes(self) -> frozenset[str]:
        return self.laid | _explicit(self.mesh)

    @property
    def laid(self) -> frozenset[str]:
        """The axes over which anything is laid."""
        return frozenset(sum((*self.positions, *self.gathered, self.classes), ()))


def head_layout(
    features: Array, kernel: Array, class_axis: int, batch_axes: PartitionSpec | None, class_names: Names, examples: int
) -> Layout | None:
    """The layout of a linear head; None where no mesh axis takes part."""
    stated = stated_sharding(features) or stated_sharding(kernel)
    positions = stated_names(features)[:-1]
    if batch_axes is not None:
        given = ((),) * examples + tuple(map(_names, batch_axes))
        pairs = itertools.zip_longest(positions, given, fillvalue=())
        positions = tuple((*names, *(name for name in more if name not in names)) for names, more in pairs)
    of_kernel = stated_names(kernel)
    if class_names:
        of_kernel = (of_kernel[0], class_names) if class_axis == 1 else (class_names, of_kernel[1])
    context = jax.sharding.get_abstract_mesh()
    mesh = context if stated is None or not context.empty else stated.mesh
    taken = frozenset(sum(positions, ()))
    classes = () if taken & frozenset(of_kernel[class_axis]) else of_kernel[class_axis]
    # Over what has no positions a kernel is gathered beforehand: its devices compute the same.
    gathered = [tuple(name for name in names if name in taken) for names in of_kernel]
    if classes:
        gathered[class_axis] = ()
    layout = Layout(mesh, positions, (gathered[0], gathered[1]), classes)
    if not layout.laid:
        return None
    if AxisType.Manual in mesh.axis_types:  # JAX has no derivative of one shard_map in another
        raise ValueError(
            f"features, kernel: expected no axes laid over a mesh beside those of the enclosing jax.shard_map, got "
            f"{sorted(layout.laid)}: name these in its axis_names too, and those of the classes as axis_name"
        )
    return layout


def reshard(array: Array, mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> Array:
    """`array` laid as `spec` says, where that is for its type to say."""
    explicit = _explicit(mesh)
    if not explicit:
        return array
    stated = PartitionSpec(*(tuple(name for name in _names(entry) if name in explicit) for entry in spec))
    return jax.sharding.reshard(array, NamedSharding(mesh, stated))


def everywhere(array: Array) -> Array:
    """`array` as a whole on every device, if its type says that it is laid otherwise."""
    sharding = stated_sharding(array)
    if sharding is None or not any(stated_names(array)):
        return array
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, PartitionSpec()))


def _explicit(mesh: Mesh | AbstractMesh) -> frozenset[str]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset(name for name, kind in kinds if kind == AxisType.Explicit)


def as_batch_axes(batch_axes: BatchAxes, features: Array) -> PartitionSpec | None:
    """The names of the mesh axes over which each axis of the positions is laid, checked."""
    if batch_axes is None:
        return None
    entries = batch_axes if isinstance(batch_axes, PartitionSpec) else (batch_axes,)
    names = [name for entry in entries for name in (entry if isinstance(entry, tuple | list) else (entry,))]
    if not all(isinstance(name, str) or name is None for name in names) or len({*names} - {None}) < len(
        names
    ) - names.count(None):
        raise ValueError(f"batch_axes: expected different names of mesh axes, got {batch_axes!r}")
    spec = PartitionSpec(*map(_names, entries))
    if len(spec) > features.ndim - 1:
        raise ValueError(
            f"batch_axes: expected names for at most {features.ndim - 1} axes of positions, features having shape "
            f"{features.shape}, got {batch_axes!r}"
        )
    for axis, entry in enumerate(spec):
        names = as_mesh_axes(entry)
        if len(names) < len(_names(entry)):
            raise ValueError(
                "batch_axes: expected axes of the mesh set by jax.set_mesh that no enclosing shard_map has, "
                f"{_free()}, got {entry!r}"
            )
        devices = math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)
        if features.shape[axis] % devices:
            raise ValueError(
                f"features: expected an axis {axis} of positions that the {devices} devices of {entry!r} divide, "
                f"got shape {features.shape}"
            )
    return spec


def as_mesh_axes(names: AxisName) -> Names:
    """`names` if they are those of axes that the mesh has and no `shard_map` has taken, or else ()."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    wanted = _names(names) if isinstance(names, str | tuple | list | None) else ()
    return wanted if all(kinds.get(name, AxisType.Manual) != AxisType.Manual for name in wanted) else ()


def _free() -> str:
    mesh = jax.sharding.get_abstract_mesh()
    kinds = list(zip(mesh.axis_names, mesh.axis_types, strict=True))
    free = [name for name, kind in kinds if kind != AxisType.Manual]
    if free:
        return f"here {', '.join(map(repr, free))}"
    return "of which there is none here" if kinds else "and no mesh is set: call inside `with jax.set_mesh(mesh):`"


def check_blocks(names: Names, classes: int, taken: PartitionSpec | None) -> None:
    """Refuse classes that the devices of their mesh axes do not divide, or axes that the positions have."""
    if frozenset(names) & frozenset(sum(map(_names, taken or ()), ())):
        raise ValueError(f"axis_name: expected no axis that batch_axes names, got {names!r}")
    devices = math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)
    if classes % devices:
        raise ValueError(f"kernel: expected classes that the {devices} devices of {names!r} divide, got {classes}")
