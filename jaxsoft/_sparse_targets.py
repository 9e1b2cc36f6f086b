"""Targets of a few classes a position, as of a teacher: a third form beside labels and distributions."""

import functools
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

from jaxsoft._checks import as_array, as_floating, as_option, check_values
from jaxsoft._classes import put, take
from jaxsoft._dtypes import compute_dtype, is_removed
from jaxsoft._jax_internals import Tracer
from jaxsoft._losses import LOSSES
from jaxsoft._meshes import Names, lay_beside
from jaxsoft._platform import Axes
from jaxsoft._readings import Reading, Values, scale_gradient, taking_part
from jaxsoft._shards import AxisName, all_classes, first_class, sum_shards
from jaxsoft._statistics import Statistics, block_statistics, scaled_exponentials
from jaxsoft._targets import Options, Reduction, as_targets, count_positions, position_weights, read_targets

Outside = Literal["tail", "renormalise", "nothing"]
NONE = -(2**31)  # the index of what is no class, or again one of before: it is in no block


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class SparseTargets:
    """Probabilities q of K classes a position, as targets of `cross_entropy` and `linear_cross_entropy`.

    tail:         loss = −Σ_k q_k log p_k − (1 − Σ_k q_k) log(1 − Σ_k p_k)
    renormalise:  loss = −Σ_k q̃_k log p̃_k,  q̃ = q / Σ_k q_k,  p̃ = p / Σ_k p_k
    nothing:      loss = −Σ_k q_k log p_k

    for p = softmax(z). What is said of the classes outside of the K differs, and with it what is learnt of them: that
    they have the rest of the probability together, in whatever shares; nothing, not even how much they have together;
    or, since log p_k counts them, that they have as little as can be. Only "tail" has its least where every p_k = q_k.
    The sum over the classes outside is taken over them, never as 1 − Σ p, which rounds to 0.

    Args:
        indices: the classes, of the logits' shape but for K in the place of the classes (the last axis for
            `linear_cross_entropy`).
        probs: their probabilities q_k ≥ 0, of the same shape; `exp` of what `linear_top_k` returns.
        outside: what is meant about all other classes; "renormalize" is "renormalise".

    Edges: the same class twice counts with both probabilities. Servers that return the sampled token beside the K most
    probable ones return it twice: drop the second. A class that is no class gives NaN, but with a probability of 0 it
    is left out, so −1 can pad. Mass that is not left, to rounding, is 0. With "nothing" probabilities need not sum to
    one. K = 1 with q = 1 is the label, to rounding, but with "renormalise", where nothing is left to learn;
    K = classes is the distribution. Mass that is left where no class is costs +inf. `checked` refuses a class that
    comes twice, and but with "nothing" a sum above 1: a teacher's probabilities that were rounded to bfloat16 or to
    four digits sum to 1.003 at times, where K = 64 classes have nearly all mass. Divide them by their sum before.

    Differentiation: to logits and to probs.

    Raises:
        TypeError: on use, indices that are not integers, probabilities that are not floating.
        ValueError: an `outside` that is none of these; on use, shapes that do not fit, probabilities below 0 that are
            not traced, and options that have no meaning beside it: `ignore_index` (take weights of 0),
            `class_weights`, `label_smoothing`.

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
        """The targets whose probabilities are given as logarithms, as servers of language models return them.

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


class Chosen(NamedTuple):
    """Sparse targets of a block: share·spread_k is the weight of class k, and what is square that of lse²."""

    classes: Array  # (…, K) indices within the block, different ones but for those outside of any block
    spread: Array  # (…, K)
    share: Array
    square: Array | None = None

    @property
    def idle(self) -> Array:
        return self.share == 0 if self.square is None else (self.share == 0) & (self.square == 0)

    spread_moves = True
    is_wide = False


