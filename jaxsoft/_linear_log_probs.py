"""Log-probabilities of a linear layer whose logits are never all stored, and the statistics that trainers log."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxsoft._arrays.classes import take
from jaxsoft._arrays.exports import exportable
from jaxsoft._arrays.sharding import AxisName, first_class, sum_shards
from jaxsoft._formula.head import Head, Values, freeze_ignored
from jaxsoft._formula.moments import Moments, block_moments, moment_gradients
from jaxsoft._formula.sparse import SparseTargets
from jaxsoft._formula.statistics import Statistics, scaled_exponentials
from jaxsoft._formula.targets import Targets, labels_as_array
from jaxsoft._jax_internals import Results
from jaxsoft._linear.args import Execution, HeadArgs, Scaling, check_head
from jaxsoft._linear.mesh import BatchAxes
from jaxsoft._linear.run import run_head


@exportable
class LogProbs(NamedTuple):
    """Numbers per position computed from softmax(logits). At an ignored position they are 0, and the argmax is −1.

    A position is ignored by `ignore_index` or a weight of 0; with a loss, also if its label's class weight is 0.
    """

    # Any instead of None: the call decides, so a type checker need not be told again.
    label_log_prob: Float[Array, "*positions"] | Any
    """log p of the label; None without labels."""
    logsumexp: Float[Array, "*positions"]
    """log Σ_j exp(z_j)."""
    argmax: Int[Array, "*positions"]
    """The class with the largest logit, the first of equal ones; −1 if every class is masked or a logit is NaN."""
    entropy: Float[Array, "*positions"] | Any
    """−Σ_j p_j log p_j; None unless requested."""


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

    This is the building block of sequence losses (policy gradients, preferences, distillation): numbers per position,
    each with its own cotangent. A label's log-probability is never above 0. It and the entropy stay accurate for
    confident predictions, for instance at a margin of 40.

    Args:
        features: inputs of the layer; its other arguments are as in `linear_cross_entropy`.
        kernel: weights of the layer.
        labels: integers in [0, classes), of the features' shape without their last axis.
        bias: of shape (classes,).
        ignore_index: label of the ignored positions, which cost almost no time.
        where: booleans of shape (classes,); False masks a class.
        soft_cap: c > 0, which keeps the logits within ±c.
        temperature: T > 0, which divides the logits after the cap; all results are computed from the divided logits.
        entropy: whether to compute the entropy.
        kernel_axis: the kernel's class axis.
        memory_budget: bytes that one tile's logits and their gradient may take.
        axis_name: the mesh axis over which the classes are sharded.
        batch_axes: the mesh axes over which the positions are sharded.

    Returns:
        `LogProbs` in float32, or float64 for float64 inputs, of the labels' shape.

    Edges: a label out of range gives a log-probability and gradients of NaN (`checked` raises instead), a masked label
    −inf. At ignored positions numbers and gradients are 0, and the argmax is −1.

    Differentiation: of label_log_prob, logsumexp and entropy, with respect to features, kernel and bias, in reverse and
    forward mode to any order. The logits are recomputed in the backward pass: four matmuls in all.

    Raises:
        TypeError, ValueError: as `linear_cross_entropy`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxsoft import linear_log_probs
        >>> x, w = jnp.linspace(-1, 1, 6).reshape(3, 2), jnp.linspace(-2, 1, 8).reshape(2, 4)
        >>> found = linear_log_probs(x, w, jnp.array([0, 3, 1]), entropy=True)
        >>> for label, best, entropy in zip(found.label_log_prob, found.argmax, found.entropy):
        ...     print(f"{label:.4f} {best} {entropy:.4f}")
        -0.6341 0 1.1414
        -1.3863 2 1.3863
        -2.0055 3 1.1414

    Source: R. J. Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement
    learning" (1992) for the policy gradient, their main use.
    """
    execution = Execution(kernel_axis, memory_budget, axis_name, batch_axes)
    args = check_head(features, kernel, bias, where, Scaling(soft_cap, temperature), execution)
    if isinstance(labels, SparseTargets):
        raise TypeError("labels: expected integers, got SparseTargets, which only cross-entropies accept")
    y, ignore_index = labels_as_array(labels, args.classes, ignore_index, "labels")
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"labels: expected integers, got dtype {y.dtype}")
    positions = args.layer.features.shape[:-1]
    if y.shape != positions:
        raise ValueError(f"labels: expected shape {positions}, got {y.shape}")
    head = _log_probs(bool(entropy))
    config = args.config._replace(head=head, ignore_index=ignore_index, targets_name="labels")
    label, lse, *rest = (a[..., 0] for a in run_head(HeadArgs(args.layer, y), config))
    return LogProbs(label, lse, rest[-1], rest[0] if entropy else None)


