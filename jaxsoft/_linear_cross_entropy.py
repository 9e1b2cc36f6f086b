"""Cross-entropy of a linear layer whose logits are never all stored."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, DTypeLike, Float, Int

from jaxsoft._checks import as_floating, as_integer, as_number, as_option, check_values, compute_dtype
from jaxsoft._cross_entropy import REDUCTIONS, Reduction, losses_and_lse, or_one
from jaxsoft._shards import AxisName, as_axis_name, unsharded, vary, varying
from jaxsoft._statistics import block_gradient, block_statistics, position_losses, target_gradient
from jaxsoft._targets import Targets, read_targets

MEMORY_BUDGET = 256 * 2**20


def linear_cross_entropy(
    features: Float[ArrayLike, "*positions features"],
    kernel: Float[ArrayLike, "features classes"],
    targets: Int[ArrayLike, "*positions"] | Float[ArrayLike, "*positions classes"],
    bias: Float[ArrayLike, " classes"] | None = None,
    *,
    ignore_index: int | None = None,
    weights: Float[ArrayLike, "*positions"] | None = None,
    class_weights: Float[ArrayLike, " classes"] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    reduction: Reduction = "mean",
    memory_budget: int = MEMORY_BUDGET,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """Cross-entropy between targets and softmax(features @ kernel + bias), without storing all logits.

    z = x·W + b, capped to c·tanh(z/c);  loss = τ·lse − Σ_j q_j z_j + ζ·lse², as in `cross_entropy`

    Positions are taken in tiles of as many rows as `memory_budget` allows; only one tile's logits exist
    at a time. A tile's statistics and gradient are those of `cross_entropy`.

    Args:
        features: inputs x of the layer, in any floating dtype, with any number of leading axes.
        kernel: weights W of shape (features, classes), as in Flax's Dense.
        targets: integer labels in [0, classes), of the features' shape without their last axis; or a
            floating distribution of shape (..., classes), which need not sum to one.
        bias: b of shape (classes,).
        ignore_index: label of the positions that take no part, nor any time.
        weights: weight of each position; 0 leaves a position out like `ignore_index`.
        class_weights: weight of each class, of shape (classes,).
        label_smoothing: ε in [0, 1], as in `cross_entropy`.
        z_loss: ζ ≥ 0, as in `cross_entropy`.
        soft_cap: c > 0, which keeps the logits within ±c.
        reduction: "none", "sum" or "mean", as in `cross_entropy`.
        memory_budget: bytes that one tile's logits and their gradient may take.
        axis_name: inside `jax.shard_map`, the mesh axis over which the classes are laid in contiguous
            blocks: kernel, bias and distributions are of one block; labels and class weights are of all
            classes. The loss and gradients are those of the whole layer. Where the positions are sharded
            too, "mean" is over those of one device: take "sum", and divide by the `psum` of the count.

    Returns:
        The loss in float32, or float64 for float64 inputs: a scalar, or with "none" an array of the
        features' shape without the last axis, 0 at ignored positions.

    Edges: as in `cross_entropy`: a label out of range gives NaN, nothing to average gives 0, and the
    features of a position that takes no part may be NaN. A bias of −inf removes a class, soft cap or not.

    Differentiation: to features, kernel, bias and distributions, in reverse mode to any order and forward
    over reverse (`jax.hessian`). Under differentiation a scalar loss forms its gradients along with it:
    three matrix products a tile, 6·N·D·V operations. "none" forms them in the backward pass, from logits
    computed again: four, 8·N·D·V. Without differentiation there is one, and none for an input that is not
    differentiated. The gradient of the kernel is summed in float32. Training takes memory for one tile, the
    gradients, and a product or two of the kernel's size: see `plan_linear_cross_entropy`.

    Products are computed in the wider dtype of features and kernel (cast the kernel to compute in bfloat16),
    their sums and everything else in float32. On several devices shard the positions with `jax.shard_map`:
    a tile takes rows from anywhere, which automatic sharding answers with every device doing all of them.

    Raises:
        TypeError: inputs that are not real numbers, targets of a wrong dtype, an option that is not a plain number.
        ValueError: shapes that do not fit, an option out of range, a budget below one position's logits.

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
    if x.ndim == 0:
        raise ValueError("features: expected at least one axis, the features, got a scalar")
    if w.ndim != 2 or w.shape[0] != x.shape[-1] or w.shape[1] == 0:
        raise ValueError(f"kernel: expected shape ({x.shape[-1]}, classes) with at least one class, got {w.shape}")
    dtype = jnp.result_type(x, w)
    b = None
    if bias is not None:
        b = as_floating("bias", bias)
        if b.shape != w.shape[1:]:
            raise ValueError(f"bias: expected shape {w.shape[1:]}, one number a class, got {b.shape}")
    if soft_cap is not None:
        soft_cap = as_number("soft_cap", soft_cap, 0)
        if soft_cap == 0:
            raise ValueError("soft_cap: expected a number above 0, got 0")
    if ignore_index is not None:
        ignore_index = as_integer("ignore_index", ignore_index)
    return _linear_cross_entropy(
        x.astype(dtype),
        w.astype(dtype),
        b,
        jnp.asarray(targets),
        weights,
        class_weights,
        ignore_index=ignore_index,
        label_smoothing=as_number("label_smoothing", label_smoothing, 0, 1),
        z_loss=as_number("z_loss", z_loss, 0),
        soft_cap=soft_cap,
        reduction=as_option("reduction", reduction, REDUCTIONS),
        memory_budget=as_integer("memory_budget", memory_budget),
        axis_name=as_axis_name(axis_name, "kernel", w),
    )


