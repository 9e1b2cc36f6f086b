"""Targets of a few classes per position, such as a teacher's top-k: the third form, after labels and distributions."""

import functools
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

from jaxsoft._arrays.checks import as_array, as_floating, as_option, check_values
from jaxsoft._arrays.classes import put, take
from jaxsoft._arrays.dtypes import at_least_int32, is_removed, nan_unless
from jaxsoft._arrays.exports import exportable
from jaxsoft._arrays.sharding import AxisName, all_classes, shard_like_except, sum_shards
from jaxsoft._formula.head import Head, Values, freeze_ignored, scale_gradient
from jaxsoft._formula.statistics import Statistics, block_statistics, scaled_exponentials, weighted
from jaxsoft._formula.targets import Averaging, LogitsType, Options, labels_as_array, position_weights, z_loss_weights
from jaxsoft._jax_internals import Results, Tracer

Outside = Literal["tail", "renormalise", "nothing"]
NONE = -(2**31)  # an index in no block, for padding and repeated classes


@exportable
@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class SparseTargets:
    """Probabilities q of K classes per position, as targets of `cross_entropy` and `linear_cross_entropy`.

    tail:         loss = −Σ_k q_k log p_k − (1 − Σ_k q_k) log(1 − Σ_k p_k)
    renormalise:  loss = −Σ_k q̃_k log p̃_k,  q̃ = q / Σ_k q_k,  p̃ = p / Σ_k p_k
    nothing:      loss = −Σ_k q_k log p_k

    for p = softmax(z). The three differ in what the student learns about the classes outside the K. "tail": together
    they have the remaining probability. "renormalise": nothing. "nothing": they should have as little probability as
    possible, because they lower log p_k. Only "tail" has its minimum where every p_k = q_k. The probability of the
    other classes is a sum over them, never 1 − Σ p, which would round to 0.

    Args:
        indices: the classes, of the logits' shape with K in place of the classes (the last axis for
            `linear_cross_entropy`).
        probs: their probabilities q_k ≥ 0, of the same shape; `exp` of the log-probabilities of `linear_top_k`.
        outside: how to treat all other classes; "renormalize" is the same as "renormalise".

    Edges: a class that occurs twice counts with both probabilities: drop the sampled token if a server returns it in
    addition to the K most likely. An index out of range gives NaN, unless its probability is 0; then it is ignored, so
    pad with −1. A remainder 1 − Σ q within rounding is treated as 0; a larger one costs +inf if every class outside the
    K is masked. With "nothing" probabilities need not sum to one. K = 1 with q = 1 equals a label up to rounding
    (except with "renormalise", where the loss is then 0); K = classes equals a distribution. `checked` refuses a class
    that occurs twice and, except with "nothing", a sum above 1, which probabilities rounded to bfloat16 or to four
    digits may have: divide them by their sum first.

    Differentiation: with respect to logits and probs.

    Raises:
        TypeError: on use, indices that are not integers, probabilities that are not floating.
        ValueError: an unknown `outside`; on use, shapes that do not fit, probabilities below 0 that are not traced, and
            options that do not apply to sparse targets: `ignore_index` (use weights of 0), `class_weights`,
            `label_smoothing`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import SparseTargets, cross_entropy
        >>> logits = jnp.log(jnp.array([0.5, 0.3, 0.1, 0.1]))
        >>> for outside in ("tail", "renormalise", "nothing"):
        ...     targets = SparseTargets(jnp.array([0, 1]), jnp.array([0.5, 0.3]), outside)
        ...     print(outside, f"{cross_entropy(logits, targets):.4f}")
        tail 1.0297
        renormalise 0.6616
        nothing 0.7078

    Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the knowledge in a neural network" (2015) for targets from a
    teacher.
    """

    indices: Int[ArrayLike, "..."]
    probs: Float[ArrayLike, "..."]
    outside: Outside = field(default="tail", metadata={"static": True})

    def __post_init__(self) -> None:
        if self.outside == "renormalize":
            object.__setattr__(self, "outside", "renormalise")
        as_option("outside", self.outside, get_args(Outside))

    @classmethod
    def from_log_probs(
        cls, indices: Int[ArrayLike, "..."], log_probs: Float[ArrayLike, "..."], outside: Outside = "tail"
    ) -> "SparseTargets":
        """Targets from log-probabilities, as servers of language models return them.

        Args:
            indices: the classes, as above.
            log_probs: log q_k of each; −inf where the index is padding.
            outside: as above.

        Returns:
            `SparseTargets` with the probabilities exp(log q_k), in the dtype of the logarithms.

        Raises:
            TypeError: logarithms that are not real numbers.

        Example:
            >>> import jax.numpy as jnp
            >>> from jaxsoft import SparseTargets
            >>> print(SparseTargets.from_log_probs(jnp.array([3, 7]), jnp.log(jnp.array([0.5, 0.25]))).probs)
            [0.5  0.25]
        """
        return cls(indices, jnp.exp(as_floating("log_probs", log_probs)), outside)


