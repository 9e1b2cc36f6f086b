"""Loops over tiles of a linear layer's positions, which compute a head's values and gradients from one tile's logits.

The loops are fast but cannot be differentiated: their derivatives are those of the same sums written as scans. A layer
among the operands, a teacher, stands for its logits, which each tile computes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._arrays.classes import is_label
from jaxsoft._arrays.dtypes import compute_dtype, is_removed, widen
from jaxsoft._arrays.sharding import axes_after_psum, is_replicated, pvary
from jaxsoft._formula.head import Values, evaluate, evaluate_plainly
from jaxsoft._formula.statistics import Statistics, over_shards
from jaxsoft._jax_internals import Results, manual_axes
from jaxsoft._linear.args import DiffArgs, HeadConfig, LinearParams
from jaxsoft._linear.one_pass import SAMPLE, Pass, one_pass
from jaxsoft._linear.plan import Tile, plan_tile
from jaxsoft._platform.cpu import native_kernels
from jaxsoft._platform.devices import Device
from jaxsoft._platform.dispatch import by_platform


@by_platform(lambda arrays, config: tuple(jax.tree.leaves(_scanned_values(evaluate_plainly, *arrays, config=config))))
def tiled_values(device: Device, arrays: tuple[LinearParams, Any], config: HeadConfig) -> Results:
    """The values of every position, each of shape (N, …)."""
    (layer, operands), head = arrays, config.head
    tile = _tile(device, layer, operands, config)

    def step(rows: Array, values: Results) -> Results:
        x, t = _gather_rows(rows, (layer.features, operands), config)
        if tile.one_pass:
            _, statistics = _one_pass(x, t, layer, config, keep=False)
        else:
            logits = _to_logits(_products(x, layer, config), layer)
            statistics = head.statistics(logits, 1, t, config.axis_name)
        return _scatter_rows(rows, values, head.values(t, statistics, 1))

    return _over_tiles(device, tile.loss_rows, operands, config, step, _init_output(layer, operands, config))


@by_platform(lambda arrays, static: tuple(jax.tree.leaves(_scanned_gradients(*arrays, *static))))
def tiled_gradients(
    device: Device, arrays: tuple[LinearParams, Any, Results], static: tuple[HeadConfig, DiffArgs]
) -> Results:
    """The values of every position, and the needed gradients of the sum of cotangents·values."""
    (layer, operands, _), (config, needs_grad) = arrays, static
    tile = _tile(device, layer, operands, config, needs_grad)
    loop = _Gradients(device, tile, *arrays, *static)
    values, gradients = _over_tiles(device, tile.group_rows, operands, config, loop.step, loop.init())
    return *values, *(gradient for gradient in gradients if gradient is not None)


class _Group(NamedTuple):
    """The operands of the matmuls for the gradients to features and kernel."""

    x: Array
    for_features: Array  # the gradients to the group's logits before bias and cap, in the features' dtype
    for_kernel: Array


class _Gradients(NamedTuple):
    """A loop over groups of tiles that computes values and gradients."""

    device: Device
    tile: Tile
    layer: LinearParams
    operands: Any
    cotangents: Results
    config: HeadConfig
    needs_grad: DiffArgs

    @property
    def dtype(self) -> jnp.dtype:
        return self.layer.features.dtype

    @property
    def features_dtype(self) -> jnp.dtype:
        """The dtype of the features' gradient: the dtype to compute in if it is summed over shards."""
        return self.dtype if self.config.axis_name is None else compute_dtype(self.dtype)

    def step(self, rows: Array, carry: Any) -> Any:
        """Values and gradients with a group's added; it has one matmul for the features' and the kernel's each."""
        values, gradients = carry
        small = gradients._replace(features=None, kernel=None)
        (values, small), group = self.one_group(rows, (values, small))
        gradients = small._replace(features=gradients.features, kernel=gradients.kernel)
        class_axis = self.config.class_axis
        if self.needs_grad.features:
            new = _matmul(group.for_features, self.layer.kernel, (1, class_axis)).astype(self.features_dtype)
            gradients = gradients._replace(features=gradients.features.at[rows].set(new, mode="drop"))
        if self.needs_grad.kernel:
            factors = (group.x, group.for_kernel) if class_axis == 1 else (group.for_kernel, group.x)
            gradients = gradients._replace(kernel=gradients.kernel + _matmul(*factors, (0, 0)))
        return values, gradients

    def one_tile(self, rows: Array, carry: Any) -> tuple[Array, Any, Array]:
        """A tile's features, the carry with its values and small gradients added, and the gradients to its products."""
        layer, config = self.layer, self.config
        x, t, c = _gather_rows(rows, (layer.features, self.operands, self.cotangents), config)
        x = jnp.where(t.ignored, 0, x)  # a class weight of 0 ignores positions too, and their features may be NaN
        logits, pull = jax.vjp(lambda products: _to_logits(products, layer), _products(x, layer, config))
        statistics = config.head.statistics(logits, 1, t, config.axis_name)
        values = config.head.values(t, statistics, 1)
        # Not over shards, where the barrier would type both as varying.
        if self.device.platform == "cpu" and config.axis_name is None and not native_kernels().loaded:
            # Without the barrier XLA would store the exponentials, as large as the logits, for the gradient.
            logits, statistics = lax.optimization_barrier((logits, statistics))
        in_place = not self.needs_grad.target_weights
        grad_logits, grad_weights = config.head.gradients(logits, t, statistics, 1, c, in_place=in_place)
        (grad_products,) = pull(grad_logits)
        results, gradients = carry
        if self.needs_grad.bias:
            gradients = gradients._replace(bias=gradients.bias + jnp.sum(grad_products, 0))
        if self.needs_grad.target_weights:
            filled = gradients.target_weights.at[rows].set(grad_weights, mode="drop")
            gradients = gradients._replace(target_weights=filled)
        return x, (_scatter_rows(rows, results, values), gradients), grad_products

    def one_group(self, rows: Array, carry: Any) -> tuple[Any, _Group]:
        """The carry as in `one_tile`, and the operands of the matmuls for the gradients."""
        if self.tile.one_pass:
            return self.one_pass(rows, carry)
        if self.tile.rows == self.tile.group_rows:
            x, carry, grad_products = self.one_tile(rows, carry)
            grad_products = grad_products.astype(x.dtype)  # otherwise their matmuls would run in float32
            return carry, _Group(x, grad_products, grad_products)
        length, tiles = self.tile.rows, self.tile.group_rows // self.tile.rows
        used = tiles
        if self.config.may_ignore:
            used = (jnp.sum(rows < self.layer.features.shape[0]) + length - 1) // length
        classes, axes = self.layer.kernel.shape[self.config.class_axis], manual_axes(self.layer)

        def put(kept: Array, tile: Array, grad_products: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(kept, grad_products.astype(kept.dtype), tile * length, 0)

        def step(tile: Array, state: Any) -> Any:
            carry, kept = state
            _, carry, grad_products = self.one_tile(lax.dynamic_slice_in_dim(rows, tile * length, length), carry)
            return carry, put(kept, tile, grad_products)

        # Not zeros, which would be another pass over a group's logits, and with a TPU's compiler more than one.
        kept = pvary(lax.empty((tiles * length, classes), self.dtype), axes)
        carry, kept = lax.fori_loop(0, used, step, (carry, kept))
        if self.config.may_ignore:
            zeros = pvary(jnp.zeros((length, classes), self.dtype), axes)
            kept = lax.fori_loop(used, tiles, lambda tile, kept: put(kept, tile, zeros), kept)
        x, ignored = _gather_rows(rows, (self.layer.features, self.operands.ignored), self.config)
        return carry, _Group(jnp.where(ignored, 0, x), kept, kept)

    def one_pass(self, rows: Array, carry: Any) -> tuple[Any, _Group]:
        """The same with exponentials instead of logits; the matmuls of the gradients multiply them by their factors."""
        layer, config = self.layer, self.config
        assert config.head.factors is not None
        x, t, c = _gather_rows(rows, (layer.features, self.operands, self.cotangents), config)
        x = jnp.where(t.ignored, 0, x)
        found, statistics = _one_pass(x, t, layer, config)
        terms = cast(Array, found.terms)
        factor, at_label, position_weight = config.head.factors(t, statistics, c)
        factor *= jnp.exp(found.statistics.max_logit - statistics.max_logit)
        at_label = at_label if found.label_slope is None else at_label * found.label_slope
        if layer.bias is not None:  # a label that is masked has a gradient of 0
            at_label = jnp.where(is_removed(statistics.label_logit), 0, at_label)

        def gradient(label: Array, factor: Array) -> Array:
            products = jnp.where(is_label(terms, label, 1), at_label, widen(terms) * factor)
            return products if t.target_weights is None else products - position_weight * t.target_weights

        # One for each use, which XLA fuses with it; it would store a shared one in addition to the terms.
        apart = lax.optimization_barrier((t.label, factor))
        group = _Group(x, gradient(t.label, factor).astype(x.dtype), gradient(*apart).astype(x.dtype))
        results, gradients = carry
        if self.needs_grad.bias:
            own = jnp.sum(gradient(*lax.optimization_barrier(apart)), 0)
            gradients = gradients._replace(bias=gradients.bias + own)
        return (_scatter_rows(rows, results, config.head.values(t, statistics, 1)), gradients), group

    def init(self) -> tuple[Results, DiffArgs]:
        """Values and gradients before the first tile, typed as varying like the tiles' contributions."""
        wide = compute_dtype(self.dtype)
        dtypes = DiffArgs(self.features_dtype, wide, wide, wide)

        def zeros(array: Array, needed: bool, dtype: jnp.dtype) -> Array | None:
            if not needed:
                return None
            axes = manual_axes(self.layer)
            if array is self.operands.target_weights and is_replicated(array, self.config.axis_name):
                axes = axes_after_psum(axes, self.config.axis_name)
            return pvary(jnp.zeros(array.shape, dtype), axes)

        gradients = DiffArgs(*map(zeros, diff_args(self.layer, self.operands), self.needs_grad, dtypes))
        return _init_output(self.layer, self.operands, self.config), gradients


def diff_args(layer: LinearParams, operands: Any) -> DiffArgs:
    """The arguments that may be differentiated."""
    return DiffArgs(layer.features, layer.kernel, layer.bias, operands.target_weights)


def as_values(config: HeadConfig, results: Results) -> Values:
    """A flat tuple of results as differentiable values and constants."""
    count = len(config.head.widths)
    return results[:count], results[count:]


def _scanned_gradients(
    layer: LinearParams, operands: Any, cotangents: Results, config: HeadConfig, needs_grad: DiffArgs
) -> tuple[Values, DiffArgs]:
    """Values and gradients by differentiating a scan, which JAX can differentiate again."""
    # The kernel in the dtype to compute in, because JAX sums the gradients of all tiles in the variable's dtype.
    wide = compute_dtype(layer.features.dtype)
    given = diff_args(layer._replace(kernel=layer.kernel.astype(wide)), operands)

    def total(chosen: DiffArgs) -> tuple[Any, Values]:
        x, w, b, weights = (old if new is None else new for new, old in zip(chosen, given, strict=True))
        changed = layer._replace(features=x, kernel=w, bias=b), operands._replace(target_weights=weights)
        values = _scanned_values(evaluate, *changed, config)
        return sum(jnp.sum(c * value) for c, value in zip(cotangents, values[0], strict=True)), values

    chosen = DiffArgs(*(v if needed else None for v, needed in zip(given, needs_grad, strict=True)))
    gradients, values = jax.grad(total, has_aux=True)(chosen)
    if gradients.features is not None and config.axis_name is not None:  # in the same dtype as the loop's
        gradients = gradients._replace(features=gradients.features.astype(wide))
    return values, gradients


def _scanned_values(fn: Callable[..., Values], layer: LinearParams, operands: Any, config: HeadConfig) -> Values:
    """`tiled_values` as a scan over all tiles, which JAX can differentiate."""

    @jax.checkpoint
    def tile(rows: Array) -> Values:
        x, t = _gather_rows(rows, (layer.features, operands), config)
        x = jnp.where(t.ignored, 0, x)  # the loops skip most ignored rows, not all
        products = _products(x, layer._replace(kernel=layer.kernel.astype(x.dtype)), config)
        return fn(config.head, _to_logits(products, layer, _capped_in_scans), t, 1, config.axis_name)

    positions, size = layer.features.shape[0], _tile(Device("cpu"), layer, operands, config).rows
    tiles = -(-positions // size)
    rows = jnp.arange(tiles * size).reshape(tiles, size)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:positions], lax.map(tile, rows))


