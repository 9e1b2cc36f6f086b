"""The program of GPUs and TPUs: one reduction over the logits; the plain formula reduces to the largest, then sums.

To merge two sets of classes, the sum of the set with the smaller largest logit is scaled down (M. Milakov,
N. Gimelshein, "Online normalizer calculation for softmax", 2018). If sums were relative to the largest logit m, each
new largest would round the sum again: emulated errors are 3e-5 if logits rise slowly over the 1563 turns of 128 lanes
for 200,000 classes, and 2e-4 if every exponential is too large by 4u. So a sum is relative to ⌈m⌉: differences of
integers are exact, and a term that was scaled r times weighs e^(1−r) at most.

In any order, a class is scaled at most once per integer between its logit and the largest in the tail, and
once more when the label becomes the largest. Under softmax the mean of m − z is at most log n for n classes. So with
u = 2⁻²⁴, exponentials accurate to ε, and L additions in sequence, the relative error of the tail is at most

    L·u + (log n + 4)·(ε + u)        with the plain formula L·u + ε + (m − z)·u

Emulated: the largest relative error of the loss, over margins of −60 … 80 and logits that rise, fall, are random or
equal, with NumPy's exponentials (in parentheses: with each too large by 4u). The plain formula: 2e-6 … 1e-5.

    lanes    classes: 1000      4096               32,768             200,000
    32       4e-7 (7e-7)        8e-7 (1e-6)        6e-6 (5e-6)        5e-6 (8e-6)
    128      2e-7 (6e-7)        4e-7 (7e-7)        3e-6 (3e-6)        6e-6 (6e-6)
    1024     2e-7 (7e-7)        2e-7 (7e-7)        3e-7 (8e-7)        2e-6 (1e-6)
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._arrays.classes import is_label
from jaxsoft._arrays.dtypes import widen
from jaxsoft._arrays.sharding import pvary
from jaxsoft._jax_internals import Function, Results, manual_axes
from jaxsoft._platform.dispatch import Axes

KERNEL = 1 << 14  # up to so many classes XLA compiles softmax to one kernel with a row in registers, on an H100
FEW = 1 << 7  # below so many classes, or along another axis than the last, a GPU's compiler may store what it reduces


def tpu_statistics(single_device: bool, types: Any, axes: Axes) -> Function | None:
    # XLA can shard its own operations, so `single_device` does not matter. A TPU has no float64, and XLA's compilation
    # does not end when it emulates float64 in a merge.
    return None if types[0].dtype == jnp.float64 else _block_sums


def gpu_statistics(single_device: bool, types: Any, axes: Axes) -> Function | None:
    logits, *targets = types
    sizes = [logits.shape[axis] for axis in axes]
    known = all(isinstance(size, int) for size in sizes)  # a symbol of `jax.export` stands for every size
    if not known or axes != tuple(range(-len(axes), 0)):
        return None
    least = FEW if any(target is not None for target in targets) else KERNEL + 1
    return _block_sums if math.prod(sizes) >= least else None


def _block_sums(arrays: tuple[Array, Array | None, Array | None], axes: Axes) -> Results:
    logits, label, target_weights = arrays
    lowest = float(jnp.finfo(logits.dtype).min)
    z = widen(logits)
    max_logit = jnp.maximum(z, lowest)
    sum_others = jnp.exp(z - jnp.ceil(max_logit))
    sums = [max_logit, sum_others]
    if label is not None:
        (axis,) = axes
        sums[1] = jnp.where(is_label(logits, label, axis), 0, sum_others)
        # A sum in the same pass, not a gather: in half precision a TPU gathers from a float32 copy of all logits.
        index = jnp.clip(label, 0, logits.shape[axis] - 1)
        sums.append(jnp.where(is_label(logits, index, axis), z, 0))
    merge = _merge
    if target_weights is not None:
        merge = _merge_weighted
        sums += [jnp.broadcast_to(target_weights, z.shape), jnp.where(target_weights == 0, 0, max_logit - z)]
    if label is None and target_weights is not None:  # at first each class is the only one with its logit
        merge, leads, (*_, weight, gap) = _merge_distribution, z == max_logit, sums
        sums[1:] = [jnp.where(leads, 0, sum_others), leads.astype(z.dtype)]
        sums += [jnp.where(leads, 0, weight), gap, jnp.where(leads, weight, 0)]
    sums = pvary(tuple(sums), manual_axes(sums))
    units = tuple(jnp.asarray(unit, z.dtype) for unit in (lowest, *(0.0 for _ in sums[1:])))
    summed = lax.reduce(sums, units, merge, [axis % z.ndim for axis in axes])
    max_logit, sum_others, *rest = (jnp.expand_dims(array, axes) for array in summed)
    # Divided by its own exponential the largest logit contributes exactly 1, so a sum that contains it is at least 1.
    sum_others = sum_others / jnp.exp(max_logit - jnp.ceil(max_logit))
    if merge is _merge_distribution:
        count = rest[0]
        sum_others += jnp.maximum(count - 1, 0)
        rest[0] = max_logit + jnp.log(jnp.minimum(count, 1))  # −inf if every class is masked
        rest[1], rest[3] = rest[1] + rest[3], rest[1]  # the weight of all classes, and of those with logits below m
    return max_logit, sum_others, *rest


def _merge(one: Results, other: Results) -> Results:
    """The sums of two sets of classes; sums of exponentials are relative to the largest logit rounded up."""
    (max_logit, sum_others, *sums), (other_max, other_sum, *other_sums) = one, other
    above = jnp.ceil(max_logit) - jnp.ceil(other_max)
    leads = above >= 0
    scaled = jnp.exp(-jnp.abs(above)) * jnp.where(leads, other_sum, sum_others)
    merged = jnp.where(leads, sum_others, other_sum) + scaled
    return jnp.maximum(max_logit, other_max), merged, *map(jnp.add, sums, other_sums)


def _merge_weighted(one: Results, other: Results) -> Results:
    """As `_merge`, with Σ_j q_j (m − z_j) last, which grows by the weight times the growth of the largest logit."""
    *merged, weighted_gap = _merge(one, other)

    def growth(sums: Results) -> Array:
        return jnp.where(sums[-2] == 0, 0, sums[-2] * (merged[0] - sums[0]))

    return *merged, weighted_gap + growth(one) + growth(other)


def _merge_distribution(one: Results, other: Results) -> Results:
    """As `_merge_weighted`, but the classes with the largest logit are counted, and their weight is separate, last."""
    max_logit = jnp.maximum(one[0], other[0])

    def relative(sums: Results) -> Results:
        own_max, sum_others, count, other_weight, weighted_gap, max_weight = sums
        stays = own_max == max_logit
        weight = other_weight + max_weight
        gap = weighted_gap + jnp.where(weight == 0, 0, weight * (max_logit - own_max))
        joined = sum_others + count * jnp.exp(own_max - jnp.ceil(own_max))
        return (
            own_max,
            jnp.where(stays, sum_others, joined),
            jnp.where(stays, count, 0),
            jnp.where(stays, other_weight, weight),
            gap,
            jnp.where(stays, max_weight, 0),
        )

    return _merge(relative(one), relative(other))