class Plan(NamedTuple):
    """What `linear_cross_entropy` does for given shapes."""

    tiles: int
    rows: int  # positions in a tile; the loss alone may take fewer
    flops: int  # of the loss alone
    training_flops: int  # of the loss and all gradients
    tile_bytes: int  # logits and their gradient of one tile, within the budget
    gradient_bytes: int  # gradients to features and kernel, the latter summed in float32
    unfused_bytes: int  # logits and their gradient of all positions, which are not stored

    def __str__(self) -> str:
        mib = (f"{n / 2**20:,.1f} MiB" for n in (self.tile_bytes, self.gradient_bytes, self.unfused_bytes))
        tile, gradients, unfused = mib
        plural = "s" if self.tiles > 1 else ""
        return (
            f"{self.tiles} tile{plural} of {self.rows} positions: {self.flops / 1e9:,.1f} GFLOP for the loss, "
            f"{self.training_flops / 1e9:,.1f} with its gradients; {tile} for a tile and {gradients} for gradients, "
            f"in place of {unfused} for all logits"
        )


def plan_linear_cross_entropy(
    positions: int,
    features: int,
    classes: int,
    dtype: DTypeLike = "float32",
    *,
    distributions: bool = False,
    reduction: Reduction = "mean",
    memory_budget: int = MEMORY_BUDGET,
) -> Plan:
    """The tiles, operations and bytes of `linear_cross_entropy` for given shapes.

    tile bytes = rows · classes · (logit + gradient),  training operations = 6·N·D·V, with "none" 8·N·D·V

    Args:
        positions: N, of one shard where the data are sharded.
        features: D.
        classes: V, of one shard where the classes are sharded.
        dtype: of features and kernel.
        distributions: whether the targets are distributions, whose rows are part of a tile.
        reduction: as given to `linear_cross_entropy`.
        memory_budget: as given to `linear_cross_entropy`.

    Returns:
        A `Plan` of counts, in tiles, positions, floating-point operations and bytes, that prints as a sentence.

    Edges: ignored positions take part in the plan but not in the work.

    Raises:
        TypeError, ValueError: an argument that is not a positive integer, a budget below one position's logits.

    Example:
        >>> from jaxsoft import plan_linear_cross_entropy
        >>> print(plan_linear_cross_entropy(4096, 4096, 128_256, "bfloat16"))
        16 tiles of 256 positions: 4,303.6 GFLOP for the loss, 12,910.7 with its gradients; 250.5 MiB for a tile and
        2,036.0 MiB for gradients, in place of 4,008.0 MiB for all logits
    """
    sizes = {"positions": positions, "features": features, "classes": classes}
    for name, size in sizes.items():
        if as_integer(name, size) < 1:
            raise ValueError(f"{name}: expected a positive integer, got {size}")
    as_option("reduction", reduction, REDUCTIONS)
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
    wide, narrow = compute_dtype(dtype).itemsize, dtype.itemsize
    entry = 2 * wide  # bytes of a logit and its gradient
    row_bytes = classes * (2 * entry if distributions else entry)  # a distribution and its gradient besides
    if as_integer("memory_budget", memory_budget) < row_bytes:
        raise ValueError(
            f"memory_budget: expected at least {row_bytes} bytes, what one position's logits take, got {memory_budget}"
        )
    tiles = -(-positions // (memory_budget // row_bytes))
    rows = -(-positions // tiles)
    product = 2 * positions * features * classes
    return Plan(
        tiles=-(-positions // rows),
        rows=rows,
        flops=product,
        training_flops=product * (4 if reduction == "none" else 3),
        tile_bytes=rows * row_bytes,
        gradient_bytes=features * (positions * narrow + classes * wide),
        unfused_bytes=positions * classes * entry,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "ignore_index",
        "label_smoothing",
        "z_loss",
        "soft_cap",
        "reduction",
        "memory_budget",
        "axis_name",
    ),
)
def _linear_cross_entropy(
    features: Array,
    kernel: Array,
    bias: Array | None,
    targets: Array,
    weights: ArrayLike | None,
    class_weights: ArrayLike | None,
    *,
    ignore_index: int | None,
    label_smoothing: float,
    z_loss: float,
    soft_cap: float | None,
    reduction: Reduction,
    memory_budget: int,
    axis_name: AxisName,
) -> Array:
    leading, (width, classes) = features.shape[:-1], kernel.shape
    dtype = compute_dtype(features.dtype)
    read, counts = read_targets(
        targets,
        (*leading, classes),
        dtype,
        len(leading),
        ignore_index=ignore_index,
        weights=weights,
        class_weights=class_weights,
        where=None,
        label_smoothing=label_smoothing,
        axis_name=axis_name,
    )
    positions = counts.loss.size
    if positions == 0:
        return jnp.zeros(leading if reduction == "none" else (), dtype)
    flat, counts = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]) if jnp.ndim(a) else a, (read, counts))
    plan = plan_linear_cross_entropy(
        positions,
        max(width, 1),
        classes,
        features.dtype,
        distributions=read.label is None,
        memory_budget=memory_budget,
    )
    layer = Layer(features.reshape(positions, width), kernel, None if bias is None else bias.astype(dtype))
    takes_part = counts.position != 0
    check_values("features", layer.features, ~(jnp.isnan(layer.features) & takes_part), "a number")
    check_values("kernel", kernel, ~jnp.isnan(kernel), "a number")
    # Differences between devices are declared before the rule, so that JAX sums the gradients over them.
    layer = vary(layer, varying((layer, flat, counts)))
    skips = ignore_index is not None or weights is not None
    options = Options(plan.rows, soft_cap, axis_name, features.dtype, skips)
    coefficients = Coefficients(jnp.ones_like(counts.loss), z_loss * counts.position if z_loss else None)
    if reduction == "none":
        return cast(Array, _position_terms(options, layer, flat, coefficients)).reshape(leading)
    if reduction == "sum":
        return cast(Array, _total(options, layer, flat, coefficients))
    # Divided by the count at the end: float16 could not hold a position's share of a gradient.
    count = or_one(jnp.sum(counts.loss))
    if coefficients.square is not None:
        coefficients = coefficients._replace(square=coefficients.square * (count / or_one(jnp.sum(counts.position))))
    return cast(Array, _total(options, layer, flat, coefficients)) / count


