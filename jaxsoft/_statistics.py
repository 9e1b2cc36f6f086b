"""The one formula: what a block of classes contributes to a loss and to a normaliser, and exp(z) in their terms.

Every loss and normaliser in this package comes from `block_statistics`, every gradient to logits from
`scaled_exponentials`, but for those of softmax and log_softmax. Arrays of statistics keep the class axes with length
one, so they broadcast against the logits.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft import _accelerator, _cpu
from jaxsoft._dtypes import widen
from jaxsoft._meshes import broadcast_like, stated_names
from jaxsoft._platform import Axes, from_end, on
from jaxsoft._shards import AxisName, max_shards, sum_shards
from jaxsoft._targets import Targets, is_label


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
    def surplus(self) -> Array:
        """Σ_j exp(z_j − m) − 1, to full relative precision when the label leads; 0 where no class is left.

        That is why the tail leaves the label out: once the label leads by 17, its 1 swallows every
        other term in float32. A label that leads has exp(0) − 1 = 0 exactly; under any other the
        tail is at least 1 and nothing cancels.
        """
        surplus = self.tail - 1 if self.label is None else self.tail + (jnp.exp(self.label) - 1)
        return surplus + lax.stop_gradient(jnp.maximum(-surplus, 0))

    @property
    def log_total(self) -> Array:
        """log Σ_j exp(z_j − m), as precise; 0 where no class is left."""
        return _log1p((self.surplus,), ())[0]

    @property
    def surprise(self) -> Array:
        """log Σ_j exp(z_j) − z_label, and its derivative, to full relative precision when the label leads."""
        leads = self.label > -1
        # By log_total − label the derivative would be what is left of two ones.
        lead = self.tail * jnp.exp(-jnp.maximum(self.label, -1))
        (log_total,) = _log1p((jnp.where(leads, lead, self.surplus),), ())
        return log_total - jnp.where(leads, 0, self.label)

    @property
    def logsumexp(self) -> Array:
        """log Σ_j exp(z_j): −inf where no class is left, +inf at a logit of +inf."""
        return jnp.where(self.exp_sum == 0, jnp.log(lax.stop_gradient(self.exp_sum)), self.finite_logsumexp)

    @property
    def finite_logsumexp(self) -> Array:
        """lse, or 0 where no class is left and nothing is to be drawn towards 0."""
        lse = jnp.where(jnp.isfinite(self.largest), self.largest + self.log_total, self.largest)
        return jnp.where(self.exp_sum == 0, 0, lse)


def leading_statistics(logits: Array, axes: Axes, axis_name: AxisName = None) -> Statistics:
    """Statistics whose label is the class with the largest logit: a lse near 0 has the digits its 1 would swallow."""
    if axis_name is None:
        largest, tail, label = _leading_sums((logits,), from_end(axes, logits))
    else:
        largest = max_shards(largest_logit(logits, axes), axis_name)
        sums = jnp.concatenate(_others_and_leaders(logits, largest, axes), axes[-1])
        others, leaders = jnp.split(sum_shards(sums, axis_name), 2, axes[-1])
        tail, label = _but_one(others, leaders, largest)
    largest = lax.stop_gradient(largest)
    return Statistics(largest, tail, label - largest)


def block_statistics(logits: Array, axes: Axes, targets: Targets = Targets(), axis_name: AxisName = None) -> Statistics:
    """What a block of classes contributes to the loss of each position, summed over the shards of `axis_name`."""
    largest, tail, *rest = _block_sums((logits, targets.label, targets.spread), from_end(axes, logits))
    largest = lax.stop_gradient(largest)  # no result depends on the shift
    label = None if targets.label is None else rest.pop(0) - largest
    block = Statistics(largest, tail, label, *rest)
    if axis_name is None:
        return block
    largest = max_shards(block.largest, axis_name)
    below = block.largest - largest
    sums = [_shifted_tail(logits, targets.label, tail, below, largest, axes)]
    if targets.label is not None:  # of one shard; a label in none has no weight, or NaN
        inside = (targets.label >= 0) & (targets.label < logits.shape[axes[0]])
        sums.append(jnp.where(inside, block.label + below, 0))
    if targets.spread is not None:
        moved = jnp.where((block.spread == 0) & ~jnp.isfinite(below), 0, below)  # a block without weight may not cost
        sums += [block.spread, block.gap - block.spread * moved]
    packed = sum_shards(jnp.concatenate(sums, axes[-1]), axis_name)  # one all-reduce for them all
    tail, *rest = jnp.split(packed, len(sums), axes[-1])
    return Statistics(largest, tail, None if label is None else rest.pop(0), *rest)


@on(cpu=_cpu.leading_sums)
def _leading_sums(arrays: tuple[Array], axes: Axes) -> tuple[Array, ...]:
    """m, the sum of exponentials but that of one class with the logit m, and its logit."""
    (logits,) = arrays
    largest = largest_logit(logits, axes)
    return largest, *_but_one(*_others_and_leaders(logits, largest, axes), largest)


def _others_and_leaders(logits: Array, largest: Array, axes: Axes) -> tuple[Array, Array]:
    """Σ exp(z_j − m) over the classes below m, and over those with the logit m."""
    z = widen(logits)
    exponentials, leads = jnp.exp(z - largest), z == largest
    others, leaders = (jnp.where(mask, exponentials, 0) for mask in (~leads, leads))
    return jnp.sum(others, axes, keepdims=True), jnp.sum(leaders, axes, keepdims=True)


def _but_one(others: Array, leaders: Array, largest: Array) -> tuple[Array, Array]:
    """Both sums together but for one of the leaders, and its logit, which does not move: it does in the sum."""
    count = lax.stop_gradient(leaders)
    # −inf where no class is left, and no literal: `debug_infs` stops at one that is not chosen, too.
    leader = lax.stop_gradient(largest) + jnp.log(jnp.minimum(count, 1))
    return others + jnp.where(count == 0, leaders, leaders - 1), leader


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _shifted_tail(logits: Array, label: Array | None, tail: Array, below: Array, largest: Array, axes: Axes) -> Array:
    """A block's tail relative to the largest logit of all shards, from that relative to its own."""
    return tail * jnp.exp(below)


