"""One pass over the logits of a group of positions; none is stored, because a TPU's compiler fuses it with the matmul.

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
from jaxsoft._formula.statistics import finite_max

SAMPLE = 1024  # classes
# How far above the sample's largest logit another logit may be. A language model's logits are rarely further apart, and
# float32 can still hold the product of a sum of e⁴⁰ over all classes with the factor of a gradient.
HIGHEST = 40.0
SECOND_ATTEMPT = "second_attempt"  # its name in compiled programs


class Pass(NamedTuple):
    """The results of one pass; except for the exponentials, one number per position."""

    exponentials: Array | None  # exp(z_j − reference), in half precision, if they are kept for a gradient
    reference: Array
    sum_others: Array  # Σ exp(z_j − reference) over all classes except the label, at least in float32
    label_logit: Array  # z − reference of the label; 0 if another shard has it


def one_pass(logits: Callable[[Array], Array], x: Array, sample: Array, label: Array, *, keep: bool = True) -> Pass:
    """The exponentials and sums of `logits(x)`, given the logits of a sample of the classes."""

    def attempt(x: Array, reference: Array) -> Pass:
        z = logits(x) - reference
        exponentials, here = jnp.exp(z), is_label(z, label, 1)
        sum_others = jnp.sum(jnp.where(here, 0, exponentials), 1, keepdims=True)
        label_logit = jnp.sum(jnp.where(here, z, 0), 1, keepdims=True)
        # Without the barrier XLA would store the logits instead, and compute the exponentials again.
        kept = exponentials.astype(x.dtype) if keep else None
        return lax.optimization_barrier(Pass(kept, reference, sum_others, label_logit))

    def is_low(found: Pass) -> Array:
        # Whether a reference is too low shows in the sums; the largest logit would be one more result of the pass.
        return (found.label_logit > HIGHEST) | (found.sum_others > math.exp(HIGHEST))

    def again(found: Pass) -> Pass:
        # Without the barriers XLA would merge equal matmuls, or move them out of the loop, and store their results. It
        # drops a barrier if one of the results is unused.
        features, reference = lax.optimization_barrier((x, found.reference))
        largest = jnp.maximum(reference, finite_max(logits(features), (1,)))
        reference = jnp.where(is_low(found), largest, reference)  # of each position by itself
        return attempt(*lax.optimization_barrier((features, reference)))

    first = attempt(x, finite_max(sample, (1,)))
    with jax.named_scope(SECOND_ATTEMPT):
        return lax.while_loop(lambda found: jnp.any(is_low(found)), again, first)