class Layer(NamedTuple):
    """The linear layer; its gradient has the same form."""

    features: Array  # (N, D)
    kernel: Array  # (D, V)
    bias: Array | None  # (V,)


class Coefficients(NamedTuple):
    """What a position adds to the result: loss·its loss + square·lse², both of shape (N, 1)."""

    loss: Array
    square: Array | None  # None without z-loss


class Options(NamedTuple):
    """What the program depends on beside its arrays."""

    rows: int  # positions in a tile
    soft_cap: float | None
    axis_name: AxisName
    dtype: jnp.dtype  # of features and kernel
    skips: bool  # whether positions may be ignored


class Variables(NamedTuple):
    """One array, or None, for each input that may be differentiated."""

    features: Any = None
    kernel: Any = None
    bias: Any = None
    spread: Any = None

    def as_cotangents(self) -> tuple[Layer, Targets, Coefficients]:
        constant: Any = None  # JAX's word for a zero cotangent
        targets = Targets(constant, constant, self.spread, constant)
        return Layer(self.features, self.kernel, self.bias), targets, Coefficients(constant, constant)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(options: Options, layer: Layer, targets: Targets, coefficients: Coefficients) -> Array:
    """The sum of all positions' terms, which forms its gradients along with itself."""
    return jnp.sum(_terms(options, layer, targets, coefficients))