def as_any_targets(
    targets: ArrayLike | SparseTargets, classes: int, options: Options, ignore_index: int | None
) -> tuple[Array | SparseTargets, int | None]:
    """The targets of a public function as arrays, and what to ignore among labels."""
    if isinstance(targets, tuple) and hasattr(targets, "as_targets"):
        raise TypeError("targets: expected an array or SparseTargets, got TopK: pass targets.as_targets()")
    if not isinstance(targets, SparseTargets):
        return as_targets(targets, classes, ignore_index)
    for name, option in (
        ("ignore_index", ignore_index),
        ("class_weights", options.class_weights),
        ("label_smoothing", options.label_smoothing),
    ):
        if option is not None:
            hint = "; use weights" if name == "ignore_index" else ""
            raise ValueError(f"{name}: expected none with SparseTargets{hint}")
    indices, _ = as_targets(targets.indices, classes, None, "targets.indices")
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
            hint = "of log-probabilities make SparseTargets.from_log_probs(indices, log_probs)"
            raise ValueError(f"targets.probs: expected probabilities of at least 0, got {least:.6g}; {hint}")
    return SparseTargets(indices, probs, targets.outside), None


def read_sparse_targets(
    targets: SparseTargets,
    logits: Array | jax.ShapeDtypeStruct,
    axis: int,
    options: Options,
    *,
    reduction: Reduction,
    axis_name: AxisName = None,
    examples: int = 0,
    batch: Names = (),
) -> tuple[Chosen, Array | None]:
    """As `read_targets`."""
    indices, probs, shape = jnp.asarray(targets.indices), jnp.asarray(targets.probs), logits.shape
    dtype = compute_dtype(logits.dtype)
    expected = (*shape[:axis], "K", *shape[axis + 1 :])
    if indices.ndim != len(shape) or any(n != e for n, e in zip(indices.shape, expected, strict=True) if e != "K"):
        raise ValueError(f"targets.indices: expected shape ({', '.join(map(str, expected))}), got {indices.shape}")
    if indices.shape[axis] == 0:
        raise ValueError(f"targets.indices: expected at least one class a position, got shape {indices.shape}")
    if indices.dtype.itemsize < 4:  # int8 cannot hold the number of classes to compare with
        indices = indices.astype(jnp.int32)
    counted = jnp.expand_dims(position_weights(options.weights, logits, axis), axis)
    indices, probs = lay_beside(indices, logits, axis), lay_beside(probs, logits, axis)
    classes, idle = all_classes(shape[axis], axis_name), counted == 0
    valid = (probs >= 0) & jnp.isfinite(probs)
    check_values("targets.probs", probs, valid | idle, "a finite probability of at least 0")
    inside = (indices >= 0) & (indices < classes)
    check_values("targets.indices", indices, inside | (probs == 0) | idle, f"a class in [0, {classes})")
    q = jnp.where(inside & ~idle, probs, 0).astype(dtype)
    # The same class twice is its first with both weights: K² comparisons, few beside the classes.
    same = jnp.expand_dims(indices, axis) == jnp.expand_dims(indices, axis + 1)  # (…, k, l, …)
    q = jnp.sum(jnp.where(same, jnp.expand_dims(q, axis), 0), axis + 1)
    order = [lax.broadcasted_iota(jnp.int32, same.shape, axis + n) for n in range(2)]
    is_first = ~jnp.any(same & (order[1] < order[0]), axis + 1) & inside
    again = inside & ~is_first & (probs != 0) & ~idle
    check_values("targets.indices", indices, ~again, "another class than before at the position: drop the second")
    q = jnp.where(is_first, q, 0)
    total = jnp.sum(q, axis, keepdims=True)
    if targets.outside != "nothing":
        most = 1 + indices.shape[axis] * float(jnp.finfo(probs.dtype).eps)
        sums = jnp.squeeze(total, axis)
        check_values("sum of targets.probs", sums, ~(sums > most), "at most 1, unless outside='nothing'")
    if targets.outside == "renormalise":
        q = q / jnp.where(total == 0, 1, total)
    wrong = jnp.any(~inside & (probs != 0), axis, keepdims=True) & ~idle
    share = jnp.where(wrong, 0, counted) / jnp.where(wrong, 0, 1).astype(dtype)  # 0/0: there is no other way to object
    count, square = count_positions(counted, counted, options, reduction, examples, batch)
    ids = jnp.where(is_first, indices.astype(jnp.int32) - first_class(shape[axis], axis_name), NONE)
    return Chosen(ids, q, share, square), count


