"""The one formula: what a block of classes contributes to a loss and a normaliser, and exponentials scaled by these.

Losses and normalisers come from `block_statistics`, their gradients to logits from `scaled_exponentials`; the entropy
comes from `moments.py`, and divergences from two such statistics. Arrays of statistics keep the class axes with length
one, so that they broadcast against the logits.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._arrays.classes import is_label
from jaxsoft._arrays.dtypes import widen
from jaxsoft._arrays.sharding import AxisName, broadcast_like, explicit_names, max_shards, sum_together
from jaxsoft._formula.targets import Targets
from jaxsoft._platform import accelerator, cpu
from jaxsoft._platform.dispatch import Axes, from_end, with_local_impl, with_platform_impl


class Statistics(NamedTuple):
    """Sums over the classes of a block, relative to its largest logit m; None if no target needs a sum."""

    max_logit: Array  # m, above −inf
    sum_others: Array  # Σ_j exp(z_j − m) without the label, or, for a distribution, without one class with logit m
    label_logit: Any = None  # z − m of the class that this sum omits
    weight_sum: Any = None  # Σ_j q_j
    weighted_gap: Any = None  # Σ_j q_j (m − z_j)
    other_weight: Any = None  # for a distribution, Σ_j q_j over the classes with logits below m

    @property
    def exp_sum(self) -> Array:
        """Σ_j exp(z_j − m): at least 1, or 0 if every class is masked."""
        return self.sum_others if self.label_logit is None else self.sum_others + jnp.exp(self.label_logit)

    @property
    def positive_sum(self) -> Array:
        """The sum, or slightly more than 0 if every class is masked, so that nothing is divided by zero."""
        # A sum of at least 1 absorbs eps/8 in rounding. Unlike a maximum, an addition keeps NaN on every platform.
        return self.exp_sum + jnp.finfo(self.sum_others.dtype).eps / 8

    @property
    def sum_minus_one(self) -> Array:
        """Σ_j exp(z_j − m) − 1, accurate even if the label is the most likely class; 0 if every class is masked.

        This is why `sum_others` omits the label: at a margin of 17 the label's term of 1 would absorb all other terms
        in float32. If the label has the largest logit, exp(0) − 1 = 0 exactly; otherwise the sum over the other classes
        is at least 1 and nothing cancels.
        """
        excess = self.sum_others - 1
        if self.label_logit is not None:
            excess = self.sum_others + (jnp.exp(self.label_logit) - 1)
        return excess + lax.stop_gradient(jnp.maximum(-excess, 0))

    @property
    def log_sum(self) -> Array:
        """log Σ_j exp(z_j − m), equally accurate; 0 if every class is masked."""
        return _log1p((self.sum_minus_one,), ())[0]

    @property
    def nll(self) -> Array:
        """log Σ_j exp(z_j) − z_label; it and its derivative are accurate even when the label is the most likely."""
        leads = self.label_logit > -1
        # The derivative of log_sum − label_logit would be a difference of two numbers that both round to 1.
        led = self.sum_others * jnp.exp(-jnp.maximum(self.label_logit, -1))
        (log_sum,) = _log1p((jnp.where(leads, led, self.sum_minus_one),), ())
        return log_sum - jnp.where(leads, 0, self.label_logit)

    @property
    def logsumexp(self) -> Array:
        """log Σ_j exp(z_j): −inf if every class is masked, +inf if a logit is +inf."""
        return jnp.where(self.exp_sum == 0, jnp.log(lax.stop_gradient(self.exp_sum)), self.finite_logsumexp)

    @property
    def finite_logsumexp(self) -> Array:
        """lse, or 0 if every class is masked, so that the z-loss is 0."""
        lse = jnp.where(jnp.isfinite(self.max_logit), self.max_logit + self.log_sum, self.max_logit)
        return jnp.where(self.exp_sum == 0, 0, lse)

    def label_gradient(self, mass: Array | float, label_weight: Array) -> Array:
        """(mass + label_weight)·p_label − label_weight, with 1 − p as the sum over the other classes."""
        return (mass * jnp.exp(self.label_logit) - label_weight * self.sum_others) / self.positive_sum

    def max_gradient(self, mass: Array, position_weight: Array) -> tuple[Array, Array]:
        """(mass + w·τ)·p − w·q at a class with the largest logit, as a − b·q for any target weight q: a and b.

        If all other classes together are less likely than this one, it is the only one with that logit, and the
        gradient is (mass + w·(τ − q))·p − w·q·(1 − p). There τ − q and 1 − p are sums over the other classes, not
        differences, so that a distribution that is nearly one-hot has an accurate gradient.
        """
        confident, total = self.sum_others < 1, self.positive_sum
        weight = jnp.where(confident, self.other_weight, self.weight_sum)
        slope = jnp.where(confident, self.sum_minus_one / total, 1)
        return (mass + position_weight * weight) / total, position_weight * slope


def block_statistics(
    logits: Array, axis: int | Axes, targets: Targets = Targets(), axis_name: AxisName = None
) -> Statistics:
    """The sums that a block of classes contributes to each position's loss, added over the shards of `axis_name`."""
    axes = (axis,) if isinstance(axis, int) else axis
    max_logit, sum_others, *rest = _block_sums((logits, targets.label, targets.target_weights), from_end(axes, logits))
    max_logit = lax.stop_gradient(max_logit)  # no result depends on the shift
    if rest:
        rest[0] -= max_logit
    block = Statistics(max_logit, sum_others, *rest)
    return block if axis_name is None else over_shards(block, logits, axes, targets, axis_name)


