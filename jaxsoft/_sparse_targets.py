"""Targets of a few classes a position, as of a teacher: a third form beside labels and distributions."""

import functools
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

from jaxsoft._checks import as_option, check_values
from jaxsoft._classes import put, take
from jaxsoft._dtypes import compute_dtype, is_removed
from jaxsoft._losses import LOSSES
from jaxsoft._meshes import Names, lay_beside
from jaxsoft._platform import Axes
from jaxsoft._readings import Reading, Values, scale_gradient, taking_part
from jaxsoft._shards import AxisName, all_classes, first_class
from jaxsoft._statistics import Statistics, block_statistics, scaled_exponentials
from jaxsoft._targets import Options, Reduction, Targets, as_targets, count_positions, position_weights, read_targets

Outside = Literal["tail", "renormalise", "nothing"]


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
        outside: what is meant about all other classes.

    Edges: the same class twice counts with both probabilities. A class that is no class gives NaN, but with a
    probability of 0 it is left out, so −1 can pad. Mass that is not left, to rounding, is 0. With "nothing"
    probabilities need not sum to one. K = 1 with q = 1 is the label, bit for bit, but with "renormalise", where
    nothing is left to learn; K = classes is the distribution. Mass that is left where no class is costs +inf.

    Differentiation: to logits and to probs.

    Raises:
        TypeError: on use, indices that are not integers, probabilities that are not floating.
        ValueError: an `outside` that is none of these; on use, shapes that do not fit, and options that have no
            meaning beside it: `ignore_index` (take weights of 0), `class_weights`, `label_smoothing`.

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
        as_option("outside", self.outside, get_args(Outside))


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
    indices, _ = as_targets(targets.indices, classes, None)
    probs = jnp.asarray(targets.probs)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"targets.indices: expected integers, got dtype {indices.dtype}")
    if not jnp.issubdtype(probs.dtype, jnp.floating):
        raise TypeError(f"targets.probs: expected floating probabilities, got dtype {probs.dtype}")
    if indices.shape != probs.shape:
        raise ValueError(f"targets.probs: expected the indices' shape {indices.shape}, got {probs.shape}")
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
    q = jnp.where(is_first, q, 0)
    if targets.outside == "renormalise":
        total = jnp.sum(q, axis, keepdims=True)
        q = q / jnp.where(total == 0, 1, total)
    wrong = jnp.any(~inside & (probs != 0), axis, keepdims=True) & ~idle
    share = jnp.where(wrong, 0, counted) / jnp.where(wrong, 0, 1).astype(dtype)  # 0/0: there is no other way to object
    count, square = count_positions(counted, counted, options, reduction, examples, batch)
    none = jnp.iinfo(jnp.int32).min  # before the first block
    ids = jnp.where(is_first, indices.astype(jnp.int32) - first_class(shape[axis], axis_name), none)
    return Chosen(ids, q, share, square), count


def read_any_targets(
    targets: Array | SparseTargets,
    logits: Array | jax.ShapeDtypeStruct,
    axis: int,
    options: Options,
    *,
    ignore_index: int | None,
    **of_positions: Any,
) -> tuple[Any, Array | None]:
    """As `read_targets`, of targets of any form."""
    if isinstance(targets, SparseTargets):
        return read_sparse_targets(targets, logits, axis, options, **of_positions)
    return read_targets(targets, logits, axis, options, ignore_index=ignore_index, **of_positions)


def losses_of(targets: Array | SparseTargets) -> Reading:
    """What reads the losses of targets of any form."""
    if isinstance(targets, SparseTargets):
        return sparse_losses(targets.outside, float(jnp.finfo(jnp.asarray(targets.probs).dtype).eps))
    return LOSSES


class Sparse(NamedTuple):
    """Statistics of the classes outside of the K, whose label is the one of the K that leads, and of each of these."""

    outside: Statistics
    inner: Statistics  # of what the loss is normalised over
    at: Array  # z_k − the largest of the inner; −inf where there is no k
    leads: Array
    rest: Array | None  # what the targets leave to the classes outside, together


def _without(logits: Array, chosen: Chosen, leads: Array, axis: int) -> Array:
    """The logits without the chosen classes but the one that leads."""
    if chosen.classes.shape[axis] == 1:
        return logits
    return put(logits, jnp.where(leads, -1, chosen.classes), jnp.asarray(-jnp.inf), axis)