def read_any_targets(
    targets: Array | SparseTargets,
    logits: Array | jax.ShapeDtypeStruct,
    axis: int,
    options: Options,
    *,
    ignore_index: int | None,
    name: str = "targets",
    **of_positions: Any,
) -> tuple[Any, Array | None]:
    """As `read_targets`, of targets of any form."""
    if isinstance(targets, SparseTargets):
        return read_sparse_targets(targets, logits, axis, options, **of_positions)
    return read_targets(targets, logits, axis, options, ignore_index=ignore_index, name=name, **of_positions)


def losses_of(targets: Array | SparseTargets) -> Reading:
    """What reads the losses of targets of any form."""
    if isinstance(targets, SparseTargets):
        return sparse_losses(targets.outside, float(jnp.finfo(jnp.asarray(targets.probs).dtype).eps))
    return LOSSES


class Sparse(NamedTuple):
    """Statistics of two groups of classes, the K chosen and all others, each relative to its own largest logit.

    In one group's terms the other's sum may be 0 or infinite in float32, however little the loss is.
    """

    chosen: Statistics  # whose label is the class of the K that leads
    others: Statistics
    below: Array  # z_k − the largest of the K; −inf where there is no k
    leads: Array  # which of the K it is that leads
    rest: Array | None  # what the targets leave to the others together

    @property
    def surprise(self) -> Array:
        """log Σ_l exp(z_l) − z_k of each of the K, over the K alone."""
        return jnp.where(self.leads, self.chosen.surprise, self.chosen.log_total - self.below)

    @property
    def log_odds(self) -> Array:
        """log P/(1 − P), where P is the probability of the K together."""
        chosen, others = self.chosen, self.others
        odds = (chosen.largest - others.largest) + (chosen.log_total - others.log_total)
        return jnp.where(others.exp_sum == 0, jnp.inf, jnp.where(chosen.exp_sum == 0, -jnp.inf, odds))

    @property
    def logsumexp(self) -> Array:
        """That of all classes; 0 where none is left."""
        odds = self.log_odds
        larger = jnp.where(odds >= 0, self.chosen.finite_logsumexp, self.others.finite_logsumexp)
        return larger + jnp.log1p(_smaller_odds(odds))


def _smaller_odds(log_odds: Array) -> Array:
    """The odds or their reciprocal, whichever is at most 1."""
    return jnp.exp(jnp.where(log_odds >= 0, -log_odds, log_odds))


def _surprises(log_odds: Array) -> tuple[Array, Array]:
    """−log P and −log(1 − P), each with its digits."""
    common = jnp.log1p(_smaller_odds(log_odds))
    return common + jnp.where(log_odds >= 0, 0, -log_odds), common + jnp.where(log_odds >= 0, log_odds, 0)


def _probs(log_odds: Array) -> tuple[Array, Array]:
    """P and 1 − P, each with its digits, and those of its derivative."""
    smaller = _smaller_odds(log_odds)
    larger, smaller = 1 / (1 + smaller), smaller / (1 + smaller)
    return jnp.where(log_odds >= 0, larger, smaller), jnp.where(log_odds >= 0, smaller, larger)


