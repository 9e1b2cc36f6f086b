"""The arguments of every head of a linear layer: arrays, and the static configuration."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, ArrayLike

from jaxsoft._arrays.checks import as_axis, as_floating, as_integer, as_mask, as_number, check_values
from jaxsoft._arrays.classes import remove_classes
from jaxsoft._arrays.dtypes import compute_dtype
from jaxsoft._arrays.sharding import (
    AxisName,
    Kernel,
    Names,
    PerClass,
    PerPosition,
    Replicated,
    all_classes,
    as_axis_name,
    shard_like,
)
from jaxsoft._formula.head import Head
from jaxsoft._formula.losses import LOSS
from jaxsoft._formula.targets import Averaging, Options
from jaxsoft._linear.mesh import BatchAxes, as_batch_axes, as_mesh_axes, check_blocks


class LinearParams(NamedTuple):
    """The linear layer and the scaling of its logits."""

    features: PerPosition  # (…, D)
    kernel: Kernel  # (D, V) or (V, D)
    bias: PerClass | None  # (V,), −inf at a masked class
    soft_cap: Replicated | None  # scalars
    temperature: Replicated | None


class HeadArgs(NamedTuple):
    """The arrays of a call."""

    layer: LinearParams
    targets: Any = None  # labels, a distribution or sparse targets
    options: Options = Options()
    teacher: LinearParams | None = None  # a constant


class DiffArgs(NamedTuple):
    """One entry per argument that may be differentiated: its gradient, or whether that is needed, and so on."""

    features: Any = None
    kernel: Any = None
    bias: Any = None
    target_weights: Any = None


class HeadConfig(NamedTuple):
    """The static part of a call, which is compiled into its program."""

    class_axis: int  # of the kernel
    memory_budget: int | None
    axis_name: AxisName
    batch_axes: PartitionSpec | None  # mesh axes over which the positions are to be sharded
    class_names: Names  # mesh axes over which the classes are sharded, outside of any `shard_map`
    head: Head = LOSS
    averaging: Averaging = Averaging("none")
    ignore_index: int | None = None
    targets_name: str = "targets"  # the caller's name of the argument
    gathered: tuple[Names, Names] = ((), ())  # mesh axes of each kernel axis, over which it is gathered for use
    # Known only on the devices, inside `_on_device`.
    operands: type | None = None
    may_ignore: bool = False
    summed: DiffArgs = DiffArgs()  # mesh axes over which each argument is the same, and its gradient a sum


class CheckedArgs(NamedTuple):
    """The arguments of a public function that all heads have."""

    layer: LinearParams
    mask: Array | None  # False at masked classes
    classes: int  # of all devices
    config: HeadConfig


class Scaling(NamedTuple):
    """The scaling of the logits, as a user gives it."""

    soft_cap: ArrayLike | None
    temperature: ArrayLike


class Execution(NamedTuple):
    """How a head is run, as a user gives it."""

    kernel_axis: int
    memory_budget: int | None
    axis_name: AxisName
    batch_axes: BatchAxes


def check_head(
    features: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None,
    where: ArrayLike | None,
    scaling: Scaling,
    execution: Execution,
    *,
    prefix: str = "",
) -> CheckedArgs:
    """The arguments that all heads have, checked; `prefix` names the arguments of a second layer."""
    x, w = as_floating(f"{prefix}features", features), as_floating(f"{prefix}kernel", kernel)
    class_axis = as_axis(execution.kernel_axis, 2, "kernel_axis")
    if x.ndim == 0:
        raise ValueError(f"{prefix}features: expected at least one axis, the features, got a scalar")
    _check_kernel(f"{prefix}kernel", w.shape, x.shape[-1], class_axis)
    with jax.numpy_dtype_promotion("standard"):  # documented, unlike what strict promotion refuses
        dtype = jnp.result_type(x, w)
    wide, classes = compute_dtype(dtype), w.shape[class_axis]
    mask = None if where is None else as_mask("where", where, (classes,))
    cap, temperature = _as_scaling(scaling, prefix, wide)
    layer = LinearParams(
        x.astype(dtype), w.astype(dtype), _as_bias(f"{prefix}bias", bias, mask, classes, wide), cap, temperature
    )
    batch_axes, class_names = as_batch_axes(execution.batch_axes, x), as_mesh_axes(execution.axis_name)
    check_blocks(class_names, classes, batch_axes)
    axis_name = None if class_names else as_axis_name(execution.axis_name, f"{prefix}kernel", w)
    budget = None if execution.memory_budget is None else as_integer("memory_budget", execution.memory_budget)
    config = HeadConfig(class_axis, budget, axis_name, batch_axes, class_names)
    return CheckedArgs(layer, mask, all_classes(classes, axis_name), config)


def _check_kernel(name: str, shape: tuple[int, ...], width: int, class_axis: int) -> None:
    if len(shape) == 2 and shape[1 - class_axis] == width and shape[class_axis] != 0:
        return
    expected = f"({width}, classes)" if class_axis == 1 else f"(classes, {width})"
    message = f"{name}: expected shape {expected} with at least one class, got {shape}"
    if len(shape) == 2 and shape[class_axis] == width:
        message += f"; for a kernel of shape {'(classes, features)' if class_axis == 1 else '(features, classes)'} "
        message += f"pass kernel_axis={0 if class_axis == 1 else -1}"
    raise ValueError(message)


def _as_bias(name: str, bias: ArrayLike | None, mask: Array | None, classes: int, dtype: jnp.dtype) -> Array | None:
    """The bias, −inf at masked classes."""
    if bias is None and mask is None:
        return None
    b = jnp.zeros(classes, dtype) if bias is None else as_floating(name, bias).astype(dtype)
    if b.shape != (classes,):
        raise ValueError(f"{name}: expected shape ({classes},), one number per class, got {b.shape}")
    check_values(name, b, ~jnp.isnan(b), "a number")
    return b if mask is None else remove_classes(b, shard_like(mask, b))


def _as_scaling(scaling: Scaling, prefix: str, dtype: jnp.dtype) -> tuple[Array | None, Array | None]:
    """Soft cap and temperature in the dtype to compute in; None for a temperature that is known to be 1."""
    cap = None
    if scaling.soft_cap is not None:
        cap = jnp.asarray(as_number(f"{prefix}soft_cap", scaling.soft_cap, 0, above=True), dtype)
    temperature = as_number("temperature", scaling.temperature, 0, above=True)
    if isinstance(temperature, float) and temperature == 1:
        return cap, None
    return cap, jnp.asarray(temperature, dtype)