@_shifted_tail.defjvp
def _shifted_tail_jvp(axes: Axes, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    # Each exp(z_j − m) as `scaled_exponentials` has it. By way of the block's own m it would be rounded otherwise, by
    # z_j − m units, and of second derivatives there would remain so much of what two of their terms have in common.
    # Inside a scan JAX may forget this rule (see `taking_part`): so the tail moves as well, for which it stands.
    logits, label, _, _, largest = primals
    moved = jnp.exp(widen(logits) - largest) * widen(tangents[0])
    if label is not None:
        moved = jnp.where(is_label(logits, label, axes), 0, moved)
    return _shifted_tail(*primals, axes), jnp.sum(moved, axes, keepdims=True)


@on(cpu=_cpu.log1p)
def _log1p(arrays: tuple[Array], axes: Axes) -> tuple[Array]:
    return (jnp.log1p(*arrays),)


@on(
    cpu=_cpu.statistics,
    cuda=_accelerator.gpu_statistics,
    rocm=_accelerator.gpu_statistics,
    tpu=_accelerator.tpu_statistics,
)
def _block_sums(arrays: tuple[Any, ...], axes: Axes) -> tuple[Array, ...]:
    """m, the tail, and where the targets have such the logit of the label, Σ_j spread_j and Σ_j spread_j (m − z_j)."""
    logits, label, spread = arrays
    largest = largest_logit(logits, axes)
    z = widen(logits)
    exponentials = jnp.exp(z - largest)
    if label is not None:
        exponentials = jnp.where(is_label(logits, label, axes), 0, exponentials)
    sums = [largest, jnp.sum(exponentials, axes, keepdims=True)]
    if label is not None:
        (axis,) = axes
        index = jnp.clip(label, 0, logits.shape[axis] - 1)
        if stated_names(logits)[axis]:  # no gather looks on several devices
            sums.append(jnp.sum(jnp.where(is_label(logits, index, axes), z, 0), axes, keepdims=True))
        else:
            sums.append(jnp.take_along_axis(z, index, axis, mode="promise_in_bounds"))
    if spread is not None:
        below, held = largest - z, lax.stop_gradient(spread)
        # A class without target weight costs nothing, at −inf too. What is added is 0 and has the derivative to a
        # target: where that does not move it adds nothing, however much the class costs.
        cost = held * jnp.where(spread == 0, 0, below) + (spread - held) * jnp.where(jnp.isfinite(below), below, 0)
        weight, gap = (jnp.sum(terms, axes, keepdims=True) for terms in (spread, cost))
        sums += [jnp.broadcast_to(weight, gap.shape), gap]
    return tuple(sums)


def largest_logit(logits: Array, axes: Axes) -> Array:
    """The largest logit or, where none is left, the lowest finite number, from which exp(−inf) is still 0."""
    lowest = jnp.finfo(logits.dtype).min
    largest = jnp.max(lax.stop_gradient(logits), axes, keepdims=True, initial=lowest)
    if largest.shape == logits.shape:  # XLA takes a reduction of one element for that element
        largest = jnp.maximum(largest, float(lowest))
    return widen(largest)


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
    *,
    in_place: bool = False,
) -> Array:
    """exp(z_j − m)·factor − share·spread_j, but `at_label` in place of the product at the label, and 0 where idle.

    In the logits' dtype, and in their place if they are not read again. What is absent is left out.
    """
    of_positions = jax.tree.map(lambda a: jnp.broadcast_to(a, largest.shape), (factor, idle, label, at_label, share))
    program = _in_place if in_place else _in_new_place
    return program((logits, largest, *of_positions, spread), from_end(axes, logits))[0]


def _scaled_exponentials(arrays: tuple[Any, ...], axes: Axes) -> tuple[Array]:
    logits, largest, factor, idle, label, at_label, share, spread = arrays
    result = jnp.exp(widen(logits) - largest) * factor
    if label is not None:
        result = jnp.where(is_label(logits, label, axes), broadcast_like(at_label, result), result)
    if spread is not None:
        result -= share * spread
    if idle is not None:
        result = jnp.where(broadcast_like(idle, result), 0, result)
    return (result.astype(logits.dtype),)


_in_new_place = on(cpu=_cpu.gradient)(_scaled_exponentials)
_in_place = on(cpu=_cpu.gradient_in_place)(_scaled_exponentials)
