"""Cross-entropy of a linear layer whose logits are never all stored."""

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxsoft._checks import (
    as_axis,
    as_floating,
    as_integer,
    as_mask,
    as_number,
    as_option,
    broadcast,
    check_values,
    is_checking,
)
from jaxsoft._dtypes import compute_dtype
from jaxsoft._losses import scale_gradient
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
from jaxsoft._primitive import Results, as_primitive
from jaxsoft._shards import AxisName, all_classes, as_axis_name, vary, varying
from jaxsoft._targets import (
    REDUCTIONS,
    Options,
    Reduction,
    Targets,
    as_targets,
    read_options,
    read_targets,
    reduce_losses,
    sum_positions,
)
from jaxsoft._tiles import Layer, Tiling, Variables, tiled_gradients, tiled_losses


def linear_cross_entropy(
    features: Float[ArrayLike, "*positions features"],
    kernel: Float[ArrayLike, "features classes"],
    targets: Int[ArrayLike, "*positions"] | Float[ArrayLike, "*positions classes"] | Bool[ArrayLike, "..."],
    bias: Float[ArrayLike, " classes"] | None = None,
    *,
    ignore_index: int | None = None,
    weights: Float[ArrayLike, "*positions"] | Bool[ArrayLike, "*positions"] | None = None,
    class_weights: Float[ArrayLike, " classes"] | None = None,
    where: Bool[ArrayLike, " classes"] | None = None,
    label_smoothing: Float[ArrayLike, ""] = 0.0,
    z_loss: Float[ArrayLike, ""] = 0.0,
    soft_cap: Float[ArrayLike, ""] | None = None,
    temperature: Float[ArrayLike, ""] = 1.0,
    reduction: Reduction = "mean",
    kernel_axis: int = -1,
    memory_budget: int | None = None,
    axis_name: AxisName = None,
    batch_axes: BatchAxes = None,
) -> Float[Array, "..."]:
    """Cross-entropy between targets and softmax(features @ kernel + bias), without storing all logits.

    z = c·tanh((x·W + b)/c)/T;  loss = τ·lse − Σ_j q_j z_j + ζ·lse², as in `cross_entropy`

    Positions are taken in tiles, see `plan_linear_cross_entropy`; only one tile's logits exist at a time. A tile's
    statistics and gradient are those of `cross_entropy`.

    Args:
        features: inputs x of the layer, in float16, bfloat16, float32 or float64, with any number of
            leading axes.
        kernel: weights W of shape (features, classes), as in Flax's Dense; see `kernel_axis`.
        targets: integer labels in [0, classes), of the features' shape without their last axis; or a
            floating distribution of shape (..., classes), which need not sum to one, or a one-hot over two classes or
            more: all as in `cross_entropy`.
        bias: b of shape (classes,).
        ignore_index: label of the positions that take no part, nor, to first order, any time.
        weights: weight of each position, or a mask of those that take part; 0 leaves a position out like
            `ignore_index`.
        class_weights: weight of each class, of shape (classes,).
        where: booleans of shape (classes,); False removes a class, such as one that pads the vocabulary.
        label_smoothing: ε in [0, 1], as in `cross_entropy`.
        z_loss: ζ ≥ 0, as in `cross_entropy`.
        soft_cap: c > 0, which keeps the logits within ±c; None for none.
        temperature: T > 0, which divides the logits after the cap. Like smoothing, z-loss and cap it may be
            traced, for schedules, and is a constant: for one that is learnt divide the features by it.
        reduction: "none", "sum" or "mean", as in `cross_entropy`.
        kernel_axis: the kernel's class axis: -1, or 0 for a kernel of shape (classes, features), such as tied
            embeddings, of which no copy is made.
        memory_budget: bytes that one tile's logits and their gradient may take; None for what suits the platform it
            is compiled for.
        axis_name: inside `jax.shard_map`, or on an automatic mesh set by `jax.set_mesh`, the mesh axis over which the
            classes are laid in contiguous blocks. Inside `shard_map`, kernel, bias, `where` and distributions are of
            one block; labels and class weights are of all classes. The loss and gradients are those of the whole
            layer. Types do not tell blocks from copies of all classes that were gathered inside the `shard_map`: those
            would count once for each device. Where a `shard_map` has sharded the positions too, "mean" is over those
            of one device: take "sum", and divide by the `psum` of the count.
        batch_axes: on an automatic mesh set by `jax.set_mesh`, the names of the mesh axes over which the first axis of
            the positions is laid, or a `PartitionSpec` for each of these axes. Explicit axes are read from the types.

    Returns:
        The loss in float32, or float64 for float64 inputs: a scalar, or with "none" an array of the
        features' shape without the last axis, 0 at ignored positions.

    Edges: as in `cross_entropy`: a label out of range gives NaN, nothing to average gives 0, and the
    features of a position that takes no part may be NaN. A bias of −inf removes a class like `where`, soft
    cap or not: smoothing shares its mass among the classes left.

    Differentiation: to features, kernel, bias and distributions, in reverse mode to any order and forward
    over reverse (`jax.hessian`). Under differentiation a scalar loss forms its gradients along with it:
    three matrix products a tile, 6·N·D·V operations. "none" forms them in the backward pass, from logits
    computed again: four, 8·N·D·V. Without differentiation there is one, and none for an input that is not
    differentiated. The gradient of the kernel is summed in float32, over devices too. Training takes memory for
    one tile, the gradients, and a product or two of the kernel's size: see `plan_linear_cross_entropy`.

    Under `jax.vmap` over features, and targets and weights where these are mapped, as over sequences, all examples
    are positions of one loss, with gradients formed in the backward pass. A mapped layer, and `vmap` of a
    gradient, have a kernel gradient for each example, and may not be mapped over an axis that is laid over a mesh
    explicitly (JAX loses its name inside the loop). In the body of `jax.lax.scan` or `jax.lax.map` every step
    would keep its gradients: wrap the body in `jax.checkpoint`.

    Products are computed in the wider dtype of features and kernel (cast the kernel to compute in bfloat16),
    their sums and everything else in float32.

    Sharded arrays under plain `jax.jit`: on explicit axes as they are laid, on automatic ones as `batch_axes` and
    `axis_name` say, each device has a loop over its own positions, in which only two numbers a position are summed over
    the blocks of a vocabulary. A kernel that is sharded over the positions' axes (fully sharded data parallelism) is
    gathered once and its gradient, in float32, reduced once; "mean" is over the positions of all devices. Without
    `batch_axes` on automatic axes the result is the same, but every device may do all positions. JAX cannot
    differentiate one `shard_map` in another: in your own, name all axes that have part in it.

    Raises:
        TypeError: inputs that are not real numbers of 16 bits or more, targets of a wrong dtype, an option that is
            not a number.
        ValueError: shapes that do not fit, an option out of range, a budget below one position's logits, names that
            are no axes of the mesh, positions that its devices do not divide.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxsoft import cross_entropy, linear_cross_entropy
        >>> x, w = jnp.linspace(-1, 1, 6).reshape(3, 2), jnp.linspace(-2, 1, 8).reshape(2, 4)
        >>> labels = jnp.array([0, 3, 1])
        >>> print(linear_cross_entropy(x, w, labels).round(4), cross_entropy(x @ w, labels).round(4))
        1.342 1.342

    Source: tiles with gradients formed in the forward pass, P.-L. Hsu et al., "Liger kernel" (2024);
    the memory argument, E. Wijmans et al., "Cut your losses in large-vocabulary language models" (2024);
    the soft cap, Gemma Team, "Gemma 2" (2024).
    """
    x, w = as_floating("features", features), as_floating("kernel", kernel)
    class_axis = as_axis(kernel_axis, 2, "kernel_axis")
    if x.ndim == 0:
        raise ValueError("features: expected at least one axis, the features, got a scalar")
    _check_kernel(w.shape, x.shape[-1], class_axis)
    with jax.numpy_dtype_promotion("standard"):  # documented, unlike what strict promotion refuses
        dtype = jnp.result_type(x, w)
    wide, classes = compute_dtype(dtype), w.shape[class_axis]
    b = None
    if bias is not None:
        b = as_floating("bias", bias).astype(wide)
        if b.shape != (classes,):
            raise ValueError(f"bias: expected shape ({classes},), one number a class, got {b.shape}")
        check_values("bias", b, ~jnp.isnan(b), "a number")
    mask = None
    if where is not None:
        mask = as_mask("where", where, (classes,))
        b = jnp.zeros(classes, wide) if b is None else b
        b = jnp.where(lay_like(mask, b), b, -jnp.inf)
    batch = as_batch_axes(batch_axes, x)
    blocks = as_mesh_axes(axis_name)
    check_blocks(blocks, classes, batch)
    axis_name = None if blocks else as_axis_name(axis_name, "kernel", w)
    labels, ignore_index = as_targets(targets, all_classes(classes, axis_name), ignore_index)
    options = read_options(weights, class_weights, mask, label_smoothing, z_loss, wide)
    if options.weights is not None:  # an array, of all positions, for `vmap`
        options = options._replace(weights=broadcast("weights", jnp.asarray(weights), x.shape[:-1]))
    cap = None if soft_cap is None else jnp.asarray(as_number("soft_cap", soft_cap, 0, above=True), wide)
    heat = as_number("temperature", temperature, 0, above=True)
    (loss,) = _linear_cross_entropy(
        Inputs(
            Layer(
                x.astype(dtype),
                w.astype(dtype),
                b,
                cap,
                None if isinstance(heat, float) and heat == 1 else jnp.asarray(heat, wide),
            ),
            labels,
            options,
        ),
        Static(
            class_axis,
            ignore_index,
            as_option("reduction", reduction, REDUCTIONS),
            None if memory_budget is None else as_integer("memory_budget", memory_budget),
            axis_name,
            batch,
            blocks,
        ),
    )
    return loss


