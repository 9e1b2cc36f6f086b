"""Caffe's softmax and loss layers, with Caffe's names and exact behaviour.

A network ported from Caffe gives the same numbers only if its conventions are ported too: the class axis is 1,
losses are clamped but their gradients are not, and a batch is averaged in one of four ways. This module implements
only these conventions, with `jaxsoft.softmax` and `jaxsoft.cross_entropy`.

Caffe treats an array as (outer, classes, inner), where outer and inner are the products of the dimensions before and
after the class axis. Each of the outer·inner vectors of classes is a position.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from jaxsoft import _softmax
from jaxsoft._arrays.checks import as_axis, as_floating, as_integer, check_labels, check_values, refuse_mask
from jaxsoft._arrays.dtypes import at_least_int32, compute_dtype, nan_unless
from jaxsoft._cross_entropy import cross_entropy
from jaxsoft._formula.targets import equals

__all__ = ["infogain_loss", "multinomial_logistic_loss", "softmax", "softmax_with_loss"]

Normalization = Literal["FULL", "VALID", "BATCH_SIZE", "NONE"]
Labels = Int[ArrayLike, "..."] | Float[ArrayLike, "..."]

FLT_MIN = 2.0**-126  # the smallest normal float32, which Caffe uses in double precision too
LOG_THRESHOLD = 1e-20
IGNORED, NO_CLASS = -1, -2  # in place of an ignored label, and of a label out of range


def softmax(x: Float[ArrayLike, "..."], axis: int = 1) -> Float[Array, "..."]:
    """Caffe's Softmax layer: `jaxsoft.softmax` with the classes along axis 1 by default.

    s_i = exp(x_i) / Σ_j exp(x_j)

    Args:
        x: scores of any rank, in float16, bfloat16, float32 or float64 (integers are promoted).
        axis: the class axis; a negative one counts from the end.

    Returns:
        Array of the shape and dtype of `x` that sums to one over `axis`.

    Edges, Differentiation: as `jaxsoft.softmax`.

    Raises:
        TypeError: scores that are not real numbers, an axis that is not one integer.
        ValueError: an axis out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import caffe
        >>> print(caffe.softmax(jnp.zeros((1, 4, 2, 2)))[0, :, 0, 0])
        [0.25 0.25 0.25 0.25]

    Source: Y. Jia et al., "Caffe: convolutional architecture for fast feature embedding" (2014).
    """
    return _softmax.softmax(x, as_axis(axis, jnp.ndim(x)))


def softmax_with_loss(
    logits: Float[ArrayLike, "..."],
    labels: Labels,
    *,
    axis: int = 1,
    ignore_label: int | None = None,
    normalization: Normalization | None = None,
    normalize: bool | None = None,
    loss_weight: Float[ArrayLike, ""] = 1.0,
) -> tuple[Float[Array, ""], Float[Array, "..."]]:
    """Caffe's SoftmaxWithLoss layer: the loss of the labels, and the probabilities.

    loss = loss_weight/normaliser · Σ −log max(p_label, 2⁻¹²⁶)
    ∂loss/∂z_j = loss_weight/normaliser · (p_j − [j = label]), whether clamped or not

    Args:
        logits: scores z of any rank, classes along `axis`, in float16, bfloat16, float32 or float64.
        labels: one per position, in any shape with that many elements and the logits' first dimension.
            Floats, as Caffe stores labels, are truncated to integers.
        axis: the class axis; a negative one counts from the end.
        ignore_label: any integer; positions of this label have loss 0 and gradient 0, whatever their logits,
            and are not counted.
        normalization: the divisor of the sum: "FULL", the number of positions; "VALID", the number of
            positions that are not ignored (the default); "BATCH_SIZE", the product of the dimensions before
            `axis`; "NONE", 1. It is at least 1.
        normalize: the older flag, used only without `normalization`: True is "VALID", False "BATCH_SIZE".
        loss_weight: a scalar that multiplies loss and gradient.

    Returns:
        The loss, a scalar in float32, or float64 for float64 logits; and the probabilities, of the
        logits' shape and dtype, through which gradients flow by softmax's rule.

    Edges: a position costs at most 126 log 2 = 87.3365448, even if its label's logit is −inf, and still has a gradient.
    If every position is ignored, loss and gradient are 0. A label that is neither a class nor ignored, or NaN, gives a
    NaN loss and gradient (`checked` raises instead), also in a NumPy array wider than 32 bits, unless `jax.jit` has
    truncated it before. NaN logits make probabilities NaN, even at ignored positions.

    Raises:
        TypeError: logits, labels or options of a wrong type.
        ValueError: another number of labels than positions, or another first dimension than the
            logits'; an axis out of range, an unknown normalization, a loss weight that is not a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import caffe
        >>> logits = jnp.arange(24).reshape(2, 3, 2, 2) % 7 * 0.5
        >>> labels = jnp.array([[[0, 1], [255, 2]], [[255, 255], [1, 0]]])
        >>> for normalization in ("FULL", "VALID", "BATCH_SIZE", "NONE"):
        ...     loss, _ = caffe.softmax_with_loss(logits, labels, ignore_label=255, normalization=normalization)
        ...     print(f"{normalization:10} {loss:.4f}")
        FULL       0.7225
        VALID      1.1561
        BATCH_SIZE 2.8902
        NONE       5.7804

    Source: Y. Jia et al. (2014); the fully convolutional use: J. Long, E. Shelhamer, T. Darrell,
    "Fully convolutional networks for semantic segmentation" (2015).
    """
    z = as_floating("logits", logits)
    axis = as_axis(axis, z.ndim)
    label = _read_labels(labels, z.shape, axis, ignore_label)
    losses = cross_entropy(z, label, axis, ignore_index=IGNORED, reduction="none")
    scale = _scale(label, z.shape[:axis], normalization, normalize, loss_weight, losses.dtype)
    return scale * jnp.sum(-_at_least(-losses, math.log(FLT_MIN))), softmax(z, axis)


def infogain_loss(
    logits: Float[ArrayLike, "..."],
    labels: Labels,
    infogain: Float[ArrayLike, "classes classes"],
    *,
    axis: int = 1,
    ignore_label: int | None = None,
    normalization: Normalization | None = None,
    normalize: bool | None = None,
    loss_weight: Float[ArrayLike, ""] = 1.0,
) -> tuple[Float[Array, ""], Float[Array, "..."]]:
    """Caffe's InfogainLoss layer: a matrix weights the loss of every class for every label.

    loss = loss_weight/normaliser · Σ −Σ_j H[label, j] log max(p_j, 1e-20)
    ∂loss/∂z_j = loss_weight/normaliser · (p_j Σ_k H[label, k] − H[label, j]), whether clamped or not

    That is cross-entropy against the targets t = H[label], which need not sum to one.

    Args:
        logits: scores z, classes along `axis`; all arguments except `infogain` are as in `softmax_with_loss`.
        labels: one per position.
        infogain: the matrix H, one row per label, in any shape of classes² elements. A constant: no gradient.
        axis: the class axis.
        ignore_label: label of the ignored positions.
        normalization: the divisor of the sum.
        normalize: the older flag.
        loss_weight: a scalar that multiplies loss and gradient.

    Returns:
        The loss and the probabilities, as `softmax_with_loss`.

    Edges: with the identity matrix it equals `softmax_with_loss` up to the clamp. Otherwise as `softmax_with_loss`.

    Raises:
        TypeError, ValueError: as `softmax_with_loss`; a matrix of another size. Under `checked`: an
            entry of the matrix that is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import caffe
        >>> rare_first = jnp.diag(jnp.array([10.0, 1.0]))
        >>> print(caffe.infogain_loss(jnp.zeros((2, 2)), jnp.array([0, 1]), rare_first)[0].round(4))  # 11/2 log 2
        3.8123

    Source: Y. Jia et al. (2014).
    """
    z = as_floating("logits", logits)
    axis, dtype = as_axis(axis, z.ndim), compute_dtype(z.dtype)
    classes = z.shape[axis]
    label = _read_labels(labels, z.shape, axis, ignore_label)
    h = jax.lax.stop_gradient(as_floating("infogain", infogain)).astype(dtype)
    if h.size != classes**2:
        raise ValueError(f"infogain: expected shape ({classes}, {classes}), got {h.shape}")
    check_values("infogain", h, jnp.isfinite(h), "a finite number")
    ignored = jnp.expand_dims(label == IGNORED, axis)
    at_label = h.reshape(classes, classes)[jnp.maximum(label, 0)]
    gains = jnp.moveaxis(nan_unless(label != NO_CLASS, dtype)[..., None] * at_label, -1, axis)
    # Mask before the logarithm, for the gradient, and after it, for the value.
    log_probs = _softmax.log_softmax(jnp.where(ignored, 0, z.astype(dtype)), axis)
    log_probs = _at_least(log_probs, math.log(LOG_THRESHOLD))
    scale = _scale(label, z.shape[:axis], normalization, normalize, loss_weight, dtype)
    return -scale * jnp.sum(jnp.where(ignored, 0, gains * log_probs)), softmax(z, axis)


def multinomial_logistic_loss(probs: Float[ArrayLike, "..."], labels: Labels) -> Float[Array, ""]:
    """Caffe's MultinomialLogisticLoss layer: the loss of given probabilities.

    loss = 1/N Σ_n −log max(p_n,label, 1e-20)        ∂loss/∂p_n,label = −1/(N max(p_n,label, 1e-20))

    After a softmax layer its gradient is divided by a probability that may have underflowed, and then
    multiplied by it again; `softmax_with_loss` does neither.

    Args:
        probs: probabilities p of any rank, N = the first dimension; the rest, flattened, are the classes.
        labels: N labels, in any shape whose first dimension is N. Floats are truncated to integers.

    Returns:
        The mean loss, a scalar in float32, or float64 for float64 probabilities.

    Edges: both value and gradient use the clamped probability, so a position costs at most
    20 log 10 = 46.05 with a gradient of 1e20/N. Zero samples give loss 0. A label out of range
    gives a NaN loss and gradient (`checked` raises instead).

    Raises:
        TypeError: probabilities or labels that are not real numbers.
        ValueError: a scalar, or another number of labels than samples.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import caffe
        >>> print(caffe.multinomial_logistic_loss(jnp.array([[0.25, 0.75]]), jnp.array([0])).round(4))  # log 4
        1.3863

    Source: Y. Jia et al. (2014).
    """
    p = as_floating("probs", probs)
    if p.ndim == 0:
        raise ValueError("probs: expected at least one axis, the samples, got a scalar")
    samples = p.shape[0]
    p = p.reshape(samples, math.prod(p.shape[1:])).astype(compute_dtype(p.dtype))
    label = _read_labels(labels, p.shape, 1, None)
    at_label = jnp.take_along_axis(p, jnp.maximum(label, 0)[:, None], 1, mode="promise_in_bounds")[:, 0]
    at_label *= nan_unless(label != NO_CLASS, p.dtype)
    return -jnp.sum(jnp.log(_at_least(at_label, LOG_THRESHOLD))) / max(samples, 1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _at_least(x: Array, floor: float) -> Array:
    """max(x, floor), differentiated as if there were no floor, because Caffe does not clamp gradients."""
    # The added term is 0; its derivative is used inside a scan, where JAX drops the rule below.
    finite = jnp.where(x < jnp.finfo(x.dtype).min, 0, x)
    return jnp.where(x < floor, floor + (finite - jax.lax.stop_gradient(finite)), x)


@_at_least.defjvp
def _at_least_jvp(floor: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _at_least(*primals, floor), *tangents


def _read_labels(labels: Labels, shape: tuple[int, ...], axis: int, ignore_label: int | None) -> Int[Array, "..."]:
    """The class of each position, IGNORED or NO_CLASS."""
    # Read NumPy arrays with NumPy, because JAX would truncate them: 2³² + 1 is not class 1.
    refuse_mask("labels", labels, "ignore_label")
    xp = jnp if isinstance(labels, jax.Array) else np
    given: Any = xp.asarray(labels)
    classes, positions = shape[axis], shape[:axis] + shape[axis + 1 :]
    if given.size != math.prod(positions):
        raise ValueError(
            f"labels: expected {math.prod(positions)} labels, one per position of shape {shape} without axis {axis}, "
            f"got {given.size} of shape {given.shape}"
        )
    if given.shape[:1] != shape[:1]:
        raise ValueError(f"labels: expected {shape[0]} as first dimension like the scores, got shape {given.shape}")
    integers = jnp.issubdtype(given.dtype, jnp.integer)
    if integers:
        y = at_least_int32(given)
    elif jnp.issubdtype(given.dtype, jnp.floating):
        y = xp.trunc(given.astype(compute_dtype(given.dtype)))
    else:
        raise TypeError(f"labels: expected real numbers, got dtype {given.dtype}")
    inside = (y >= 0) & (y < classes)
    ignored = xp.zeros(y.shape, bool)
    if ignore_label is not None:
        index = as_integer("ignore_label", ignore_label)
        ignored = equals(y, index) if xp is jnp and integers else y == (index if integers else float(index))
    check_labels("labels", given, inside | ignored, classes, ignore_label, "ignore_label")
    label = xp.where(inside, y, 0).astype(np.int32)  # NO_CLASS does not fit into every dtype
    label = xp.where(ignored, IGNORED, xp.where(inside, label, NO_CLASS))
    return jnp.asarray(label).reshape(positions)


def _scale(
    label: Int[Array, "..."],
    outer: tuple[int, ...],
    normalization: Normalization | None,
    normalize: bool | None,
    loss_weight: Float[ArrayLike, ""],
    dtype: jnp.dtype,
) -> Float[Array, ""]:
    """loss_weight/normaliser."""
    if normalize is not None and not isinstance(normalize, bool):
        raise TypeError(f"normalize: expected True, False or None, got {normalize!r}")
    if normalization is None:
        normalization = "BATCH_SIZE" if normalize is False else "VALID"
    counts = {"FULL": label.size, "VALID": jnp.sum(label != IGNORED), "BATCH_SIZE": math.prod(outer), "NONE": 1}
    if normalization not in counts:
        raise ValueError(f"normalization: expected one of {', '.join(counts)} or None, got {normalization!r}")
    weight = as_floating("loss_weight", loss_weight).astype(dtype)
    if weight.shape:
        raise ValueError(f"loss_weight: expected a scalar, got shape {weight.shape}")
    return weight / jnp.maximum(counts[normalization], 1).astype(dtype)