def _one_pass(
    x: Array, targets: Any, layer: LinearParams, config: HeadConfig, *, keep: bool = True
) -> tuple[Pass, Statistics]:
    """One pass over the logits of a tile, and the statistics of all shards from it."""
    classes = layer.kernel.shape[config.class_axis]

    def logits(x: Array, layer: LinearParams = layer) -> tuple[Array, Array | None]:
        products = _products(x, layer, config)
        if not keep or (layer.soft_cap is None and layer.temperature is None):
            return _to_logits(products, layer), None
        return jax.jvp(lambda products: _to_logits(products, layer), (products,), (jnp.ones_like(products),))

    # A label out of range has a weight of NaN or 0. A label on another shard must not change the sums of this one.
    label = targets.label if config.axis_name else jnp.clip(targets.label, 0, classes - 1)
    sample, _ = logits(x, _first_classes(layer, config))
    found = one_pass(logits, x, sample, label, targets.target_weights, keep=keep)
    statistics = found.statistics
    if config.axis_name is not None:
        statistics = over_shards(statistics, jnp.zeros((1, classes), x.dtype), (1,), targets, config.axis_name)
    return found, statistics


def _first_classes(layer: LinearParams, config: HeadConfig) -> LinearParams:
    """The layer with a sample of the classes."""
    count = min(SAMPLE, layer.kernel.shape[config.class_axis])
    bias = None if layer.bias is None else layer.bias[:count]
    return layer._replace(kernel=lax.slice_in_dim(layer.kernel, 0, count, axis=config.class_axis), bias=bias)


