"""The one formula: what a block of classes contributes to a loss, and the block's gradient.

For one position with logits z, target weights q_j (see `Targets`), τ = Σ_j q_j and p = softmax(z):

    loss       = τ·lse − Σ_j q_j z_j              lse = log Σ_j exp(z_j)
    ∂loss/∂z_j = τ·p_j − q_j

Every loss and normaliser in this package comes from `block_statistics`; every gradient to logits comes from
`block_gradient`, but for softmax and log_softmax, which keep their output alone.
Arrays of statistics keep the class axes with length one, so they broadcast against the logits.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._reductions import is_cut, is_narrow, reduce_classes
from jaxsoft._shards import AxisName, max_shards, sum_shards
from jaxsoft._targets import Targets

# Bytes above which the C library hands out new pages for each array: touching them takes longer than exponentials,
# and those of the sum are best kept for the gradient.
LARGE = 32 * 2**20


class Statistics(NamedTuple):
    """Sums over the classes of a block, relative to its largest logit m."""

    max: Array  # m, above −inf
    tail: Array  # Σ_j exp(z_j − m) over every class but the label
    label: Array  # z_label − m; −inf where there is no label
    spread: Array  # Σ_j spread_j
    gap: Array  # Σ_j spread_j (m − z_j)

    @property
    def total(self) -> Array:
        """Σ_j exp(z_j − m), at least 1; where no class is left a little above 0, for no division to meet a zero."""
        # Rounding absorbs what is added to 1 or more. Unlike a maximum, which some of XLA's CPU kernels take to be
        # the other argument, it keeps a NaN.
        total = self.tail + jnp.exp(self.label)
        return total + jnp.finfo(total.dtype).eps / 8

    @property
    def log_total(self) -> Array:
        """log Σ_j exp(z_j − m) to full relative precision when the label leads; 0 where no class is left.

        That is why the tail leaves the label out: once the label leads by 17, its 1 swallows every
        other term in float32. A label that leads has exp(0) − 1 = 0 exactly; under any other the
        tail is at least 1 and nothing cancels.
        """
        surplus = self.tail + (jnp.exp(self.label) - 1)
        return jnp.log1p(surplus + lax.stop_gradient(jnp.maximum(-surplus, 0)))

    @property
    def logsumexp(self) -> Array:
        """log Σ_j exp(z_j): −inf where no class is left, +inf at a logit of +inf."""
        total = self.tail + jnp.exp(self.label)
        return jnp.where(jnp.isinf(self.max), self.max, self.max + jnp.log(total))


def block_exponentials(
    logits: Array, max: Array, label: Array | None, axes: tuple[int, ...], *, stored: bool = True
) -> Array:
    """exp(z_j − m), with the label's own term left out.

    Forward and backward share it, so under one `jit` the compiler may compute it once. On the CPU the form of
    the mask decides whether it does: XLA fuses arithmetic with the sum, but no comparison. `stored` says whether
    anything but a sum reads them.
    """
    exponentials = jnp.exp(logits.astype(max.dtype) - max)
    if label is None:
        return exponentials
    (axis,) = axes
    axis %= logits.ndim
    # A comparison keeps the exponentials from the sum's kernel: right where they are stored anyway and large enough to
    # be worth reading again, or where they are not large and the kernel is slow, because the classes are not last.
    large = exponentials.nbytes > LARGE
    compared = large if stored else not large and axis < logits.ndim - 1
    if compared:
        return jnp.where(_at_label(logits, label, (axis,)), 0, exponentials)
    # Integers are faster where the exponentials are stored and slower for the sum alone, but needed for more classes
    # than a float can count.
    whole = stored or logits.shape[axis] > 1 / jnp.finfo(max.dtype).eps
    dtype = label.dtype if whole else max.dtype
    # Numbered in integers and then converted: a float32 iota becomes part of XLA's CPU reduction, where jaxlib 0.11.2
    # and 0.12.0.1, if it has fewer than 16 elements, fill only as many as an earlier program had: losses come out
    # wrong.
    classes = lax.broadcast_in_dim(lax.iota(label.dtype, logits.shape[axis]).astype(dtype), logits.shape, (axis,))
    return exponentials * jnp.minimum(jnp.abs(classes - label.astype(dtype)), 1).astype(max.dtype)


def block_statistics(
    logits: Array,
    axes: tuple[int, ...],
    targets: Targets = Targets(),
    axis_name: AxisName = None,
    *,
    reused: Literal["exponentials", "logits", "nothing"] = "exponentials",
) -> Statistics:
    """What a block of classes contributes to the loss of each position, summed over the shards of `axis_name`.

    `reused` is what will be read again: the exponentials by softmax and by a gradient, which are best stored but in
    half precision along rows that are cut, the logits by log_softmax, nothing where only statistics are wanted. Half
    precision is widened inside each expression that reads it, which leaves XLA the choice not to store it; its maximum
    is exact as it is.
    """
    # Every result is independent of the shift, so its derivative is dropped. Reducing from the lowest
    # finite number keeps it finite without one more operation, which XLA's CPU fusions would not take.
    lowest = jnp.finfo(logits.dtype).min
    only_reduced = reused == "nothing"
    constant = lax.stop_gradient(logits)
    max = reduce_classes(lax.max, lowest, lambda _, z: z, (constant,), axes, only_reduced=only_reduced)
    if max.shape == logits.shape:  # XLA takes a reduction of one element for that element
        max = jnp.maximum(max, float(lowest))
    max = max_shards(max, axis_name)

    # Stored exponentials of half-precision logits take twice the logits' bytes. Where rows are cut they are computed
    # once for the sum and once for the result: runs have another shape, so XLA does not merge the two. Not beside
    # spread, for which XLA would store the widened logits.
    recomputed = (
        is_narrow(logits) and axes == (logits.ndim - 1,) and is_cut(logits.shape[-1]) and targets.spread is None
    )
    if reused == "exponentials" and not recomputed:
        stored = block_exponentials(logits, max, targets.label, axes)
        sums = [reduce_classes(lax.add, 0, lambda _, e: e, (stored,), axes)]
    else:
        from_end = tuple(axis - logits.ndim for axis in axes)  # the views that are reduced differ in rank

        def exponentials(first: Array | int, z: Array, max: Array, label: Array | None = None) -> Array:
            return block_exponentials(z, max, None if label is None else label - first, from_end, stored=False)

        arrays = (logits, max) if targets.label is None else (logits, max, targets.label)
        lse_alone = targets.label is None and targets.spread is None
        sums = [reduce_classes(lax.add, 0, exponentials, arrays, axes, read_once=lse_alone, only_reduced=only_reduced)]
    if targets.label is not None:
        (axis,) = axes
        # A label in no block has no logit; its weight, 0 or NaN, decides what becomes of any other.
        index = jnp.clip(targets.label, 0, logits.shape[axis] - 1)
        label = jnp.take_along_axis(logits, index, axis, mode="promise_in_bounds").astype(max.dtype) - max
        sums.append(label if axis_name is None else jnp.where(index == targets.label, label, 0))
    if targets.spread is not None:
        spread = reduce_classes(lax.add, 0, lambda _, q: q, (targets.spread,), axes)
        weights = jnp.broadcast_to(targets.spread, logits.shape)

        def surprise(_: Array | int, z: Array, q: Array, max: Array) -> Array:
            # A class without target weight costs nothing, at −inf too.
            return jnp.where(q == 0, 0, q * (max - z.astype(max.dtype)))

        # Never in groups of rows: XLA stores the select, and would store it in both shapes.
        gap = reduce_classes(lax.add, 0, surprise, (logits, weights, max), axes, apart=True)
        sums += [jnp.broadcast_to(spread, gap.shape), gap]
    if axis_name is not None:  # one all-reduce for them all
        packed = sum_shards(jnp.concatenate(sums, axes[-1]), axis_name)
        sums = jnp.split(packed, len(sums), axes[-1])
    tail, *rest = sums
    no_label, zero = jnp.array([-jnp.inf, 0], max.dtype)
    label = rest.pop(0) if targets.label is not None else no_label
    spread, gap = rest or (zero, zero)
    return Statistics(max, tail, label, spread, gap)


def position_losses(targets: Targets, statistics: Statistics) -> Array:
    """τ·lse − Σ_j q_j z_j of every position, from finished statistics."""
    losses = jnp.zeros_like(statistics.tail)
    # A position without target weight costs nothing, not even where its surprise is infinite.
    if targets.label is not None:
        surprise = statistics.log_total - statistics.label
        losses += jnp.where(targets.hot == 0, 0, targets.hot * surprise)
    if targets.spread is not None:
        surprise = statistics.spread * statistics.log_total + statistics.gap
        losses += jnp.where(targets.share == 0, 0, targets.share * surprise)
    return losses


def block_gradient(
    logits: Array,
    targets: Targets,
    statistics: Statistics,
    axes: tuple[int, ...],
    loss_cotangent: Array,
    lse_cotangent: Array,
) -> Array:
    """The gradient of Σ loss_cotangent·loss + lse_cotangent·lse to the logits of a block.

    At the label τ·p_y − q_y is never formed by subtracting from one: 1 − p_y is the other classes' sum.
    """
    total = statistics.total
    hot = loss_cotangent * targets.hot
    share = loss_cotangent * targets.share
    mass = lse_cotangent if targets.spread is None else lse_cotangent + share * statistics.spread
    exponentials = block_exponentials(logits, statistics.max, targets.label, axes)
    gradient = exponentials * ((mass + hot) / total)
    if targets.label is not None:
        at_label = (mass * jnp.exp(statistics.label) - hot * statistics.tail) / total
        gradient = jnp.where(_at_label(logits, targets.label, axes), at_label, gradient)
    idle = (hot == 0) & (lse_cotangent == 0)
    if targets.spread is not None:
        gradient -= share * targets.spread
        idle &= share == 0
    # A position without weight has no gradient, whatever its logits: padding may be NaN.
    return jnp.where(idle, 0, gradient)


def target_gradient(logits: Array, targets: Targets, statistics: Statistics, loss_cotangent: Array) -> Array:
    """The gradient to a distribution's weights, −log p_j."""
    share = loss_cotangent * targets.share
    return jnp.where(
        share == 0, 0, share * (statistics.log_total + (statistics.max - logits.astype(statistics.max.dtype)))
    )


def _at_label(logits: Array, label: Array, axes: tuple[int, ...]) -> Array:
    """A mask by comparison, not a scatter: it fuses on every platform."""
    (axis,) = axes
    return lax.broadcasted_iota(label.dtype, logits.shape, axis) == label
