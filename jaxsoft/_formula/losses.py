"""The loss of each position, and its gradient, from statistics: for labels and distributions.

    loss       = τ·lse − Σ_j q_j z_j + ζ·lse²
    ∂loss/∂z_j = (τ + 2ζ·lse)·p_j − q_j

for logits z, target weights q_j (see `Targets`), τ = Σ_j q_j, p = softmax(z), lse = log Σ_j exp(z_j) and a z-loss of ζ.
"""

import functools
from typing import Any, cast

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxsoft._arrays.dtypes import compute_dtype, widen
from jaxsoft._custom_vjp import custom_vjp
from jaxsoft._formula.head import Head, Values, freeze_ignored, operand_cotangents, scale_gradient
from jaxsoft._formula.sparse import SparseTargets, check_sparse, sparse_loss, sparse_operands
from jaxsoft._formula.statistics import Statistics, block_statistics, leading_statistics, scaled_exponentials, weighted
from jaxsoft._formula.targets import Averaging, LogitsType, Options, Targets, dense_operands, labels_as_array
from jaxsoft._jax_internals import Results
from jaxsoft._platform import cpu
from jaxsoft._platform.dispatch import Axes, from_end, with_platform_impl


def loss_head(targets: Array | SparseTargets) -> Head:
    """The head whose value is the loss of targets of any form."""
    return sparse_loss(targets) if isinstance(targets, SparseTargets) else LOSS


def check_targets(
    targets: ArrayLike | SparseTargets, classes: int, options: Options, ignore_index: int | None
) -> tuple[Array | SparseTargets, int | None]:
    """The targets of a public function as arrays, and the label to ignore."""
    if isinstance(targets, tuple) and hasattr(targets, "as_targets"):
        raise TypeError("targets: expected an array or SparseTargets, got TopK: pass targets.as_targets()")
    if isinstance(targets, SparseTargets):
        return check_sparse(targets, classes, options, ignore_index), None
    return labels_as_array(targets, classes, ignore_index)


def target_operands(
    targets: Array | SparseTargets,
    logits: LogitsType,
    options: Options,
    averaging: Averaging,
    ignore_index: int | None,
    name: str = "targets",
) -> tuple[Any, Array | None]:
    """The operands of `loss_head(targets)`, and the denominator of the sum of their losses."""
    if isinstance(targets, SparseTargets):
        return sparse_operands(targets, logits, options, averaging)
    return dense_operands(targets, logits, options, averaging, ignore_index, name)


def position_losses(targets: Targets, statistics: Statistics, axis: int) -> Values:
    """τ·lse − Σ_j q_j z_j + ζ·lse² of every position."""
    # A term of weight 0 is 0 even if the loss is infinite. Weights are constants, because a tangent of 0 times an
    # infinite loss would be NaN.
    weights = targets.label_weight, targets.position_weight, targets.z_loss_weight
    label_weight, position_weight, z_loss_weight = cast(tuple[Array, Array, Array], lax.stop_gradient(weights))
    losses = jnp.zeros_like(statistics.sum_others)
    if targets.label is not None:
        losses += weighted(label_weight, statistics.nll)
    if targets.target_weights is not None:
        losses += weighted(position_weight, statistics.weight_sum * statistics.log_sum + statistics.weighted_gap)
    if targets.z_loss_weight is not None:
        losses += weighted(z_loss_weight, statistics.finite_logsumexp**2)
    return (losses,), ()


def position_gradients(
    logits: Array, targets: Targets, statistics: Statistics, axis: int, cotangents: Results, *, in_place: bool
) -> tuple[Array, Array | None]:
    """The gradients of Σ cotangent·loss to the logits of a block, and to the weights of a distribution: −log p_j.

    At a position of weight 0 they are 0, whatever its logits and its cotangent: padding may be NaN.
    """
    ignored, (logits, targets) = targets.ignored, freeze_ignored(logits, targets)
    cotangent = jnp.where(ignored, 0, cotangents[0])
    mass = _z_loss_mass(targets, statistics, cotangent)  # τ + 2ζ·lse without the label's own weight
    position_weight = at_max = None
    if targets.target_weights is not None:
        position_weight = cotangent * targets.position_weight
        at_max = None if statistics.other_weight is None else statistics.max_gradient(mass, position_weight)
        mass += position_weight * statistics.weight_sum
    label_weight, at_label = 0, None
    if targets.label is not None:
        label_weight = cotangent * targets.label_weight
        at_label = statistics.label_gradient(mass, label_weight)
    grad_logits = scaled_exponentials(
        logits,
        statistics.max_logit,
        (mass + label_weight) / statistics.positive_sum,
        (axis,),
        ignored=ignored,
        label=targets.label,
        at_label=at_label,
        position_weight=position_weight,
        target_weights=targets.target_weights,
        at_max=at_max,
        in_place=in_place,
    )
    if targets.differentiable is None:
        return grad_logits, None
    return grad_logits, _weight_gradients(logits, targets, statistics, cotangent)


