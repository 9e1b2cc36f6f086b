"""The loops over tiles of a linear layer's positions, with one tile's logits alive: what is read, and its gradients."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._cpu import native_kernels
from jaxsoft._dtypes import compute_dtype
from jaxsoft._jax_internals import Results, manual_axes
from jaxsoft._plan import Platform, Tile, plan_tile
from jaxsoft._platform import by_platform
from jaxsoft._readings import Reading, Values, read
from jaxsoft._shards import AxisName, is_whole, unsharded, vary


class Layer(NamedTuple):
    """The linear layer and what is done to its logits."""

    features: Array  # (N, D)
    kernel: Array  # (D, V) or (V, D)
    bias: Array | None  # (V,), −inf at a class that is removed
    soft_cap: Array | None  # scalars
    temperature: Array | None


class Tiling(NamedTuple):
    """What the program depends on beside its arrays."""

    reading: Reading
    memory_budget: int | None
    class_axis: int  # of the kernel
    axis_name: AxisName
    skips: bool  # whether positions may be ignored


class Variables(NamedTuple):
    """Something of each input that may be differentiated: its gradient, whether that is wanted."""

    features: Any = None
    kernel: Any = None
    bias: Any = None
    spread: Any = None


# Each loop is fast and cannot be differentiated, hence a rule: that of the same sum as a scan. It is a `custom_jvp` for
# `checked`, which looks into what is compiled, and once more that of the primitive: inside of a scan JAX forgets a
# `custom_jvp` once it has differentiated in reverse. A layer among the operands stands for its logits, which a tile has
# in its place.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def tiled_values(tiling: Tiling, layer: Layer, operands: Any) -> Values:
    """The values of every position, each of shape (N, …)."""
    return _as_values(tiling, _fold_values((layer, operands), tiling))


def _values_formula(arrays: tuple[Layer, Any], tiling: Tiling) -> Results:
    return tuple(jax.tree.leaves(_scanned_values(tiling, tiling.reading, *arrays)))


@by_platform(_values_formula)
def _fold_values(platform: Platform, arrays: tuple[Layer, Any], tiling: Tiling) -> Results:
    layer, operands = arrays

    def step(rows: Array, first: Any, values: Results) -> Results:
        x, t = _take(tiling, rows, (layer.features, operands))
        logits = _to_logits(_products(tiling, x, layer), layer)
        return _put(rows, values, tiling.reading(logits, t, 1, tiling.axis_name))

    rows = _tile(platform, tiling, layer, operands).loss_rows
    return _over_tiles(platform, tiling, rows, operands, step, _blank(tiling, layer, operands))


@tiled_values.defjvp
def _tiled_values_jvp(tiling: Tiling, primals, tangents):
    # A custom_vjp, as `read` is, cannot be differentiated in forward mode.
    return jax.jvp(functools.partial(_scanned_values, tiling, tiling.reading), primals, tangents)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def tiled_gradients(
    tiling: Tiling, wanted: Variables, layer: Layer, operands: Any, cotangents: Results
) -> tuple[Values, Variables]:
    """The values of every position, and those gradients of the sum of cotangents·values that are wanted."""
    results = _fold_gradients((layer, operands, cotangents), (tiling, wanted))
    count = len(jax.tree.leaves(_blank_values(tiling, layer)))
    found = iter(results[count:])
    gradients = Variables(*(next(found) if w else None for w in wanted))
    return _as_values(tiling, results[:count]), gradients


def _gradients_formula(arrays: tuple[Layer, Any, Results], static: tuple[Tiling, Variables]) -> Results:
    return tuple(jax.tree.leaves(_scanned_gradients(*static, *arrays)))


@by_platform(_gradients_formula)
def _fold_gradients(
    platform: Platform, arrays: tuple[Layer, Any, Results], static: tuple[Tiling, Variables]
) -> Results:
    """The values, and those gradients that are wanted."""
    (layer, operands, cotangents), (tiling, wanted) = arrays, static
    reading, tile = tiling.reading, _tile(platform, tiling, layer, operands, kernel_moves=wanted.kernel)
    x_dtype, dtype = layer.features.dtype, compute_dtype(layer.features.dtype)
    product = functools.partial(lax.dot_general, preferred_element_type=dtype)
    # Sums over shards are taken in the dtype to compute in, and so are what they add up.
    features_dtype = x_dtype if tiling.axis_name is None else dtype

    def of_features(to_logits: Array) -> Array:
        contracted = (((1,), (tiling.class_axis,)), ((), ()))
        return product(to_logits, layer.kernel, contracted).astype(features_dtype)

    def of_kernel(x: Array, to_logits: Array) -> Array:
        first, second = (x, to_logits) if tiling.class_axis == 1 else (to_logits, x)
        return product(first, second, (((0,), (0,)), ((), ())))

    def step(rows: Array, first: Any, carry: Any) -> Any:
        values, (to_features, to_kernel, to_bias, to_spread), kept = carry
        x, t, c = _take(tiling, rows, (layer.features, operands, cotangents))
        x = jnp.where(t.idle, 0, x)  # by a class weight of 0 too, and then its features may be NaN
        logits, to_products = jax.vjp(lambda products: _to_logits(products, layer), _products(tiling, x, layer))
        statistics = reading.statistics(logits, (1,), t, tiling.axis_name)
        values = _put(rows, values, reading.values(t, statistics, (1,)))
        # Not over shards, of which both would be typed as differing.
        if platform == "cpu" and tiling.axis_name is None and not native_kernels().loaded:
            # Without it XLA would keep the exponentials of the statistics for the gradient, as large as the logits.
            logits, statistics = lax.optimization_barrier((logits, statistics))
        to_logits, of_spread = reading.gradients(logits, t, statistics, (1,), c, in_place=not wanted.spread)
        (gradient,) = to_products(to_logits)
        narrow = gradient.astype(x_dtype)  # or the products would be taken in float32
        if kept is not None:
            kept = lax.dynamic_update_slice_in_dim(kept, narrow, first, 0)
        elif wanted.features:
            to_features = to_features.at[rows].set(of_features(narrow), mode="drop")
        if wanted.kernel and kept is None:
            to_kernel += of_kernel(x, narrow)
        if wanted.bias:
            to_bias += jnp.sum(gradient, 0)
        if wanted.spread:
            to_spread = to_spread.at[rows].set(of_spread, mode="drop")
        return values, Variables(to_features, to_kernel, to_bias, to_spread), kept

    def zeros(array: Array, wanted: bool, dtype: jnp.dtype) -> Array | None:
        if not wanted:
            return None
        whole = array is operands.spread and is_whole(array, tiling.axis_name)
        axes = unsharded(manual_axes(layer), tiling.axis_name) if whole else manual_axes(layer)
        return vary(jnp.zeros(array.shape, dtype), axes)

    dtypes = Variables(features_dtype, dtype, dtype, dtype)
    inputs = _variables(layer, operands)
    now = wanted._replace(features=False, kernel=False) if tile.deferred else wanted
    none_yet = Variables(*map(zeros, inputs, now, dtypes))
    kept = None
    if tile.deferred:
        shape = -(-layer.features.shape[0] // tile.rows) * tile.rows, layer.kernel.shape[tiling.class_axis]
        kept = vary(jnp.zeros(shape, x_dtype), manual_axes(layer))
    start = _blank(tiling, layer, operands), none_yet, kept
    values, found, kept = _over_tiles(platform, tiling, tile.rows, operands, step, start)
    if kept is not None:
        rows, _ = _in_turn(tiling, operands)
        rows = jnp.pad(rows, (0, kept.shape[0] - rows.shape[0]), constant_values=rows.shape[0])
        if wanted.features:
            nowhere = cast(Array, zeros(layer.features, True, features_dtype))
            found = found._replace(features=nowhere.at[rows].set(of_features(kept), mode="drop"))
        x, idle = _take(tiling, rows, (layer.features, operands.idle))
        found = found._replace(kernel=of_kernel(jnp.where(idle, 0, x), kept))
    return *values, *(gradient for gradient in found if gradient is not None)


@tiled_gradients.defjvp
def _tiled_gradients_jvp(tiling: Tiling, wanted: Variables, primals, tangents):
    return jax.jvp(functools.partial(_scanned_gradients, tiling, wanted), primals, tangents)


def _scanned_gradients(
    tiling: Tiling, wanted: Variables, layer: Layer, operands: Any, cotangents: Results
) -> tuple[Values, Variables]:
    """`tiled_gradients` of the values as a scan, which JAX can differentiate again."""
    # Of the kernel in the dtype to compute in: the gradients of all tiles are summed in that of the variable.
    wide = compute_dtype(layer.features.dtype)
    every = _variables(layer._replace(kernel=layer.kernel.astype(wide)), operands)

    def total(chosen: Variables) -> tuple[Array, Values]:
        x, w, b, spread = (old if new is None else new for new, old in zip(chosen, every, strict=True))
        changed = layer._replace(features=x, kernel=w, bias=b)
        reading = functools.partial(read, tiling.reading)
        values = _scanned_values(tiling, reading, changed, operands._replace(spread=spread))
        weighed = (jnp.sum(c * value) for c, value in zip(cotangents, values[0], strict=True))
        return functools.reduce(operator.add, weighed), values

    chosen = Variables(*(v if w else None for v, w in zip(every, wanted, strict=True)))
    gradients, values = jax.grad(total, has_aux=True)(chosen)
    if gradients.features is not None and tiling.axis_name is not None:  # in the dtype of the loop's
        gradients = gradients._replace(features=gradients.features.astype(wide))
    return values, gradients


def _variables(layer: Layer, operands: Any) -> Variables:
    return Variables(layer.features, layer.kernel, layer.bias, operands.spread)


def _scanned_values(tiling: Tiling, reading: Callable[..., Values], layer: Layer, operands: Any) -> Values:
    """`tiled_values` as a scan over all tiles, which JAX can differentiate."""

    @jax.checkpoint
    def tile(rows: Array) -> Values:
        x, t = _take(tiling, rows, (layer.features, operands))
        x = jnp.where(t.idle, 0, x)  # the loops leave most of these rows out
        products = _products(tiling, x, layer._replace(kernel=layer.kernel.astype(x.dtype)))
        return reading(_to_logits(products, layer), t, 1, tiling.axis_name)

    positions, size = layer.features.shape[0], _tile("cpu", tiling, layer, operands).rows
    tiles = -(-positions // size)
    rows = jnp.arange(tiles * size).reshape(tiles, size)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:positions], lax.map(tile, rows))


def _blank_values(tiling: Tiling, layer: Layer) -> Values:
    return tiling.reading.blank(layer.features.shape[0], compute_dtype(layer.features.dtype))


def _blank(tiling: Tiling, layer: Layer, operands: Any) -> Results:
    """The values of positions that take no part, typed as what the devices read."""
    axes = unsharded(manual_axes((layer, operands)), tiling.axis_name)
    return vary(tuple(jax.tree.leaves(_blank_values(tiling, layer))), axes)


def _as_values(tiling: Tiling, results: Results) -> Values:
    moving, _ = tiling.reading.blank(1, jnp.float32)
    return results[: len(moving)], results[len(moving) :]


def _put(rows: Array, results: Results, values: Values) -> Results:
    new = jax.tree.leaves(values)
    return tuple(old.at[rows].set(of_tile, mode="drop") for old, of_tile in zip(results, new, strict=True))


def _tile(platform: Platform, tiling: Tiling, layer: Layer, operands: Any, *, kernel_moves: bool = True) -> Tile:
    (positions, width), classes = layer.features.shape, layer.kernel.shape[tiling.class_axis]
    dtype = layer.features.dtype
    writes_out = platform == "cpu" and not native_kernels().loaded  # what the plain formula sums
    return plan_tile(
        platform,
        positions,
        width,
        classes,
        dtype,
        operands.is_wide or tiling.reading.copies or writes_out,
        tiling.memory_budget,
        kernel_moves,
    )


def _over_tiles(
    platform: Platform, tiling: Tiling, size: int, operands: Any, step: Callable[[Array, Any, Any], Any], start: Any
) -> Any:
    """Fold `step(rows, first, carry)` over tiles of the positions that take part, `first` of them gone before."""

    def fold(first: Array | int, end: Array | int, size: int, carry: Any) -> Any:
        def body(tile: Array, carry: Any) -> Any:
            row = first + tile * size
            return step(lax.dynamic_slice_in_dim(padded, row, size), row, carry)

        return lax.fori_loop(0, (end - first + size - 1) // size, body, carry)

    rows, count = _in_turn(tiling, operands)
    padded = jnp.pad(rows, (0, size), constant_values=rows.shape[0])
    if platform != "cpu" or not tiling.skips or tiling.axis_name is not None:
        return fold(0, count, size, start)
    # What whole tiles leave is taken in tiles of an eighth, or most of the last one could be idle. A small tile costs
    # an accelerator as much as a whole one, and over shards each loop brings two all-reduces of its own.
    whole = count - count % size
    return fold(whole, count, -(-size // 8), fold(0, whole, size, start))


def _in_turn(tiling: Tiling, operands: Any) -> tuple[Array, Array | int]:
    """The rows of the positions that take part, how many, and behind them an index out of range."""
    share = operands.share
    positions = share.shape[0]
    if not tiling.skips:
        return jnp.arange(positions), positions
    # XLA would sort a constant while it compiles, which takes seconds for some ten thousand labels.
    idle = lax.optimization_barrier(share[:, 0] == 0)
    count = positions - jnp.sum(idle)
    return jnp.where(jnp.arange(positions) < count, jnp.argsort(idle, stable=True), positions), count


def _take(tiling: Tiling, rows: Array, arrays: Any) -> Any:
    """A tile's rows of every array, zero where the index is out of range, and logits in the place of a layer."""

    def take(array: Any) -> Array:
        if isinstance(array, Layer):
            return _to_logits(_products(tiling, take(array.features), array), array)
        shared = array.shape[0] == 1  # by all positions, or there is but one
        return array if shared else jnp.take(array, rows, axis=0, mode="fill", fill_value=0)

    return jax.tree.map(take, arrays, is_leaf=lambda array: isinstance(array, Layer))


def _products(tiling: Tiling, features: Array, layer: Layer) -> Array:
    """x·W + b of a tile."""
    contracted = (((1,), (1 - tiling.class_axis,)), ((), ()))
    dtype = compute_dtype(features.dtype)
    products = lax.dot_general(features, layer.kernel, contracted, preferred_element_type=dtype)
    return products if layer.bias is None else products + layer.bias[None, :]


def _to_logits(products: Array, layer: Layer) -> Array:
    """Capped, then divided by the temperature; a class removed by a bias of −inf stays removed, without a gradient."""
    logits = products
    if layer.soft_cap is not None:
        logits = _capped(logits, layer.soft_cap)
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
    """With 1 − tanh² from one exponential: by subtraction it would be 0 where the cap is nearly reached."""
    products, soft_cap = primals
    e = jnp.exp(-2 * jnp.abs(products / lax.stop_gradient(soft_cap)))  # whose tangent of 0 meets the −inf of a bias
    return _capped(*primals), 4 * e / (1 + e) ** 2 * tangents[0]