def over_shards(block: Statistics, logits: Array, axes: Axes, targets: Targets, axis_name: AxisName) -> Statistics:
    """The statistics of all blocks from each block's own, relative to the largest logit of all blocks."""
    max_logit = max_shards(block.max_logit, axis_name)
    below = block.max_logit - max_logit
    sums, sum_others = {}, block.sum_others
    if block.other_weight is not None:  # only blocks that have the largest logit omit a class from their sum
        # A block may have found no class at its maximum: XLA may compute the logits twice and round them differently.
        leads = lax.stop_gradient((below == 0) & (block.label_logit == 0))
        sum_others = jnp.where(leads, sum_others, block.exp_sum)
        sums["label_logit"] = leads.astype(below.dtype)  # their number, for now
        sums["other_weight"] = jnp.where(leads, block.other_weight, block.weight_sum)
    sums["sum_others"] = _shifted_sum((logits, targets.label, sum_others, below, max_logit), axes)
    if targets.label is not None:  # one shard has the label; a label on no shard has weight 0 or NaN
        inside = (targets.label >= 0) & (targets.label < logits.shape[axes[0]])
        sums["label_logit"] = jnp.where(inside, block.label_logit + below, 0)
    if targets.target_weights is not None:
        below = jnp.where((block.weight_sum == 0) & ~jnp.isfinite(below), 0, below)  # avoids 0 · inf
        sums["weight_sum"], sums["weighted_gap"] = block.weight_sum, block.weighted_gap - block.weight_sum * below
    sums = dict(zip(sums, sum_together([*sums.values()], axes[-1], axis_name), strict=True))
    if block.other_weight is not None:
        sums["sum_others"], leader = _without_one(sums["sum_others"], sums["label_logit"], max_logit)
        sums["label_logit"] = leader - lax.stop_gradient(max_logit)
    return Statistics(max_logit, **sums)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _shifted_sum(arrays: tuple[Any, ...], axes: Axes) -> Array:
    """The block's sum over the other classes, rescaled from its own largest logit to the largest of all shards."""
    _, _, sum_others, below, _ = arrays
    return sum_others * jnp.exp(below)


@_shifted_sum.defjvp
def _shifted_sum_jvp(axes: Axes, primals: tuple[Any], tangents: tuple[Any]) -> tuple[Array, Array]:
    # Compute each exp(z_j − m) as `scaled_exponentials` does, so that rounding errors cancel in second derivatives:
    # relative to the block's own m its rounding would differ by up to z_j − m units. Inside a scan JAX may forget this
    # rule (see `freeze_ignored`), so the sum of the others has a derivative too.
    ((logits, label, _, _, max_logit),) = primals
    change = jnp.exp(widen(logits) - max_logit) * widen(tangents[0][0])
    if label is not None:
        change = jnp.where(is_label(logits, label, axes[0]), 0, change)
    return _shifted_sum(*primals, axes), jnp.sum(change, axes, keepdims=True)


