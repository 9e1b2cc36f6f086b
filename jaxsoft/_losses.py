"""The loss of each position from finished statistics, and its gradient: every loss of this package.

    loss       = τ·lse − Σ_j q_j z_j + ζ·lse²
    ∂loss/∂z_j = (τ + 2ζ·lse)·p_j − q_j

for logits z, target weights q_j (see `Targets`), τ = Σ_j q_j, p = softmax(z), lse = log Σ_j exp(z_j) and a z-loss of ζ.
"""

from typing import cast

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._dtypes import widen
from jaxsoft._platform import Axes
from jaxsoft._readings import Reading, Values, scale_gradient, taking_part
from jaxsoft._shards import AxisName
from jaxsoft._statistics import Statistics, block_statistics, scaled_exponentials
from jaxsoft._targets import Targets


def _statistics(logits: Array, axes: Axes, targets: Targets, axis_name: AxisName) -> Statistics:
    return block_statistics(logits, axes, targets, axis_name)


def _values(targets: Targets, statistics: Statistics, axes: Axes) -> Values:
    return (position_losses(targets, statistics),), ()


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
    logits: Array,
    targets: Targets,
    statistics: Statistics,
    axes: Axes,
    cotangents: tuple[Array],
    *,
    in_place: bool = False,
) -> tuple[Array, Array | None]:
    """The gradients of Σ cotangent·loss to the logits of a block, and to the weights of a distribution: −log p_j.

    A position without weight has none, whatever its logits and its cotangent: padding may be NaN. At the label
    τ·p_y − q_y is never formed by subtracting from one: 1 − p_y is the other classes' sum. `in_place` says that the
    logits are not read again.
    """
    idle, (logits, targets) = targets.idle, taking_part(logits, targets)
    cotangent = jnp.where(idle, 0, cotangents[0])
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
        in_place=in_place,
    )
    if targets.label is not None:
        return to_logits, None
    to_weights = statistics.log_total + (statistics.largest - widen(logits))
    to_weights = jnp.where(cast(Array, targets.variable), to_weights, 0)  # which a class at −inf makes infinite
    return to_logits, scale_gradient(to_weights, cotangent * targets.share, targets.share == 0)


LOSSES = Reading(_statistics, _values, block_gradients)
