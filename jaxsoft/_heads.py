"""A linear layer and what is read from its logits, laid over devices and in tiles: every head is one call of this."""

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike

from jaxsoft._checks import as_axis, as_floating, as_integer, as_mask, as_number, check_values, is_checking
from jaxsoft._dtypes import compute_dtype
from jaxsoft._jax_internals import Results, as_primitive, knows_manual_axes, manual_axes
from jaxsoft._losses import LOSSES
from jaxsoft._meshes import (
    BatchAxes,
    Layout,
    Names,
    as_batch_axes,
    as_mesh_axes,
    check_blocks,
    everywhere,
    head_layout,
    lay_like,
    reshard,
)
from jaxsoft._plan import check_budget
from jaxsoft._readings import Positions, Reading, Values, scale_gradient, to_operands
from jaxsoft._shards import AxisName, all_classes, as_axis_name, is_whole, unsharded, vary
from jaxsoft._sparse_targets import SparseTargets, read_any_targets
from jaxsoft._targets import Options, Reduction, count_positions, position_weights, reduce_losses, sum_positions
from jaxsoft._tiles import Layer, Tiling, Variables, tiled_gradients, tiled_values


class Head(NamedTuple):
    """A layer as it was given to a public function, checked."""

    layer: Layer
    mask: Array | None  # of the classes that are left
    classes: int  # of all devices
    static: "Static"


def as_head(
    features: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None,
    where: ArrayLike | None,
    soft_cap: ArrayLike | None,
    temperature: ArrayLike,
    kernel_axis: int,
    memory_budget: int | None,
    axis_name: AxisName,
    batch_axes: BatchAxes,
    prefix: str = "",
) -> Head:
    """The arguments that all heads have, checked; a prefix of their names for those of a second layer."""
    x, w = as_floating(f"{prefix}features", features), as_floating(f"{prefix}kernel", kernel)
    class_axis = as_axis(kernel_axis, 2, "kernel_axis")
    if x.ndim == 0:
        raise ValueError(f"{prefix}features: expected at least one axis, the features, got a scalar")
    _check_kernel(f"{prefix}kernel", w.shape, x.shape[-1], class_axis)
    with jax.numpy_dtype_promotion("standard"):  # documented, unlike what strict promotion refuses
        dtype = jnp.result_type(x, w)
    wide, classes = compute_dtype(dtype), w.shape[class_axis]
    b = None
    if bias is not None:
        b = as_floating(f"{prefix}bias", bias).astype(wide)
        if b.shape != (classes,):
            raise ValueError(f"{prefix}bias: expected shape ({classes},), one number a class, got {b.shape}")
        check_values(f"{prefix}bias", b, ~jnp.isnan(b), "a number")
    mask = None
    if where is not None:
        mask = as_mask("where", where, (classes,))
        b = jnp.zeros(classes, wide) if b is None else b
        b = jnp.where(lay_like(mask, b), b, -jnp.inf)
    batch = as_batch_axes(batch_axes, x)
    blocks = as_mesh_axes(axis_name)
    check_blocks(blocks, classes, batch)
    axis_name = None if blocks else as_axis_name(axis_name, f"{prefix}kernel", w)
    cap = None if soft_cap is None else jnp.asarray(as_number(f"{prefix}soft_cap", soft_cap, 0, above=True), wide)
    heat = as_number("temperature", temperature, 0, above=True)
    heat = None if isinstance(heat, float) and heat == 1 else jnp.asarray(heat, wide)
    budget = None if memory_budget is None else as_integer("memory_budget", memory_budget)
    static = Static(class_axis, budget, axis_name, batch, blocks)
    layer = Layer(x.astype(dtype), w.astype(dtype), b, cap, heat)
    return Head(layer, mask, all_classes(classes, axis_name), static)


def _check_kernel(name: str, shape: tuple[int, ...], width: int, class_axis: int) -> None:
    if len(shape) == 2 and shape[1 - class_axis] == width and shape[class_axis] != 0:
        return
    expected = f"({width}, classes)" if class_axis == 1 else f"(classes, {width})"
    message = f"{name}: expected shape {expected} with at least one class, got {shape}"
    if len(shape) == 2 and shape[class_axis] == width:
        message += f"; for a kernel of shape {'(classes, features)' if class_axis == 1 else '(features, classes)'} "
        message += f"pass kernel_axis={0 if class_axis == 1 else -1}"
    raise ValueError(message)


class Inputs(NamedTuple):
    """The arrays of a call."""

    layer: Layer  # features with any leading axes
    targets: Any = None  # labels, a distribution or sparse targets
    options: Options = Options()
    teacher: Layer | None = None  # a layer beside it, which is a constant


