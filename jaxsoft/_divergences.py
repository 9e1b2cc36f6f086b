"""Divergences between a student's and a teacher's softmax, of dense logits or tile by tile."""

import functools
from typing import Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float

from jaxsoft._arrays.checks import as_array, as_floating, as_option, broadcast, check_values
from jaxsoft._arrays.classes import Axis, dense_arguments, remove_classes
from jaxsoft._arrays.dtypes import is_removed, widen
from jaxsoft._arrays.sharding import AxisName, broadcast_like, shard_like, sum_shards
from jaxsoft._formula.head import Head, Untargeted, Values, evaluate, freeze_ignored
from jaxsoft._formula.statistics import Statistics, block_statistics, weighted
from jaxsoft._formula.targets import REDUCTIONS, Averaging, LogitsType, Options, Reduction, position_weights
from jaxsoft._jax_internals import Results, Tracer
from jaxsoft._linear.args import Execution, HeadArgs, Scaling, check_head
from jaxsoft._linear.mesh import BatchAxes
from jaxsoft._linear.run import run_head

Kind = Literal["forward", "reverse", "jensen-shannon"]


def kl_divergence(
    logits: Float[ArrayLike, "..."],
    teacher_logits: Float[ArrayLike, "..."],
    axis: Axis = -1,
    *,
    kind: Kind = "forward",
    beta: float = 0.5,
    weights: Float[ArrayLike, "..."] | Bool[ArrayLike, "..."] | None = None,
    where: Bool[ArrayLike, "..."] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """Divergence between s = softmax(logits) and a teacher's t = softmax(teacher_logits), in nats.

    forward: KL(t‖s) = Σ_j t_j log(t_j/s_j)        reverse: KL(s‖t)
    jensen-shannon: β·KL(t‖m) + (1 − β)·KL(s‖m),  m = βt + (1 − β)s

    KL(p‖q) is computed as Σ_j p_j (e^x − 1 − x) with x = log(q_j/p_j), which is the same because both sum to one: no
    term is negative, and even a divergence of 1e-8 is accurate. The gradient of the forward divergence is s − t.

    Args:
        logits: scores z of the student.
        teacher_logits: scores of the teacher, of the same shape. They are constants.
        axis: the class axis, several axes that together enumerate the classes, or None for all.
        kind: "forward", an expectation under the teacher, makes the student cover every mode of the teacher; "reverse",
            an expectation under the student, makes it seek a mode; "jensen-shannon" lies between them.
        beta: β in (0, 1), used by "jensen-shannon" only.
        weights: weight per position, or a boolean mask of the positions to keep.
        where: booleans that broadcast to the logits' shape; False masks a class in both.
        reduction: "none", "sum" or "mean", the sum divided by the sum of the weights.
        axis_name: the mesh axis over which the classes are sharded, as in `softmax`.

    Returns:
        The divergence in float32, or float64 for float64 logits: a scalar, or with "none" an array without `axis`.

    Edges: 0 for logits that differ by a constant, and if every class of either is masked. Infinite if the first
    distribution has a class that is masked in the second; the gradient of "reverse" is then NaN.

    Differentiation: with respect to logits, in reverse and forward mode to any order.

    Raises:
        TypeError, ValueError: as `cross_entropy`; an unknown kind, a β that is not between 0 and 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import kl_divergence
        >>> teacher, student = jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.zeros(3)
        >>> print(*(f"{kl_divergence(student, teacher, kind=kind):.4f}" for kind in ("forward", "reverse")))
        0.0589 0.0566

    Source: S. Kullback, R. A. Leibler, "On information and sufficiency" (1951); J. Lin, "Divergence measures based on
    the Shannon entropy" (1991); all three for distillation, R. Agarwal et al., "On-policy distillation of language
    models" (2024).
    """
    teacher_z = as_floating("teacher_logits", teacher_logits)
    shape = jnp.shape(as_floating("logits", logits))
    if teacher_z.shape != shape:
        raise ValueError(f"teacher_logits: expected the logits' shape {shape}, got {teacher_z.shape}")
    z, class_axis, mask, axis_name, (teacher_z,) = dense_arguments(logits, axis, where, axis_name, teacher_z)
    z, teacher_z = remove_classes(z, mask), remove_classes(teacher_z, mask)
    averaging = Averaging(as_option("reduction", reduction, REDUCTIONS))
    weight = jnp.expand_dims(position_weights(weights, LogitsType(z, class_axis, axis_name)), class_axis)
    check_values("logits", z, ~jnp.isnan(z) | (weight == 0), "a number")
    check_values("teacher_logits", teacher_z, ~jnp.isnan(teacher_z) | (weight == 0), "a number")
    operands = Untargeted(weight, lax.stop_gradient(shard_like(teacher_z, z)))
    return _kl_divergence(z, operands, _divergence_head(kind, beta), class_axis, averaging, axis_name)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _kl_divergence(
    logits: Array, operands: Untargeted, head: Head, axis: int, averaging: Averaging, axis_name: AxisName
) -> Array:
    (losses,), _ = cast(Values, evaluate(head, logits, operands, axis, axis_name))
    return averaging.reduce(losses, averaging.denominator(operands.position_weight, weighted=True), axis)


def linear_kl_divergence(
    features: Float[ArrayLike, "*positions features"],
    kernel: Float[ArrayLike, "features classes"],
    teacher_features: Float[ArrayLike, "*positions teacher_features"],
    teacher_kernel: Float[ArrayLike, "teacher_features classes"],
    bias: Float[ArrayLike, " classes"] | None = None,
    teacher_bias: Float[ArrayLike, " classes"] | None = None,
    *,
    kind: Kind = "forward",
    beta: float = 0.5,
    weights: Float[ArrayLike, "*positions"] | Bool[ArrayLike, "*positions"] | None = None,
    where: Bool[ArrayLike, " classes"] | None = None,
    soft_cap: Float[ArrayLike, ""] | None = None,
    teacher_soft_cap: Float[ArrayLike, ""] | None = None,
    temperature: Float[ArrayLike, ""] = 1.0,
    reduction: Reduction = "mean",
    kernel_axis: int = -1,
    memory_budget: int | None = None,
    axis_name: AxisName = None,
    batch_axes: BatchAxes = None,
) -> Float[Array, "..."]:
    """Divergence between the softmaxes of a student's and a teacher's linear layer, without storing either's logits.

    As `kl_divergence` of features @ kernel + bias and teacher_features @ teacher_kernel + teacher_bias

    Args:
        features: inputs of the student's layer; its other arguments are as in `linear_cross_entropy`.
        kernel: weights of the student's layer.
        teacher_features: inputs of the teacher's layer, for the same positions, of any width.
        teacher_kernel: weights of the teacher's layer, for the same classes. The teacher is a constant and costs one
            matmul.
        bias: bias of the student's layer; −inf masks a class, such as one that pads the vocabulary.
        teacher_bias: bias of the teacher's layer.
        kind: "forward", "reverse" or "jensen-shannon", as in `kl_divergence`.
        beta: β in (0, 1), used by "jensen-shannon" only.
        weights: weight per position, or a boolean mask of the positions to keep; a weight of 0 ignores a position.
        where: booleans of shape (classes,); False masks a class in both.
        soft_cap: soft cap of the student's logits.
        teacher_soft_cap: soft cap of the teacher's logits.
        temperature: T > 0, which divides the logits of both after the caps. Gradients shrink as 1/T²: multiply the
            loss by T² to keep its weight relative to a loss with labels (G. Hinton et al., 2015).
        reduction: "none", "sum" or "mean", the sum divided by the sum of the weights.
        kernel_axis: the class axis of both kernels.
        memory_budget: bytes that one tile may take: the logits of both layers, and arrays computed from them.
        axis_name: the mesh axis over which the classes of both are sharded, as in `linear_cross_entropy`.
        batch_axes: the mesh axes over which the positions are sharded, as in `linear_cross_entropy`.

    Returns:
        As `kl_divergence`.

    Edges: as `kl_divergence`.

    Differentiation: with respect to features, kernel and bias of the student, as `linear_cross_entropy`: a scalar loss
    takes three matmuls, and the teacher one.

    Raises:
        TypeError, ValueError: as `linear_cross_entropy`, for the teacher's arguments too.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import linear_kl_divergence
        >>> x, teacher = jnp.ones((2, 1)), jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
        >>> print(linear_kl_divergence(x, jnp.zeros((1, 3)), x, teacher).round(4))
        0.0589

    Source: as `kl_divergence`.
    """
    execution = Execution(kernel_axis, memory_budget, axis_name, batch_axes)
    args = check_head(features, kernel, bias, where, Scaling(soft_cap, temperature), execution)
    given = teacher_features, teacher_kernel, teacher_bias, where, Scaling(teacher_soft_cap, temperature)
    teacher = check_head(*given, execution, prefix="teacher_")
    positions, shape = args.layer.features.shape[:-1], teacher.layer.features.shape
    if shape[:-1] != positions:
        raise ValueError(f"teacher_features: expected the positions of features {positions} and a width, got {shape}")
    if teacher.classes != args.classes:
        raise ValueError(f"teacher_kernel: expected the kernel's {args.classes} classes, got {teacher.classes}")
    if weights is not None:
        weights = broadcast("weights", as_array("weights", weights), positions)
    averaging = Averaging(as_option("reduction", reduction, REDUCTIONS))
    config = args.config._replace(head=_divergence_head(kind, beta), averaging=averaging)
    (loss,) = run_head(HeadArgs(args.layer, None, Options(weights), lax.stop_gradient(teacher.layer)), config)
    return loss[..., 0] if reduction == "none" else loss


def _divergence_head(kind: Kind, beta: float) -> Head:
    if as_option("kind", kind, get_args(Kind)) != "jensen-shannon":
        return _divergence(kind, 0.5)
    if isinstance(beta, Tracer):
        raise TypeError("beta: expected a number known when the function is traced, got a traced value")
    if not 0 < float(beta) < 1:
        # As β → 0 the Jensen–Shannon divergence tends to 0, but divided by β to the forward one; likewise as β → 1.
        instead = {
            n: f"; libraries that accept it mean kind={kind!r}" for n, kind in ((0.0, "forward"), (1.0, "reverse"))
        }
        raise ValueError(f"beta: expected a number between 0 and 1, got {beta}{instead.get(float(beta), '')}")
    return _divergence(kind, float(beta))


class DivergenceStatistics(NamedTuple):
    """Statistics of student and teacher, the divergence, and the part of it that is a mean under the student."""

    student: Statistics
    teacher: Statistics
    divergence: Array
    under_student: Array

    @property
    def none_left(self) -> Array:
        """Whether every class of student or teacher is masked."""
        return (self.student.exp_sum == 0) | (self.teacher.exp_sum == 0)


@functools.cache
def _divergence(kind: Kind, beta: float) -> Head:
    """The head of the divergences of a kind from the teacher's logits."""
    statistics = functools.partial(_statistics, kind=kind, beta=beta)
    return Head(statistics, _values, functools.partial(_gradients, kind=kind, beta=beta))


def _statistics(
    logits: Array, axis: int, operands: Untargeted, axis_name: AxisName, *, kind: Kind, beta: float
) -> DivergenceStatistics:
    z_t = _teacher_logits(operands, logits)
    student, teacher = (block_statistics(z, axis, axis_name=axis_name) for z in (logits, z_t))
    s, t, r = _ratios(logits, z_t, student, teacher)

    def summed(p: Array, q: Array, x: Array) -> Array:
        return sum_shards(jnp.sum(_terms(p, q, x), axis, keepdims=True), axis_name)

    if kind != "jensen-shannon":
        divergence = summed(t, s, r) if kind == "forward" else summed(s, t, -r)
        return DivergenceStatistics(student, teacher, divergence, divergence)
    m = beta * t + (1 - beta) * s
    under_teacher, under_student = summed(t, m, _mixed(r, beta)), summed(s, m, _mixed(-r, 1 - beta))
    return DivergenceStatistics(student, teacher, beta * under_teacher + (1 - beta) * under_student, under_student)


def _values(operands: Untargeted, statistics: DivergenceStatistics, axis: int) -> Values:
    weight = lax.stop_gradient(operands.position_weight)
    return (jnp.where((weight == 0) | statistics.none_left, 0, weight * statistics.divergence),), ()


def _gradients(
    logits: Array,
    operands: Untargeted,
    statistics: DivergenceStatistics,
    axis: int,
    cotangents: Results,
    *,
    in_place: bool,
    kind: Kind,
    beta: float,
) -> tuple[Array, None]:
    ignored = operands.ignored | statistics.none_left
    logits, operands = freeze_ignored(logits, operands)
    scale = jnp.where(ignored, 0, cotangents[0]) * operands.position_weight
    s, t, r = _ratios(logits, _teacher_logits(operands, logits), statistics.student, statistics.teacher)
    if kind == "forward":
        gradient = s - t
    elif kind == "reverse":
        gradient = weighted(s, r - statistics.under_student)
    else:
        gradient = (1 - beta) * weighted(s, -_mixed(-r, 1 - beta) - statistics.under_student)
    gradient = jnp.where(broadcast_like(ignored, gradient), 0, scale * gradient)
    return gradient.astype(logits.dtype), None


def _teacher_logits(operands: Untargeted, logits: Array) -> Array:
    return cast(Array, operands.teacher).astype(widen(logits).dtype)


def _ratios(logits: Array, z_t: Array, student: Statistics, teacher: Statistics) -> tuple[Array, Array, Array]:
    """s, t and log s/t; 0 for a class that is masked in both."""
    z = widen(logits)
    s = jnp.exp(z - student.max_logit) / student.positive_sum
    t = jnp.exp(z_t - teacher.max_logit) / teacher.positive_sum
    shift = (student.max_logit - teacher.max_logit) + (jnp.log(student.positive_sum) - jnp.log(teacher.positive_sum))
    removed = is_removed(z) & is_removed(z_t)
    return s, t, jnp.where(removed, 0, jnp.where(removed, 0, z) - jnp.where(removed, 0, z_t) - shift)


def _mixed(r: Array, beta: float) -> Array:
    """log m/t for m = βt + (1 − β)s and r = log s/t."""
    low, high = jnp.minimum(r, 0), jnp.maximum(r, 0)
    return jnp.where(r > 0, high + jnp.log1p(beta * jnp.expm1(-high)), jnp.log1p((1 - beta) * jnp.expm1(low)))


def _terms(p: Array, q: Array, x: Array) -> Array:
    """p (e^x − 1 − x) for x = log q/p: terms of at least 0 that add up to KL(p‖q)."""
    near = jnp.abs(x) < 0.5
    small = jnp.where(near, x, 0)
    series = 1.0
    for n in range(12, 2, -1):  # e^x − 1 − x = x²/2 (1 + x/3 (1 + x/4 (…))): subtracting would cancel
        series = 1 + small / n * series
    far = jnp.where(near | (p == 0), 0, x)
    return jnp.where(near, p * small**2 / 2 * series, jnp.where(p == 0, q, q - p - p * far))
