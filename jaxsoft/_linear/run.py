"""Run a head of a linear layer over devices and in tiles, with its derivatives: every linear head is one such call."""

import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._arrays.checks import check_values, is_checking
from jaxsoft._arrays.dtypes import compute_dtype
from jaxsoft._arrays.sharding import axes_after_psum, is_replicated, pvary, replicate
from jaxsoft._custom_vjp import custom_vjp
from jaxsoft._formula.head import Untargeted, Values, check_operands, operand_cotangents, scale_gradient
from jaxsoft._formula.losses import target_operands
from jaxsoft._formula.targets import LogitsType, Options, position_weights
from jaxsoft._jax_internals import Results, as_primitive, is_symbolic_zero, knows_manual_axes, manual_axes, partial_jvp
from jaxsoft._linear.args import DiffArgs, HeadArgs, HeadConfig, LinearParams
from jaxsoft._linear.mesh import head_layout, over_mesh
from jaxsoft._linear.plan import check_budget
from jaxsoft._linear.tiles import as_values, diff_args, tiled_gradients, tiled_values
from jaxsoft._platform.dispatch import mapped_axis_first


def _map_examples(size: int, axes: HeadArgs, args: HeadArgs, config: HeadConfig) -> Any:
    """Run mapped examples of one layer as more positions, with one loss per example.

    `jax.vmap` of the loss itself would store one gradient of the kernel per example. Returns None if anything except
    features, targets, weights and the teacher's features is mapped.
    """
    own, mapped = _per_position_args(args), _per_position_args(axes)
    if axes.layer.features is None or len(jax.tree.leaves(axes)) > len(jax.tree.leaves(mapped)):
        return None
    features, targets, weights, teacher = mapped_axis_first(size, mapped, own)
    moved = HeadArgs(
        args.layer._replace(features=features),
        targets,
        args.options._replace(weights=weights),
        None if args.teacher is None else args.teacher._replace(features=teacher),
    )
    averaging = config.averaging._replace(examples=config.averaging.examples + 1)
    results = run_head(moved, config._replace(averaging=averaging))
    return results, (0,) * len(results)


def _per_position_args(args: HeadArgs) -> tuple[Any, ...]:
    teacher = None if args.teacher is None else args.teacher.features
    return args.layer.features, args.targets, args.options.weights, teacher


@as_primitive(_map_examples)
@functools.partial(jax.jit, static_argnums=1)
def run_head(args: HeadArgs, config: HeadConfig) -> Results:
    """The values of the head at every position, or their reduced loss and the constants of every position."""
    layout = head_layout(args.layer, config)
    # JAX cannot carry the errors of checks out of a shard_map, and sums over devices would be wrong in it if types do
    # not say what varies.
    if layout is None or is_checking() or not knows_manual_axes(args.layer.features):
        return _on_device(jax.tree.map(replicate, args), config)
    return over_mesh(_on_device, layout, args, config)


def _on_device(args: HeadArgs, config: HeadConfig) -> Results:
    leading = args.layer.features.shape[:-1]
    operands, denominator = _operands(args, config)
    check_operands(operands, len(leading) + 1)
    if math.prod(leading) == 0:
        return _nothing(leading, compute_dtype(args.layer.features.dtype), config)
    layer, operands = _flattened(args.layer, operands)
    config = _completed(config, args.options, layer, operands)
    _check_numbers(config, layer, operands)

    def unflatten(array: Array) -> Array:
        return array.reshape(*leading, *array.shape[1:])

    averaging = config.averaging
    if averaging.reduction == "none":
        return tuple(map(unflatten, jax.tree.leaves(_per_position(config, layer, operands))))
    if averaging.examples:
        (losses,), constants = cast(Values, _per_position(config, layer, operands))
        reduced = averaging.reduce(unflatten(losses), denominator, len(leading))
    else:
        # Divide by the count at the end: float16 might not hold a position's share of a gradient.
        total, constants = cast(tuple[Array, Results], _summed_losses(config, layer, operands))
        reduced = jnp.reshape(averaging.sum(total), ())
        reduced = reduced if denominator is None else reduced / denominator.reshape(())
    return reduced, *map(unflatten, constants)