class Static(NamedTuple):
    """What is part of the program."""

    class_axis: int
    memory_budget: int | None
    axis_name: AxisName
    batch_axes: P | None  # mesh axes over which the positions are to be laid
    blocks: Names  # those over which the classes are, outside of any `shard_map`
    reading: Reading = LOSSES
    reduction: Reduction = "none"
    ignore_index: int | None = None
    targets_name: str = "targets"  # what the caller calls them
    examples: int = 0  # leading axes that enumerate losses, not positions of one
    batch: Names = ()  # mesh axes over which positions are laid already
    gathered: tuple[Names, Names] = ((), ())  # those over which the kernel's axes are, and are to be gathered


def _map_examples(size: int, axes: Inputs, inputs: Inputs, static: Static) -> tuple[Results, tuple[int, ...]] | None:
    """Examples of one layer are more positions, with a loss for each.

    Mapped as it stands, the loss would keep a gradient of the kernel for each example. None where more than what each
    position has of its own is mapped.
    """

    def lead(array: Array, axis: int | None) -> Array:
        return jnp.broadcast_to(array, (size, *array.shape)) if axis is None else jnp.moveaxis(array, axis, 0)

    own, tree = jax.tree.flatten(_of_positions(inputs))
    mapped = tree.flatten_up_to(_of_positions(axes))
    if axes.layer.features is None or len(jax.tree.leaves(axes)) > len(jax.tree.leaves(mapped)):
        return None
    moved = jax.tree.unflatten(tree, map(lead, own, mapped))
    results = read_positions(_replace_positions(inputs, *moved), static._replace(examples=static.examples + 1))
    return results, (0,) * len(results)


def _of_positions(inputs: Inputs) -> tuple[Any, ...]:
    """What each position has of its own."""
    teacher = None if inputs.teacher is None else inputs.teacher.features
    return inputs.layer.features, inputs.targets, inputs.options.weights, teacher


def _replace_positions(inputs: Inputs, features: Any, targets: Any, weights: Any, teacher: Any) -> Inputs:
    return Inputs(
        inputs.layer._replace(features=features),
        targets,
        inputs.options._replace(weights=weights),
        None if inputs.teacher is None else inputs.teacher._replace(features=teacher),
    )


@as_primitive(_map_examples)
@functools.partial(jax.jit, static_argnums=1)
def read_positions(inputs: Inputs, static: Static) -> Results:
    """What is read from the logits of every position, or a loss of them all and what is read beside it."""
    features, kernel = inputs.layer.features, inputs.layer.kernel
    layout = head_layout(features, kernel, static.class_axis, static.batch_axes, static.blocks, static.examples)
    # The errors of checks JAX cannot carry out of a shard_map, in which types must say what varies, or sums go wrong.
    if layout is None or is_checking() or not knows_manual_axes(features):
        return _on_device(jax.tree.map(everywhere, inputs), static)
    return _over_mesh(layout, inputs, static)


def _over_mesh(layout: Layout, inputs: Inputs, static: Static) -> Results:
    """Each device's positions in a loop of its own."""
    positions, blocks, kernel = layout.positions, P(layout.classes), list(layout.gathered)
    if layout.classes:
        kernel[static.class_axis] = layout.classes
    own, none = P(*positions), P()
    targets: Any = None
    if isinstance(inputs.targets, SparseTargets):
        targets = jax.tree.map(lambda _: own, inputs.targets)
    elif inputs.targets is not None:
        targets = own if inputs.targets.ndim < inputs.layer.features.ndim else P(*positions, *blocks)
    of_teacher: list[Names] = [(), ()]  # a constant, and gathered beforehand
    of_teacher[static.class_axis] = layout.classes
    specs: Any = Inputs(
        Layer(*cast(Any, (own, P(*kernel), blocks, none, none))),
        targets,
        Options(*cast(Any, (own, none, blocks, none, none))),
        Layer(*cast(Any, (own, P(*of_teacher), blocks, none, none))),
    )
    specs = _like(inputs, specs)
    on_device = static._replace(
        axis_name=layout.classes or static.axis_name,
        batch_axes=None,
        blocks=(),
        batch=sum(layout.positions[static.examples :], ()),
        gathered=layout.gathered,
    )
    count = len(jax.tree.leaves(static.reading.blank(1, jnp.float32)))
    reduced = P(*layout.positions[: static.examples])
    results = (own,) * count if static.reduction == "none" else (reduced, *(own,) * (count - 1))
    run = jax.shard_map(
        functools.partial(_on_device, static=on_device),
        mesh=layout.mesh,
        in_specs=(specs,),
        out_specs=results,
        axis_names=layout.axes,
    )
    return run(jax.tree.map(lambda array, spec: reshard(array, layout.mesh, spec), inputs, specs))


