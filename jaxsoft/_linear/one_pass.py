"""One pass over the logits of a tile. A TPU's compiler fuses this pass with the matmul and stores no logits.

Sums relative to a position's largest logit take two passes, because it is known only after the first. Here they are
relative to the largest logit of a sample of the classes, which is known before. If another logit is far above it, which
is rare, a second attempt is relative to the largest of all.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._arrays.classes import is_label
from jaxsoft._formula.statistics import Statistics, finite_max

SAMPLE = 1024  # classes
# How far above the sample's largest logit another logit may be. A language model's logits are rarely further apart, and
# float32 can still hold the product of a sum of e⁴⁰ over all classes with the factor of a gradient.
HIGHEST = 40.0
SECOND_ATTEMPT = "second_attempt"  # its name in compiled programs


class Pass(NamedTuple):
    """The results of one pass over a tile's logits."""

    terms: Array | None  # exp(z_j − reference)·∂z_j/∂product_j in half precision, if they are kept for a gradient
    statistics: Statistics  # relative to the reference
    label_slope: Array | None  # ∂z_j/∂product_j of the label, if it is not 1; 0 if another shard has the label


def one_pass(
    logits: Callable[[Array], tuple[Array, Array | None]],
    x: Array,
    sample: Array,
    label: Array,
    target_weights: Array | None = None,
    *,
    keep: bool = True,
) -> Pass:
    """The terms and sums of `logits(x)`, which are logits and slopes, given the logits of a sample of the classes."""

    def attempt(x: Array, reference: Array) -> Pass:
        z, slope = logits(x)
        z -= reference
        here = is_label(z, label, 1)

        def total(terms: Array) -> Array:
            return jnp.sum(terms, 1, keepdims=True)

        exponentials, q = jnp.exp(z), target_weights
        statistics = Statistics(reference, total(jnp.where(here, 0, exponentials)), total(jnp.where(here, z, 0)))
        if q is not None:
            gap = total(jnp.where(q == 0, 0, -q * z))
            statistics = statistics._replace(weight_sum=jnp.broadcast_to(total(q), gap.shape), weighted_gap=gap)
        terms = exponentials if slope is None else exponentials * slope
        label_slope = None if slope is None else total(jnp.where(here, slope, 0))
        # Without the barrier XLA would store the logits instead, and compute the exponentials again.
        return lax.optimization_barrier(Pass(terms.astype(x.dtype) if keep else None, statistics, label_slope))

    def is_low(found: Pass) -> Array:
        # Whether a reference is too low shows in the sums; the largest logit would be one more result of the pass.
        sums = found.statistics
        return (sums.label_logit > HIGHEST) | (sums.sum_others > math.exp(HIGHEST))

    def again(found: Pass) -> Pass:
        # Without the barriers XLA would merge equal matmuls and store their results. It drops a barrier if one of the
        # results is unused.
        features, reference = lax.optimization_barrier((x, found.statistics.max_logit))
        largest = jnp.maximum(reference, finite_max(logits(features)[0], (1,)))
        reference = jnp.where(is_low(found), largest, reference)  # of each position by itself
        return attempt(*lax.optimization_barrier((features, reference)))

    first = attempt(x, finite_max(sample, (1,)))
    with jax.named_scope(SECOND_ATTEMPT):
        return lax.cond(jnp.any(is_low(first)), again, lambda found: found, first)
