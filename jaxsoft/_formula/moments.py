"""Sums over the classes relative to the most likely class, for the entropy and any class's log-probability."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._arrays.classes import is_label
from jaxsoft._arrays.dtypes import is_removed, widen
from jaxsoft._arrays.sharding import AxisName, broadcast_like, first_class, max_shards, sum_together
from jaxsoft._formula.statistics import Statistics, finite_max
from jaxsoft._platform import cpu
from jaxsoft._platform.dispatch import Axes, from_end, with_platform_impl


class Moments(NamedTuple):
    """Statistics whose label is the class with the largest logit m, the first of several."""

    statistics: Statistics
    gap: Array  # Σ_j exp(z_j − m)(m − z_j)
    leader: Array  # its index among the classes of all shards; −1 if every class is masked, or a logit is NaN

    @property
    def mean_gap(self) -> Array:
        """m − Σ_j p_j z_j; 0 if every class is masked."""
        return self.gap / self.statistics.positive_sum

    @property
    def entropy(self) -> Array:
        """−Σ_j p_j log p_j as two terms of at least 0: lse − Σ_j p_j z_j would be a difference of two large ones."""
        return self.statistics.log_sum + self.mean_gap

    def around(self, leads: Array, label_logit: Array) -> Statistics:
        """The statistics with another class as the label, unless that class `leads`; no sum is recomputed."""
        statistics = self.statistics
        below = label_logit - statistics.max_logit
        # With another label the sum of the others includes the leader's 1, so this subtraction loses no accuracy.
        others = statistics.sum_others + (jnp.exp(statistics.label_logit) - jnp.exp(below))
        sum_others = jnp.where(leads, statistics.sum_others, others)
        return statistics._replace(sum_others=sum_others, label_logit=below)


def block_moments(logits: Array, axis: int, axis_name: AxisName = None) -> Moments:
    """The moments of a block of classes, combined with the blocks of the other shards of `axis_name`."""
    max_logit, sum_others, leader_logit, gap, leader = _block_moments((logits,), from_end((axis,), logits))
    max_logit = lax.stop_gradient(max_logit)
    statistics = Statistics(max_logit, sum_others, leader_logit - max_logit)
    if axis_name is not None:
        leader += first_class(logits.shape[axis], axis_name)
        statistics, gap, leader = _over_shards(statistics, gap, leader, axis, axis_name)
    none = jnp.isnan(statistics.label_logit) | is_removed(statistics.label_logit)
    return Moments(statistics, gap, jnp.where(none, -1, leader))


def _over_shards(
    block: Statistics, gap: Array, leader: Array, axis: int, axis_name: AxisName
) -> tuple[Statistics, Array, Array]:
    max_logit = max_shards(block.max_logit, axis_name)
    below = block.max_logit - max_logit
    # The first shard that has the largest logit of all.
    none = jnp.iinfo(leader.dtype).max
    first = lax.pmin(jnp.where((below == 0) & jnp.isfinite(block.label_logit), leader, none), axis_name)
    leads, leading = leader == first, jnp.exp(block.label_logit)
    scale = jnp.exp(below)
    below = jnp.where(scale == 0, 0, below)  # avoids 0 · (−huge) for a block whose exponentials underflow
    gap = (gap - below * (block.sum_others + leading)) * scale
    sum_others = (block.sum_others + jnp.where(leads, 0, leading)) * scale
    sums = sum_others, gap, jnp.where(leads, block.label_logit, 0)
    sum_others, gap, label_logit = sum_together(sums, axis, axis_name)
    return Statistics(max_logit, sum_others, jnp.where(first == none, -jnp.inf, label_logit)), gap, first


@with_platform_impl(cpu=cpu.moments)
def _block_moments(arrays: tuple[Array], axes: Axes) -> tuple[Array, ...]:
    """m, the sum of all exponentials except the leader's, the leader's logit, the gap, and the leader's index."""
    (logits,), (axis,) = arrays, axes
    max_logit = finite_max(logits, axes)
    z = widen(logits)
    leader = jnp.argmax(lax.stop_gradient(logits), axis, keepdims=True).astype(jnp.int32)
    gaps = max_logit - z
    exponentials = jnp.exp(-gaps)
    is_leader = is_label(logits, leader, axis)
    sum_others = jnp.sum(jnp.where(is_leader, 0, exponentials), axes, keepdims=True)
    # A class of probability 0 adds nothing, even if its logit is −inf.
    left = lax.stop_gradient(exponentials) != 0
    gap = jnp.sum(jnp.where(left, exponentials * jnp.where(left, gaps, 0), 0), axes, keepdims=True)
    leader_logit = jnp.sum(jnp.where(is_leader, z, 0), axes, keepdims=True)
    return max_logit, sum_others, leader_logit, gap, leader


def moment_gradients(
    logits: Array,
    moments: Moments,
    grad_lse: Array | float,
    grad_entropy: Array,
    ignored: Array,
    axis: int,
    *,
    label: Array | None = None,
    at_label: Array | None = None,
) -> Array:
    """p_j (b − h (log p_j + H)) for the cotangents b of lse and h of H, except `at_label` at the label.

    log p_j + H is computed as G − (m − z_j), G = Σ_j p_j (m − z_j), where the logarithms have already cancelled.
    """
    statistics, total = moments.statistics, moments.statistics.positive_sum
    gaps = statistics.max_logit - widen(logits)
    exponentials = jnp.exp(-gaps)
    gaps = jnp.where(exponentials == 0, 0, gaps)
    result = exponentials * ((grad_lse - grad_entropy * moments.mean_gap) / total + grad_entropy / total * gaps)
    if label is not None and at_label is not None:
        result = jnp.where(is_label(logits, label, axis), broadcast_like(at_label, result), result)
    return jnp.where(broadcast_like(ignored, result), 0, result).astype(logits.dtype)