def _check_kernel(shape: tuple[int, ...], width: int, class_axis: int) -> None:
    if len(shape) == 2 and shape[1 - class_axis] == width and shape[class_axis] != 0:
        return
    expected = f"({width}, classes)" if class_axis == 1 else f"(classes, {width})"
    message = f"kernel: expected shape {expected} with at least one class, got {shape}"
    if len(shape) == 2 and shape[class_axis] == width:
        message += f"; for a kernel of shape {'(classes, features)' if class_axis == 1 else '(features, classes)'} "
        message += f"pass kernel_axis={0 if class_axis == 1 else -1}"
    raise ValueError(message)


class Inputs(NamedTuple):
    """The arrays of a call."""

    layer: Layer  # features with any leading axes
    targets: Array
    options: Options


class Static(NamedTuple):
    """What is part of the program."""

    class_axis: int
    ignore_index: int | None
    reduction: Reduction
    memory_budget: int | None
    axis_name: AxisName
    batch_axes: P | None  # mesh axes over which the positions are to be laid
    blocks: Names  # those over which the classes are, outside of any `shard_map`
    examples: int = 0  # leading axes that enumerate losses, not positions of one
    batch: Names = ()  # mesh axes over which positions are laid already
    gathered: tuple[Names, Names] = ((), ())  # those over which the kernel's axes are, and are to be gathered


