"""The one formula: what a block of classes contributes to a loss, and the block's gradient.

For one position with logits z, target weights q_j (see `Targets`), τ = Σ_j q_j, p = softmax(z) and a z-loss of ζ:

    loss       = τ·lse − Σ_j q_j z_j + ζ·lse²              lse = log Σ_j exp(z_j)
    ∂loss/∂z_j = (τ + 2ζ·lse)·p_j − q_j

Every loss and normaliser in this package comes from `block_statistics`, every gradient to logits from
`scaled_exponentials`, but for those of softmax and log_softmax.
Arrays of statistics keep the class axes with length one, so they broadcast against the logits.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft import _cpu
from jaxsoft._dtypes import widen
from jaxsoft._platform import Axes, from_end, on
from jaxsoft._shards import AxisName, max_shards, sum_shards
from jaxsoft._targets import Targets


class Statistics(NamedTuple):
    """Sums over the classes of a block, relative to its largest logit m; None where no target asks for one."""

    largest: Array  # m, above −inf
    tail: Array  # Σ_j exp(z_j − m) over every class but the label
    label: Any = None  # z_label − m
    spread: Any = None  # Σ_j spread_j
    gap: Any = None  # Σ_j spread_j (m − z_j)

    @property
    def exp_sum(self) -> Array:
        """Σ_j exp(z_j − m): at least 1, or 0 where no class is left."""
        return self.tail if self.label is None else self.tail + jnp.exp(self.label)

    @property
    def total(self) -> Array:
        """The sum, but a little above 0 where no class is left, for no division to meet a zero."""
        # Rounding absorbs what is added to 1 or more. Unlike a maximum it keeps a NaN on every platform.
        return self.exp_sum + jnp.finfo(self.tail.dtype).eps / 8

    @property
    def log_total(self) -> Array:
        """log Σ_j exp(z_j − m) to full relative precision when the label leads; 0 where no class is left.

        That is why the tail leaves the label out: once the label leads by 17, its 1 swallows every
        other term in float32. A label that leads has exp(0) − 1 = 0 exactly; under any other the
        tail is at least 1 and nothing cancels.
        """
        surplus = self.tail - 1 if self.label is None else self.tail + (jnp.exp(self.label) - 1)
        return jnp.log1p(surplus + lax.stop_gradient(jnp.maximum(-surplus, 0)))

    @property
    def surprise(self) -> Array:
        """log Σ_j exp(z_j) − z_label, and its derivative, to full relative precision when the label leads."""
        # By log_total − label the derivative would be what is left of two ones.
        lead = jnp.log1p(self.tail * jnp.exp(-jnp.maximum(self.label, -1)))
        return jnp.where(self.label > -1, lead, self.log_total - self.label)

    @property
    def logsumexp(self) -> Array:
        """log Σ_j exp(z_j): −inf where no class is left, +inf at a logit of +inf."""
        return jnp.where(self.exp_sum == 0, jnp.log(lax.stop_gradient(self.exp_sum)), self.finite_logsumexp)

    @property
    def finite_logsumexp(self) -> Array:
        """lse, or 0 where no class is left and nothing is to be drawn towards 0."""
        lse = jnp.where(jnp.isfinite(self.largest), self.largest + jnp.log(self.total), self.largest)
        return jnp.where(self.exp_sum == 0, 0, lse)


def block_statistics(logits: Array, axes: Axes, targets: Targets = Targets(), axis_name: AxisName = None) -> Statistics:
    """What a block of classes contributes to the loss of each position, summed over the shards of `axis_name`."""
    label, spread = targets.label, targets.spread
    of_block, tail, *rest = _block_sums((logits, label, spread), from_end(axes, logits))
    of_block = lax.stop_gradient(of_block)  # no result depends on the shift
    largest = max_shards(of_block, axis_name)
    below = of_block - largest
    sums = [tail if axis_name is None else tail * jnp.exp(below)]
    if label is not None:
        (axis,) = axes
        relative = rest.pop(0) - largest
        inside = (label >= 0) & (label < logits.shape[axis])  # of one shard; a label in none has no weight, or NaN
        sums.append(relative if axis_name is None else jnp.where(inside, relative, 0))
    if spread is not None:
        weight, gap = rest
        sums += [weight, gap if axis_name is None else gap - jnp.where(weight == 0, 0, weight * below)]
    if axis_name is not None:  # one all-reduce for them all
        sums = jnp.split(sum_shards(jnp.concatenate(sums, axes[-1]), axis_name), len(sums), axes[-1])
    tail, *rest = sums
    return Statistics(largest, tail, rest.pop(0) if label is not None else None, *rest)


@on(cpu=_cpu.statistics)
def _block_sums(arrays: tuple[Array, Array | None, Array | None], axes: Axes) -> tuple[Array, ...]:
    """m, the tail, and where the targets have such the logit of the label, Σ_j spread_j and Σ_j spread_j (m − z_j)."""
    logits, label, spread = arrays
    largest = _largest(logits, axes)
    z = widen(logits)
    exponentials = jnp.exp(z - largest)
    if label is not None:
        exponentials = jnp.where(_at_label(logits, label, axes), 0, exponentials)
    sums = [largest, jnp.sum(exponentials, axes, keepdims=True)]
    if label is not None:
        (axis,) = axes
        index = jnp.clip(label, 0, logits.shape[axis] - 1)
        sums.append(jnp.take_along_axis(z, index, axis, mode="promise_in_bounds"))
    if spread is not None:
        below, held = largest - z, lax.stop_gradient(spread)
        # A class without target weight costs nothing, at −inf too. What is added is 0 and has the derivative to a
        # target: where that does not move it adds nothing, however much the class costs.
        cost = held * jnp.where(spread == 0, 0, below) + (spread - held) * jnp.where(_is_infinite(below), 0, below)
        weight, gap = (jnp.sum(terms, axes, keepdims=True) for terms in (spread, cost))
        sums += [jnp.broadcast_to(weight, gap.shape), gap]
    return tuple(sums)


def _largest(logits: Array, axes: Axes) -> Array:
    """The largest logit or, where none is left, the lowest finite number, from which exp(−inf) is still 0."""
    lowest = jnp.finfo(logits.dtype).min
    largest = jnp.max(lax.stop_gradient(logits), axes, keepdims=True, initial=lowest)
    if largest.shape == logits.shape:  # XLA takes a reduction of one element for that element
        largest = jnp.maximum(largest, float(lowest))
    return widen(largest)


def taking_part(logits: Array, targets: Targets) -> tuple[Array, Targets]:
    """The same logits and targets, of which those of idle positions do not move.

    A derivative would take them to be constants only times a weight of 0, and padding may be NaN.
    """

    # Not by a rule of its own: inside a scan JAX forgets a `custom_jvp` once it has differentiated in reverse. XLA
    # drops this select, both of whose cases are one value, but not one inside `jnp.where`.
    def held(array: Array) -> Array:
        return lax.select(jnp.broadcast_to(targets.idle, array.shape), lax.stop_gradient(array), array)

    is_distribution = targets.label is None
    return held(logits), targets._replace(spread=held(cast(Array, targets.spread))) if is_distribution else targets


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def losses(logits: Array, targets: Targets, axis: int, axis_name: AxisName) -> Array:
    """The loss of each position; every reduction is an ordinary function of them."""
    return position_losses(targets, block_statistics(logits, (axis,), targets, axis_name))


def _losses_fwd(logits: Array, targets: Targets, axis: int, axis_name: AxisName):
    moving, of_moving = taking_part(logits, targets)
    statistics = block_statistics(moving, (axis,), of_moving, axis_name)
    return position_losses(targets, statistics), (logits, targets, statistics)


def _losses_bwd(
    axis: int, axis_name: AxisName, residuals: tuple[Array, Targets, Statistics], cotangent: Array
) -> tuple[Array, Targets]:
    logits, targets, statistics = residuals
    to_logits, to_spread = block_gradients(logits, targets, statistics, (axis,), cotangent)
    # None is JAX's word for a zero cotangent: labels, weights and smoothing are no variables.
    return to_logits, Targets(spread=to_spread)


losses.defvjp(_losses_fwd, _losses_bwd)


def position_losses(targets: Targets, statistics: Statistics) -> Array:
    """τ·lse − Σ_j q_j z_j + ζ·lse² of every position, from finished statistics."""
    # A term without weight costs nothing, not even where it is infinite. Weights do not move: times an infinite loss a
    # tangent of 0 would be NaN.
    hot, share = lax.stop_gradient((targets.hot, targets.share))
    losses = jnp.zeros_like(statistics.tail)
    if targets.label is not None:
        losses += jnp.where(hot == 0, 0, hot * statistics.surprise)
    if targets.spread is not None:
        losses += jnp.where(share == 0, 0, share * (statistics.spread * statistics.log_total + statistics.gap))
    if targets.square is not None:
        square = lax.stop_gradient(targets.square)
        losses += jnp.where(square == 0, 0, square * statistics.finite_logsumexp**2)
    return losses


def block_gradients(
    logits: Array, targets: Targets, statistics: Statistics, axes: Axes, cotangent: Array
) -> tuple[Array, Array | None]:
    """The gradients of Σ cotangent·loss to the logits of a block, and to the weights of a distribution: −log p_j.

    A position without weight has none, whatever its logits and its cotangent: padding may be NaN. At the label
    τ·p_y − q_y is never formed by subtracting from one: 1 − p_y is the other classes' sum.
    """
    idle, (logits, targets) = targets.idle, taking_part(logits, targets)
    cotangent = jnp.where(idle, 0, cotangent)
    mass = jnp.zeros_like(statistics.tail)  # τ + 2ζ·lse but for the label's own weight
    if targets.square is not None:
        mass += cotangent * 2 * targets.square * statistics.finite_logsumexp
    share = None
    if targets.spread is not None:
        share = cotangent * targets.share
        mass += share * statistics.spread
    hot, at_label = 0, None
    if targets.label is not None:
        hot = cotangent * targets.hot
        at_label = (mass * jnp.exp(statistics.label) - hot * statistics.tail) / statistics.total
    to_logits = scaled_exponentials(
        logits,
        statistics.largest,
        (mass + hot) / statistics.total,
        axes,
        idle,
        targets.label,
        at_label,
        share,
        targets.spread,
    )
    if targets.label is not None:
        return to_logits, None
    to_weights = statistics.log_total + (statistics.largest - widen(logits))
    to_weights = jnp.where(cast(Array, targets.variable), to_weights, 0)  # which a class at −inf makes infinite
    return to_logits, scale_gradient(to_weights, cotangent * targets.share, targets.share == 0)


def scaled_exponentials(
    logits: Array,
    largest: Array,
    factor: Array,
    axes: Axes,
    idle: Array | None = None,
    label: Array | None = None,
    at_label: Array | None = None,
    share: Array | None = None,
    spread: Array | None = None,
) -> Array:
    """exp(z_j − m)·factor − share·spread_j, but `at_label` in place of the product at the label, and 0 where idle.

    In the logits' dtype. What is absent is left out.
    """
    of_positions = jax.tree.map(lambda a: jnp.broadcast_to(a, largest.shape), (factor, idle, label, at_label, share))
    (result,) = _scaled_exponentials((logits, largest, *of_positions, spread), from_end(axes, logits))
    return result


@on(cpu=_cpu.gradient)
def _scaled_exponentials(arrays: tuple[Array | None, ...], axes: Axes) -> tuple[Array]:
    logits, largest, factor, idle, label, at_label, share, spread = arrays
    result = jnp.exp(widen(logits) - largest) * factor
    if label is not None:
        result = jnp.where(_at_label(logits, label, axes), at_label, result)
    if spread is not None:
        result -= share * spread
    if idle is not None:
        result = jnp.where(idle, 0, result)
    return (result.astype(logits.dtype),)


def scale_gradient(gradient: Array, cotangent: Array, idle: Array | bool = False) -> Array:
    """Their product, but 0 for what takes no part, and where the cotangent is 0 and the gradient infinite."""
    return jnp.where(idle | ((cotangent == 0) & _is_infinite(gradient)), 0, cotangent * gradient)


def _is_infinite(array: Array) -> Array:
    return jnp.abs(array) > jnp.finfo(array.dtype).max  # `isinf` itself makes what `debug_infs` stops at


def _at_label(logits: Array, label: Array, axes: Axes) -> Array:
    """A mask by comparison, not a scatter: it fuses on every platform."""
    (axis,) = axes
    return lax.broadcasted_iota(label.dtype, logits.shape, axis % logits.ndim) == label
