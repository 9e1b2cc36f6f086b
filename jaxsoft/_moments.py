"""Sums over the classes relative to the one that leads: what entropy and the log-probability of any class come from."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft import _cpu
from jaxsoft._dtypes import is_removed, widen
from jaxsoft._platform import Axes, from_end, on
from jaxsoft._shards import AxisName, first_class, max_shards, sum_shards
from jaxsoft._statistics import Statistics, largest_logit
from jaxsoft._targets import is_label


class Moments(NamedTuple):
    """Statistics whose label is the class with the largest logit m, the first of several."""

    statistics: Statistics
    gap: Array  # Σ_j exp(z_j − m)(m − z_j)
    lead: Array  # that class, among those of all shards; −1 where no class is left, or a logit is NaN

    @property
    def mean_gap(self) -> Array:
        """m − Σ_j p_j z_j; 0 where no class is left."""
        return self.gap / self.statistics.total

    @property
    def entropy(self) -> Array:
        """−Σ_j p_j log p_j as two terms of at least 0: lse − Σ_j p_j z_j is what two large ones leave."""
        return self.statistics.log_total + self.mean_gap

    def around(self, leads: Array, label_logit: Array) -> Statistics:
        """The statistics with another class as the label, unless that is what `leads`: no sum is taken again."""
        statistics = self.statistics
        below = label_logit - statistics.largest
        # What leads has 1 in the sum, and takes it along; under any other the tail is at least that 1.
        others = statistics.tail + (jnp.exp(statistics.label) - jnp.exp(below))
        return statistics._replace(tail=jnp.where(leads, statistics.tail, others), label=below)


def block_moments(logits: Array, axis: int, axis_name: AxisName = None) -> Moments:
    """Those of a block of classes, put together with the blocks of the other shards of `axis_name`."""
    largest, tail, of_lead, gap, lead = _block_moments((logits,), from_end((axis,), logits))
    largest = lax.stop_gradient(largest)
    led = of_lead - largest
    if axis_name is not None:
        block = largest
        largest = max_shards(block, axis_name)
        below = block - largest
        lead += first_class(logits.shape[axis], axis_name)
        # The first of the shards whose largest logit is that of all.
        most = jnp.iinfo(lead.dtype).max
        its = lax.pmin(jnp.where((below == 0) & jnp.isfinite(led), lead, most), axis_name)
        leads = lead == its
        scale = jnp.exp(below)
        below = jnp.where(scale == 0, 0, below)  # of a block without weight, which may be as low as a number can be
        gap = (gap - below * (tail + jnp.exp(led))) * scale
        tail = (tail + jnp.where(leads, 0, jnp.exp(led))) * scale
        led = jnp.where(leads, led, 0)
        tail, gap, led = jnp.split(sum_shards(jnp.concatenate([tail, gap, led], axis), axis_name), 3, axis)
        lead, led = its, jnp.where(its == most, -jnp.inf, led)
    statistics = Statistics(largest, tail, led)
    return Moments(statistics, gap, jnp.where(jnp.isnan(led) | is_removed(led), -1, lead))


@on(cpu=_cpu.moments)
def _block_moments(arrays: tuple[Array], axes: Axes) -> tuple[Array, ...]:
    """m, the sum of exponentials but that of the class that leads, its logit, the gap, and its index."""
    (logits,), (axis,) = arrays, axes
    largest = largest_logit(logits, axes)
    z = widen(logits)
    lead = jnp.argmax(lax.stop_gradient(logits), axis, keepdims=True).astype(jnp.int32)
    below = largest - z
    exponentials = jnp.exp(-below)
    tail = jnp.sum(jnp.where(is_label(logits, lead, axes), 0, exponentials), axes, keepdims=True)
    # A class without probability adds nothing, at −inf too.
    left = lax.stop_gradient(exponentials) != 0
    gap = jnp.sum(jnp.where(left, exponentials * jnp.where(left, below, 0), 0), axes, keepdims=True)
    of_lead = jnp.sum(jnp.where(is_label(logits, lead, axes), z, 0), axes, keepdims=True)
    return largest, tail, of_lead, gap, lead