def _map_examples(size: int, axes: Inputs, inputs: Inputs, static: Static) -> tuple[Results, tuple[int]] | None:
    """Examples of one layer are more positions, with a loss for each.

    Mapped as it stands, the loss would keep a gradient of the kernel for each example. None where more than features,
    targets and weights is mapped.
    """
    of_examples = (axes.layer.features, axes.targets, axes.options.weights)
    if axes.layer.features is None or len(jax.tree.leaves(axes)) > len(jax.tree.leaves(of_examples)):
        return None

    def lead(array: Any, axis: Any) -> Any:
        if array is None:
            return None
        return jnp.broadcast_to(array, (size, *array.shape)) if axis is None else jnp.moveaxis(array, axis, 0)

    layer = inputs.layer._replace(features=lead(inputs.layer.features, axes.layer.features))
    options = inputs.options._replace(weights=lead(inputs.options.weights, axes.options.weights))
    mapped = Inputs(layer, lead(inputs.targets, axes.targets), options)
    return _linear_cross_entropy(mapped, static._replace(examples=static.examples + 1)), (0,)


@as_primitive(_map_examples)
@functools.partial(jax.jit, static_argnums=1)
def _linear_cross_entropy(inputs: Inputs, static: Static) -> tuple[Array]:
    features, kernel = inputs.layer.features, inputs.layer.kernel
    layout = head_layout(features, kernel, static.class_axis, static.batch_axes, static.blocks, static.examples)
    if layout is None or is_checking():  # whose errors JAX cannot carry out of a shard_map
        return _on_device(jax.tree.map(everywhere, inputs), static)
    return _over_mesh(layout, inputs, static)