def _around_label(logits: Array, axis: int, targets: Targets, axis_name: AxisName) -> tuple[Moments, Statistics]:
    """Moments, and the label's statistics computed from them."""
    assert targets.label is not None
    moments = block_moments(logits, axis, axis_name)
    # Compare on the shard that has the label, and sum: a result that differs between devices would be typed as varying.
    in_block = targets.label == moments.leader - first_class(logits.shape[axis], axis_name)
    leads = sum_shards(in_block.astype(jnp.int32), axis_name) > 0
    label_logit, _ = take(logits, targets.label, axis, axis_name)
    return moments, moments.around(leads, label_logit)


@functools.cache
def _log_probs(with_entropy: bool) -> Head:
    """The head of the label's log-probability and lse, with the entropy or without, and the argmax."""
    values = functools.partial(_values, with_entropy=with_entropy)
    return Head(_around_label, values, _gradients, widths=(1,) * (3 if with_entropy else 2), indices=1)


def _values(targets: Targets, statistics: tuple[Moments, Statistics], axis: int, *, with_entropy: bool) -> Values:
    moments, label_statistics = statistics
    weight = lax.stop_gradient(targets.label_weight)
    label_log_prob = jnp.where(weight == 0, 0, -weight * label_statistics.nll)
    numbers = (moments.statistics.logsumexp, *((moments.entropy,) if with_entropy else ()))
    numbers = (jnp.where(targets.ignored, 0, number) for number in numbers)
    return (label_log_prob, *numbers), (jnp.where(targets.ignored, -1, moments.leader),)


def _gradients(
    logits: Array,
    targets: Targets,
    statistics: tuple[Moments, Statistics],
    axis: int,
    cotangents: Results,
    *,
    in_place: bool,
) -> tuple[Array, None]:
    ignored, (logits, targets) = targets.ignored, freeze_ignored(logits, targets)
    grad_label, grad_lse, *rest = (jnp.where(ignored, 0, c) for c in cotangents)
    grad_label *= targets.label_weight
    moments, label_statistics = statistics
    factor = grad_lse - grad_label
    if rest:
        (grad_entropy,) = rest
        gap = jnp.where(jnp.exp(label_statistics.label_logit) == 0, 0, label_statistics.label_logit)
        mass = grad_lse - grad_entropy * (moments.mean_gap + gap)
        at_label = label_statistics.label_gradient(mass, -grad_label)
        label = {"label": targets.label, "at_label": at_label}
        return moment_gradients(logits, moments, factor, grad_entropy, ignored, axis, **label), None
    scaled = scaled_exponentials(
        logits,
        moments.statistics.max_logit,
        factor / moments.statistics.positive_sum,
        (axis,),
        ignored=ignored,
        label=targets.label,
        at_label=label_statistics.label_gradient(grad_lse, -grad_label),
        in_place=in_place,
    )
    return scaled, None


@functools.cache
def with_log_probs(loss: Head, has_labels: bool) -> Head:
    """The head of a loss, and as constants the log-probability of labels, lse, entropy and argmax."""

    def statistics(logits: Array, axis: int, targets: Any, axis_name: AxisName) -> Any:
        if has_labels:
            moments, label_statistics = _around_label(logits, axis, targets, axis_name)
        else:
            moments, label_statistics = block_moments(logits, axis, axis_name), None
        again = not has_labels or targets.target_weights is not None  # otherwise the moments have all sums
        loss_statistics = loss.statistics(logits, axis, targets, axis_name) if again else label_statistics
        return loss_statistics, moments, label_statistics

    def values(targets: Any, statistics: Any, axis: int) -> Values:
        loss_statistics, moments, label_statistics = statistics
        variable, _ = loss.values(targets, loss_statistics, axis)
        constants = (moments.statistics.logsumexp, moments.entropy)
        if has_labels:
            # NaN if the label is out of range.
            constants = (0 * targets.position_weight - label_statistics.nll, *constants)
        constants = tuple(jnp.where(targets.ignored, 0, number) for number in constants)
        return variable, lax.stop_gradient((*constants, jnp.where(targets.ignored, -1, moments.leader)))

    def gradients(logits: Array, targets: Any, statistics: Any, axis: int, cotangents: Results, **how: bool) -> Any:
        return loss.gradients(logits, targets, statistics[0], axis, cotangents, **how)

    return Head(statistics, values, gradients, numbers=3 if has_labels else 2, indices=1)
