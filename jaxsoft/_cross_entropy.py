"""Cross-entropy of dense logits against labels or distributions."""

import functools
from typing import Literal, cast, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxsoft._checks import as_axis, as_floating, as_integer, as_mask, as_number, as_option, check_values, compute_dtype
from jaxsoft._shards import AxisName, as_axis_name
from jaxsoft._statistics import Statistics, block_gradient, block_statistics, position_losses, target_gradient
from jaxsoft._targets import Counts, Targets, read_targets

Reduction = Literal["none", "sum", "mean"]
REDUCTIONS = get_args(Reduction)


def cross_entropy(
    logits: Float[ArrayLike, "..."],
    targets: Int[ArrayLike, "..."] | Float[ArrayLike, "..."],
    axis: int = -1,
    *,
    ignore_index: int | None = None,
    weights: Float[ArrayLike, "..."] | None = None,
    class_weights: Float[ArrayLike, " classes"] | None = None,
    where: Bool[ArrayLike, "..."] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """Cross-entropy between targets and softmax(logits), in nats.

    loss = τ·lse − Σ_j q_j z_j + ζ·lse²      q_j = c_j t_j,  τ = Σ_j q_j,  lse = log Σ_j exp(z_j)
    ∂loss/∂z_j = (τ + 2ζ·lse)·softmax(z)_j − q_j

    for targets t (one-hot at an integer label), class weights c and z-loss ζ. The loss and gradient
    of a label come from the sum over the other classes, never from 1 − p: they keep full relative
    precision where the label's float32 probability has long rounded to one.

    Args:
        logits: scores z with the classes along `axis`, in any floating dtype (integers are promoted).
        targets: integer labels in [0, classes), of the logits' shape without the class axis; or a
            floating distribution of the logits' shape, which need not sum to one. Told apart by dtype.
        axis: the class axis.
        ignore_index: label of the positions that take no part: loss 0, gradient 0, not counted. Any
            integer, also one that is a class.
        weights: weight of each position, broadcasting to the loss; 0 leaves a position out like
            `ignore_index`.
        class_weights: weight c of each class, of shape (classes,).
        where: booleans that broadcast to the logits' shape; False removes a class.
        label_smoothing: ε in [0, 1]: targets become (1−ε)t + ε/classes, counting the classes left.
        z_loss: ζ ≥ 0, which draws lse towards 0. It is not weighted by class.
        reduction: "none", the loss of each position; "sum"; or "mean", over the weights of the
            positions that are not ignored, each times its label's class weight when targets are labels.
        axis_name: inside `jax.shard_map`, the mesh axis over which the classes are laid in contiguous
            blocks: logits, masks and distributions are of one block, labels and class weights of all
            classes. The loss and gradients are those of the whole, for two all-reduces of a few numbers
            a position (a third with `where` and smoothing). Where the positions are sharded too, "mean" is
            over those of one device: take "sum", and divide by the `psum` of the count.

    Returns:
        The loss in float32, or float64 for float64 logits: a scalar, or with "none" an array of the
        logits' shape without the class axis, 0 at ignored positions.

    Edges: a label out of range is never clamped or wrapped: its loss and its gradients are NaN, the
    gradients elsewhere are not touched (`checked` raises instead). A removed label costs +inf, with
    finite gradients. Nothing to average gives loss 0 and gradient 0. The logits of a position that
    takes no part may be anything, NaN too; elsewhere a NaN or +inf logit makes the loss NaN or +inf.

    Differentiation: to logits and to distributions, in reverse mode to any order and forward over
    reverse (`jax.hessian`). Gradients have the dtype of their input. Labels, weights and masks are
    constants. Kept for the backward pass: the logits (with `where` a masked copy), a distribution, and
    a few numbers a position.

    Raises:
        TypeError: logits or targets of a wrong dtype, an option that is not a plain number.
        ValueError: shapes that do not fit, an axis, smoothing or reduction out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxsoft import cross_entropy
        >>> loss, gradient = jax.value_and_grad(cross_entropy)(jnp.array([1.0, 2.0, 3.0]), jnp.array(2))
        >>> print(loss.round(4), gradient.round(4))
        0.4076 [ 0.09    0.2447 -0.3348]
        >>> print(cross_entropy(jnp.zeros((2, 3)), jnp.array([1, 255]), ignore_index=255).round(4))
        1.0986

    Source: J. S. Bridle (1990) for the loss; C. Szegedy et al., "Rethinking the Inception architecture
    for computer vision" (2016) for smoothing; A. Chowdhery et al., "PaLM" (2022) for the z-loss.
    Weighting and averaging follow PyTorch's `cross_entropy`.
    """
    logits = as_floating("logits", logits)
    axis = as_axis(axis, logits.ndim)
    if logits.shape[axis] == 0:
        raise ValueError(f"logits: expected at least one class along axis {axis}, got shape {logits.shape}")
    if ignore_index is not None:
        ignore_index = as_integer("ignore_index", ignore_index)
    return _cross_entropy(
        logits,
        jnp.asarray(targets),
        weights,
        class_weights,
        None if where is None else as_mask("where", where, logits.shape),
        axis=axis,
        ignore_index=ignore_index,
        label_smoothing=as_number("label_smoothing", label_smoothing, 0, 1),
        z_loss=as_number("z_loss", z_loss, 0),
        reduction=as_option("reduction", reduction, REDUCTIONS),
        axis_name=as_axis_name(axis_name, "logits", logits),
    )


@functools.partial(
    jax.jit, static_argnames=("axis", "ignore_index", "label_smoothing", "z_loss", "reduction", "axis_name")
)
def _cross_entropy(
    logits: Array,
    targets: Array,
    weights: ArrayLike | None,
    class_weights: ArrayLike | None,
    where: Array | None,
    *,
    axis: int,
    ignore_index: int | None,
    label_smoothing: float,
    z_loss: float,
    reduction: Reduction,
    axis_name: AxisName,
) -> Array:
    read, counts = read_targets(
        targets,
        logits.shape,
        compute_dtype(logits.dtype),
        axis,
        ignore_index=ignore_index,
        weights=weights,
        class_weights=class_weights,
        where=where,
        label_smoothing=label_smoothing,
        axis_name=axis_name,
    )
    if where is not None:
        logits = jnp.where(where, logits, -jnp.inf)
    check_values("logits", logits, ~jnp.isnan(logits) | (counts.position == 0), "a number")
    losses, lse = cast(tuple[Array, Array], losses_and_lse(logits, read, axis, axis_name))
    penalties = None
    if z_loss:
        lse = jnp.where((counts.position == 0) | jnp.isneginf(lse), 0, lse)
        penalties = z_loss * counts.position * lse**2
    return _reduce(losses, penalties, counts, axis, reduction)


def _reduce(losses: Array, penalties: Array | None, counts: Counts, axis: int, reduction: Reduction) -> Array:
    """The two terms have denominators of their own, so that class weights leave the z-loss alone."""
    if reduction == "none":
        return jnp.squeeze(losses if penalties is None else losses + penalties, axis)
    total = jnp.sum(losses)
    penalty = 0 if penalties is None else jnp.sum(penalties)
    if reduction == "sum":
        return total + penalty
    return total / or_one(jnp.sum(counts.loss)) + penalty / or_one(jnp.sum(counts.position))


def or_one(count: Array) -> Array:
    return jnp.where(count == 0, 1, count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def losses_and_lse(logits: Array, targets: Targets, axis: int, axis_name: AxisName) -> tuple[Array, Array]:
    """Loss and lse of each position: z-loss and every reduction are ordinary functions of the two."""
    statistics = block_statistics(logits, (axis,), targets, axis_name, reused="nothing")
    return position_losses(targets, statistics), statistics.logsumexp


def _losses_and_lse_fwd(logits: Array, targets: Targets, axis: int, axis_name: AxisName):
    statistics = block_statistics(logits, (axis,), targets, axis_name)
    return (position_losses(targets, statistics), statistics.logsumexp), (logits, targets, statistics)


def _losses_and_lse_bwd(
    axis: int,
    axis_name: AxisName,
    residuals: tuple[Array, Targets, Statistics],
    cotangents: tuple[Array, Array],
) -> tuple[Array, Targets]:
    logits, targets, statistics = residuals
    gradient = block_gradient(logits, targets, statistics, (axis,), *cotangents)
    constant = None  # JAX's word for a zero cotangent: labels, weights and smoothing are no variables
    is_distribution = targets.label is None
    to_spread = target_gradient(logits, targets, statistics, cotangents[0]) if is_distribution else constant
    return gradient.astype(logits.dtype), Targets(constant, constant, to_spread, constant)  # pyright: ignore[reportArgumentType]


losses_and_lse.defvjp(_losses_and_lse_fwd, _losses_and_lse_bwd)
