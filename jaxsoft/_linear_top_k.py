"""The most likely classes of a linear layer whose logits are never all stored."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxsoft._arrays.checks import as_integer
from jaxsoft._arrays.classes import put
from jaxsoft._arrays.dtypes import is_removed
from jaxsoft._arrays.exports import exportable
from jaxsoft._arrays.sharding import AxisName, first_class, sum_shards
from jaxsoft._formula.head import Head, Untargeted, Values, freeze_ignored
from jaxsoft._formula.sparse import Outside, SparseTargets
from jaxsoft._formula.statistics import Statistics, block_statistics, scaled_exponentials
from jaxsoft._formula.targets import Targets
from jaxsoft._jax_internals import Results
from jaxsoft._linear.args import Execution, HeadArgs, Scaling, check_head
from jaxsoft._linear.mesh import BatchAxes
from jaxsoft._linear.run import run_head


@exportable
class TopK(NamedTuple):
    """The k most likely classes of each position, the most likely first."""

    log_probs: Float[Array, "*positions k"]
    """log p of each; −inf if fewer than k classes are not masked."""
    indices: Int[Array, "*positions k"]
    """The classes; for equal logits the lower index comes first."""
    logsumexp: Float[Array, "*positions"]
    """log Σ_j exp(z_j) over all classes."""

    def as_targets(self, outside: Outside = "tail") -> SparseTargets:
        """These classes as targets of `cross_entropy` and `linear_cross_entropy`, for a student."""
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
    """The k most likely classes under softmax(features @ kernel + bias), without storing all logits.

    log p_j = z_j − log Σ_i exp(z_i) for the k largest z_j        vjp: Σ_k g_k (δ_jk − p_j)

    For distillation, store a teacher's top k, and train a student on `top.as_targets()`.

    Args:
        features: inputs of the layer; all other arguments except k are as in `linear_cross_entropy`.
        kernel: weights of the layer.
        k: how many classes, from 1 to all of them.
        bias: of shape (classes,).
        where: booleans of shape (classes,); False masks a class.
        soft_cap: c > 0, which keeps the logits within ±c.
        temperature: T > 0, which divides the logits after the cap.
        kernel_axis: the kernel's class axis.
        memory_budget: bytes that one tile's logits and their gradient may take.
        axis_name: the mesh axis over which the classes are sharded. Each device sends its k candidates, not its logits.
        batch_axes: the mesh axes over which the positions are sharded.

    Returns:
        `TopK`, log-probabilities in float32, or float64 for float64 inputs.

    Edges: the log-probability of the most likely class stays accurate where p rounds to 1. A masked class
    comes last, with −inf and a gradient of 0.

    Differentiation: of log-probabilities and logsumexp, as `linear_log_probs`; indices are constants.

    Raises:
        TypeError, ValueError: as `linear_cross_entropy`; a k that is not between 1 and the number of classes.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import linear_top_k
        >>> top = linear_top_k(jnp.ones((1, 1)), jnp.log(jnp.array([[0.1, 0.6, 0.3]])), 2)
        >>> print(*(f"{p:.4f}" for p in jnp.exp(top.log_probs[0])), top.indices[0])
        0.6000 0.3000 [1 2]

    Source: storing a teacher's largest logits, X. Tan et al., "Multilingual neural machine
    translation with knowledge distillation" (2019).
    """
    execution = Execution(kernel_axis, memory_budget, axis_name, batch_axes)
    args = check_head(features, kernel, bias, where, Scaling(soft_cap, temperature), execution)
    if not 1 <= as_integer("k", k) <= args.classes:
        raise ValueError(f"k: expected an integer from 1 to the {args.classes} classes, got {k}")
    log_probs, lse, indices = run_head(HeadArgs(args.layer), args.config._replace(head=_top_k(int(k))))
    return TopK(log_probs, indices, lse[..., 0])


class TopKStats(NamedTuple):
    """Statistics whose label is the class with the largest logit, and the k largest logits."""

    statistics: Statistics
    logits: Array  # z_k − m
    classes: Array  # among those of all shards
    first_class: Array | int  # of this shard


def _candidates(logits: Array, k: int, axis_name: AxisName) -> tuple[Array, Array]:
    """The k largest logits of all shards, and their classes."""
    # Without the barriers XLA fuses the slices with its own, no longer recognises a top-k, and sorts all classes. One
    # barrier around both results would have the same effect.
    count = min(k, logits.shape[1])
    top, classes = map(lax.optimization_barrier, lax.top_k(logits, count))
    classes = classes.astype(jnp.int32) + first_class(logits.shape[1], axis_name)
    if axis_name is None:
        return top, classes
    shards = lax.axis_size(axis_name)  # whose candidates are concatenated in the order of the classes
    mine = lax.broadcasted_iota(jnp.int32, (1, shards * count), 1) // count == lax.axis_index(axis_name)

    def gather(array: Array) -> Array:  # a sum, whose type says that it is the same on every device
        return sum_shards(jnp.where(mine, jnp.tile(array, (1, shards)), 0), axis_name)

    top, chosen = lax.top_k(gather(top), k)
    return top, jnp.take_along_axis(gather(classes), chosen, 1)


@functools.cache
def _top_k(k: int) -> Head:
    # `copies`: XLA adds a bias to the matmul's result once for the search, and again for the gradient.
    statistics = functools.partial(_statistics, k=k)
    return Head(statistics, _values, _gradients, widths=(k, 1), indices=k, copies=True)


def _statistics(logits: Array, axis: int, operands: Untargeted, axis_name: AxisName, *, k: int) -> TopKStats:
    first = first_class(logits.shape[axis], axis_name)
    top, classes = _candidates(logits, k, axis_name)
    leader = Targets(label=classes[:, :1] - first)
    found = block_statistics(logits, axis, leader, axis_name)
    return TopKStats(found, top.astype(found.max_logit.dtype) - found.max_logit, classes, first)


def _values(operands: Untargeted, top: TopKStats, axis: int) -> Values:
    return (top.logits - top.statistics.log_sum, top.statistics.logsumexp), (top.classes,)


def _gradients(
    logits: Array, operands: Untargeted, top: TopKStats, axis: int, cotangents: Results, *, in_place: bool
) -> tuple[Array, None]:
    ignored, logits = operands.ignored, freeze_ignored(logits, operands)[0]
    statistics, (grad_log_probs, grad_lse) = top.statistics, cotangents
    removed = is_removed(top.logits)
    grad_log_probs = jnp.where(removed, 0, grad_log_probs)
    grad_leader, grad_others = grad_log_probs[:, :1], grad_log_probs[:, 1:]
    mass = grad_lse - jnp.sum(grad_others, axis, keepdims=True)
    factor = (mass - grad_leader) / statistics.positive_sum
    block = top.classes - top.first_class
    grad_logits = scaled_exponentials(
        logits,
        statistics.max_logit,
        factor,
        (axis,),
        ignored=ignored,
        label=block[:, :1],
        at_label=statistics.label_gradient(mass, -grad_leader),
        in_place=in_place,
    )
    if top.classes.shape[1] > 1:
        at_others = factor * jnp.exp(top.logits[:, 1:]) + grad_others
        grad_logits = put(grad_logits, jnp.where(removed[:, 1:], -1, block[:, 1:]), at_others, axis)
    return grad_logits, None