def _like(arrays: Any, specs: Any) -> Any:
    """The specs of those arrays that are there."""
    if arrays is None or isinstance(specs, P):
        return None if arrays is None else specs
    if isinstance(specs, SparseTargets):
        return specs
    return type(specs)(*map(_like, arrays, specs))


def _on_device(inputs: Inputs, static: Static) -> Results:
    (features, kernel, bias, _, _), options = inputs.layer, inputs.options
    leading, width, classes = features.shape[:-1], features.shape[-1], kernel.shape[static.class_axis]
    classes *= math.prod(map(lax.axis_size, static.gathered[static.class_axis]))
    dtype = compute_dtype(features.dtype)
    if bias is not None:
        left = jnp.isfinite(bias) | (bias > 0)
        options = options._replace(where=jnp.expand_dims(left, tuple(range(len(leading)))))
    operands, count = _operands(inputs, options, jax.ShapeDtypeStruct((*leading, classes), features.dtype), static)
    positions = math.prod(leading)
    if positions == 0:
        blank = static.reading.blank(0, dtype)
        nothing = [jnp.reshape(a, (*leading, *a.shape[1:])) for a in jax.tree.leaves(blank)]
        if static.reduction != "none":
            nothing[0] = jnp.zeros(leading[: static.examples], dtype)
        return tuple(nothing)

    def flatten(array: Any) -> Any:
        if isinstance(array, Layer):
            return array._replace(features=flatten(array.features))
        return array.reshape(-1, array.shape[-1])

    flat = jax.tree.map(flatten, operands, is_leaf=lambda array: isinstance(array, Layer))
    layer = inputs.layer._replace(features=features.reshape(positions, width))
    check_values("features", layer.features, ~(jnp.isnan(layer.features) & (flat.share != 0)), "a number")
    check_values("kernel", kernel, ~jnp.isnan(kernel), "a number")
    if isinstance(teacher := getattr(flat, "beside", None), Layer):
        check_values(
            "teacher_features", teacher.features, ~(jnp.isnan(teacher.features) & (flat.share != 0)), "a number"
        )
        check_values("teacher_kernel", teacher.kernel, ~jnp.isnan(teacher.kernel), "a number")

    check_budget(classes, features.dtype, flat.is_wide or static.reading.copies, static.memory_budget)
    skips = static.ignore_index is not None or options.weights is not None
    axes = manual_axes((layer, flat))
    summed = Variables(*(axes - manual_axes(v) for v in (layer.features, layer.kernel, layer.bias, flat.spread)))
    if is_whole(flat.spread, static.axis_name):  # and so is its gradient
        summed = summed._replace(spread=unsharded(summed.spread, static.axis_name))
    tiling = Tiling(static.reading, static.memory_budget, static.class_axis, static.axis_name, skips)
    program = Program(tiling, axes, summed, static.gathered, type(flat))
    if is_checking():
        (first, *_), _ = tiled_values(tiling, *lax.stop_gradient((_ready(program, layer), flat)))
        check_values("logits", first, ~jnp.isnan(first), "numbers: features @ kernel + bias is none")

    def unflatten(array: Array) -> Array:
        return array.reshape(*leading, *array.shape[1:])

    if static.reduction == "none":
        return tuple(map(unflatten, jax.tree.leaves(_each(program, layer, flat))))
    if static.examples:
        (losses,), constant = cast(Values, _each(program, layer, flat))
        losses = unflatten(losses)
        reduced = reduce_losses(losses, static.reduction, count, len(leading), static.examples, static.batch)
    else:
        # Divided by the count at the end: float16 could not hold a position's share of a gradient.
        total, constant = cast(tuple[Array, Results], _total(program, layer, flat))
        reduced = jnp.reshape(sum_positions(total, batch=static.batch), ())
        reduced = reduced if count is None else reduced / count.reshape(())
    return reduced, *map(unflatten, constant)


def _operands(
    inputs: Inputs, options: Options, logits: jax.ShapeDtypeStruct, static: Static
) -> tuple[Any, Array | None]:
    """What is read beside the logits, and what the sum of losses is to be divided by."""
    axis = logits.ndim - 1
    if inputs.targets is not None:
        return read_any_targets(
            inputs.targets,
            logits,
            axis,
            options,
            ignore_index=static.ignore_index,
            name=static.targets_name,
            reduction=static.reduction,
            axis_name=static.axis_name,
            examples=static.examples,
            batch=static.batch,
        )
    share = jnp.expand_dims(position_weights(options.weights, logits, axis), axis)
    count, _ = count_positions(share, share, options, static.reduction, static.examples, static.batch)
    return Positions(share, inputs.teacher), count


class Program(NamedTuple):
    """What the rules depend on beside their arrays."""

    tiling: Tiling
    axes: frozenset  # mesh axes over which the devices differ
    summed: Variables  # those of them over which each input is the same, and its gradient a sum
    gathered: tuple[Names, Names]  # those over which each axis of the kernel is laid, which is used as a whole
    operands: Any  # their type