class SparseOperands(NamedTuple):
    """Sparse targets of a block: class k has the weight position_weight·target_weights_k."""

    classes: Array  # (…, K) indices within the block, distinct except outside of any block
    target_weights: Array  # (…, K)
    position_weight: Array
    z_loss_weight: Array | None = None

    @property
    def ignored(self) -> Array:
        ignored = self.position_weight == 0
        return ignored if self.z_loss_weight is None else ignored & (self.z_loss_weight == 0)

    weights_differentiable = True
    is_wide = False


def check_sparse(targets: SparseTargets, classes: int, options: Options, ignore_index: int | None) -> SparseTargets:
    """Sparse targets of a public function, as arrays."""
    accepted = {"weights", "where", "z_loss"}
    for name, option in ({"ignore_index": ignore_index} | options._asdict()).items():
        if option is not None and name not in accepted:
            hint = "; use weights" if name == "ignore_index" else ""
            raise ValueError(f"{name}: expected none with SparseTargets{hint}")
    indices, _ = labels_as_array(targets.indices, classes, None, "targets.indices")
    probs = as_array("targets.probs", targets.probs)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"targets.indices: expected integers, got dtype {indices.dtype}")
    if not jnp.issubdtype(probs.dtype, jnp.floating):
        raise TypeError(f"targets.probs: expected floating probabilities, got dtype {probs.dtype}")
    if indices.shape != probs.shape:
        raise ValueError(f"targets.probs: expected the indices' shape {indices.shape}, got {probs.shape}")
    given = targets.probs
    if not isinstance(given, Tracer) and getattr(given, "is_fully_addressable", True):
        least = np.min(np.asarray(given), initial=0)
        if least < 0:
            hint = "for log-probabilities use SparseTargets.from_log_probs(indices, log_probs)"
            raise ValueError(f"targets.probs: expected probabilities of at least 0, got {least:.6g}; {hint}")
    return SparseTargets(indices, probs, targets.outside)


