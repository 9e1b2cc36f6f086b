"""Log-probabilities of a linear layer whose logits are never all stored, and what trainers log beside a loss."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxsoft._classes import take
from jaxsoft._entropy import entropy_gradients
from jaxsoft._heads import Inputs, as_head, read_positions
from jaxsoft._meshes import BatchAxes
from jaxsoft._moments import Moments, block_moments
from jaxsoft._platform import Axes
from jaxsoft._readings import Reading, Values, taking_part
from jaxsoft._shards import AxisName, first_class, sum_shards
from jaxsoft._sparse_targets import SparseTargets
from jaxsoft._statistics import Statistics, scaled_exponentials
from jaxsoft._targets import Targets, as_targets


class LogProbs(NamedTuple):
    """What is known of softmax(logits) at each position; 0, and of the argmax −1, at one that takes no part.

    Such are ignored, or of weight 0; beside a loss also those whose label is of a class of weight 0.
    """

    label: Float[Array, "*positions"] | None
    """log p of the label; None where there are no labels."""
    logsumexp: Float[Array, "*positions"]
    """log Σ_j exp(z_j)."""
    argmax: Int[Array, "*positions"]
    """The class with the largest logit, the first of several; −1 where no class is left or a logit is NaN."""
    entropy: Float[Array, "*positions"] | None
    """−Σ_j p_j log p_j; None where it was not asked for."""


def linear_log_probs(
    features: Float[ArrayLike, "*positions features"],
    kernel: Float[ArrayLike, "features classes"],
    labels: Int[ArrayLike, "*positions"],
    bias: Float[ArrayLike, " classes"] | None = None,
    *,
    ignore_index: int | None = None,
    where: Bool[ArrayLike, " classes"] | None = None,
    soft_cap: Float[ArrayLike, ""] | None = None,
    temperature: Float[ArrayLike, ""] = 1.0,
    entropy: bool = False,
    kernel_axis: int = -1,
    memory_budget: int | None = None,
    axis_name: AxisName = None,
    batch_axes: BatchAxes = None,
) -> LogProbs:
    """Log-probabilities of labels under softmax(features @ kernel + bias), without storing all logits.

    z = c·tanh((x·W + b)/c)/T;  label = z_y − lse,  lse = log Σ_j exp(z_j),  entropy = −Σ_j p_j log p_j

    What losses of sequences are made of (policy gradients, preferences, distillation): each position's numbers, each
    with a cotangent of its own. They are exact in the tail: a label's log-probability is never above 0, and that of a
    label which leads by 40 has its digits, as has the entropy there.

    Args:
        features: inputs of the layer, and its other arguments, as in `linear_cross_entropy`.
        kernel: weights of the layer.
        labels: integers in [0, classes), of the features' shape without their last axis.
        bias: of shape (classes,).
        ignore_index: label of the positions that take no part, nor any time.
        where: booleans of shape (classes,); False removes a class.
        soft_cap: c > 0, which keeps the logits within ±c.
        temperature: T > 0, which divides the logits after the cap, once: all results are those of the quotients.
        entropy: whether the entropy is wanted.
        kernel_axis: the kernel's class axis.
        memory_budget: bytes that one tile's logits and their gradient may take.
        axis_name: the mesh axis over which the classes are laid.
        batch_axes: the mesh axes over which the positions are laid.

    Returns:
        `LogProbs` in float32, or float64 for float64 inputs, of the labels' shape.

    Edges: a label out of range has a log-probability and gradients of NaN (`checked` raises instead); a removed one
    has −inf. Ignored positions have 0, no gradient, and an argmax of −1.

    Differentiation: label, logsumexp and entropy, to features, kernel and bias, in reverse mode to any order and
    forward over reverse. The logits are computed again in the backward pass: four matrix products in all.

    Raises:
        TypeError, ValueError: as `linear_cross_entropy`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxsoft import linear_log_probs
        >>> x, w = jnp.linspace(-1, 1, 6).reshape(3, 2), jnp.linspace(-2, 1, 8).reshape(2, 4)
        >>> found = linear_log_probs(x, w, jnp.array([0, 3, 1]), entropy=True)
        >>> for label, best, entropy in zip(found.label, found.argmax, found.entropy):
        ...     print(f"{label:.4f} {best} {entropy:.4f}")
        -0.6341 0 1.1414
        -1.3863 2 1.3863
        -2.0055 3 1.1414

    Source: R. J. Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement
    learning" (1992) for what they are differentiated for.
    """
    head = as_head(
        features, kernel, bias, where, soft_cap, temperature, kernel_axis, memory_budget, axis_name, batch_axes
    )
    if isinstance(labels, SparseTargets):
        raise TypeError("labels: expected integers, got SparseTargets: cross-entropies take these")
    y, ignore_index = as_targets(labels, head.classes, ignore_index, "labels")
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"labels: expected integers, got dtype {y.dtype}")
    if y.shape != head.layer.features.shape[:-1]:
        raise ValueError(f"labels: expected shape {head.layer.features.shape[:-1]}, got {y.shape}")
    static = head.static._replace(reading=log_probs(bool(entropy)), ignore_index=ignore_index, targets_name="labels")
    label, lse, *rest = (a[..., 0] for a in read_positions(Inputs(head.layer, y), static))
    return LogProbs(label, lse, rest[-1], rest[0] if entropy else None)


def _around(logits: Array, targets: Targets, axis: int, axis_name: AxisName) -> tuple[Moments, Statistics]:
    """Moments, and from these the statistics of the label."""
    assert targets.label is not None
    moments = block_moments(logits, axis, axis_name)
    # On the shard that has it: what is known of an index beside another shard's would differ between devices.
    of_block = targets.label == moments.lead - first_class(logits.shape[axis], axis_name)
    leads = sum_shards(of_block.astype(jnp.int32), axis_name) > 0
    of_label, _ = take(logits, targets.label, axis, axis_name)
    return moments, moments.around(leads, of_label)


@functools.cache
def log_probs(with_entropy: bool) -> Reading:
    """Label and lse, with the entropy or without, and the argmax."""

    def statistics(logits: Array, axes: Axes, targets: Targets, axis_name: AxisName) -> tuple[Moments, Statistics]:
        (axis,) = axes
        return _around(logits, targets, axis, axis_name)

    def values(targets: Targets, found: tuple[Moments, Statistics], axes: Axes) -> Values:
        moments, of_label = found
        hot = lax.stop_gradient(targets.hot)
        label = jnp.where(hot == 0, 0, -hot * of_label.surprise)
        lse = jnp.where(targets.idle, 0, moments.statistics.logsumexp)
        moving = (label, lse, jnp.where(targets.idle, 0, moments.entropy)) if with_entropy else (label, lse)
        return moving, (jnp.where(targets.idle, -1, moments.lead),)

    def gradients(
        logits: Array,
        targets: Targets,
        found: tuple[Moments, Statistics],
        axes: Axes,
        cotangents: tuple[Array, ...],
        *,
        in_place: bool = False,
    ) -> tuple[Array, None]:
        idle, (logits, targets) = targets.idle, taking_part(logits, targets)
        to_label, to_lse, *to_entropy = (jnp.where(idle, 0, c) for c in cotangents)
        to_label *= targets.hot
        (moments, of_label), total = found, found[0].statistics.total
        factor = to_lse - to_label
        if not to_entropy:
            at_label = (to_lse * jnp.exp(of_label.label) + to_label * of_label.tail) / total
            largest = moments.statistics.largest
            scaled = scaled_exponentials(
                logits, largest, factor / total, axes, idle, targets.label, at_label, in_place=in_place
            )
            return scaled, None
        (h,) = to_entropy
        exponential = jnp.exp(of_label.label)
        below = jnp.where(exponential == 0, 0, of_label.label)
        at_label = (exponential * (to_lse - h * (moments.mean_gap + below)) + to_label * of_label.tail) / total
        return entropy_gradients(logits, moments, axes, factor, h, idle, targets.label, at_label), None

    def blank(positions: int, dtype: Any) -> Values:
        zeros = jnp.zeros((positions, 1), dtype)
        return (zeros,) * (3 if with_entropy else 2), (jnp.full((positions, 1), -1, jnp.int32),)

    return Reading(statistics, values, gradients, blank)


@functools.cache
def with_log_probs(losses: Reading, labelled: bool) -> Reading:
    """Losses, and beside them what is not differentiated: the log-probability of labels, lse, argmax and entropy."""

    def statistics(logits: Array, axes: Axes, targets: Any, axis_name: AxisName) -> Any:
        (axis,) = axes
        if labelled:
            moments, of_label = _around(logits, targets, axis, axis_name)
        else:
            moments, of_label = block_moments(logits, axis, axis_name), None
        again = not labelled or targets.spread is not None  # or no sum is taken again
        of_losses = losses.statistics(logits, axes, targets, axis_name) if again else of_label
        return of_losses, moments, of_label

    def values(targets: Any, found: Any, axes: Axes) -> Values:
        of_losses, moments, of_label = found
        moving, _ = losses.values(targets, of_losses, axes)
        idle, beside = targets.idle, (moments.statistics.logsumexp, moments.entropy)
        if labelled:
            beside = (0 * targets.share - of_label.surprise, *beside)  # NaN where the label is none
        beside = tuple(jnp.where(idle, 0, value) for value in beside)
        return moving, lax.stop_gradient((*beside, jnp.where(idle, -1, moments.lead)))

    def gradients(logits: Array, targets: Any, found: Any, axes: Axes, cotangents: Any, **options: bool) -> Any:
        return losses.gradients(logits, targets, found[0], axes, cotangents, **options)

    def blank(positions: int, dtype: Any) -> Values:
        zeros = jnp.zeros((positions, 1), dtype)
        return (zeros,), (*(zeros,) * (3 if labelled else 2), jnp.full((positions, 1), -1, jnp.int32))

    return Reading(statistics, values, gradients, blank)
