"""The seam beneath the formula: a plain function may have another program on a platform.

The plain function is the reference, the default, and what is differentiated; the other program only computes its value.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.interpreters.mlir import LoweringRuleContext, ShardingContext, SPMDAxisContext
from jax.sharding import AxisType
from jaxtyping import Array

from jaxsoft._primitive import Function, Results, as_primitive

Axes = tuple[int, ...]  # the class axes, counted from the end: a mapped axis comes before them
Place = Literal["one device", "devices"]
Program = Callable[[Place, Any, Axes], Function | None]


def on(**programs: Program) -> Callable[[Function], Function]:
    """Give `plain(arrays, axes)`, which returns a tuple of arrays, another program on each platform that is named.

    All arrays have one rank, those without classes a length of one in their place, and so have the results.
    `program(place, types, axes)` is asked when a call is compiled, and returns the function to compile, or None to
    leave the call to `plain`. `place` says whether the arrays lie on one device (each of a `shard_map` is one) or on
    several over which XLA is still to lay them. `plain` alone knows of any other kind of sharding.
    """

    def decorate(plain: Function) -> Function:
        def choose(program: Program, context: LoweringRuleContext, types: Any, axes: Axes) -> Function:
            place = _place(context, types)
            return (None if place is None else program(place, types, axes)) or plain

        def mapped(size: int, mapped_axes: Any, arrays: Any, axes: Axes) -> tuple[Results, tuple[int, ...]]:
            def lead(array: Array, axis: int | None) -> Array:
                return jnp.broadcast_to(array, (size, *array.shape)) if axis is None else jnp.moveaxis(array, axis, 0)

            # None marks an axis that is not mapped as well as an array that is absent.
            leaves, tree = jax.tree.flatten(arrays)
            results = seam(jax.tree.unflatten(tree, map(lead, leaves, tree.flatten_up_to(mapped_axes))), axes)
            return results, (0,) * len(results)

        choices = {name: functools.partial(choose, program) for name, program in programs.items()}
        seam = as_primitive(mapped, choices)(plain)
        return seam

    return decorate


def _place(context: LoweringRuleContext, types: Any) -> Place | None:
    """Where a call runs, or None where that is not known, or a sharding that only XLA knows to follow."""
    if context.module_context.lowering_parameters.for_export:  # JAX stores no foreign call
        return None
    on_devices = context.module_context.axis_context
    if isinstance(on_devices, SPMDAxisContext):
        return "one device" if set(on_devices.manual_axes) == set(on_devices.mesh.axis_names) else None
    if not isinstance(on_devices, ShardingContext):
        return None
    if on_devices.num_devices == 1:
        return "one device"
    explicit = any(AxisType.Explicit in t.sharding.mesh.axis_types for t in jax.tree.leaves(types))
    return None if explicit or not jax.config.read("jax_use_shardy_partitioner") else "devices"


def from_end(axes: Axes, array: Array) -> Axes:
    return tuple(axis % array.ndim - array.ndim for axis in axes)
