"""One pass over the logits of some positions, none of which is stored: a TPU's compiler makes it part of the product.

Sums relative to the largest logit take two passes, since that is known only after the first. These are relative to the
largest logit of a sample of the classes, which is known before. If another class is far above it, which is rare, there
is a second attempt, relative to the largest of all.
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
# How far above the sample's largest logit another may be. The sum of e⁴⁰ over all classes leaves room in float32 for
# the factor of a gradient, and the logits of a language model are rarely so far apart.
HIGHEST = 40.0
SECOND_ATTEMPT = "second_attempt"  # the name, in compiled programs, of what is rare


class Pass(NamedTuple):
    """What one pass leaves; all but the exponentials have one number for each position."""

    exponentials: Array  # exp(z_j − reference), in half precision
    reference: Array
    sum_others: Array  # Σ exp(z_j − reference) over all classes but the label, in the dtype to compute in
    label_logit: Array


def one_pass(logits: Callable[[Array], Array], x: Array, sample: Array, label: Array) -> Pass:
    """The exponentials and sums of the logits of features, given those of a sample of the classes."""

    def attempt(x: Array, reference: Array) -> Pass:
        z = logits(x)
        exponentials, here = jnp.exp(z - reference), is_label(z, label, 1)
        sum_others = jnp.sum(jnp.where(here, 0, exponentials), 1, keepdims=True)
        label_logit = jnp.sum(jnp.where(here, z, 0), 1, keepdims=True)
        # Behind the barrier exponentials are stored, not logits to compute them from again.
        return lax.optimization_barrier(Pass(exponentials.astype(x.dtype), reference, sum_others, label_logit))

    def is_low(found: Pass) -> Array:
        # By the sums, since the largest logit would be one more thing for the pass to find.
        above = found.label_logit - found.reference > HIGHEST
        return jnp.any(above | (found.sum_others > math.exp(HIGHEST)))

    def again(found: Pass) -> Pass:
        # XLA would store products that it took for the same, or took out of the loop. A barrier with a result that is
        # not used is none.
        features, reference = lax.optimization_barrier((x, found.reference))
        reference = jnp.maximum(reference, finite_max(logits(features), (1,)))
        return attempt(*lax.optimization_barrier((features, reference)))

    first = attempt(x, finite_max(sample, (1,)))
    with jax.named_scope(SECOND_ATTEMPT):
        return lax.while_loop(is_low, again, first)
