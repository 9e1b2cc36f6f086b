"""Softmax, its logarithm and its normaliser: each public function next to its derivative rule."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from jaxsoft._arrays.checks import as_axes, as_floating, as_mask, check_values
from jaxsoft._arrays.classes import remove_classes
from jaxsoft._arrays.dtypes import widen
from jaxsoft._arrays.sharding import AxisName, as_axis_name, shard_like, sum_shards
from jaxsoft._custom_vjp import with_rule
from jaxsoft._formula.statistics import Statistics, block_statistics, leading_statistics, scaled_exponentials
from jaxsoft._jax_internals import Results
from jaxsoft._platform import cpu
from jaxsoft._platform.dispatch import Axes, with_local_impl


def softmax(
    logits: Float[ArrayLike, "..."],
    axis: int | Sequence[int] | None = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """Probabilities proportional to the exponentials of the logits.

    s_i = exp(z_i) / Σ_j exp(z_j)

    The derivative is a `jax.custom_vjp` with the rule s * (g − s·g), which saves only s and computes no Jacobian.
    Mapping `softmax` with `jax.vmap` over batch and spatial axes equals passing `axis`.

    Args:
        logits: scores z of any shape, in float16, bfloat16, float32 or float64 (integers are promoted).
        axis: the class axis, several axes that together enumerate the classes, or None for all.
        where: booleans that broadcast to the logits' shape; False masks a class.
        axis_name: inside `jax.shard_map`, the mesh axis over which the classes are sharded in blocks. The result is
            this block of the whole softmax, at the cost of two all-reduces of one number per vector, three with the
            gradient.

    Returns:
        Array of the logits' shape and dtype that sums to one over `axis`. Half precision is reduced in float32.

    Edges: a masked class has probability 0 and gradient 0 whatever its logit is, even NaN. If every class
    is masked, or every logit is −inf, all probabilities and gradients are 0. A NaN or +inf logit that is
    not masked makes its own vector NaN.

    Exactness: s and its derivative are accurate to the rounding of s. In float32, at a margin of about 17 over the
    log-sum-exp of the other classes, s rounds to 1 and its own derivative, s (1 − s), to 0, except in reverse mode on a
    CPU with kernels; the other classes stay accurate. For the loss of a label take `cross_entropy`, which stays
    accurate at every margin.

    Differentiation: reverse and forward mode to any order. The Jacobian is symmetric, so the same rule
    s * (g − s·g) maps cotangents of s to the logits and tangents of the logits to s.

    Raises:
        TypeError: logits that are not real numbers, a mask that is not boolean, an axis that is not an integer.
        ValueError: an axis out of range or repeated, a mask that does not broadcast, an `axis_name` that
            no enclosing `shard_map` has.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import softmax
        >>> print(softmax(jnp.array([1.0, 2.0, 3.0])).round(4))
        [0.09   0.2447 0.6652]

    Source: J. S. Bridle, "Probabilistic interpretation of feedforward classification network
    outputs" (1990). The shift by the maximum: P. Blanchard, D. J. Higham, N. J. Higham, "Accurately
    computing the log-sum-exp and softmax functions" (2021).
    """
    prepared, axes, mask, axis_name = _prepare(logits, axis, where, axis_name)
    probs = _softmax(prepared, axes, axis_name)
    return probs if mask is None else jnp.where(mask, probs, 0)


def _softmax_fwd(logits: Array, axes: Axes, axis_name: AxisName) -> tuple[Array, Array]:
    (probs,) = _probs((logits,), axes, axis_name)
    return probs, probs


@with_local_impl(cpu=cpu.softmax)
def _probs(arrays: tuple[Array], axes: Axes, axis_name: AxisName = None) -> tuple[Array]:
    (logits,) = arrays
    statistics = block_statistics(logits, axes, axis_name=axis_name)
    return ((jnp.exp(widen(logits) - statistics.max_logit) / statistics.positive_sum).astype(logits.dtype),)


def _softmax_bwd(axes: Axes, axis_name: AxisName, probs: Array, cotangent: Array) -> tuple[Array]:
    return (softmax_vjp(probs, cotangent, axes, axis_name=axis_name),)


_softmax = with_rule(_softmax_fwd, _softmax_bwd)


def softmax_vjp(
    probs: Float[ArrayLike, "..."],
    cotangent: Float[ArrayLike, "..."],
    axis: int | Sequence[int] | None = -1,
    *,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """The vector-Jacobian product (VJP) of softmax, from the probabilities alone.

    (diag(s) − s sᵀ) g = s * (g − s·g)

    Args:
        probs: softmax output s, of any shape.
        cotangent: the gradient g of a scalar to s, of the same shape.
        axis: the class axis, several axes, or None for all, as given to `softmax`.
        axis_name: the mesh axis over which the classes are sharded, as given to `softmax`.

    Returns:
        The gradient with respect to the logits, of the shape and dtype of `probs`. Half precision is reduced
        in float32. The Jacobian is symmetric, so the same call maps a tangent of the logits to a tangent of s.

    Edges: a class of probability 0 has gradient 0. A cotangent that is constant over the classes gives 0.

    Raises:
        TypeError: arguments that are not real numbers, an axis that is not an integer.
        ValueError: shapes that differ, an axis out of range or repeated.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import softmax, softmax_vjp
        >>> s = softmax(jnp.array([1.0, 2.0, 3.0]))
        >>> print(softmax_vjp(s, jnp.array([0.5, -1.0, 2.0])).round(4))
        [-0.0568 -0.5215  0.5782]

    Source: J. S. Bridle (1990); as one dot product and one elementwise product in Y. Jia et al.,
    "Caffe: convolutional architecture for fast feature embedding" (2014).
    """
    s, g = as_floating("probs", probs), as_floating("cotangent", cotangent)
    if s.shape != g.shape:
        raise ValueError(f"cotangent: expected the shape of probs {s.shape}, got {g.shape}")
    axes, g = as_axes(axis, s.ndim), shard_like(g, s)
    axis_name = as_axis_name(axis_name, "probs", s)
    return _compiled_pullback(s, g, axes, axis_name)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _compiled_pullback(probs: Array, cotangent: Array, axes: Axes, axis_name: AxisName) -> Array:
    return _pulled_back((probs, cotangent), axes, axis_name)[0]


@with_local_impl(cpu=cpu.softmax_vjp)
def _pulled_back(arrays: tuple[Array, Array], axes: Axes, axis_name: AxisName = None) -> tuple[Array]:
    s = widen(arrays[0])
    g = arrays[1].astype(s.dtype)
    dot = sum_shards(jnp.sum(s * g, axes, keepdims=True), axis_name)
    return ((s * (g - dot)).astype(arrays[0].dtype),)


def softmax_jacobian(probs: Float[ArrayLike, "*batch classes"]) -> Float[Array, "*batch classes classes"]:
    """The matrix of all derivatives ∂s_i/∂z_j, for inspection. For computations use `softmax_vjp`.

    J = diag(s) − s sᵀ, that is J_ij = s_i (δ_ij − s_j)

    Args:
        probs: softmax output s with the classes along the last axis.

    Returns:
        Array of shape (..., classes, classes) and the dtype of `probs`: one symmetric matrix per vector.

    Edges: rows sum to zero; a probability of 1 makes the matrix zero.

    Raises:
        TypeError: probabilities that are not real numbers.
        ValueError: an array without a class axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import softmax_jacobian
        >>> print(softmax_jacobian(jnp.array([0.1, 0.2, 0.7])).round(2))
        [[ 0.09 -0.02 -0.07]
         [-0.02  0.16 -0.14]
         [-0.07 -0.14  0.21]]

    Source: J. S. Bridle (1990).
    """
    s = as_floating("probs", probs)
    if s.ndim == 0:
        raise ValueError("probs: expected at least one axis, the classes, got a scalar")
    across = jnp.expand_dims(s, -2)
    eye = jnp.expand_dims(jnp.eye(s.shape[-1], dtype=s.dtype), tuple(range(s.ndim - 1)))
    return jnp.expand_dims(s, -1) * (eye - across)


def log_softmax(
    logits: Float[ArrayLike, "..."],
    axis: int | Sequence[int] | None = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """Logarithms of the softmax probabilities, without forming the probabilities.

    log s_i = z_i − log Σ_j exp(z_j)        vjp: g − s Σ_j g_j

    Args:
        logits: scores z of any shape, in float16, bfloat16, float32 or float64 (integers are promoted).
        axis: the class axis, several axes, or None for all.
        where: booleans that broadcast to the logits' shape; False masks a class.
        axis_name: the mesh axis over which the classes are sharded, as in `softmax`.

    Returns:
        Array of the logits' shape and dtype. Half precision is reduced in float32.

    Edges: a masked class has −inf and gradient 0, and its cotangent is dropped. If every class is masked all are −inf.

    Exactness: accurate to rounding, except near 0, where a log-probability and its derivative with respect to its own
    logit round to 0 as 1 − s and its derivative do (see `softmax`). For the loss of a label take `cross_entropy`.

    Differentiation: as `softmax`; the logits and two numbers per vector are saved for the backward pass.

    Raises:
        TypeError, ValueError: as `softmax`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import log_softmax
        >>> print(log_softmax(jnp.array([0.0, 0.0])).round(4))
        [-0.6931 -0.6931]

    Source: P. Blanchard, D. J. Higham, N. J. Higham (2021).
    """
    prepared, axes, mask, axis_name = _prepare(logits, axis, where, axis_name)
    log_probs = _log_softmax(prepared, axes, axis_name)
    return log_probs if mask is None else jnp.where(mask, log_probs, -jnp.inf)


def _log_softmax_fwd(logits: Array, axes: Axes, axis_name: AxisName) -> tuple[Array, tuple[Array, ...]]:
    log_probs, *sums = _log_probs((logits,), axes, axis_name)
    return log_probs, (logits, *sums)


@with_local_impl(cpu=cpu.log_softmax)
def _log_probs(arrays: tuple[Array], axes: Axes, axis_name: AxisName = None) -> tuple[Array, Array, Array]:
    (logits,) = arrays
    statistics = block_statistics(logits, axes, axis_name=axis_name)
    log_probs = widen(logits) - statistics.max_logit - jnp.log(statistics.positive_sum)
    return log_probs.astype(logits.dtype), statistics.max_logit, statistics.positive_sum


def _log_softmax_bwd(axes: Axes, axis_name: AxisName, residuals: tuple[Array, ...], cotangent: Array) -> Results:
    return _log_pulled_back((*residuals, cotangent), axes, axis_name)


@with_local_impl(cpu=cpu.log_softmax_vjp)
def _log_pulled_back(arrays: tuple[Array, ...], axes: Axes, axis_name: AxisName = None) -> tuple[Array]:
    logits, max_logit, total, g = map(widen, arrays)
    # From the logits, not from the result, whose exponentials would not sum to one in half precision.
    probs = jnp.exp(logits - max_logit) / total
    total_cotangent = sum_shards(jnp.sum(g, axes, keepdims=True), axis_name)
    return ((g - probs * total_cotangent).astype(arrays[0].dtype),)


_log_softmax = with_rule(_log_softmax_fwd, _log_softmax_bwd)


def logsumexp(
    logits: Float[ArrayLike, "..."],
    axis: int | Sequence[int] | None = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    keepdims: bool = False,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """Logarithm of the sum of exponentials: softmax's normaliser, the log partition function.

    lse = log Σ_j exp(z_j)        vjp: softmax(z)·g

    Args:
        logits: scores z of any shape, in float16, bfloat16, float32 or float64 (integers are promoted).
        axis: the class axis (by default the last, unlike `jax.nn.logsumexp`), several axes, or None for all.
        where: booleans that broadcast to the logits' shape; False masks a class.
        keepdims: keep the reduced axes with length one.
        axis_name: the mesh axis over which the classes are sharded, as in `softmax`; the result is over all classes.

    Returns:
        Array of the logits' dtype without `axis`. Half precision is reduced in float32.

    Edges: −inf with gradient 0 if every class is masked. A +inf logit gives +inf.

    Exactness: computed as m + log1p(Σ exp(z_j − m)), where the sum omits one class with the largest logit m. It stays
    accurate near 0, where log(1 + …) would round to 0: logsumexp([0, −20]) is 2.06e-9.

    Differentiation: as `softmax`; the logits and two numbers per vector are saved for the backward pass.

    Raises:
        TypeError, ValueError: as `softmax`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import logsumexp
        >>> print(logsumexp(jnp.zeros(8)).round(4))
        2.0794

    Source: P. Blanchard, D. J. Higham, N. J. Higham (2021).
    """
    prepared, axes, _, axis_name = _prepare(logits, axis, where, axis_name)
    lse = _logsumexp(prepared, axes, axis_name)
    return lse if keepdims else jnp.squeeze(lse, axes)


def _logsumexp_fwd(logits: Array, axes: Axes, axis_name: AxisName) -> tuple[Array, tuple[Array, Statistics]]:
    statistics = leading_statistics(logits, axes, axis_name)
    return statistics.logsumexp.astype(logits.dtype), (logits, statistics)


def _logsumexp_bwd(
    axes: Axes, axis_name: AxisName, residuals: tuple[Array, Statistics], cotangent: Array
) -> tuple[Array]:
    logits, statistics = residuals
    # If every class is masked the gradient is 0, whatever the cotangent is.
    g = jnp.where(statistics.exp_sum == 0, 0, widen(cotangent))
    return (scaled_exponentials(logits, statistics.max_logit, g / statistics.positive_sum, axes),)


_logsumexp = with_rule(_logsumexp_fwd, _logsumexp_bwd)


def _prepare(
    logits: ArrayLike, axis: int | Sequence[int] | None, where: ArrayLike | None, axis_name: AxisName
) -> tuple[Array, Axes, Array | None, AxisName]:
    """The logits with masked classes at −inf, the class axes, the mask, and the mesh axes of the classes.

    A mask is applied to the result as well, so that a cotangent at a masked class, NaN included
    (the derivative of p log p at 0), does not reach the others.
    """
    array = as_floating("logits", logits)
    axes = as_axes(axis, array.ndim)
    mask = None if where is None else shard_like(as_mask("where", where, array.shape), array)
    array = remove_classes(array, mask)
    check_values("logits", array, ~jnp.isnan(array), "a number")
    return array, axes, mask, as_axis_name(axis_name, "logits", array)
