"""A linear head sharded over a mesh outside `shard_map`: by its types (explicit axes) or by a user's arguments."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxsoft._arrays.sharding import AxisName, Names, as_names, explicit_names, explicit_sharding, field_specs
from jaxsoft._formula.sparse import SparseTargets
from jaxsoft._jax_internals import Results

if TYPE_CHECKING:
    from jaxsoft._linear.args import HeadArgs, HeadConfig, LinearParams

BatchAxes = str | Sequence[str] | P | None


class Layout(NamedTuple):
    """How a linear head's arrays are sharded over a mesh."""

    mesh: Mesh | AbstractMesh
    position_names: tuple[Names, ...]  # of each axis of the features except the last
    gathered: tuple[Names, Names]  # of each axis of the kernel, if every device uses the whole kernel
    classes: Names  # of the class axis, if each device uses a block

    @property
    def sharded(self) -> frozenset[str]:
        """The axes over which anything is sharded."""
        return frozenset(sum((*self.position_names, *self.gathered, self.classes), ()))


def head_layout(layer: "LinearParams", config: "HeadConfig") -> Layout | None:
    """The layout of a linear head; None if nothing is sharded."""
    features, kernel, class_axis = layer.features, layer.kernel, config.class_axis
    explicit = explicit_sharding(features) or explicit_sharding(kernel)
    position_names = explicit_names(features)[:-1]
    if config.batch_axes is not None:
        given = ((),) * config.averaging.examples + tuple(map(as_names, config.batch_axes))
        pairs = itertools.zip_longest(position_names, given, fillvalue=())
        position_names = tuple((*names, *(name for name in more if name not in names)) for names, more in pairs)
    kernel_names = list(explicit_names(kernel))
    if config.class_names:
        kernel_names[class_axis] = config.class_names
    context = jax.sharding.get_abstract_mesh()
    mesh = context if explicit is None or not context.empty else explicit.mesh
    used = frozenset(sum(position_names, ()))
    classes = () if used & frozenset(kernel_names[class_axis]) else kernel_names[class_axis]
    # Over axes without positions, whose devices compute the same, a kernel is gathered beforehand.
    gathered = [tuple(name for name in names if name in used) for names in kernel_names]
    if classes:
        gathered[class_axis] = ()
    layout = Layout(mesh, position_names, (gathered[0], gathered[1]), classes)
    if not layout.sharded:
        return None
    if AxisType.Manual in mesh.axis_types:  # JAX has no derivative of one shard_map in another
        raise ValueError(
            f"features, kernel: expected only axes of the enclosing jax.shard_map to be sharded over, got "
            f"{sorted(layout.sharded)}: name these in its axis_names too, and the axes of the classes as axis_name"
        )
    return layout


def over_mesh(on_device: Callable[..., Results], layout: Layout, args: "HeadArgs", config: "HeadConfig") -> Results:
    """Run the head on each device, over the device's own positions."""
    examples = config.averaging.examples
    device_config = config._replace(
        axis_name=layout.classes or config.axis_name,
        batch_axes=None,
        class_names=(),
        averaging=config.averaging._replace(batch=sum(layout.position_names[examples:], ())),
        gathered=layout.gathered,
    )
    own, reduced = P(*layout.position_names), P(*layout.position_names[:examples])
    count = len(jax.tree.leaves(config.head.ignored_values(1, jnp.float32)))
    first = own if config.averaging.reduction == "none" else reduced
    specs = _specs(layout, args, config.class_axis)
    run = jax.shard_map(
        functools.partial(on_device, config=device_config),
        mesh=layout.mesh,
        in_specs=(specs,),
        out_specs=(first, *(own,) * (count - 1)),
        axis_names=layout.sharded | _explicit(layout.mesh),
    )
    return run(jax.tree.map(lambda array, spec: _reshard(array, layout.mesh, spec), args, specs))


