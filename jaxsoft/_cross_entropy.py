"""Cross-entropy of dense logits against labels or distributions."""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxsoft._arrays.checks import as_array, as_option, check_values
from jaxsoft._arrays.classes import Axis, dense_arguments, remove_classes
from jaxsoft._arrays.dtypes import compute_dtype
from jaxsoft._arrays.sharding import AxisName, all_classes
from jaxsoft._formula.head import Values, evaluate
from jaxsoft._formula.losses import check_targets, loss_head, reduced_loss, target_operands
from jaxsoft._formula.sparse import SparseTargets
from jaxsoft._formula.targets import REDUCTIONS, Averaging, LogitsType, Options, Reduction, Targets, as_options


def cross_entropy(
    logits: Float[ArrayLike, "..."],
    targets: Int[ArrayLike, "..."] | Float[ArrayLike, "..."] | Bool[ArrayLike, "..."] | SparseTargets,
    axis: Axis = -1,
    *,
    ignore_index: int | None = None,
    weights: Float[ArrayLike, "..."] | Bool[ArrayLike, "..."] | None = None,
    class_weights: Float[ArrayLike, " classes"] | None = None,
    where: Bool[ArrayLike, "..."] | None = None,
    label_smoothing: Float[ArrayLike, ""] = 0.0,
    z_loss: Float[ArrayLike, ""] = 0.0,
    reduction: Reduction = "mean",
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """Cross-entropy between targets and softmax(logits), in nats.

    loss = τ·lse − Σ_j q_j z_j + ζ·lse²      q_j = c_j t_j,  τ = Σ_j q_j,  lse = log Σ_j exp(z_j)
    ∂loss/∂z_j = (τ + 2ζ·lse)·softmax(z)_j − q_j

    for targets t (one-hot at an integer label), class weights c and z-loss ζ. The loss and gradient
    of a label come from the sum over the other classes, never from 1 − p: they stay accurate, in relative
    terms, even where the label's float32 probability rounds to one.

    Args:
        logits: scores z with the classes along `axis`, in float16, bfloat16, float32 or float64 (integers are
            promoted).
        targets: integer labels in [0, classes), of the logits' shape without the class axis; or a floating distribution
            of the logits' shape, which need not sum to one; or a one-hot array of integers or booleans of the logits'
            shape, over two classes or more; or `SparseTargets`. Without x64, JAX truncates integers to 32 bits before
            this function sees them, so only labels in NumPy arrays or lists may be wider.
        axis: the class axis; or several axes, or None for all, that together enumerate the classes as
            `reshape` does: in labels the last of the axes varies fastest, and sparse targets have K at the end.
        ignore_index: label of the ignored positions: loss 0, gradient 0, not counted in the mean. Any
            integer, even one that is also a class.
        weights: weight per position, or a boolean mask of the positions to keep, broadcasting to the loss; a
            weight of 0 ignores a position, as `ignore_index` does.
        class_weights: weight c of each class, of shape (classes,).
        where: booleans that broadcast to the logits' shape; False masks a class. Target probability on a masked class
            costs +inf: pass `jnp.where(where, targets, 0)` to drop it.
        label_smoothing: ε in [0, 1]: targets become (1−ε)t + ε/classes, counting the classes not masked.
        z_loss: ζ ≥ 0, which pulls lse towards 0. It is not weighted by class. Label smoothing and z-loss may both be
            traced, for schedules, and are constants under differentiation.
        reduction: "none", one loss per position; "sum"; or "mean", the sum divided by the total weight of the
            positions that are not ignored; with labels, a position's weight is multiplied by its label's class weight.
        axis_name: inside `jax.shard_map`, the mesh axis over which the classes are sharded in contiguous blocks:
            logits, masks and distributions hold one block, labels and class weights refer to all classes. The loss and
            gradients are the same as unsharded, at the cost of two all-reduces of a few numbers per position (a third
            with `where` and smoothing). Do not pass logits or kernels of all classes that were gathered inside the
            `shard_map`: types cannot tell them from blocks, and they would count once per device. If the positions are
            sharded too, "mean" averages over one device only: take "sum", and divide its `psum` by the `psum` of the
            count.

    Returns:
        The loss in float32, or float64 for float64 logits: a scalar, or with "none" an array of the
        logits' shape without the class axis, 0 at ignored positions.

    Edges: a label out of range is never clamped or wrapped: its loss and its gradients are NaN, and the
    gradients of other positions are unaffected (`checked` raises instead). A label that is masked costs +inf, with
    finite gradients. With every position ignored, loss and gradient are 0. The logits of an ignored position
    may be anything, even NaN; elsewhere a NaN or +inf logit makes the loss NaN or +inf.

    Differentiation: with respect to logits and distributions, in reverse and forward mode to any order. Gradients have
    the dtype of their input. Labels, weights and masks are constants. A mean or sum in float32 or float64 computes its
    gradient together with the loss, and saves it for the backward pass; otherwise the logits and a few numbers per
    position are saved. For a distribution all of these and the distribution itself are saved.

    Raises:
        TypeError: logits or targets of a wrong dtype, an option that is not a number.
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
    targets = targets if isinstance(axis, int) or isinstance(targets, SparseTargets) else as_array("targets", targets)
    z, class_axis, mask, axis_name, (targets,) = dense_arguments(logits, axis, where, axis_name, targets)
    options = as_options(weights, class_weights, mask, label_smoothing, z_loss, compute_dtype(z.dtype))
    checked, ignore_index = check_targets(targets, all_classes(z.shape[class_axis], axis_name), options, ignore_index)
    return _cross_entropy(
        z,
        checked,
        options,
        axis=class_axis,
        ignore_index=ignore_index,
        reduction=as_option("reduction", reduction, REDUCTIONS),
        axis_name=axis_name,
    )


@functools.partial(jax.jit, static_argnames=("axis", "ignore_index", "reduction", "axis_name"))
def _cross_entropy(
    logits: Array,
    targets: Array | SparseTargets,
    options: Options,
    *,
    axis: int,
    ignore_index: int | None,
    reduction: Reduction,
    axis_name: AxisName,
) -> Array:
    averaging = Averaging(reduction)
    logits_type = LogitsType(logits, axis, axis_name)
    operands, denominator = target_operands(targets, logits_type, options, averaging, ignore_index)
    logits = remove_classes(logits, options.where)
    check_values("logits", logits, ~jnp.isnan(logits) | (operands.position_weight == 0), "a number")
    # In half precision a gradient that is computed before its cotangent is known would be rounded twice.
    one_pass = logits.dtype == compute_dtype(logits.dtype) and 0 not in logits.shape and axis_name is None
    if one_pass and reduction != "none" and isinstance(operands, Targets):
        return cast(Array, reduced_loss(axis, averaging, logits, operands, denominator))
    (losses,), _ = cast(Values, evaluate(loss_head(targets), logits, operands, axis, axis_name))
    return averaging.reduce(losses, denominator, axis)
