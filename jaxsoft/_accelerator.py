"""The program of GPUs and TPUs: one reduction over the logits, where the plain formula takes the largest, then a sum.

Two sets of classes are merged by scaling down the sum of that with the smaller largest logit (M. Milakov,
N. Gimelshein, "Online normalizer calculation for softmax", 2018). Relative to the largest logit m, each new largest
would round the sum anew: emulated 3e-5 where logits rise slowly over the 1563 turns of 128 lanes for 200,000 classes,
2e-4 where every exponential is too large by 4u. Here a sum is relative to ⌈m⌉: differences of what is rounded up are
exact, and what was scaled r times has come to weigh e^(1−r) at most.

In whatever order: a class is scaled at most once for each integer between its logit and the largest in the tail, and
once more when the label takes the lead. Under softmax the mean of m − z is at most log n for n classes. So with
u = 2⁻²⁴, exponentials right to ε, and L additions in turn, the tail is right to

    L·u + (log n + 4)·(ε + u)        by the plain formula to L·u + ε + (m − z)·u

Emulated: the largest relative error of the loss, over margins of −60 … 80 and logits that rise, fall, are random or
equal, with NumPy's exponentials (in parentheses: each too large by 4u besides). The plain formula: 2e-6 … 1e-5.

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

from jaxsoft._dtypes import widen
from jaxsoft._jax_internals import Function, Results, manual_axes
from jaxsoft._platform import Axes
from jaxsoft._shards import vary
from jaxsoft._targets import is_label

KERNEL = 1 << 14  # classes up to which XLA makes one kernel of a softmax, which has its row in registers, on an H100
FEW = 1 << 7  # classes below which a GPU's compiler may store what it is to reduce, as along any axis but the last


def tpu_statistics(local: bool, types: Any, axes: Axes) -> Function | None:
    # XLA's own operations need not be local. A TPU has no float64, and XLA does not end imitating it in a merge.
    return None if types[0].dtype == jnp.float64 else _block_sums


def gpu_statistics(local: bool, types: Any, axes: Axes) -> Function | None:
    logits, *targets = types
    sizes = [logits.shape[axis] for axis in axes]
    known = all(isinstance(size, int) for size in sizes)  # a symbol of `jax.export` serves every size
    if not known or axes != tuple(range(-len(axes), 0)):
        return None
    least = FEW if any(target is not None for target in targets) else KERNEL + 1
    return _block_sums if math.prod(sizes) >= least else None


def _block_sums(arrays: tuple[Array, Array | None, Array | None], axes: Axes) -> Results:
    logits, label, spread = arrays
    lowest = float(jnp.finfo(logits.dtype).min)
    z = widen(logits)
    largest = jnp.maximum(z, lowest)
    tail = jnp.exp(z - jnp.ceil(largest))
    sums = [largest, tail]
    if label is not None:
        (axis,) = axes
        sums[1] = jnp.where(is_label(logits, label, axes), 0, tail)
        # In the same pass. A TPU gathers half precision from a copy of all logits in float32.
        index = jnp.clip(label, 0, logits.shape[axis] - 1)
        sums.append(jnp.where(is_label(logits, index, axes), z, 0))
    if spread is not None:
        sums += [jnp.broadcast_to(spread, z.shape), jnp.where(spread == 0, 0, largest - z)]
    sums = vary(tuple(sums), manual_axes(sums))
    units = tuple(jnp.asarray(unit, z.dtype) for unit in (lowest, *(0.0 for _ in sums[1:])))
    summed = lax.reduce(sums, units, _merge_spread if spread is not None else _merge, [axis % z.ndim for axis in axes])
    largest, tail, *rest = (jnp.expand_dims(array, axes) for array in summed)
    # Divided by what its own logit contributed the largest is 1, and no sum in which it takes part is less.
    return largest, tail / jnp.exp(largest - jnp.ceil(largest)), *rest


def _merge(one: Results, other: Results) -> Results:
    """The sums of two sets of classes, those of exponentials relative to the largest logit rounded up."""
    (largest, tail, *sums), (its_largest, its_tail, *its_sums) = one, other
    above = jnp.ceil(largest) - jnp.ceil(its_largest)
    leads = above >= 0
    scaled = jnp.exp(-jnp.abs(above)) * jnp.where(leads, its_tail, tail)
    merged = jnp.where(leads, tail, its_tail) + scaled
    return jnp.maximum(largest, its_largest), merged, *map(jnp.add, sums, its_sums)


def _merge_spread(one: Results, other: Results) -> Results:
    """Also of Σ_j spread_j (m − z_j), the last, which grows by the weight times what the largest logit does."""
    *merged, gap = _merge(one, other)

    def moved(sums: Results) -> Array:
        return jnp.where(sums[-2] == 0, 0, sums[-2] * (merged[0] - sums[0]))

    return *merged, gap + moved(one) + moved(other)
