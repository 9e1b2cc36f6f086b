"""The seam beneath the formula: a plain function may have another program on a platform.

The plain function is the reference, the default, and what is differentiated; the other program only computes its value.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsoft._jax_internals import Function, Results, as_primitive, device_lowered_for, is_on_one_device
from jaxsoft._platform.devices import Device, as_device

Axes = tuple[int, ...]  # the class axes, counted from the end: a mapped axis comes before them
Program = Callable[[bool, Any, Axes], Function | None]


def with_platform_impl(**programs: Program) -> Callable[[Function], Function]:
    """Give `plain(arrays, axes)`, which returns a tuple of arrays, another program on each named platform.

    All arrays and results have the same rank; without classes they have length one along the class axes.
    `program(single_device, types, axes)` is called when a call is compiled, and returns the function to compile, or
    None to leave the call to `plain`. `single_device` says whether arrays are on one device, as inside a `shard_map`;
    if not, XLA still has to shard the call, and it can only shard its own operations, not a kernel.
    """

    def decorate(plain: Function) -> Function:
        def choose(program: Program, context: Any, types: Any, axes: Axes) -> Function:
            return program(is_on_one_device(context), types, axes) or plain

        def mapped(size: int, mapped_axes: Any, arrays: Any, axes: Axes) -> tuple[Results, tuple[int, ...]]:
            results = seam(mapped_axis_first(size, mapped_axes, arrays), axes)
            return results, (0,) * len(results)

        seam = as_primitive(mapped, {name: functools.partial(choose, p) for name, p in programs.items()})(plain)
        return seam

    return decorate


def with_local_impl(**programs: Program) -> Callable[[Callable[..., Results]], Callable[..., Results]]:
    """As `with_platform_impl`, for a `plain(arrays, axes, axis_name)` that may sum over the shards of `axis_name`.

    With an `axis_name` the arrays are blocks of the classes, and `plain` runs on every platform. `axes` may be counted
    from either end.
    """

    def decorate(plain: Callable[..., Results]) -> Callable[..., Results]:
        seam = with_platform_impl(**programs)(plain)

        @functools.wraps(plain)
        def call(arrays: Any, axes: Axes, axis_name: Any = None) -> Results:
            return seam(arrays, from_end(axes, arrays[0])) if axis_name is None else plain(arrays, axes, axis_name)

        return call

    return decorate


def by_platform(formula: Function) -> Callable[[Callable[[Device, Any, Any], Results]], Function]:
    """Tell `plain(device, arrays, static)` the kind of device for which it is compiled.

    `vmap` maps the CPU's program; derivatives are those of `formula(arrays, static)`, which has the same results.
    """

    def decorate(plain: Callable[[Device, Any, Any], Results]) -> Function:
        def choose(platform: str, context: Any, types: Any, static: Any) -> Function:
            return functools.partial(plain, as_device(platform, device_lowered_for(context)))

        choices = {name: functools.partial(choose, name) for name in ("cuda", "rocm", "tpu")}
        on_cpu = functools.update_wrapper(functools.partial(plain, Device("cpu")), plain)
        return as_primitive(lambda *_: None, choices, formula, needs_devices=True)(on_cpu)

    return decorate


def mapped_axis_first(size: int, axes: Any, arrays: Any) -> Any:
    """Arrays with the mapped axis first; an array that is not mapped, whose axis is None, is broadcast."""
    leaves, tree = jax.tree.flatten(arrays)  # None also marks an absent array

    def move(array: Array, axis: int | None) -> Array:
        return jnp.broadcast_to(array, (size, *array.shape)) if axis is None else jnp.moveaxis(array, axis, 0)

    return jax.tree.unflatten(tree, map(move, leaves, tree.flatten_up_to(axes)))


def from_end(axes: Axes, array: Array) -> Axes:
    return tuple(axis % array.ndim - array.ndim for axis in axes)