@with_platform_impl(cpu=cpu.log1p)
def _log1p(arrays: tuple[Array], axes: Axes) -> tuple[Array]:
    return (jnp.log1p(*arrays),)


@with_platform_impl(
    cpu=cpu.statistics,
    cuda=accelerator.gpu_statistics,
    rocm=accelerator.gpu_statistics,
    tpu=accelerator.tpu_statistics,
)
def _block_sums(arrays: tuple[Any, ...], axes: Axes) -> tuple[Array, ...]:
    """m, the sum of the others, and if the targets need them z_label, Σ_j q_j and Σ_j q_j (m − z_j).

    For a distribution one class with logit m takes the label's place, and Σ_j q_j over the classes with logits below m
    is the last result.
    """
    logits, label, target_weights = arrays
    max_logit = finite_max(logits, axes)
    z = widen(logits)
    exponentials = jnp.exp(z - max_logit)
    if label is None and target_weights is not None:
        sums = [max_logit, *_without_one(*_others_and_leaders(exponentials, axes), max_logit)]
        below_max = target_weights - target_weights * _leads(exponentials)
        gap = _weighted_gap(target_weights, max_logit - z, axes)
        weights = [jnp.sum(terms, axes, keepdims=True) for terms in (target_weights, below_max)]
        return *sums, jnp.broadcast_to(weights[0], gap.shape), gap, weights[1]
    if label is not None:
        exponentials = jnp.where(is_label(logits, label, axes[0]), 0, exponentials)
    sums = [max_logit, jnp.sum(exponentials, axes, keepdims=True)]
    if label is not None:
        (axis,) = axes
        index = jnp.clip(label, 0, logits.shape[axis] - 1)
        if explicit_names(logits)[axis]:  # a gather cannot look at several devices
            sums.append(jnp.sum(jnp.where(is_label(logits, index, axis), z, 0), axis, keepdims=True))
        else:
            sums.append(jnp.take_along_axis(z, index, axis, mode="promise_in_bounds"))
    if target_weights is not None:
        gap = _weighted_gap(target_weights, max_logit - z, axes)
        sums += [jnp.broadcast_to(jnp.sum(target_weights, axes, keepdims=True), gap.shape), gap]
    return tuple(sums)


def _weighted_gap(target_weights: Array, gaps: Array, axes: Axes) -> Array:
    """Σ_j q_j (m − z_j)."""
    finite = jnp.isfinite(gaps)
    # One select around both products: XLA's CPU stores what each select yields.
    infinite_cost = weighted(lax.stop_gradient(target_weights), gaps)
    cost = jnp.where(finite, target_weights * jnp.where(finite, gaps, 0), infinite_cost)
    return jnp.sum(cost, axes, keepdims=True)


def weighted(weight: Array, cost: Array) -> Array:
    """weight·cost, but 0 where the weight is 0, even if the cost is infinite."""
    return jnp.where(weight == 0, 0, weight * jnp.where(weight == 0, 0, cost))


def finite_max(logits: Array, axes: Axes) -> Array:
    """The largest logit or, if every class is masked, the lowest finite number, so that exp(−inf − m) is still 0."""
    along = tuple(axis % logits.ndim for axis in axes)
    # `jnp.max` would need an `initial` for arrays without classes, which XLA drops when it reduces a single element.
    max_logit = jnp.expand_dims(lax.reduce_max(lax.stop_gradient(logits), along), along)
    return widen(jnp.maximum(max_logit, float(jnp.finfo(logits.dtype).min)))