def _ready(program: Program, layer: Layer) -> Layer:
    """The layer with its whole kernel, typed as what the devices compute with it is."""
    kernel = layer.kernel
    for axis, names in enumerate(program.gathered):
        if names:
            kernel = lax.all_gather(kernel, names, axis=axis, tiled=True)
    return vary(layer._replace(kernel=kernel), program.axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(program: Program, layer: Layer, operands: Any) -> tuple[Array, Results]:
    """The sum of all losses, which forms its gradients along with itself, and what is read beside them."""
    (losses,), constant = tiled_values(program.tiling, _ready(program, layer), operands)
    return jnp.sum(losses), constant


def _total_fwd(program: Program, *primals):
    wanted, (layer, operands) = _wanted(*primals)
    one = jnp.ones((1, 1), compute_dtype(layer.features.dtype))
    values, gradients = tiled_gradients(program.tiling, wanted, _ready(program, layer), operands, (one,))
    (losses,), constant = values
    # What is kept has one structure whichever gradients are wanted, and says which by its shapes: JAX caches the
    # structure with the traced function, and a later trace for other variables would replace it.
    kept = tuple(jnp.zeros(()) if g is None else g for g in gradients)
    return (jnp.sum(losses), constant), (kept, _dtypes(layer))


def _total_bwd(program: Program, residuals, cotangents):
    (gradients, dtypes), (cotangent, _) = residuals, cotangents
    cotangent = _instantiate(cotangent)
    scaled = (scale_gradient(g.astype(cotangent.dtype), cotangent) if g.ndim else None for g in gradients)
    return _as_cotangents(program, Variables(*scaled), dtypes)


_total.defvjp(_total_fwd, _total_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _each(program: Program, layer: Layer, operands: Any) -> Values:
    """Each position's values, whose gradients wait for the cotangents of each."""
    return tiled_values(program.tiling, _ready(program, layer), operands)


def _each_fwd(program: Program, *primals):
    wanted, (layer, operands) = _wanted(*primals)
    values = tiled_values(program.tiling, _ready(program, layer), operands)
    return values, (tuple(jnp.zeros(int(w)) for w in wanted), layer, operands)


def _each_bwd(program: Program, residuals, cotangents):
    flags, layer, operands = residuals
    wanted = Variables(*(flag.size > 0 for flag in flags))
    moving = tuple(map(_instantiate, cotangents[0]))
    _, gradients = tiled_gradients(program.tiling, wanted, _ready(program, layer), operands, moving)
    return _as_cotangents(program, gradients, _dtypes(layer))


_each.defvjp(_each_fwd, _each_bwd, symbolic_zeros=True)


def _instantiate(cotangent: Any) -> Array:
    """A cotangent as an array, which a symbolic zero is not."""
    return cotangent if isinstance(cotangent, jax.Array) else jnp.zeros(cotangent.shape, cotangent.dtype)


def _wanted(*primals) -> tuple[Variables, tuple[Layer, Any]]:
    """Which of the primals of a rule with `symbolic_zeros` are differentiated, and the primals themselves.

    No matrix product is spent on the gradient of any other.
    """
    layer, operands = primals
    inputs = (layer.features, layer.kernel, layer.bias, operands.spread)
    wanted = Variables(*(v is not None and v.perturbed for v in inputs))
    return wanted, jax.tree.map(lambda p: p.value, primals, is_leaf=lambda p: hasattr(p, "perturbed"))


def _dtypes(layer: Layer) -> tuple[Array, Array]:
    """Empty arrays of the dtypes of features and kernel."""
    return jnp.zeros(0, layer.features.dtype), jnp.zeros(0, layer.kernel.dtype)


def _as_cotangents(program: Program, gradients: Variables, dtypes: tuple[Array, Array]) -> tuple[Layer, Any]:
    """Summed over the devices, and last of all in the inputs' dtype: a sum may not fit into float16."""
    summed = (
        lax.psum(g, tuple(axes)) if axes and g is not None else g
        for g, axes in zip(gradients, program.summed, strict=True)
    )
    features, kernel, bias, spread = summed
    for axis, names in enumerate(program.gathered):
        if names and kernel is not None:
            kernel = lax.psum_scatter(kernel, names, scatter_dimension=axis, tiled=True)
    features, kernel = (
        g if g is None else g.astype(like.dtype) for g, like in zip((features, kernel), dtypes, strict=True)
    )
    # None is JAX's word for a zero cotangent.
    to_layer = Layer(features, kernel, bias, None, None)  # pyright: ignore[reportArgumentType]
    return to_layer, to_operands(program.operands, spread)