@functools.cache
def sparse_losses(outside: Outside, rounding: float) -> Reading:
    """The losses of `SparseTargets`, in the terms of those of labels: the tail of one class widened to that of K.

    Probabilities are right to a rounding, and what they leave is no mass if it is no more.
    """

    def statistics(logits: Array, axes: Axes, chosen: Chosen, axis_name: AxisName) -> Sparse:
        (axis,) = axes
        at, is_there = take(logits, chosen.classes, axis, axis_name)
        at = jnp.where(is_there, at, -jnp.inf)
        lead = jnp.argmax(lax.stop_gradient(at), axis, keepdims=True)
        leads = lax.broadcasted_iota(lead.dtype, at.shape, axis % at.ndim) == lead
        label = jnp.take_along_axis(chosen.classes, lead, axis)
        rest = block_statistics(_without(logits, chosen, leads, axis), axes, Targets(label=label), axis_name)
        of_lead = jnp.sum(jnp.where(leads, at, 0), axis, keepdims=True)
        rest = rest._replace(label=jnp.where(is_removed(of_lead), -jnp.inf, rest.label))

        def around(largest: Array, tail: Array | float, label: Array) -> tuple[Statistics, Array]:
            below = at - largest
            others = jnp.sum(jnp.where(leads, 0, jnp.exp(below)), axis, keepdims=True)
            return Statistics(largest, tail + others, label), below

        if outside == "renormalise":
            largest = jnp.maximum(lax.stop_gradient(of_lead), jnp.finfo(at.dtype).min)
            return Sparse(rest, *around(largest, 0.0, of_lead - largest), leads, None)
        left = None
        if outside == "tail" and chosen.classes.shape[axis] < all_classes(logits.shape[axis], axis_name):
            left = 1 - jnp.sum(chosen.spread, axis, keepdims=True)
            left = jnp.where(left > max(rounding, 8 * float(jnp.finfo(left.dtype).eps)), left, 0)
        return Sparse(rest, *around(rest.largest, rest.tail, rest.label), leads, left)

    def surprises(sparse: Sparse) -> tuple[Array, Array]:
        """lse − z_k of each of the K, and of what lies outside."""
        inner, tail = sparse.inner, sparse.outside.tail
        each = jnp.where(sparse.leads, inner.surprise, inner.log_total - sparse.at)
        return each, inner.log_total - jnp.log(tail)

    def values(chosen: Chosen, sparse: Sparse, axes: Axes) -> Values:
        each, of_rest = surprises(sparse)
        q = chosen.spread
        losses = jnp.sum(q * jnp.where(q == 0, 0, each), axes, keepdims=True)
        if sparse.rest is not None:
            losses += sparse.rest * jnp.where(sparse.rest == 0, 0, of_rest)
        share = lax.stop_gradient(chosen.share)
        losses = jnp.where(share == 0, 0, share * losses)
        if chosen.square is not None:
            square = lax.stop_gradient(chosen.square)
            losses += jnp.where(square == 0, 0, square * full(sparse).finite_logsumexp ** 2)
        return (losses,), ()

    def full(sparse: Sparse) -> Statistics:
        """Of all classes."""
        if outside != "renormalise":
            return sparse.inner
        inner, rest = sparse.inner, sparse.outside
        scale = jnp.exp(inner.largest - rest.largest)
        return rest._replace(tail=rest.tail + jnp.where(inner.tail == 0, 0, inner.tail * scale))

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
        share, q, inner = cotangent * chosen.share, chosen.spread, sparse.inner
        of_lead = jnp.sum(jnp.where(sparse.leads, q, 0), axis, keepdims=True)
        mass = share * (jnp.sum(jnp.where(sparse.leads, 0, q), axis, keepdims=True))
        if sparse.rest is not None:
            mass += share * sparse.rest
        square = jnp.zeros_like(mass)
        if chosen.square is not None:
            square = cotangent * 2 * chosen.square * full(sparse).finite_logsumexp
        if outside != "renormalise":
            mass += square
        hot = share * of_lead
        factor = (mass + hot) / inner.total
        at_lead = (mass * jnp.exp(inner.label) - hot * inner.tail) / inner.total
        at_others = factor * jnp.exp(sparse.at) - share * q
        elsewhere = factor
        if sparse.rest is not None:
            tail = sparse.outside.tail
            elsewhere -= jnp.where(sparse.rest == 0, 0, share * sparse.rest / jnp.where(tail == 0, 1, tail))
        if outside == "renormalise":
            elsewhere = square / full(sparse).total
            at_lead += elsewhere * jnp.exp(sparse.outside.label)
            at_others += elsewhere * jnp.exp(sparse.at + (inner.largest - sparse.outside.largest))
        to_logits = scaled_exponentials(
            _without(logits, chosen, sparse.leads, axis),
            sparse.outside.largest,
            elsewhere,
            axes,
            idle,
            jnp.sum(jnp.where(sparse.leads, chosen.classes, 0), axis, keepdims=True, dtype=jnp.int32),
            at_lead,
            in_place=in_place or chosen.classes.shape[axis] > 1,
        )
        if chosen.classes.shape[axis] > 1:
            others = jnp.where(sparse.leads, -1, chosen.classes)
            to_logits = put(to_logits, others, jnp.where(idle, 0, at_others), axis)
        each, of_rest = surprises(sparse)
        if sparse.rest is not None:
            each -= jnp.where(sparse.rest == 0, 0, of_rest)
        each = jnp.where(is_removed(sparse.at), 0, each)
        return to_logits, scale_gradient(each, share, chosen.share == 0)

    return Reading(statistics, values, gradients)
