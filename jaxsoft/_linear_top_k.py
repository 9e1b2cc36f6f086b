"""The most probable classes of a linear layer whose logits are never all stored."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxsoft._checks import as_integer
from jaxsoft._classes import put
from jaxsoft._dtypes import is_removed
from jaxsoft._heads import Inputs, as_head, read_positions
from jaxsoft._meshes import BatchAxes
from jaxsoft._platform import Axes
from jaxsoft._readings import Positions, Reading, Values, taking_part
from jaxsoft._shards import AxisName, first_class, sum_shards
from jaxsoft._sparse_targets import Outside, SparseTargets
from jaxsoft._statistics import Statistics, block_statistics, scaled_exponentials
from jaxsoft._targets import Targets


class TopK(NamedTuple):
    """The k most probable classes of each position, the most probable first."""

    log_probs: Float[Array, "*positions k"]
    """log p of each, −inf where fewer than k classes are left."""
    indices: Int[Array, "*positions k"]
    """The classes; of equal logits the lower index comes first."""
    logsumexp: Float[Array, "*positions"]
    """log Σ_j exp(z_j) over all classes."""

    def as_targets(self, outside: Outside = "tail") -> SparseTargets:
        """What a student is to learn of it, as targets of `cross_entropy` and `linear_cross_entropy`."""
        return SparseTargets.from_log_probs(self.indices, self.log_probs, outside)


def linear_top_k(
    features: Float[ArrayLike, "*positions features"],
    kernel: Float[ArrayLike, "features classes"],
    k: int,
    bias: Float[ArrayLike, " classes"] | None = None,
    *,
    where: Bool[ArrayLike, " classes"] | None = None,
    soft_cap: Float[ArrayLike, ""] | None = None,
    temperature: Float[ArrayLike, ""] = 1.0,
    kernel_axis: int = -1,
    memory_budget: int | None = None,
    axis_name: AxisName = None,
    batch_axes: BatchAxes = None,
) -> TopK:
    """The k most probable classes under softmax(features @ kernel + bias), without storing all logits.

    log p_j = z_j − log Σ_i exp(z_i) for the k largest z_j        vjp: Σ_k g_k (δ_jk − p_j)

    What is stored of a teacher; a student's targets are `top.as_targets()`.

    Args:
        features: inputs of the layer, and all other arguments but k, as in `linear_cross_entropy`.
        kernel: weights of the layer.
        k: how many classes, from 1 to all of them.
        bias: of shape (classes,).
        where: booleans of shape (classes,); False removes a class.
        soft_cap: c > 0, which keeps the logits within ±c.
        temperature: T > 0, which divides the logits after the cap.
        kernel_axis: the kernel's class axis.
        memory_budget: bytes that one tile's logits and their gradient may take.
        axis_name: the mesh axis over which the classes are laid. Each device sends its own k candidates, no logits.
        batch_axes: the mesh axes over which the positions are laid.

    Returns:
        `TopK`, log-probabilities in float32, or float64 for float64 inputs.

    Edges: the log-probability of a leading class has its digits where p has rounded to 1. A class that is removed
    comes last, with −inf and no gradient.

    Differentiation: log-probabilities and logsumexp, as `linear_log_probs`; indices are constants.

    Raises:
        TypeError, ValueError: as `linear_cross_entropy`; a k that is not from 1 to the number of classes.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import linear_top_k
        >>> top = linear_top_k(jnp.ones((1, 1)), jnp.log(jnp.array([[0.1, 0.6, 0.3]])), 2)
        >>> print(*(f"{p:.4f}" for p in jnp.exp(top.log_probs[0])), top.indices[0])
        0.6000 0.3000 [1 2]

    Source: a teacher's largest logits as what is stored of it, X. Tan et al., "Multilingual neural machine
    translation with knowledge distillation" (2019).
    """
    head = as_head(
        features, kernel, bias, where, soft_cap, temperature, kernel_axis, memory_budget, axis_name, batch_axes
    )
    if not 1 <= as_integer("k", k) <= head.classes:
        raise ValueError(f"k: expected an integer from 1 to the {head.classes} classes, got {k}")
    log_probs, lse, indices = read_positions(Inputs(head.layer), head.static._replace(reading=_largest(int(k))))
    return TopK(log_probs, indices, lse[..., 0])


class Largest(NamedTuple):
    """Statistics whose label is the class with the largest logit, and the k largest logits."""

    statistics: Statistics
    at: Array  # z_k − m
    classes: Array  # among those of all shards
    first: Array | int  # of these the first of this one


@functools.cache
def _largest(k: int) -> Reading:
    def statistics(logits: Array, axes: Axes, positions: Positions, axis_name: AxisName) -> Largest:
        (axis,) = axes
        # Or XLA merges slices of the results with its own, takes them no longer for a top-k, and sorts all classes.
        count = min(k, logits.shape[axis])
        top, classes = map(lax.optimization_barrier, lax.top_k(logits, count))  # one by one: a barrier of both ends it
        first = first_class(logits.shape[axis], axis_name)
        classes = classes.astype(jnp.int32) + first
        if axis_name is not None:  # the blocks' candidates side by side, in the order of the classes
            shards = lax.axis_size(axis_name)
            mine = lax.broadcasted_iota(jnp.int32, (1, shards * count), 1) // count == lax.axis_index(axis_name)

            def gather(array: Array) -> Array:  # as a sum, which is the same on every device
                return sum_shards(jnp.where(mine, jnp.tile(array, (1, shards)), 0), axis_name)

            top, chosen = lax.top_k(gather(top), k)
            classes = jnp.take_along_axis(gather(classes), chosen, 1)
        lead = Targets(label=lax.slice_in_dim(classes, 0, 1, axis=1) - first)
        found = block_statistics(logits, axes, lead, axis_name)
        return Largest(found, top.astype(found.largest.dtype) - found.largest, classes, first)

    def values(positions: Positions, found: Largest, axes: Axes) -> Values:
        log_probs = found.at - found.statistics.log_total
        return (log_probs, found.statistics.logsumexp), (found.classes,)

    def gradients(
        logits: Array,
        positions: Positions,
        found: Largest,
        axes: Axes,
        cotangents: tuple[Array, Array],
        *,
        in_place: bool = False,
    ) -> tuple[Array, None]:
        (axis,), s = axes, found.statistics
        idle, (logits, _) = positions.idle, taking_part(logits, positions)
        g, to_lse = cotangents
        removed = is_removed(found.at)
        g = jnp.where(removed, 0, g)
        first, others = g[:, :1], g[:, 1:]
        mass = to_lse - jnp.sum(others, axis, keepdims=True)
        factor = (mass - first) / s.total
        at_lead = (mass * jnp.exp(s.label) + first * s.tail) / s.total
        block = found.classes - found.first
        to_logits = scaled_exponentials(logits, s.largest, factor, axes, idle, block[:, :1], at_lead, in_place=in_place)
        if k > 1:
            at_others = factor * jnp.exp(found.at[:, 1:]) + others
            to_logits = put(to_logits, jnp.where(removed[:, 1:], -1, block[:, 1:]), at_others, axis)
        return to_logits, None

    def blank(positions: int, dtype: Any) -> Values:
        moving = jnp.zeros((positions, k), dtype), jnp.zeros((positions, 1), dtype)
        return moving, (jnp.full((positions, k), -1, jnp.int32),)

    # XLA adds a bias to the products once for the search, and once more where the gradient is put.
    return Reading(statistics, values, gradients, blank, copies=True)