def label_factors(targets: Targets, statistics: Statistics, cotangents: Results) -> tuple[Array, Array, Array | None]:
    """The factor of the gradient factor·exp(z_j − m), the gradient at the label, and what weighs target weights."""
    cotangent, position_weight = jnp.where(targets.ignored, 0, cotangents[0]), None
    mass, label_weight = _z_loss_mass(targets, statistics, cotangent), cotangent * targets.label_weight
    if targets.target_weights is not None:
        position_weight = cotangent * targets.position_weight
        mass += position_weight * statistics.weight_sum
    at_label = statistics.label_gradient(mass, label_weight)
    return (mass + label_weight) / statistics.positive_sum, at_label, position_weight


def _z_loss_mass(targets: Targets, statistics: Statistics, cotangent: Array) -> Array:
    """2ζ·lse: what the z-loss adds to the factor of every class."""
    if targets.z_loss_weight is None:
        return jnp.zeros_like(statistics.sum_others)
    return cotangent * 2 * targets.z_loss_weight * statistics.finite_logsumexp


def _weight_gradients(logits: Array, targets: Targets, statistics: Statistics, cotangent: Array) -> Array:
    grad_weights = statistics.log_sum + (statistics.max_logit - widen(logits))
    grad_weights = jnp.where(cast(Array, targets.differentiable), grad_weights, 0)  # infinite at a class at −inf
    return scale_gradient(grad_weights, cotangent * targets.position_weight, targets.position_weight == 0)


LOSS = Head(block_statistics, position_losses, position_gradients, factors=label_factors)


@functools.partial(custom_vjp, nondiff_argnums=(0, 1))
def reduced_loss(axis: int, averaging: Averaging, logits: Array, targets: Targets, denominator: Array | None) -> Array:
    """The sum or mean of all losses. Under differentiation it computes its gradient in the same pass."""
    (losses,), _ = position_losses(targets, block_statistics(logits, axis, targets), axis)
    return averaging.reduce(losses, denominator, axis)


def _reduced_loss_fwd(axis: int, averaging: Averaging, logits: Array, targets: Targets, denominator: Array | None):
    frozen_logits, frozen = freeze_ignored(logits, targets)
    one = jnp.ones((1,) * logits.ndim, compute_dtype(logits.dtype))
    scale = one if denominator is None else one / denominator
    arrays = frozen_logits, *frozen[:-1], scale  # all but `differentiable`, which is last
    losses, gradient = _losses_and_gradient(arrays, from_end((axis,), logits))
    # The gradient to a distribution needs the logits, so they are saved too.
    kept = None if targets.differentiable is None else logits
    return averaging.reduce(losses, denominator, axis), (gradient, kept, targets, scale)


def _reduced_loss_bwd(axis: int, averaging: Averaging, residuals: Any, cotangent: Array):
    gradient, logits, targets, scale = residuals
    grad_logits = scale_gradient(gradient.astype(scale.dtype), cotangent).astype(gradient.dtype)
    grad_weights = None
    if logits is not None:
        cotangent = jnp.where(targets.ignored, 0, cotangent * scale)
        grad_weights = _kept_weight_gradients(axis, logits, targets, cotangent)
    return grad_logits, operand_cotangents(Targets, grad_weights), None


def _reduced_loss_forward(axis: int, averaging: Averaging, residuals: Any, tangents: Any) -> Array:
    """Σ gradient·tangent, with 0 for ignored positions, where a tangent may be NaN."""
    gradient, logits, targets, scale = residuals
    logit_tangents, target_tangents, _ = tangents
    pushed = jnp.zeros((), scale.dtype)
    if logit_tangents is not None:
        terms = scale_gradient(gradient.astype(scale.dtype), logit_tangents.astype(scale.dtype), targets.ignored)
        pushed += jnp.sum(terms)
    if logits is not None and target_tangents.target_weights is not None:
        grad_weights = _kept_weight_gradients(axis, logits, targets, scale)
        pushed += jnp.sum(scale_gradient(grad_weights, target_tangents.target_weights, targets.ignored))
    return pushed


def _kept_weight_gradients(axis: int, logits: Array, targets: Targets, cotangent: Array) -> Array:
    """The gradients to the weights of a distribution, from the saved logits."""
    logits, targets = freeze_ignored(logits, targets)
    return _weight_gradients(logits, targets, leading_statistics(logits, (axis,)), cotangent)


reduced_loss.defvjp(_reduced_loss_fwd, _reduced_loss_bwd, forward=_reduced_loss_forward)


@with_platform_impl(cpu=cpu.loss)
def _losses_and_gradient(arrays: tuple[Any, ...], axes: Axes) -> tuple[Array, Array]:
    """The loss of each position, and the gradient of their sum to the logits times the scale."""
    logits, *given, scale = arrays
    targets, (axis,) = Targets(*given), axes
    statistics = block_statistics(logits, axis, targets)
    (losses,), _ = position_losses(targets, statistics, axis)
    gradient, _ = position_gradients(logits, targets, statistics, axis, (scale,), in_place=False)
    return losses, gradient
