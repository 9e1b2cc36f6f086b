"""Divergences between two softmaxes, tile by tile or of dense logits: a student's from a teacher's."""

import functools
from typing import Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float

from jaxsoft._checks import as_array, as_floating, as_mask, as_option, broadcast, check_values
from jaxsoft._classes import Axis, along_one_axis
from jaxsoft._dtypes import is_removed, widen
from jaxsoft._heads import Inputs, as_head, read_positions
from jaxsoft._jax_internals import Tracer
from jaxsoft._meshes import BatchAxes, broadcast_like, lay_like
from jaxsoft._platform import Axes
from jaxsoft._readings import Positions, Reading, Values, read, taking_part
from jaxsoft._shards import AxisName, as_axis_name, sum_shards
from jaxsoft._statistics import Statistics, block_statistics
from jaxsoft._targets import (
    REDUCTIONS,
    Options,
    Reduction,
    count_positions,
    position_weights,
    reduce_losses,
)

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

    KL(p‖q) is taken as Σ_j p_j (e^x − 1 − x) for x = log(q_j/p_j), which is the same because both sum to one: no term
    is negative, and one of 1e-8 has its digits. The gradient of the forward one is s − t.

    Args:
        logits: scores z of the student.
        teacher_logits: those of the teacher, of the same shape. They are constants.
        axis: the class axis, several axes that together enumerate the classes, or None for all.
        kind: "forward", which has its mean under the teacher and makes the student cover all that it does; "reverse",
            under the student, which makes it keep to where the teacher is; or "jensen-shannon" between them.
        beta: β in (0, 1), of "jensen-shannon" alone.
        weights: weight of each position, or a mask of those that take part.
        where: booleans that broadcast to the logits' shape; False removes a class of both.
        reduction: "none", "sum" or "mean", which is over the weights.
        axis_name: the mesh axis over which the classes are sharded, as in `softmax`.

    Returns:
        The divergence in float32, or float64 for float64 logits: a scalar, or with "none" an array without `axis`.

    Edges: 0 for equal logits, whatever constant is added to either, and where one of both has no class left. Infinite
    where the first of the two has a class which the second has not; there the reverse has no gradient but NaN.

    Differentiation: to logits, in reverse mode to any order and forward over reverse.

    Raises:
        TypeError, ValueError: as `cross_entropy`; a kind that is none of these, a β that is not between 0 and 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import kl_divergence
        >>> teacher, student = jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.zeros(3)
        >>> print(*(f"{kl_divergence(student, teacher, kind=kind):.4f}" for kind in ("forward", "reverse")))
        0.0589 0.0566

    Source: S. Kullback, R. A. Leibler, "On information and sufficiency" (1951); J. Lin, "Divergence measures based on
    the Shannon entropy" (1991); between them for distillation, R. Agarwal et al., "On-policy distillation of language
    models" (2024).
    """
    z, of_teacher = as_floating("logits", logits), as_floating("teacher_logits", teacher_logits)
    if z.shape != of_teacher.shape:
        raise ValueError(f"teacher_logits: expected the logits' shape {z.shape}, got {of_teacher.shape}")
    if where is not None:
        mask = lay_like(as_mask("where", where, z.shape), z)
        z, of_teacher = jnp.where(mask, z, -jnp.inf), jnp.where(mask, of_teacher, -jnp.inf)
    axis, z, (of_teacher,) = along_one_axis(axis, axis_name, z, of_teacher)
    if z.shape[axis] == 0:
        raise ValueError(f"logits: expected at least one class along axis {axis}, got shape {z.shape}")
    axis_name = as_axis_name(axis_name, "logits", z)
    reduction = as_option("reduction", reduction, REDUCTIONS)
    share = jnp.expand_dims(position_weights(weights, z, axis), axis)
    check_values("logits", z, ~jnp.isnan(z) | (share == 0), "a number")
    check_values("teacher_logits", of_teacher, ~jnp.isnan(of_teacher) | (share == 0), "a number")
    positions = Positions(share, lax.stop_gradient(lay_like(of_teacher, z)))
    return _kl_divergence(z, positions, _as_reading(kind, beta), axis, reduction, axis_name)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _kl_divergence(
    logits: Array, positions: Positions, reading: Reading, axis: int, reduction: Reduction, axis_name: AxisName
) -> Array:
    count, _ = count_positions(positions.share, positions.share, Options(), reduction, 0, ())
    (losses,), _ = cast(Values, read(reading, logits, positions, axis, axis_name))
    return reduce_losses(losses, reduction, count, axis)


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
    """Divergence between two linear layers' softmaxes, as of a student from its teacher, with neither's logits stored.

    As `kl_divergence` of features @ kernel + bias and teacher_features @ teacher_kernel + teacher_bias

    Args:
        features: inputs of the student's layer; its other arguments are as in `linear_cross_entropy`.
        kernel: weights of the student's layer.
        teacher_features: inputs of the teacher's, of the same positions and any width.
        teacher_kernel: weights of the teacher's, for the same classes. The teacher is a constant: it costs one product.
        bias: of the student's; −inf removes a class, as one that pads its vocabulary.
        teacher_bias: of the teacher's.
        kind: "forward", "reverse" or "jensen-shannon", as in `kl_divergence`.
        beta: β in (0, 1), of "jensen-shannon" alone.
        weights: weight of each position, or a mask of those that take part; 0 leaves a position out.
        where: booleans of shape (classes,); False removes a class of both.
        soft_cap: of the student's logits.
        teacher_soft_cap: of the teacher's.
        temperature: T > 0, which divides both's logits after the caps. Gradients shrink as 1/T²: multiply by T² for
            those of different T to weigh alike beside a loss of labels (G. Hinton et al., 2015).
        reduction: "none", "sum" or "mean", which is over the weights.
        kernel_axis: the class axis of both kernels.
        memory_budget: bytes that one tile of both's logits and what is computed from them may take.
        axis_name: the mesh axis over which the classes of both are laid, as in `linear_cross_entropy`.
        batch_axes: the mesh axes over which the positions are laid, as in `linear_cross_entropy`.

    Returns:
        As `kl_divergence`.

    Edges: as `kl_divergence`.

    Differentiation: to features, kernel and bias of the student, as `linear_cross_entropy`: for a scalar three
    products, and the teacher's one.

    Raises:
        TypeError, ValueError: as `linear_cross_entropy`, of the teacher's arguments too.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import linear_kl_divergence
        >>> x, teacher = jnp.ones((2, 1)), jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
        >>> print(linear_kl_divergence(x, jnp.zeros((1, 3)), x, teacher).round(4))
        0.0589

    Source: as `kl_divergence`.
    """
    more = (temperature, kernel_axis, memory_budget, axis_name, batch_axes)
    head = as_head(features, kernel, bias, where, soft_cap, *more)
    of_teacher = as_head(teacher_features, teacher_kernel, teacher_bias, where, teacher_soft_cap, *more, "teacher_")
    positions = head.layer.features.shape[:-1]
    if of_teacher.layer.features.shape[:-1] != positions:
        got = of_teacher.layer.features.shape
        raise ValueError(f"teacher_features: expected the positions of features {positions} and a width, got {got}")
    if of_teacher.classes != head.classes:
        raise ValueError(f"teacher_kernel: expected the kernel's {head.classes} classes, got {of_teacher.classes}")
    if weights is not None:
        weights = broadcast("weights", as_array("weights", weights), positions)
    static = head.static._replace(
        reading=_as_reading(kind, beta),
        reduction=as_option("reduction", reduction, REDUCTIONS),
    )
    teacher = lax.stop_gradient(of_teacher.layer)
    (loss,) = read_positions(Inputs(head.layer, None, Options(weights), teacher), static)
    return loss[..., 0] if reduction == "none" else loss


def _as_reading(kind: Kind, beta: float) -> Reading:
    if as_option("kind", kind, get_args(Kind)) != "jensen-shannon":
        return divergences(kind, 0.5)
    if isinstance(beta, Tracer):
        raise TypeError("beta: expected a number known when the function is traced, got a traced value")
    if not 0 < float(beta) < 1:
        # Divided by β, or 1 − β, it tends to these; itself it tends to 0.
        instead = {0.0: "; elsewhere that means kind='forward'", 1.0: "; elsewhere that means kind='reverse'"}
        raise ValueError(f"beta: expected a number between 0 and 1, got {beta}{instead.get(float(beta), '')}")
    return divergences(kind, float(beta))


class Divergence(NamedTuple):
    """Statistics of both, and what is summed with them."""

    student: Statistics
    teacher: Statistics
    total: Array
    of_student: Array  # the divergence from the student alone to the other, as its gradient has it

    @property
    def none_left(self) -> Array:
        """Where one of both has no class left."""
        return (self.student.exp_sum == 0) | (self.teacher.exp_sum == 0)


@functools.cache
def divergences(kind: Kind, beta: float) -> Reading:
    """The divergences of a kind from the logits that stand beside those that are read."""

    def as_wide(positions: Positions, logits: Array) -> Array:
        return cast(Array, positions.beside).astype(widen(logits).dtype)

    def ratios(logits: Array, beside: Array, student: Statistics, teacher: Statistics) -> tuple[Array, Array, Array]:
        """s, t and log s/t; 0 for a class that is removed from both."""
        z, z_t = widen(logits), beside
        s = jnp.exp(z - student.largest) / student.total
        t = jnp.exp(z_t - teacher.largest) / teacher.total
        shift = (student.largest - teacher.largest) + (jnp.log(student.total) - jnp.log(teacher.total))
        removed = is_removed(z) & is_removed(z_t)
        return s, t, jnp.where(removed, 0, jnp.where(removed, 0, z) - jnp.where(removed, 0, z_t) - shift)

    def statistics(logits: Array, axes: Axes, positions: Positions, axis_name: AxisName) -> Divergence:
        beside = as_wide(positions, logits)
        student, teacher = (block_statistics(z, axes, axis_name=axis_name) for z in (logits, beside))
        s, t, r = ratios(logits, beside, student, teacher)

        def summed(terms: Array) -> Array:
            return sum_shards(jnp.sum(terms, axes, keepdims=True), axis_name)

        if kind == "forward":
            total = summed(_terms(t, s, r))
            return Divergence(student, teacher, total, total)
        if kind == "reverse":
            total = summed(_terms(s, t, -r))
            return Divergence(student, teacher, total, total)
        m = beta * t + (1 - beta) * s
        one, other = summed(_terms(t, m, _mixed(r, beta))), summed(_terms(s, m, _mixed(-r, 1 - beta)))
        return Divergence(student, teacher, beta * one + (1 - beta) * other, other)

    def values(positions: Positions, found: Divergence, axes: Axes) -> Values:
        share = lax.stop_gradient(positions.share)
        return (jnp.where((share == 0) | found.none_left, 0, share * found.total),), ()

    def gradients(
        logits: Array,
        positions: Positions,
        found: Divergence,
        axes: Axes,
        cotangents: tuple[Array],
        *,
        in_place: bool = False,
    ) -> tuple[Array, None]:
        idle, (logits, positions) = positions.idle | found.none_left, taking_part(logits, positions)
        share = jnp.where(idle, 0, cotangents[0]) * positions.share
        s, t, r = ratios(logits, as_wide(positions, logits), found.student, found.teacher)
        if kind == "forward":
            gradient = s - t
        elif kind == "reverse":
            gradient = jnp.where(s == 0, 0, s * (jnp.where(s == 0, 0, r) - found.of_student))
        else:
            x = _mixed(-r, 1 - beta)
            gradient = (1 - beta) * jnp.where(s == 0, 0, s * (jnp.where(s == 0, 0, -x) - found.of_student))
        gradient = jnp.where(broadcast_like(idle, gradient), 0, share * gradient)
        return gradient.astype(logits.dtype), None

    return Reading(statistics, values, gradients)


def _mixed(r: Array, beta: float) -> Array:
    """log m/t for m = βt + (1 − β)s and r = log s/t."""
    low, high = jnp.minimum(r, 0), jnp.maximum(r, 0)
    return jnp.where(r > 0, high + jnp.log1p(beta * jnp.expm1(-high)), jnp.log1p((1 - beta) * jnp.expm1(low)))


def _terms(p: Array, q: Array, x: Array) -> Array:
    """p (e^x − 1 − x) for x = log q/p: terms of at least 0 that add up to KL(p‖q)."""
    near = jnp.abs(x) < 0.5
    small = jnp.where(near, x, 0)
    series = 1.0
    for n in range(12, 2, -1):  # e^x − 1 − x = x²/2 (1 + x/3 (1 + x/4 (…))), by subtraction nothing would be left
        series = 1 + small / n * series
    far = jnp.where(near | (p == 0), 0, x)
    return jnp.where(near, p * small**2 / 2 * series, jnp.where(p == 0, q, q - p - p * far))