def _total_fwd(options: Options, *primals):
    wanted, arrays = _wanted(*primals)
    total, gradients = _total_and_gradients(options, wanted, *arrays)
    # What is kept has one structure whichever gradients are wanted, and says which by its shapes: JAX caches the
    # structure with the traced function, and a later trace for other variables would replace it.
    return total, tuple(jnp.zeros(()) if g is None else g for g in gradients)


def _total_bwd(options: Options, gradients: tuple[Array, ...], cotangent: Array):
    scaled = Variables(*(cotangent * g.astype(cotangent.dtype) if g.ndim else None for g in gradients))
    return _in_dtype(options, scaled).as_cotangents()


_total.defvjp(_total_fwd, _total_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _position_terms(options: Options, layer: Layer, targets: Targets, coefficients: Coefficients) -> Array:
    """Each position's term, whose gradients wait for the cotangent of each."""
    return _terms(options, layer, targets, coefficients)


def _position_terms_fwd(options: Options, *primals):
    wanted, arrays = _wanted(*primals)
    return _terms(options, *arrays), (tuple(jnp.zeros(int(w)) for w in wanted), arrays)


def _position_terms_bwd(options: Options, residuals, cotangent: Array):
    flags, (layer, targets, coefficients) = residuals
    wanted = Variables(*(flag.size > 0 for flag in flags))
    coefficients = jax.tree.map(lambda c: c * cotangent, coefficients)
    _, gradients = _total_and_gradients(options, wanted, layer, targets, coefficients)
    return _in_dtype(options, gradients).as_cotangents()


_position_terms.defvjp(_position_terms_fwd, _position_terms_bwd, symbolic_zeros=True)


def _wanted(*primals) -> tuple[Variables, tuple[Layer, Targets, Coefficients]]:
    """Which of the primals of a rule with `symbolic_zeros` are differentiated, and the primals themselves.

    No matrix product is spent on the gradient of any other.
    """
    layer, targets, _ = primals
    wanted = Variables(*(v is not None and v.perturbed for v in (*layer, targets.spread)))
    return wanted, jax.tree.map(lambda p: p.value, primals, is_leaf=lambda p: hasattr(p, "perturbed"))


def _in_dtype(options: Options, gradients: Variables) -> Variables:
    """Gradients to features and kernel in the dtype of these, last of all: a sum may not fit into float16."""
    features, kernel = (None if g is None else g.astype(options.dtype) for g in (gradients.features, gradients.kernel))
    return gradients._replace(features=features, kernel=kernel)


# The loops over tiles. Each is fast and cannot be differentiated, hence a rule: that of the same sum as a scan.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _terms(options: Options, layer: Layer, targets: Targets, coefficients: Coefficients) -> Array:
    """loss·(loss of a position) + square·lse² of every position, of shape (N, 1)."""

    def step(rows: Array, terms: Array) -> Array:
        x, t, c = _take(rows, layer.features, targets, coefficients)
        logits = _logits(x, layer.kernel, layer.bias, options.soft_cap)
        statistics = block_statistics(logits, (1,), t, options.axis_name, reused="nothing")
        term = _term(c, position_losses(t, statistics), statistics.logsumexp)
        return terms.at[rows].set(term, mode="drop")

    # With no gradients to add up for each tile, small ones that stay in a cache are faster.
    options = options._replace(rows=min(options.rows, max(options.rows // 8, 256)))
    none_yet = vary(jnp.zeros_like(coefficients.loss), unsharded(varying(layer), options.axis_name))
    return _over_tiles(options, targets, step, none_yet)


@_terms.defjvp
def _terms_jvp(options: Options, primals, tangents):
    def without_rule(logits: Array, targets: Targets, axis: int, axis_name: AxisName) -> tuple[Array, Array]:
        statistics = block_statistics(logits, (axis,), targets, axis_name)
        return position_losses(targets, statistics), statistics.logsumexp

    # A custom_vjp, as `losses_and_lse` is, cannot be differentiated in forward mode.
    return jax.jvp(functools.partial(_scanned_terms, options, without_rule), primals, tangents)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _total_and_gradients(
    options: Options, wanted: Variables, layer: Layer, targets: Targets, coefficients: Coefficients
) -> tuple[Array, Variables]:
    """The sum of all terms and the gradients that are wanted."""
    dtype = coefficients.loss.dtype
    product = functools.partial(lax.dot_general, preferred_element_type=dtype)

    def step(rows: Array, carry: tuple[Array, Variables]) -> tuple[Array, Variables]:
        total, (to_features, to_kernel, to_bias, to_spread) = carry
        x, t, c = _take(rows, layer.features, targets, coefficients)
        logits = _logits(x, layer.kernel, layer.bias, options.soft_cap)
        statistics = block_statistics(logits, (1,), t, options.axis_name)
        total += jnp.sum(_term(c, position_losses(t, statistics), statistics.logsumexp))
        lse_cotangent = jnp.zeros_like(c.loss) if c.square is None else 2 * c.square * _finite(statistics.logsumexp)
        gradient = block_gradient(logits, t, statistics, (1,), c.loss, lse_cotangent)
        if options.soft_cap is not None:
            gradient *= jnp.where(jnp.isneginf(logits), 0, 1 - (logits / options.soft_cap) ** 2)
        narrow = gradient.astype(x.dtype)  # or the products would be taken in float32
        if wanted.features:
            to_rows = product(narrow, layer.kernel, (((1,), (1,)), ((), ()))).astype(x.dtype)
            to_features = to_features.at[rows].set(to_rows, mode="drop")
        if wanted.kernel:
            to_kernel += product(x, narrow, (((0,), (0,)), ((), ())))
        if wanted.bias:
            to_bias += jnp.sum(gradient, 0)
        if wanted.spread:
            to_spread = to_spread.at[rows].set(target_gradient(logits, t, statistics, c.loss), mode="drop")
        return total, Variables(to_features, to_kernel, to_bias, to_spread)

    def zeros(array: Array, wanted: bool, dtype: jnp.dtype) -> Array | None:
        return vary(jnp.zeros(array.shape, dtype), varying(layer)) if wanted else None

    dtypes = Variables(layer.features.dtype, dtype, dtype, dtype)
    inputs = Variables(*layer, targets.spread)
    none_yet = Variables(*map(zeros, inputs, wanted, dtypes))
    nothing = vary(jnp.zeros((), dtype), unsharded(varying(layer), options.axis_name))
    return _over_tiles(options, targets, step, (nothing, none_yet))


@_total_and_gradients.defjvp
def _total_and_gradients_jvp(options: Options, wanted: Variables, primals, tangents):
    def total_and_gradients(layer: Layer, targets: Targets, coefficients: Coefficients) -> tuple[Array, Variables]:
        every = Variables(*layer, targets.spread)

        def total(chosen: Variables) -> Array:
            *inputs, spread = (old if new is None else new for new, old in zip(chosen, every, strict=True))
            changed = Layer(*inputs), targets._replace(spread=spread)
            return jnp.sum(_scanned_terms(options, losses_and_lse, *changed, coefficients))

        chosen = (v if w else None for v, w in zip(every, wanted, strict=True))
        return jax.value_and_grad(total)(Variables(*chosen))

    return jax.jvp(total_and_gradients, primals, tangents)


def _scanned_terms(
    options: Options,
    losses_and_lse: Callable[..., Any],
    layer: Layer,
    targets: Targets,
    coefficients: Coefficients,
) -> Array:
    """`_terms` as a scan over all tiles, which JAX can differentiate."""

    @jax.checkpoint
    def tile(rows: Array) -> Array:
        x, t, c = _take(rows, layer.features, targets, coefficients)
        x = jnp.where(t.share == 0, 0, x)  # the loops leave these rows out
        logits = _logits(x, layer.kernel, layer.bias, options.soft_cap)
        losses, lse = losses_and_lse(logits, t, 1, options.axis_name)
        return _term(c, losses, lse)

    positions = coefficients.loss.shape[0]
    tiles = -(-positions // options.rows)
    rows = jnp.arange(tiles * options.rows).reshape(tiles, options.rows)
    return lax.map(tile, rows).reshape(-1, 1)[:positions]


def _over_tiles(options: Options, targets: Targets, step: Callable[[Array, Any], Any], start: Any) -> Any:
    """Fold `step` over tiles of the positions that take part; rows past the last have an index out of range."""
    share = jnp.asarray(targets.share)
    positions = share.shape[0]

    def fold(first: Array | int, end: Array | int, size: int, carry: Any) -> Any:
        def body(tile: Array, carry: Any) -> Any:
            row = first + tile * size
            rows = lax.dynamic_slice_in_dim(order, row, size)
            return step(jnp.where(row + jnp.arange(size) < end, rows, positions), carry)

        return lax.fori_loop(0, (end - first + size - 1) // size, body, carry)

    order, count = jnp.arange(positions), positions
    if options.skips:
        idle = share[:, 0] == 0
        order, count = jnp.argsort(idle, stable=True), positions - jnp.sum(idle)
    order = jnp.pad(order, (0, options.rows), constant_values=positions)
    if not options.skips or options.axis_name is not None:  # each loop brings two all-reduces of its own
        return fold(0, count, options.rows, start)
    # What whole tiles leave is taken in tiles of an eighth, or most of the last one could be idle.
    whole = count - count % options.rows
    return fold(whole, count, -(-options.rows // 8), fold(0, whole, options.rows, start))


def _take(
    rows: Array, features: Array, targets: Targets, coefficients: Coefficients
) -> tuple[Array, Targets, Coefficients]:
    """A tile's rows, zero where the index is out of range."""

    def take(array: Array) -> Array:
        shared = array.ndim < 2 or array.shape[0] == 1  # by all positions, or there is but one
        return array if shared else jnp.take(array, rows, axis=0, mode="fill", fill_value=0)

    return take(features), jax.tree.map(take, targets), jax.tree.map(take, coefficients)


def _logits(features: Array, kernel: Array, bias: Array | None, soft_cap: float | None) -> Array:
    logits = jnp.dot(features, kernel, preferred_element_type=compute_dtype(features.dtype))
    if bias is not None:
        logits += bias
    if soft_cap is None:
        return logits
    # A class removed by a bias of −inf stays removed.
    return jnp.where(jnp.isneginf(logits), logits, soft_cap * jnp.tanh(logits / soft_cap))


def _term(coefficients: Coefficients, losses: Array, lse: Array) -> Array:
    terms = coefficients.loss * losses
    return terms if coefficients.square is None else terms + coefficients.square * _finite(lse) ** 2


def _finite(lse: Array) -> Array:
    """lse, or 0 where no class has a finite logit and nothing is to be drawn towards 0."""
    return jnp.where(jnp.isneginf(lse), 0, lse)