def _operands(args: HeadArgs, config: HeadConfig) -> tuple[Any, Array | None]:
    """The operands of the head, and the denominator of the sum of its losses."""
    *leading, _ = args.layer.features.shape
    classes = args.layer.kernel.shape[config.class_axis]
    classes *= math.prod(map(lax.axis_size, config.gathered[config.class_axis]))
    dtype = args.layer.features.dtype
    logits = LogitsType(jax.ShapeDtypeStruct((*leading, classes), dtype), len(leading), config.axis_name)
    options, bias = args.options, args.layer.bias
    if bias is not None:
        left = jnp.isfinite(bias) | (bias > 0)
        options = options._replace(where=jnp.expand_dims(left, tuple(range(len(leading)))))
    if args.targets is not None:
        given = args.targets, logits, options, config.averaging, config.ignore_index
        return target_operands(*given, config.targets_name)
    weights = jnp.expand_dims(position_weights(options.weights, logits), logits.axis)
    return Untargeted(weights, args.teacher), config.averaging.denominator(weights, weighted=options.weighted)


def _nothing(leading: tuple[int, ...], dtype: jnp.dtype, config: HeadConfig) -> Results:
    """The results for zero positions."""
    each = jax.tree.leaves(config.head.ignored_values(0, dtype))
    results = [jnp.reshape(array, (*leading, *array.shape[1:])) for array in each]
    if config.averaging.reduction != "none":
        results[0] = jnp.zeros(leading[: config.averaging.examples], dtype)
    return tuple(results)


def _flattened(layer: LinearParams, operands: Any) -> tuple[LinearParams, Any]:
    """Layer and operands with all positions along one axis."""

    def flatten(array: Any) -> Any:
        if isinstance(array, LinearParams):
            return array._replace(features=flatten(array.features))
        return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])

    return jax.tree.map(flatten, (layer, operands), is_leaf=lambda array: isinstance(array, LinearParams))


def _completed(config: HeadConfig, options: Options, layer: LinearParams, operands: Any) -> HeadConfig:
    """The configuration with the fields that are known only on the devices."""
    check_budget(
        layer.kernel.shape[config.class_axis] * math.prod(map(lax.axis_size, config.gathered[config.class_axis])),
        layer.features.dtype,
        operands.is_wide or config.head.copies,
        config.memory_budget,
    )
    axes = manual_axes((layer, operands))
    summed = DiffArgs(*(axes - manual_axes(argument) for argument in diff_args(layer, operands)))
    if is_replicated(operands.target_weights, config.axis_name):  # so its gradient is replicated too
        summed = summed._replace(target_weights=axes_after_psum(summed.target_weights, config.axis_name))
    may_ignore = config.ignore_index is not None or options.weights is not None
    return config._replace(operands=type(operands), may_ignore=may_ignore, summed=summed)


def _check_numbers(config: HeadConfig, layer: LinearParams, operands: Any) -> None:
    """Under `checked`, refuse NaN in features, kernels and logits."""
    if not is_checking():
        return
    layers = {"": layer, "teacher_": getattr(operands, "teacher", None)}
    for prefix, each in layers.items():
        if isinstance(each, LinearParams):
            used = operands.position_weight != 0
            check_values(f"{prefix}features", each.features, ~(jnp.isnan(each.features) & used), "a number")
            check_values(f"{prefix}kernel", each.kernel, ~jnp.isnan(each.kernel), "a number")
    constant = lax.stop_gradient((_gather_kernel(config, layer, operands), operands))
    first, *_ = tiled_values(constant, config)
    check_values("logits", first, ~jnp.isnan(first), "numbers: features @ kernel + bias is none")


def _gather_kernel(config: HeadConfig, layer: LinearParams, operands: Any) -> LinearParams:
    """The layer with its whole kernel, typed as varying like the devices' results."""
    kernel = layer.kernel
    for axis, names in enumerate(config.gathered):
        if names:
            kernel = lax.all_gather(kernel, names, axis=axis, tiled=True)
    return pvary(layer._replace(kernel=kernel), manual_axes((layer, operands)))


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _summed_losses(config: HeadConfig, layer: LinearParams, operands: Any) -> tuple[Array, Results]:
    """The sum of all losses, computed together with its gradients, and the constants of every position."""
    (losses,), constants = _values(config, layer, operands)
    return jnp.sum(losses), constants


def _summed_losses_fwd(config: HeadConfig, *primals):
    needs_grad, (layer, operands) = _perturbed(*primals)
    one = jnp.ones((1, 1), compute_dtype(layer.features.dtype))
    arrays = _gather_kernel(config, layer, operands), operands, (one,)
    ((losses,), constants), gradients = _values_and_gradients(config, needs_grad, arrays)
    # The residuals have the same structure whichever gradients are needed, and tell which by their shapes: JAX caches
    # the structure with the traced function, and a later trace for other arguments would replace it.
    kept = tuple(jnp.zeros(()) if g is None else g for g in gradients)
    return (jnp.sum(losses), constants), (kept, layer, operands)