def _init_output(layer: LinearParams, operands: Any, config: HeadConfig) -> Results:
    """The values of ignored positions, typed as varying like the others' values."""
    axes = axes_after_psum(manual_axes((layer, operands)), config.axis_name)
    values = config.head.ignored_values(layer.features.shape[0], compute_dtype(layer.features.dtype))
    return pvary(tuple(jax.tree.leaves(values)), axes)


def _tile(
    device: Device, layer: LinearParams, operands: Any, config: HeadConfig, needs_grad: DiffArgs = DiffArgs()
) -> Tile:
    (positions, width), classes = layer.features.shape, layer.kernel.shape[config.class_axis]
    writes_out = device.platform == "cpu" and not native_kernels().loaded  # the plain formula stores what it sums
    is_wide = operands.is_wide or config.head.copies or writes_out
    budget = config.memory_budget
    if writes_out and budget is not None:
        budget = budget * 16 // 17  # a mask takes one byte per class, in addition to four numbers of four bytes
    return plan_tile(
        device,
        (positions, width, classes),
        layer.features.dtype,
        is_wide,
        budget,
        kernel_moves=needs_grad.kernel is not False,
        one_pass=_is_one_pass(layer, operands, config, needs_grad),
    )


def _is_one_pass(layer: LinearParams, operands: Any, config: HeadConfig, needs_grad: DiffArgs) -> bool:
    """Whether sums in one pass and one stored number per logit suffice; with slopes, smoothing needs another."""
    if config.head.factors is None or operands.label is None:
        return False
    is_scaled = layer.soft_cap is not None or layer.temperature is not None
    return not (any(needs_grad) and is_scaled and operands.target_weights is not None)