@functools.cache
def sparse_losses(outside: Outside, rounding: float) -> Reading:
    """The losses of `SparseTargets`: those within the K, and that of the K against all others.

    loss = Σ_k q_k (surprise_k − log P) − (1 − Σ_k q_k) log(1 − P),  P = Σ_k p_k

    Probabilities are right to a rounding, and what they leave is no mass if it is no more.
    """
    within_alone = outside == "renormalise"

    def statistics(logits: Array, axes: Axes, chosen: Chosen, axis_name: AxisName) -> Sparse:
        (axis,) = axes
        at, is_there = take(logits, chosen.classes, axis, axis_name)
        at = jnp.where(is_there, at, -jnp.inf)
        lead = jnp.argmax(lax.stop_gradient(at), axis, keepdims=True)
        leads = lax.broadcasted_iota(lead.dtype, at.shape, axis % at.ndim) == lead
        of_lead = jnp.sum(jnp.where(leads, at, 0), axis, keepdims=True)
        largest = jnp.maximum(lax.stop_gradient(of_lead), jnp.finfo(at.dtype).min)
        below = at - largest
        tail = jnp.sum(jnp.where(leads, 0, jnp.exp(below)), axis, keepdims=True)
        others = block_statistics(_others(logits, chosen, axis), axes, axis_name=axis_name)
        rest = None
        if outside == "tail":
            rest = 1 - jnp.sum(chosen.spread, axis, keepdims=True)
            rest = jnp.where(rest > max(rounding, 8 * float(jnp.finfo(rest.dtype).eps)), rest, 0)
            count, classes = chosen.classes.shape[axis], all_classes(logits.shape[axis], axis_name)
            if not all(isinstance(n, int) for n in (count, classes)) or count >= classes:
                inside = (chosen.classes >= 0) & (chosen.classes < logits.shape[axis])
                different = sum_shards(jnp.sum(inside, axis, keepdims=True), axis_name)
                rest = jnp.where(different == classes, 0, rest)  # then there is no other class, and q is a distribution
        return Sparse(Statistics(largest, tail, of_lead - largest), others, below, leads, rest)

    def values(chosen: Chosen, sparse: Sparse, axes: Axes) -> Values:
        q, each = chosen.spread, sparse.surprise
        of_chosen, of_others = _surprises(sparse.log_odds)
        each = each if within_alone else each + of_chosen
        # A class without weight costs nothing, at −inf too. What is added is 0 and has the derivative to a probability.
        held = lax.stop_gradient(q)
        cost = held * jnp.where(q == 0, 0, each) + (q - held) * jnp.where(jnp.isfinite(each), each, 0)
        losses = jnp.sum(cost, axes, keepdims=True)
        if sparse.rest is not None:
            losses += sparse.rest * jnp.where(sparse.rest == 0, 0, of_others)
        share = lax.stop_gradient(chosen.share)
        losses = jnp.where(share == 0, 0, share * losses)
        if chosen.square is not None:
            square = lax.stop_gradient(chosen.square)
            losses += jnp.where(square == 0, 0, square * sparse.logsumexp**2)
        return (losses,), ()

    def gradients(
        logits: Array,
        chosen: Chosen,
        sparse: Sparse,
        axes: Axes,
        cotangents: tuple[Array],
        *,
        in_place: bool = False,
    ) -> tuple[Array, Array]:
        (axis,) = axes
        idle, (logits, chosen) = chosen.idle, taking_part(logits, chosen)
        cotangent = jnp.where(idle, 0, cotangents[0])
        share, q, log_odds = cotangent * chosen.share, chosen.spread, sparse.log_odds
        of_lead, beside_lead = (
            share * jnp.sum(jnp.where(mask, q, 0), axis, keepdims=True) for mask in (sparse.leads, ~sparse.leads)
        )
        together, alone = _probs(log_odds)
        to_odds = 0 * share if within_alone else -(of_lead + beside_lead) * alone  # NaN beside a class that is none
        if sparse.rest is not None:
            to_odds += share * sparse.rest * together
        to_chosen, to_others = to_odds, -to_odds
        if chosen.square is not None:
            to_lse = cotangent * 2 * chosen.square * sparse.logsumexp
            to_chosen, to_others = to_chosen + to_lse * together, to_others + to_lse * alone
        statistics = sparse.chosen
        # At the class that leads Q·p − q is never formed by subtracting from one: see `block_gradients`.
        at_lead = ((beside_lead + to_chosen) * jnp.exp(statistics.label) - of_lead * statistics.tail) / statistics.total
        at_each = (of_lead + beside_lead + to_chosen) / statistics.total * jnp.exp(sparse.below) - share * q
        at_chosen = jnp.where(idle, 0, jnp.where(sparse.leads, at_lead, at_each))
        others, of_others = _others(logits, chosen, axis), sparse.others
        to_logits = scaled_exponentials(
            others, of_others.largest, to_others / of_others.total, axes, idle, in_place=True
        )
        to_logits = put(to_logits, chosen.classes, at_chosen, axis)
        to_probs = sparse.surprise
        if not within_alone:
            surprise, _ = _surprises(log_odds)
            # What one of the K gains "tail" takes from the others: −log P + log(1 − P).
            to_probs += surprise if sparse.rest is None else jnp.where(sparse.rest == 0, surprise, -log_odds)
        to_probs = jnp.where(is_removed(sparse.below), 0, to_probs)
        return to_logits, scale_gradient(to_probs, share, chosen.share == 0)

    return Reading(statistics, values, gradients)


def _others(logits: Array, chosen: Chosen, axis: int) -> Array:
    """The logits without the chosen classes."""
    return put(logits, chosen.classes, jnp.asarray(-jnp.inf), axis)