def sparse_operands(
    targets: SparseTargets, logits: LogitsType, options: Options, averaging: Averaging
) -> tuple[SparseOperands, Array | None]:
    """Sparse targets checked against the logits' type, and the denominator of the sum of their losses."""
    axis = logits.axis
    indices, probs = _fitting(targets, logits)
    counted = jnp.expand_dims(position_weights(options.weights, logits), axis)
    ignored = counted == 0
    valid = (probs >= 0) & jnp.isfinite(probs)
    check_values("targets.probs", probs, valid | ignored, "a finite probability of at least 0")
    inside = (indices >= 0) & (indices < logits.classes)
    check_values("targets.indices", indices, inside | (probs == 0) | ignored, f"a class in [0, {logits.classes})")
    q, is_first = _without_repetitions(indices, jnp.where(inside & ~ignored, probs, 0).astype(logits.dtype), axis)
    again = inside & ~is_first & (probs != 0) & ~ignored
    check_values("targets.indices", indices, ~again, "another class than before at the position: drop the second")
    total = jnp.sum(q, axis, keepdims=True)
    if targets.outside != "nothing":
        most = 1 + indices.shape[axis] * float(jnp.finfo(probs.dtype).eps)
        sums = jnp.squeeze(total, axis)
        check_values("sum of targets.probs", sums, ~(sums > most), "at most 1, unless outside='nothing'")
    if targets.outside == "renormalise":
        q = q / jnp.where(total == 0, 1, total)
    wrong = jnp.any(~inside & (probs != 0), axis, keepdims=True) & ~ignored
    denominator = averaging.denominator(counted, weighted=options.weighted)
    return SparseOperands(
        classes=jnp.where(inside & is_first, indices.astype(jnp.int32) - logits.first_class, NONE),
        target_weights=q,
        position_weight=jnp.where(wrong, 0, counted) * nan_unless(~wrong, logits.dtype),
        z_loss_weight=z_loss_weights(options, counted, denominator, averaging),
    ), denominator


def _fitting(targets: SparseTargets, logits: LogitsType) -> tuple[Array, Array]:
    """Indices and probabilities of the logits' shape with K in place of the classes, sharded like the logits."""
    indices, probs, axis = jnp.asarray(targets.indices), jnp.asarray(targets.probs), logits.axis
    shape = indices.shape
    if len(shape) != len(logits.shape) or shape[:axis] + shape[axis + 1 :] != logits.position_shape:
        expected = (*logits.shape[:axis], "K", *logits.shape[axis + 1 :])
        raise ValueError(f"targets.indices: expected shape ({', '.join(map(str, expected))}), got {shape}")
    if shape[axis] == 0:
        raise ValueError(f"targets.indices: expected at least one class per position, got shape {shape}")
    indices, probs = (shard_like_except(array, logits.logits, axis) for array in (at_least_int32(indices), probs))
    return indices, probs


def _without_repetitions(indices: Array, q: Array, axis: int) -> tuple[Array, Array]:
    """The weights with repeated classes merged into their first occurrence, and the mask of first occurrences."""
    # K² comparisons are few compared with the classes.
    same = jnp.expand_dims(indices, axis) == jnp.expand_dims(indices, axis + 1)  # (…, k, l, …)
    summed = jnp.sum(jnp.where(same, jnp.expand_dims(q, axis), 0), axis + 1)
    k, other = (lax.broadcasted_iota(jnp.int32, same.shape, axis + n) for n in range(2))
    is_first = ~jnp.any(same & (other < k), axis + 1)
    return jnp.where(is_first, summed, 0), is_first


class SparseStatistics(NamedTuple):
    """Statistics of two groups of classes, the K chosen and all others, each relative to its own largest logit.

    Relative to one group's largest logit, the other's sum could be 0 or infinite in float32.
    """

    chosen: Statistics  # whose label is the most likely of the K
    others: Statistics
    below: Array  # z_k minus the largest of the K; −inf if index k is in no block
    leads: Array  # True at the most likely of the K
    rest: Array | None  # 1 − Σ_k q_k, the target of all other classes together

    @property
    def nll(self) -> Array:
        """log Σ_l exp(z_l) − z_k of each of the K, over the K alone."""
        return jnp.where(self.leads, self.chosen.nll, self.chosen.log_sum - self.below)

    @property
    def log_odds(self) -> Array:
        """log P/(1 − P), where P is the probability of the K together."""
        chosen, others = self.chosen, self.others
        odds = (chosen.max_logit - others.max_logit) + (chosen.log_sum - others.log_sum)
        return jnp.where(others.exp_sum == 0, jnp.inf, jnp.where(chosen.exp_sum == 0, -jnp.inf, odds))

    @property
    def logsumexp(self) -> Array:
        """log Σ_j exp(z_j) over all classes; 0 where none is left."""
        odds = self.log_odds
        larger = jnp.where(odds >= 0, self.chosen.finite_logsumexp, self.others.finite_logsumexp)
        return larger + jnp.log1p(_smaller_odds(odds))