def _specs(layout: Layout, args: "HeadArgs", class_axis: int) -> "HeadArgs":
    """The specs of all arrays, as their fields declare."""

    def kernel(gathered: Sequence[Names]) -> P:
        return P(*(layout.classes if layout.classes and n == class_axis else names for n, names in enumerate(gathered)))

    own, classes = P(*layout.position_names), P(layout.classes)
    specs = {"positions": own, "classes": classes, "replicated": P(), "kernel": kernel(layout.gathered)}
    targets: Any = None
    if isinstance(args.targets, SparseTargets):
        targets = jax.tree.map(lambda _: own, args.targets)
    elif args.targets is not None:
        targets = own if args.targets.ndim < args.layer.features.ndim else P(*own, *classes)
    # A teacher is a constant, so its kernel is gathered beforehand.
    constant = specs | {"kernel": kernel([(), ()])}
    teacher = None if args.teacher is None else field_specs(args.teacher, constant)
    return type(args)(field_specs(args.layer, specs), targets, field_specs(args.options, specs), teacher)


def _reshard(array: Array, mesh: Mesh | AbstractMesh, spec: P) -> Array:
    """`array` sharded as `spec` says, over explicit axes."""
    explicit = _explicit(mesh)
    if not explicit:
        return array
    names = (tuple(name for name in as_names(entry) if name in explicit) for entry in spec)
    return jax.sharding.reshard(array, NamedSharding(mesh, P(*names)))


def _explicit(mesh: Mesh | AbstractMesh) -> frozenset[str]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset(name for name, kind in kinds if kind == AxisType.Explicit)


def as_batch_axes(batch_axes: BatchAxes, features: Array) -> P | None:
    """The names of the mesh axes over which each axis of the positions is sharded, checked."""
    if batch_axes is None:
        return None
    entries = batch_axes if isinstance(batch_axes, P) else (batch_axes,)
    names = [name for entry in entries for name in (entry if isinstance(entry, tuple | list) else (entry,))]
    given = [name for name in names if name is not None]
    if not all(isinstance(name, str) for name in given) or len(set(given)) < len(given):
        raise ValueError(f"batch_axes: expected different names of mesh axes, got {batch_axes!r}")
    spec = P(*map(as_names, entries))
    if len(spec) > features.ndim - 1:
        raise ValueError(
            f"batch_axes: expected names for at most {features.ndim - 1} axes of positions, features having shape "
            f"{features.shape}, got {batch_axes!r}"
        )
    for axis, entry in enumerate(spec):
        names = as_mesh_axes(entry)
        if len(names) < len(as_names(entry)):
            raise ValueError(
                "batch_axes: expected axes of the mesh set by jax.set_mesh that no enclosing shard_map has, "
                f"{_free()}, got {entry!r}"
            )
        _check_divides(f"features: axis {axis} of {features.shape[axis]} positions", names, entry, features.shape[axis])
    return spec


def as_mesh_axes(names: AxisName) -> Names:
    """`names` if they are axes of the mesh that no enclosing `shard_map` uses, otherwise ()."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    given = as_names(names) if isinstance(names, str | tuple | list | None) else ()
    return given if all(kinds.get(name, AxisType.Manual) != AxisType.Manual for name in given) else ()


def _free() -> str:
    mesh = jax.sharding.get_abstract_mesh()
    kinds = list(zip(mesh.axis_names, mesh.axis_types, strict=True))
    free = [name for name, kind in kinds if kind != AxisType.Manual]
    if free:
        return f"here {', '.join(map(repr, free))}"
    return "and there are none here" if kinds else "and no mesh is set: call inside `with jax.set_mesh(mesh):`"


def check_blocks(names: Names, classes: int, batch_axes: P | None) -> None:
    """Refuse classes that cannot be split evenly over their mesh axes, or mesh axes that the positions use too."""
    if frozenset(names) & frozenset(sum(map(as_names, batch_axes or ()), ())):
        raise ValueError(f"axis_name: expected no axis that batch_axes names, got {names!r}")
    _check_divides(f"kernel: {classes} classes", names, names, classes)


def _check_divides(what: str, names: Names, given: Any, size: int) -> None:
    devices = math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)
    if size % devices:
        raise ValueError(f"{what} cannot be split evenly over the {devices} devices of {given!r}")