def _over_tiles(
    device: Device,
    size: int,
    operands: Any,
    config: HeadConfig,
    step: Callable[[Array, Any], Any],
    carry: Any,
) -> Any:
    """Fold `step(rows, carry)` over tiles of the positions that are not ignored."""
    rows, count = _in_turn(operands, config)
    padded = jnp.pad(rows, (0, size), constant_values=rows.shape[0])
    if device.platform != "cpu" and isinstance(rows.shape[0], int) and size >= rows.shape[0]:
        return step(padded[:size], carry)
    spans = [(0, count, size)]
    if device.platform == "cpu" and config.may_ignore and config.axis_name is None:
        # The rest after the last full tile is processed in tiles of an eighth, to waste little work on the padding of
        # the last tile. Not on an accelerator, where a small tile costs as much as a full one, and not over shards,
        # where each loop has its own two all-reduces.
        whole = count - count % size
        spans = [(0, whole, size), (whole, count, -(-size // 8))]
    for first, end, length in spans:

        def body(tile: Array, carry: Any, first=first, length=length) -> Any:
            return step(lax.dynamic_slice_in_dim(padded, first + tile * length, length), carry)

        carry = lax.fori_loop(0, (end - first + length - 1) // length, body, carry)
    return carry


def _in_turn(operands: Any, config: HeadConfig) -> tuple[Array, Array | int]:
    """The rows of the positions that are not ignored, followed by an index out of range, and their number."""
    positions = operands.position_weight.shape[0]
    if not config.may_ignore:
        return jnp.arange(positions), positions
    # Without the barrier XLA would sort constant labels at compile time, which takes seconds for ten thousand labels.
    ignored = lax.optimization_barrier(operands.position_weight[:, 0] == 0)
    count = positions - jnp.sum(ignored)
    return jnp.where(jnp.arange(positions) < count, jnp.argsort(ignored, stable=True), positions), count


def _gather_rows(rows: Array, arrays: Any, config: HeadConfig) -> Any:
    """A tile's rows of every array, zero where the index is out of range, and logits in place of a layer."""

    def gather(array: Any) -> Array:
        if isinstance(array, LinearParams):
            return _to_logits(_products(gather(array.features), array, config), array)
        shared = array.shape[0] == 1  # all positions share it, or there is only one position
        return array if shared else jnp.take(array, rows, axis=0, mode="fill", fill_value=0)

    return jax.tree.map(gather, arrays, is_leaf=lambda array: isinstance(array, LinearParams))


def _scatter_rows(rows: Array, results: Results, values: Values) -> Results:
    new = jax.tree.leaves(values)
    return tuple(old.at[rows].set(one_tile, mode="drop") for old, one_tile in zip(results, new, strict=True))


def _products(features: Array, layer: LinearParams, config: HeadConfig) -> Array:
    """x·W + b of a tile."""
    products = _matmul(features, layer.kernel, (1, 1 - config.class_axis))
    return products if layer.bias is None else products + layer.bias[None, :]


def _matmul(first: Array, second: Array, axes: tuple[int, int]) -> Array:
    """The sums over one axis of each matrix, in the dtype to compute in."""
    contracted = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(first, second, contracted, preferred_element_type=compute_dtype(first.dtype))


def _capped_in_scans(products: Array, soft_cap: Array) -> Array:
    """As `_capped`, for scans: JAX forgets its rule in a scan that was differentiated in reverse."""
    sign = jnp.where(products < 0, -1, 1).astype(products.dtype)
    finite = jnp.where(jnp.isfinite(products), products, 0)  # avoids 0 · inf where a bias is −inf
    e = jnp.exp(-2 * sign * finite / soft_cap)
    differentiable = -2 * sign * e / (1 + e)  # tanh minus a constant, with the rule's derivative
    tanh = lax.stop_gradient(jnp.tanh(products / soft_cap))
    return soft_cap * (tanh + (differentiable - lax.stop_gradient(differentiable)))


def _to_logits(products: Array, layer: LinearParams, capped: Callable[[Array, Array], Array] | None = None) -> Array:
    """Cap, then divide by the temperature; a class masked by a bias of −inf stays masked, with a gradient of 0."""
    logits = products
    if layer.soft_cap is not None:
        logits = (capped or _capped)(logits, layer.soft_cap)
    if layer.temperature is not None:
        logits = logits / layer.temperature
    if layer.bias is None:
        return logits
    removed = ~jnp.isfinite(products) & (products < 0)
    return jnp.where(removed, lax.stop_gradient(products), logits)


@jax.custom_jvp
def _capped(products: Array, soft_cap: Array) -> Array:
    return soft_cap * jnp.tanh(products / soft_cap)


@_capped.defjvp
def _capped_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """Compute 1 − tanh² from one exponential, because the subtraction would give 0 near the cap."""
    products, soft_cap = primals
    e = jnp.exp(-2 * jnp.abs(products / lax.stop_gradient(soft_cap)))  # avoids 0 · inf where a bias is −inf
    return _capped(*primals), 4 * e / (1 + e) ** 2 * tangents[0]