def _smaller_odds(log_odds: Array) -> Array:
    """The odds or their reciprocal, whichever is at most 1."""
    return jnp.exp(jnp.where(log_odds >= 0, -log_odds, log_odds))


def _nlls(log_odds: Array) -> tuple[Array, Array]:
    """−log P and −log(1 − P), each as accurate as the other."""
    common = jnp.log1p(_smaller_odds(log_odds))
    return common + jnp.where(log_odds >= 0, 0, -log_odds), common + jnp.where(log_odds >= 0, log_odds, 0)


def _probs(log_odds: Array) -> tuple[Array, Array]:
    """P and 1 − P, each as accurate as the other, and their derivatives."""
    smaller = _smaller_odds(log_odds)
    larger, smaller = 1 / (1 + smaller), smaller / (1 + smaller)
    return jnp.where(log_odds >= 0, larger, smaller), jnp.where(log_odds >= 0, smaller, larger)


def sparse_loss(targets: SparseTargets) -> Head:
    """The head of the losses of sparse targets: within the K, and of the K against all others.

    loss = Σ_k q_k (nll_k − log P) − (1 − Σ_k q_k) log(1 − P),  P = Σ_k p_k

    A remainder 1 − Σ_k q_k within the rounding of the probabilities' dtype is treated as 0.
    """
    return _sparse_loss(targets.outside, float(jnp.finfo(jnp.asarray(targets.probs).dtype).eps))


@functools.cache
def _sparse_loss(outside: Outside, rounding: float) -> Head:
    statistics = functools.partial(_statistics, outside=outside, rounding=rounding)
    return Head(statistics, functools.partial(_values, outside=outside), functools.partial(_gradients, outside=outside))


def _statistics(
    logits: Array, axis: int, operands: SparseOperands, axis_name: AxisName, *, outside: Outside, rounding: float
) -> SparseStatistics:
    chosen, below, leads = _statistics_of_chosen(logits, operands, axis, axis_name)
    others = block_statistics(_others(logits, operands, axis), axis, axis_name=axis_name)
    rest = _rest(logits, operands, axis, axis_name, rounding) if outside == "tail" else None
    return SparseStatistics(chosen, others, below, leads, rest)


def _values(operands: SparseOperands, sparse: SparseStatistics, axis: int, *, outside: Outside) -> Values:
    q, each = operands.target_weights, sparse.nll
    nll_chosen, nll_others = _nlls(sparse.log_odds)
    each = each if outside == "renormalise" else each + nll_chosen
    # A class of weight 0 costs 0, even at −inf. The added term is 0; its derivative is a probability's.
    constant = lax.stop_gradient(q)
    cost = weighted(constant, each) + (q - constant) * jnp.where(jnp.isfinite(each), each, 0)
    losses = jnp.sum(cost, axis, keepdims=True)
    if sparse.rest is not None:
        losses += sparse.rest * jnp.where(sparse.rest == 0, 0, nll_others)
    losses = weighted(lax.stop_gradient(operands.position_weight), losses)
    if operands.z_loss_weight is not None:
        losses += weighted(lax.stop_gradient(operands.z_loss_weight), sparse.logsumexp**2)
    return (losses,), ()