def _summed_losses_bwd(config: HeadConfig, residuals, cotangents):
    (gradients, layer, _), cotangent = residuals, _instantiate(cotangents[0])
    scaled = (scale_gradient(g.astype(cotangent.dtype), cotangent) if g.ndim else None for g in gradients)
    return _as_cotangents(config, DiffArgs(*scaled), layer)


def _summed_losses_forward(config: HeadConfig, residuals, tangents):
    (losses,), constants = _per_position_forward(config, residuals, tangents)
    return jnp.sum(losses), constants


_summed_losses.defvjp(_summed_losses_fwd, _summed_losses_bwd, symbolic_zeros=True, forward=_summed_losses_forward)


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _per_position(config: HeadConfig, layer: LinearParams, operands: Any) -> Values:
    """Each position's values, whose gradients are computed when the cotangents are known."""
    return _values(config, layer, operands)


def _values(config: HeadConfig, layer: LinearParams, operands: Any) -> Values:
    return as_values(config, tiled_values((_gather_kernel(config, layer, operands), operands), config))


def _per_position_fwd(config: HeadConfig, *primals):
    needs_grad, (layer, operands) = _perturbed(*primals)
    values = _values(config, layer, operands)
    return values, (tuple(jnp.zeros(int(needed)) for needed in needs_grad), layer, operands)


def _per_position_bwd(config: HeadConfig, residuals, cotangents):
    flags, layer, operands = residuals
    needs_grad = DiffArgs(*(flag.size > 0 for flag in flags))
    arrays = _gather_kernel(config, layer, operands), operands, tuple(map(_instantiate, cotangents[0]))
    _, gradients = _values_and_gradients(config, needs_grad, arrays)
    return _as_cotangents(config, gradients, layer)


def _per_position_forward(config: HeadConfig, residuals, tangents):
    """The derivative of the values, tile by tile; the gradients among the residuals are not read."""
    _, *primals = residuals
    return partial_jvp(lambda primals: _values(config, *primals), primals, list(tangents))[1]


_per_position.defvjp(_per_position_fwd, _per_position_bwd, symbolic_zeros=True, forward=_per_position_forward)


def _values_and_gradients(config: HeadConfig, needs_grad: DiffArgs, arrays: Any) -> tuple[Values, DiffArgs]:
    results = tiled_gradients(arrays, (config, needs_grad))
    count = len(results) - sum(needs_grad)
    gradients = iter(results[count:])
    return as_values(config, results[:count]), DiffArgs(*(next(gradients) if needed else None for needed in needs_grad))


def _instantiate(cotangent: Any) -> Array:
    return jnp.zeros(cotangent.shape, cotangent.dtype) if is_symbolic_zero(cotangent) else cotangent


def _perturbed(*primals) -> tuple[DiffArgs, tuple[LinearParams, Any]]:
    """Which primals of a rule with `symbolic_zeros` are differentiated, and the primals themselves.

    No matmul is spent on the gradients of others.
    """
    needs_grad = DiffArgs(*(v is not None and v.perturbed for v in diff_args(*primals)))
    return needs_grad, jax.tree.map(lambda p: p.value, primals, is_leaf=lambda p: hasattr(p, "perturbed"))


def _as_cotangents(config: HeadConfig, gradients: DiffArgs, layer: LinearParams) -> tuple[LinearParams, Any]:
    """Sum over the devices, then convert to the arguments' dtype: a sum may not fit into float16."""
    summed = (
        lax.psum(gradient, tuple(axes)) if axes and gradient is not None else gradient
        for gradient, axes in zip(gradients, config.summed, strict=True)
    )
    features, kernel, bias, target_weights = summed
    for axis, names in enumerate(config.gathered):
        if names and kernel is not None:
            kernel = lax.psum_scatter(kernel, names, scatter_dimension=axis, tiled=True)
    features = None if features is None else features.astype(layer.features.dtype)
    kernel = None if kernel is None else kernel.astype(layer.kernel.dtype)
    # For JAX None is a zero cotangent.
    grad_layer = LinearParams(features, kernel, bias, None, None)  # pyright: ignore[reportArgumentType]
    return grad_layer, operand_cotangents(config.operands, target_weights)