def _over_mesh(layout: Layout, inputs: Inputs, static: Static) -> tuple[Array]:
    """Each device's positions in a loop of its own."""
    positions, blocks, kernel = layout.positions, P(layout.classes), list(layout.gathered)
    if layout.classes:
        kernel[static.class_axis] = layout.classes
    labelled = inputs.targets.ndim < inputs.layer.features.ndim
    specs: Any = Inputs(
        Layer(*cast(Any, (P(*positions, None), P(*kernel), blocks, P(), P()))),
        cast(Any, P(*positions) if labelled else P(*positions, *blocks)),
        Options(*cast(Any, (P(*positions), P(), blocks, P(), P()))),
    )
    specs = jax.tree.map(
        lambda array, spec: None if array is None else spec, inputs, specs, is_leaf=lambda a: a is None
    )
    on_device = static._replace(
        axis_name=layout.classes or static.axis_name,
        batch_axes=None,
        blocks=(),
        batch=sum(layout.positions[static.examples :], ()),
        gathered=layout.gathered,
    )
    results = layout.positions[: None if static.reduction == "none" else static.examples]
    run = jax.shard_map(
        functools.partial(_on_device, static=on_device),
        mesh=layout.mesh,
        in_specs=(specs,),
        out_specs=(P(*results),),
        axis_names=layout.axes,
    )
    return run(jax.tree.map(lambda array, spec: reshard(array, layout.mesh, spec), inputs, specs))


def _on_device(inputs: Inputs, static: Static) -> tuple[Array]:
    (features, kernel, bias, _, _), targets, options = inputs
    leading, width, classes = features.shape[:-1], features.shape[-1], kernel.shape[static.class_axis]
    classes *= math.prod(map(lax.axis_size, static.gathered[static.class_axis]))
    dtype = compute_dtype(features.dtype)
    if bias is not None:
        left = jnp.isfinite(bias) | (bias > 0)
        options = options._replace(where=jnp.expand_dims(left, tuple(range(len(leading)))))
    read, count = read_targets(
        targets,
        jax.ShapeDtypeStruct((*leading, classes), features.dtype),
        len(leading),
        options,
        ignore_index=static.ignore_index,
        reduction=static.reduction,
        axis_name=static.axis_name,
        examples=static.examples,
        batch=static.batch,
    )
    positions = math.prod(leading)
    if positions == 0:
        return (jnp.zeros(leading if static.reduction == "none" else leading[: static.examples], dtype),)
    flat = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), read)
    layer = inputs.layer._replace(features=features.reshape(positions, width))
    check_values("features", layer.features, ~(jnp.isnan(layer.features) & (flat.share != 0)), "a number")
    check_values("kernel", kernel, ~jnp.isnan(kernel), "a number")

    check_budget(classes, features.dtype, read.label is None, static.memory_budget)
    skips = static.ignore_index is not None or options.weights is not None
    axes = varying((layer, flat))
    summed = Variables(*(axes - varying(v) for v in (layer.features, layer.kernel, layer.bias, flat.spread)))
    program = Program(
        Tiling(static.memory_budget, static.class_axis, static.axis_name, skips), axes, summed, static.gathered
    )
    if is_checking():
        products = tiled_losses(program.tiling, *lax.stop_gradient((_ready(program, layer), flat)))
        check_values("logits", products, ~jnp.isnan(products), "numbers: features @ kernel + bias is none")
    if static.reduction == "none" or static.examples:
        losses = cast(Array, _losses(program, layer, flat)).reshape(*leading, 1)
        return (reduce_losses(losses, static.reduction, count, len(leading), static.examples, static.batch),)
    # Divided by the count at the end: float16 could not hold a position's share of a gradient.
    total = jnp.reshape(sum_positions(cast(Array, _total(program, layer, flat)), batch=static.batch), ())
    return (total if count is None else total / count.reshape(()),)