def _gradients(
    logits: Array,
    operands: SparseOperands,
    sparse: SparseStatistics,
    axis: int,
    cotangents: Results,
    *,
    in_place: bool,
    outside: Outside,
) -> tuple[Array, Array]:
    renormalised = outside == "renormalise"
    ignored, (logits, operands) = operands.ignored, freeze_ignored(logits, operands)
    cotangent = jnp.where(ignored, 0, cotangents[0])
    scale, q = cotangent * operands.position_weight, operands.target_weights
    chosen, log_odds = sparse.chosen, sparse.log_odds
    leader_weight, rest_weight = (
        scale * jnp.sum(jnp.where(mask, q, 0), axis, keepdims=True) for mask in (sparse.leads, ~sparse.leads)
    )
    p_chosen, p_others = _probs(log_odds)
    # 0 · scale, not 0, because scale is NaN if a target is out of range.
    grad_odds = 0 * scale if renormalised else -(leader_weight + rest_weight) * p_others
    if sparse.rest is not None:
        grad_odds += scale * sparse.rest * p_chosen
    grad_chosen, grad_others = grad_odds, -grad_odds
    if operands.z_loss_weight is not None:
        grad_lse = cotangent * 2 * operands.z_loss_weight * sparse.logsumexp
        grad_chosen, grad_others = grad_chosen + grad_lse * p_chosen, grad_others + grad_lse * p_others
    at_leader = chosen.label_gradient(rest_weight + grad_chosen, leader_weight)
    at_each = (leader_weight + rest_weight + grad_chosen) / chosen.positive_sum * jnp.exp(sparse.below) - scale * q
    at_chosen = jnp.where(ignored, 0, jnp.where(sparse.leads, at_leader, at_each))
    others, statistics = _others(logits, operands, axis), sparse.others
    factor = grad_others / statistics.positive_sum
    grad_logits = scaled_exponentials(others, statistics.max_logit, factor, (axis,), ignored=ignored, in_place=True)
    grad_weights = sparse.nll
    if not renormalised:
        nll_chosen = _nlls(log_odds)[0]
        # With "tail", raising q_k lowers the remainder: −log P + log(1 − P).
        gain = nll_chosen if sparse.rest is None else jnp.where(sparse.rest == 0, nll_chosen, -log_odds)
        grad_weights += gain
    grad_weights = jnp.where(is_removed(sparse.below), 0, grad_weights)
    return put(grad_logits, operands.classes, at_chosen, axis), scale_gradient(
        grad_weights, scale, operands.position_weight == 0
    )


def _statistics_of_chosen(
    logits: Array, operands: SparseOperands, axis: int, axis_name: AxisName
) -> tuple[Statistics, Array, Array]:
    """Statistics of the K alone, each logit minus the largest of the K, and a mask of that largest one."""
    at, exists = take(logits, operands.classes, axis, axis_name)
    at = jnp.where(exists, at, -jnp.inf)
    leader = jnp.argmax(lax.stop_gradient(at), axis, keepdims=True)
    leads = lax.broadcasted_iota(leader.dtype, at.shape, axis % at.ndim) == leader
    at_leader = jnp.sum(jnp.where(leads, at, 0), axis, keepdims=True)
    max_logit = jnp.maximum(lax.stop_gradient(at_leader), jnp.finfo(at.dtype).min)
    below = at - max_logit
    sum_others = jnp.sum(jnp.where(leads, 0, jnp.exp(below)), axis, keepdims=True)
    return Statistics(max_logit, sum_others, at_leader - max_logit), below, leads


def _rest(logits: Array, operands: SparseOperands, axis: int, axis_name: AxisName, rounding: float) -> Array:
    """1 − Σ_k q_k, or 0 if it is within rounding, or if the K are all classes, so that q is a distribution."""
    rest = 1 - jnp.sum(operands.target_weights, axis, keepdims=True)
    rest = jnp.where(rest > max(rounding, 8 * float(jnp.finfo(rest.dtype).eps)), rest, 0)
    block = logits.shape[axis]
    count, classes = operands.classes.shape[axis], all_classes(block, axis_name)
    if all(isinstance(n, int) for n in (count, classes)) and count < classes:
        return rest
    inside = (operands.classes >= 0) & (operands.classes < block)
    different = sum_shards(jnp.sum(inside, axis, keepdims=True), axis_name)
    return jnp.where(different == classes, 0, rest)


def _others(logits: Array, operands: SparseOperands, axis: int) -> Array:
    """The logits without the chosen classes."""
    return put(logits, operands.classes, jnp.asarray(-jnp.inf), axis)
