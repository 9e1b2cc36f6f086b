"""The one formula: what a block of classes contributes to a loss, and the block's gradient.

For one position with logits z, target weights q_j (see `Targets`), τ = Σ_j q_j, p = softmax(z) and a z-loss of ζ:

    loss       = τ·lse − Σ_j q_j z_j + ζ·lse²              lse = log Σ_j exp(z_j)
    ∂loss/∂z_j = (τ + 2ζ·lse)·p_j − q_j

Every loss and normaliser in this package comes from `block_statistics`, every gradient to logits from
`block_exponentials`, but for softmax, which keeps its output alone.
Arrays of statistics keep the class axes with length one, so they broadcast against the logits.
"""

from typing import Any, Literal, NamedTuple, cast

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._reductions import is_cut, is_known, is_narrow, reduce_classes
from jaxsoft._shards import AxisName, max_shards, sum_shards
from jaxsoft._targets import Targets

# Bytes above which the C library hands out new pages for each array: touching them takes longer than exponentials,
# and those of the sum are best kept for the gradient.
LARGE = 32 * 2**20


class Statistics(NamedTuple):
    """Sums over the classes of a block, relative to its largest logit m; None where no target asks for one."""

    max: Array  # m, above −inf
    tail: Array  # Σ_j exp(z_j − m) over every class but the label
    label: Any = None  # z_label − m
    spread: Any = None  # Σ_j spread_j
    gap: Any = None  # Σ_j spread_j (m − z_j)

    @property
    def sum(self) -> Array:
        """Σ_j exp(z_j − m): at least 1, or 0 where no class is left."""
        return self.tail if self.label is None else self.tail + jnp.exp(self.label)

    @property
    def total(self) -> Array:
        """The sum, but a little above 0 where no class is left, for no division to meet a zero."""
        # Rounding absorbs what is added to 1 or more. Unlike a maximum, which some of XLA's CPU kernels take to be
        # the other argument, it keeps a NaN.
        return self.sum + jnp.finfo(self.tail.dtype).eps / 8

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
        return jnp.where(self.sum == 0, jnp.log(lax.stop_gradient(self.sum)), self.finite_logsumexp)

    @property
    def finite_logsumexp(self) -> Array:
        """lse, or 0 where no class is left and nothing is to be drawn towards 0."""
        lse = jnp.where(jnp.isfinite(self.max), self.max + jnp.log(self.total), self.max)
        return jnp.where(self.sum == 0, 0, lse)