def scaled_exponentials(
    logits: Array,
    max_logit: Array,
    factor: Array,
    axes: Axes,
    *,
    ignored: Array | None = None,
    label: Array | None = None,
    at_label: Array | None = None,
    position_weight: Array | None = None,
    target_weights: Array | None = None,
    at_max: tuple[Array, Array] | None = None,
    in_place: bool = False,
) -> Array:
    """exp(z_j − m)·factor − position_weight·q_j, with `at_label` as the first term at the label; 0 where ignored.

    With `at_max`, classes with logit m have its gradient instead. The result has the logits' dtype, and with `in_place`
    may overwrite the logits. Terms that are None are omitted.
    """
    per_position = (factor, ignored, label, at_label, position_weight, *(at_max or (None, None)))
    per_position = jax.tree.map(lambda array: jnp.broadcast_to(array, max_logit.shape), per_position)
    program = _in_place if in_place else _in_new_place
    return program((logits, max_logit, *per_position, target_weights), from_end(axes, logits))[0]


def _scaled_exponentials(arrays: tuple[Any, ...], axes: Axes) -> tuple[Array]:
    logits, max_logit, factor, ignored, label, at_label, position_weight, *at_max, target_weights = arrays
    exponentials = jnp.exp(widen(logits) - max_logit)
    result = exponentials * factor
    if label is not None:
        result = jnp.where(is_label(logits, label, axes[0]), broadcast_like(at_label, result), result)
    if target_weights is not None:
        result -= position_weight * target_weights
    if target_weights is not None and at_max[0] is not None:
        constant, slope = at_max
        # The term with factor is 0 in value, but its derivative is that of the exponential.
        gradient = constant + factor * (exponentials - 1) - slope * target_weights
        result = jnp.where(exponentials == 1, gradient, result)
    if ignored is not None:
        result = jnp.where(broadcast_like(ignored, result), 0, result)
    return (result.astype(logits.dtype),)


_in_new_place = with_platform_impl(cpu=cpu.gradient)(_scaled_exponentials)
_in_place = with_platform_impl(cpu=cpu.gradient_in_place)(_scaled_exponentials)


def leading_statistics(logits: Array, axes: Axes, axis_name: AxisName = None) -> Statistics:
    """Statistics whose label is the class with the largest logit, so that an lse near 0 stays accurate."""
    max_logit, sum_others, leader = _leading_sums((logits,), axes, axis_name)
    max_logit = lax.stop_gradient(max_logit)
    return Statistics(max_logit, sum_others, leader - max_logit)


@with_local_impl(cpu=cpu.leading_sums)
def _leading_sums(arrays: tuple[Array], axes: Axes, axis_name: AxisName = None) -> tuple[Array, ...]:
    """m, the sum of all exponentials except one of a class with the logit m, and its logit."""
    (logits,) = arrays
    max_logit = max_shards(finite_max(logits, axes), axis_name)
    sums = _others_and_leaders(jnp.exp(widen(logits) - max_logit), axes)
    others, leaders = sum_together(sums, axes[-1], axis_name)
    return max_logit, *_without_one(others, leaders, max_logit)


def _others_and_leaders(exponentials: Array, axes: Axes) -> tuple[Array, Array]:
    """Σ exp(z_j − m) over the classes below m, and how many have the logit m; the first has all of the derivative."""
    leads = _leads(exponentials)
    return jnp.sum(exponentials - leads, axes, keepdims=True), jnp.sum(leads, axes, keepdims=True)


def _leads(exponentials: Array) -> Array:
    """1 at classes with the largest logit, whose exponential is 1, and 0 at others, as constants.

    A comparison would be slower: XLA's CPU sums products and differences while it reads, but first stores the result of
    a select, and a loss then took five times as long.
    """
    return jnp.floor(exponentials)


def _without_one(others: Array, count: Array, max_logit: Array) -> tuple[Array, Array]:
    """The sum of all exponentials except one of a class with the largest logit, and its logit as a constant."""
    count = lax.stop_gradient(count)  # a sum over shards has tangents of 0, and the logarithm of 0 would make them NaN
    # −inf where no class is left, but not as a literal: `debug_infs` stops at one even where it is not selected.
    leader = lax.stop_gradient(max_logit) + jnp.log(jnp.minimum(count, 1))
    return others + jnp.maximum(count - 1, 0), leader