class Program(NamedTuple):
    """What the rules depend on beside their arrays."""

    tiling: Tiling
    axes: frozenset  # mesh axes over which the devices differ
    summed: Variables  # those of them over which each input is the same, and its gradient a sum
    gathered: tuple[Names, Names]  # those over which each axis of the kernel is laid, which is used as a whole


def _ready(program: Program, layer: Layer) -> Layer:
    """The layer with its whole kernel, typed as what the devices compute with it is."""
    kernel = layer.kernel
    for axis, names in enumerate(program.gathered):
        if names:
            kernel = lax.all_gather(kernel, names, axis=axis, tiled=True)
    return vary(layer._replace(kernel=kernel), program.axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(program: Program, layer: Layer, targets: Targets) -> Array:
    """The sum of all losses, which forms its gradients along with itself."""
    return jnp.sum(tiled_losses(program.tiling, _ready(program, layer), targets))


def _total_fwd(program: Program, *primals):
    wanted, (layer, targets) = _wanted(*primals)
    one = jnp.ones((1, 1), compute_dtype(layer.features.dtype))
    total, gradients = tiled_gradients(program.tiling, wanted, _ready(program, layer), targets, one)
    # What is kept has one structure whichever gradients are wanted, and says which by its shapes: JAX caches the
    # structure with the traced function, and a later trace for other variables would replace it.
    return total, (tuple(jnp.zeros(()) if g is None else g for g in gradients), _dtypes(layer))


def _total_bwd(program: Program, residuals, cotangent: Array):
    gradients, dtypes = residuals
    scaled = (scale_gradient(g.astype(cotangent.dtype), cotangent) if g.ndim else None for g in gradients)
    return _as_cotangents(program, Variables(*scaled), dtypes)


_total.defvjp(_total_fwd, _total_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(program: Program, layer: Layer, targets: Targets) -> Array:
    """Each position's loss, whose gradients wait for the cotangent of each."""
    return tiled_losses(program.tiling, _ready(program, layer), targets)


def _losses_fwd(program: Program, *primals):
    wanted, (layer, targets) = _wanted(*primals)
    losses = tiled_losses(program.tiling, _ready(program, layer), targets)
    return losses, (tuple(jnp.zeros(int(w)) for w in wanted), layer, targets)


def _losses_bwd(program: Program, residuals, cotangent: Array):
    flags, layer, targets = residuals
    wanted = Variables(*(flag.size > 0 for flag in flags))
    _, gradients = tiled_gradients(program.tiling, wanted, _ready(program, layer), targets, cotangent)
    return _as_cotangents(program, gradients, _dtypes(layer))


_losses.defvjp(_losses_fwd, _losses_bwd, symbolic_zeros=True)


def _wanted(*primals) -> tuple[Variables, tuple[Layer, Targets]]:
    """Which of the primals of a rule with `symbolic_zeros` are differentiated, and the primals themselves.

    No matrix product is spent on the gradient of any other.
    """
    layer, targets = primals
    inputs = (layer.features, layer.kernel, layer.bias, targets.spread)
    wanted = Variables(*(v is not None and v.perturbed for v in inputs))
    return wanted, jax.tree.map(lambda p: p.value, primals, is_leaf=lambda p: hasattr(p, "perturbed"))


def _dtypes(layer: Layer) -> tuple[Array, Array]:
    """Empty arrays of the dtypes of features and kernel."""
    return jnp.zeros(0, layer.features.dtype), jnp.zeros(0, layer.kernel.dtype)


def _as_cotangents(program: Program, gradients: Variables, dtypes: tuple[Array, Array]) -> tuple[Layer, Targets]:
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
    return Layer(features, kernel, bias, None, None), Targets(spread=spread)  # pyright: ignore[reportArgumentType]