def block_exponentials(
    logits: Array, largest: Array, label: Array | None, axes: tuple[int, ...], *, stored: bool = True
) -> Array:
    """exp(z_j − m), with the label's own term left out.

    Forward and backward share it, so under one `jit` the compiler may compute it once. On the CPU the form of
    the mask decides whether it does: XLA fuses arithmetic with the sum, but no comparison. `stored` says whether
    anything but a sum reads them.
    """
    exponentials = jnp.exp(logits.astype(largest.dtype) - largest)
    if label is None:
        return exponentials
    (axis,) = axes
    axis %= logits.ndim
    # A comparison keeps the exponentials from the sum's kernel: right where they are stored anyway and large enough to
    # be worth reading again, or where they are not large and the kernel is slow, because the classes are not last.
    large = is_known(exponentials.nbytes) and exponentials.nbytes > LARGE
    compared = large if stored else not large and axis < logits.ndim - 1
    if compared:
        return jnp.where(_at_label(logits, label, (axis,)), 0, exponentials)
    # Integers are faster where the exponentials are stored and slower for the sum alone, but needed for more classes
    # than a float can count.
    countable = is_known(logits.shape[axis]) and logits.shape[axis] <= 1 / jnp.finfo(largest.dtype).eps
    dtype = largest.dtype if countable and not stored else label.dtype
    # Numbered in integers and then converted: a float32 iota becomes part of XLA's CPU reduction, where jaxlib 0.11.2
    # and 0.12.0.1, if it has fewer than 16 elements, fill only as many as an earlier program had: losses come out
    # wrong.
    classes = lax.broadcast_in_dim(lax.iota(label.dtype, logits.shape[axis]).astype(dtype), logits.shape, (axis,))
    return exponentials * jnp.minimum(jnp.abs(classes - label.astype(dtype)), 1).astype(largest.dtype)


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
    largest = reduce_classes(lax.max, lowest, lambda _, z: z, (constant,), axes, only_reduced=only_reduced)
    if largest.shape == logits.shape:  # XLA takes a reduction of one element for that element
        largest = jnp.maximum(largest, float(lowest))
    largest = max_shards(largest, axis_name)

    # Stored exponentials of half-precision logits take twice the logits' bytes. Where rows are cut they are computed
    # once for the sum and once for the result: runs have another shape, so XLA does not merge the two. Not beside
    # spread, for which XLA would store the widened logits.
    recomputed = (
        is_narrow(logits) and axes == (logits.ndim - 1,) and is_cut(logits.shape[-1]) and targets.spread is None
    )
    if reused == "exponentials" and not recomputed:
        stored = block_exponentials(logits, largest, targets.label, axes)
        sums = [reduce_classes(lax.add, 0, lambda _, e: e, (stored,), axes)]
    else:
        from_end = tuple(axis - logits.ndim for axis in axes)  # the views that are reduced differ in rank

        def exponentials(first: Array | int, z: Array, largest: Array, label: Array | None = None) -> Array:
            return block_exponentials(z, largest, None if label is None else label - first, from_end, stored=False)

        arrays = (logits, largest) if targets.label is None else (logits, largest, targets.label)
        lse_alone = targets.label is None and targets.spread is None
        sums = [reduce_classes(lax.add, 0, exponentials, arrays, axes, read_once=lse_alone, only_reduced=only_reduced)]
    if targets.label is not None:
        (axis,) = axes
        # A label in no block has no logit; its weight, 0 or NaN, decides what becomes of any other.
        index = jnp.clip(targets.label, 0, logits.shape[axis] - 1)
        label = jnp.take_along_axis(logits, index, axis, mode="promise_in_bounds").astype(largest.dtype) - largest
        sums.append(label if axis_name is None else jnp.where(index == targets.label, label, 0))
    if targets.spread is not None:
        spread = reduce_classes(lax.add, 0, lambda _, q: q, (targets.spread,), axes)
        weights = jnp.broadcast_to(targets.spread, logits.shape)

        def weighted(_: Array | int, z: Array, q: Array, largest: Array) -> Array:
            below, held = largest - z.astype(largest.dtype), lax.stop_gradient(q)
            # A class without target weight costs nothing, at −inf too.
            cost = held * jnp.where(q == 0, 0, below)
            if targets.label is not None or only_reduced:  # smoothing does not move, nor what has a rule of its own
                return cost
            # What is added is 0 and has the derivative to a target: where that does not move it adds nothing, however
            # much the class costs.
            return cost + (q - held) * jnp.where(_is_infinite(below), 0, below)

        # Never in groups of rows: XLA stores the select, and would store it in both shapes.
        gap = reduce_classes(lax.add, 0, weighted, (logits, weights, largest), axes, apart=True)
        sums += [jnp.broadcast_to(spread, gap.shape), gap]
    if axis_name is not None:  # one all-reduce for them all
        packed = sum_shards(jnp.concatenate(sums, axes[-1]), axis_name)
        sums = jnp.split(packed, len(sums), axes[-1])
    tail, *rest = sums
    label = rest.pop(0) if targets.label is not None else None
    return Statistics(largest, tail, label, *rest)


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
    logits: Array, targets: Targets, statistics: Statistics, axes: tuple[int, ...], cotangent: Array
) -> tuple[Array, Array | None]:
    """The gradients of Σ cotangent·loss to the logits of a block, and to the weights of a distribution: −log p_j.

    A position without weight has none, whatever its logits and its cotangent: padding may be NaN.
    """
    idle, (logits, targets) = targets.idle, taking_part(logits, targets)
    cotangent = jnp.where(idle, 0, cotangent)
    to_logits = jnp.where(idle, 0, _logit_gradient(logits, targets, statistics, axes, cotangent))
    if targets.label is not None:
        return to_logits, None
    to_weights = statistics.log_total + (statistics.max - logits.astype(statistics.max.dtype))
    to_weights = jnp.where(cast(Array, targets.variable), to_weights, 0)  # which a class at −inf makes infinite
    return to_logits, scale_gradient(to_weights, cotangent * targets.share, targets.share == 0)


def _logit_gradient(
    logits: Array, targets: Targets, statistics: Statistics, axes: tuple[int, ...], cotangent: Array
) -> Array:
    """At the label τ·p_y − q_y is never formed by subtracting from one: 1 − p_y is the other classes' sum."""
    total = statistics.total
    mass = jnp.zeros_like(total)  # τ + 2ζ·lse but for the label's own weight
    if targets.square is not None:
        mass += cotangent * 2 * targets.square * statistics.finite_logsumexp
    if targets.spread is not None:
        mass += cotangent * targets.share * statistics.spread
    exponentials = block_exponentials(logits, statistics.max, targets.label, axes)
    if targets.label is None:
        gradient = exponentials * (mass / total)
    else:
        hot = cotangent * targets.hot
        at_label = (mass * jnp.exp(statistics.label) - hot * statistics.tail) / total
        gradient = exponentials * ((mass + hot) / total)
        gradient = jnp.where(_at_label(logits, targets.label, axes), at_label, gradient)
    if targets.spread is not None:
        gradient -= cotangent * targets.share * targets.spread
    return gradient


def scale_gradient(gradient: Array, cotangent: Array, idle: Array | bool = False) -> Array:
    """Their product, but 0 for what takes no part, and where the cotangent is 0 and the gradient infinite."""
    return jnp.where(idle | ((cotangent == 0) & _is_infinite(gradient)), 0, cotangent * gradient)


def _is_infinite(array: Array) -> Array:
    return jnp.abs(array) > jnp.finfo(array.dtype).max  # `isinf` itself makes what `debug_infs` stops at


def _at_label(logits: Array, label: Array, axes: tuple[int, ...]) -> Array:
    """A mask by comparison, not a scatter: it fuses on every platform."""
    (axis,) = axes
    return lax.broadcasted_iota(label.dtype, logits.shape, axis) == label
