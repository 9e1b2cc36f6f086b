"""The gradient doctor: compare a gradient with the true one, and with those of the usual mistakes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import ArrayLike, Bool, Float, Int

from jaxsoft._checks import as_axis
from jaxsoft._cross_entropy import cross_entropy
from jaxsoft._softmax import softmax, softmax_vjp

# What rounding may do to a right gradient, relative to each of its vectors, by the bits of its mantissa.
TOLERANCE = {52: 1e-4, 23: 1e-4, 10: 2e-3, 7: 2e-2}


class _Precision(NamedTuple):
    """What rounding may do: relative to a vector, the spacing of numbers at one, the smallest normal number."""

    tolerance: float
    eps: float
    tiny: float


@dataclass(frozen=True, eq=False)  # arrays have no one truth value to be equal by
class Diagnosis:
    """What `diagnose_gradient` found; printing it prints the explanation."""

    correct: bool
    verdict: str  # a few words, the same for the same finding
    explanation: str  # sentences
    true_gradient: Float[np.ndarray, "..."]  # of the sum of the losses
    error: float  # distance from the true gradient of the sum or a mean, whichever is nearest, over its norm
    row_sums: Float[np.ndarray, "..."]  # over the classes; zero in every right gradient

    def __str__(self) -> str:
        return self.explanation


def diagnose_gradient(
    logits: Float[ArrayLike, "..."],
    targets: Int[ArrayLike, "..."] | Float[ArrayLike, "..."],
    gradient: Float[ArrayLike, "..."],
    axis: int = -1,
) -> Diagnosis:
    """Say whether a gradient of the cross-entropy to the logits is right, and if not, why.

    The truth is τ·softmax(z) − t, with τ = Σ_j t_j, divided by the number of positions for a mean.

    Args:
        logits: the scores z at which the gradient was computed, NumPy or JAX, classes along `axis`.
        targets: integer labels of the logits' shape without the class axis, where one outside
            [0, classes) marks an ignored position; or a distribution of the logits' shape.
        gradient: what is to be judged, of the logits' shape (or, of a matrix, transposed).
        axis: the class axis.

    Returns:
        A `Diagnosis`: whether the gradient is that of the sum or of a mean, a verdict, an explanation,
        the true gradient, how far the given one is from it, and its sums over the classes.

    Edges: the comparison is made for each position and for the whole, in float64, and allows for the
    rounding of the gradient's dtype: 1e-4 of a vector's length in float32 and float64, 2e-3 in float16
    and 2e-2 in bfloat16. Mistakes are recognised whether summed or averaged. With two classes and one
    position some are the truth up to a factor; such a mistake is named where its factor is exact. This
    is a tool for concrete arrays, not for `jit`.

    Raises:
        TypeError: traced arrays, or arrays that are not real numbers.
        ValueError: shapes that do not fit, logits or targets that are not finite, no positions.

    Example:
        >>> import numpy as np
        >>> from jaxsoft import diagnose_gradient
        >>> z, t = np.array([-1.34, -0.02, 1.48]), np.array([0.0, 1.0, 0.0])
        >>> o = np.exp(z) / np.exp(z).sum()
        >>> diagnose_gradient(z, t, o - t).verdict
        'correct for the sum'
        >>> diagnose_gradient(z, t, -t * (1 - o)).verdict
        'off-diagonal terms missing'

    Source: J. S. Bridle (1990) for the truth; the mistakes are those of public questions and answers.
    """
    z, t, ignored, dtype = _read_problem(logits, targets, axis)
    g = _read("gradient", gradient)
    problem = _solve(z, t, ignored)
    given = _floating_dtype("gradient", gradient)
    limits = jnp.finfo(given)
    precision = _Precision(TOLERANCE[limits.nmant], float(limits.eps), float(limits.tiny))
    truth, scales = problem.truth, problem.scales
    restored = np.moveaxis(truth, -1, axis)
    if g.shape != restored.shape:
        turned = np.moveaxis(g.T, axis, -1) if g.ndim == 2 and g.T.shape == restored.shape else None
        if turned is not None and _factor(turned, truth, precision) is not None:
            return Diagnosis(False, "transposed", MISTAKES["transposed"], restored, np.inf, turned.sum(-1))
        raise ValueError(f"gradient: expected the logits' shape {restored.shape}, got {g.shape}")
    g = np.moveaxis(g, axis, -1)
    tiny = precision.tiny
    if given != np.float16:  # differences of a few smallest normal numbers: a device may flush those to zero
        tiny *= 4 * max(scales.values())
        g = np.where(np.abs(g - truth) < tiny, truth, g)
    with np.errstate(all="ignore"):  # inf − inf, or the square of a huge number
        row_sums = g.sum(-1)
        error = min(_distance(g, truth / n) for n in scales.values())

    def found(verdict: str, explanation: str, *, correct: bool = False) -> Diagnosis:
        return Diagnosis(correct, verdict, explanation, restored, error, row_sums)

    if not np.isfinite(g).all():
        return found("not finite", _why_not_finite(z, t, g, min(given, dtype, key=lambda d: jnp.finfo(d).nmant)))
    for name, count in scales.items():
        if _matches(g, truth / count, precision):
            return found(f"correct for the {name}", f"This is the gradient of the {name} of the losses.", correct=True)
    if not g.any():
        return found("all zero", MISTAKES["all zero"])
    live = ~ignored
    if ignored.any() and any(_matches(g[live], truth[live] / count, precision) for count in scales.values()):
        return found("ignored positions not zeroed", MISTAKES["ignored positions not zeroed"])
    candidates = [(name, candidate) for name, make in CANDIDATES.items() for candidate in make(problem)]
    # A mistake in a sum or a mean is likelier than the truth times an odd number, and that than both at once.
    for name, candidate in candidates:
        if any(_matches(g, candidate / count, precision) for count in scales.values()):
            return found(name, MISTAKES[name])
    # Only where a target was subtracted: the other classes' probabilities lose nothing.
    lost = precision.tolerance * np.abs(truth) + 4 * precision.eps * np.abs(t) + tiny
    if any((np.abs(count * g - truth) <= lost).all() for count in scales.values()):
        return found("lost to rounding", MISTAKES["lost to rounding"])
    factor = _factor(g, truth, precision)
    if factor is not None and factor < 0:
        return found("opposite sign", MISTAKES["opposite sign"] + f" The factor is {factor:.6g}.")
    if factor is not None:
        return found(f"right up to a factor of {factor:.6g}", MISTAKES["factor"].format(factor=factor))
    for name, candidate in candidates:
        if np.count_nonzero(candidate) > 1 and (factor := _factor(g, candidate, precision)) is not None and factor > 0:
            return found(name, MISTAKES[name] + f" Besides, it is multiplied by {factor:.6g}.")
    nearest = truth / min(scales.values(), key=lambda n: _distance(g, truth / n))
    return found("wrong", _how_wrong(g, nearest, error, precision.tolerance))


MISTAKES = {
    "transposed": "This is the true gradient transposed: classes and samples are exchanged.",
    "all zero": "Every entry is zero, and the true gradient is not. The gradient of sum(softmax(z)) is zero "
    "everywhere, since the probabilities always sum to one: was that differentiated instead of the loss?",
    "opposite sign": "This is the true gradient with the opposite sign: descending along it climbs.",
    "factor": "The direction is right and the length is not: this is {factor:.6g} times the gradient of the sum, and "
    "no mean over positions makes that factor.",
    "off-diagonal terms missing": "This is −t(1 − o), the chain rule along ∂o_j/∂z_j alone. Every output depends on "
    "every logit: the terms ∂o_i/∂z_j = −o_i o_j for i ≠ j are missing, and with them every update where t_j = 0. "
    "Summed over all outputs the result is τo − t, where τ is the sum of the targets. What is computed here is the "
    "gradient of no function.",
    "Jacobian once too often": "This is the true gradient multiplied by softmax's Jacobian once more. o − t already "
    "contains the derivative of softmax; multiplying again gives the gradient of the Brier score ½‖o − t‖².",
    "elementwise derivative": "This is (o − t)·o(1 − o), as if softmax acted on each logit alone, like a sigmoid. "
    "o − t already contains the derivative of softmax; and with the off-diagonal terms left out this is the gradient "
    "of no function.",
    "label not subtracted": "This is τo: the targets were not subtracted from the probabilities.",
    "targets do not sum to one": "This is o − t, but some targets sum to τ ≠ 1: the gradient is τo − t.",
    "softmax over the wrong axis": "The probabilities were normalised over another axis than that of the classes.",
    "labels shifted by one": "This is the gradient for labels one higher or lower: are the classes counted from 0?",
    "ignored positions not zeroed": "The gradient is right but where positions are ignored: there it must be zero for "
    "all classes, not only for the label's.",
    "lost to rounding": "This is right to the rounding of one, but smaller than that: p − 1 was computed where p "
    "rounds to 1. The gradient of a label is minus the sum of the other probabilities, as in `cross_entropy`.",
}


class _Problem(NamedTuple):
    """Everything the mistakes are made of, in float64, classes last."""

    z: np.ndarray
    t: np.ndarray  # zero where ignored
    o: np.ndarray
    truth: np.ndarray  # of the sum
    scales: dict[str, int]  # by what each reduction divides


def _other_axes(p: _Problem) -> Iterator[np.ndarray]:
    live = p.t.any(-1, keepdims=True)
    for axis in range(p.z.ndim - 1):
        wrong = np.asarray(_in_float64(softmax, p.z, axis))
        yield np.where(live, p.t.sum(-1, keepdims=True) * wrong - p.t, 0)
    if p.z.size > p.z.shape[-1]:
        whole = np.asarray(_in_float64(softmax, p.z, None))
        yield np.where(live, p.t.sum(-1, keepdims=True) * whole - p.t, 0)


def _unscaled(p: _Problem) -> Iterator[np.ndarray]:
    tau = p.t.sum(-1, keepdims=True)
    if (np.abs(tau - 1) > 1e-6)[tau != 0].any():
        yield p.o - p.t
        yield np.where(tau == 0, 0, p.o - p.t)


def _neighbours(p: _Problem) -> Iterator[np.ndarray]:
    for shift, edge in ((1, 0), (-1, -1)):
        shifted = np.roll(p.t, shift, -1)
        yield p.truth + p.t - shifted
        shifted[..., edge] = 0  # a one-hot table has no row for a label beyond the last class
        yield p.truth + p.t - shifted


CANDIDATES: dict[str, Callable[[_Problem], Iterator[np.ndarray] | tuple[np.ndarray, ...]]] = {
    "off-diagonal terms missing": lambda p: (-p.t * (1 - p.o),),
    "Jacobian once too often": lambda p: (np.asarray(_in_float64(softmax_vjp, p.o, p.truth)),),
    "elementwise derivative": lambda p: (p.truth * p.o * (1 - p.o), (p.o - p.t) * p.o * (1 - p.o)),
    "label not subtracted": lambda p: (p.truth + p.t, p.o),
    "targets do not sum to one": _unscaled,
    "softmax over the wrong axis": _other_axes,
    "labels shifted by one": _neighbours,
    "transposed": lambda p: (p.truth.T,) if p.truth.ndim == 2 and p.truth.shape[0] == p.truth.shape[1] else (),
}


def _read_problem(
    logits: ArrayLike, targets: ArrayLike, axis: int
) -> tuple[np.ndarray, np.ndarray, Bool[np.ndarray, "..."], np.dtype]:
    """Logits and targets in float64 with the classes last, what is ignored, and the logits' dtype."""
    z = _read("logits", logits)
    axis = as_axis(axis, z.ndim)
    if not np.isfinite(z).all():
        raise ValueError("logits: expected finite numbers, got NaN or infinity")
    if z.size == 0:
        raise ValueError(f"logits: expected at least one position and class, got shape {z.shape}")
    z = np.moveaxis(z, axis, -1)
    t = np.asarray(_concrete("targets", targets))
    if np.issubdtype(t.dtype, np.integer):
        if t.shape != z.shape[:-1]:
            raise ValueError(
                f"targets: expected integer labels of shape {z.shape[:-1]}, got {t.shape}; "
                "a distribution must have a floating dtype"
            )
        ignored = (t < 0) | (t >= z.shape[-1])
        t = np.where(ignored[..., None], 0.0, np.arange(z.shape[-1]) == t[..., None])
    else:
        t = _read("targets", targets)
        if t.shape != np.shape(logits):
            raise ValueError(f"targets: expected the logits' shape {np.shape(logits)}, got {t.shape}")
        if not np.isfinite(t).all():
            raise ValueError("targets: expected finite numbers, got NaN or infinity")
        t, ignored = np.moveaxis(t, axis, -1), np.zeros(z.shape[:-1], bool)
    return z, t, ignored, _floating_dtype("logits", logits)


def _solve(z: np.ndarray, t: np.ndarray, ignored: np.ndarray) -> _Problem:
    # Where one class has all the target it is a label: its 1 − p is then never formed by subtracting.
    hot = np.count_nonzero(t, -1) <= 1

    def loss(z):
        by_label = cross_entropy(z, jnp.asarray(t.argmax(-1)), weights=jnp.asarray(hot * t.sum(-1)), reduction="sum")
        return by_label + cross_entropy(z, jnp.asarray(np.where(hot[..., None], 0, t)), reduction="sum")

    truth = _in_float64(jax.grad(loss), z)
    scales = {"sum": 1}
    if ignored.any():
        if not ignored.all():
            valid = int((~ignored).sum())
            scales[f"mean over the {valid} positions not ignored"] = valid
        scales[f"mean over all {ignored.size} positions, ignored ones too"] = ignored.size
    elif ignored.size > 1:
        scales[f"mean over {ignored.size} positions"] = ignored.size
    return _Problem(z, t, np.asarray(_in_float64(softmax, z)), np.asarray(truth), scales)


def _in_float64(fn: Callable, *args):
    with jax.enable_x64(True):
        return fn(*(jnp.asarray(a) if isinstance(a, np.ndarray) else a for a in args))


def _concrete(name: str, value: ArrayLike) -> ArrayLike:
    if isinstance(value, Tracer):
        raise TypeError(f"{name}: expected a concrete array, got a traced one; call this outside jit, grad and vmap")
    return value


def _floating_dtype(name: str, value: ArrayLike) -> np.dtype:
    """The dtype whose rounding to expect: no finer than float64, which is also what integers are read as."""
    dtype = np.asarray(_concrete(name, value)).dtype
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).nmant > 52:
        return np.dtype(np.float64)
    if jnp.finfo(dtype).nmant not in TOLERANCE:
        raise TypeError(f"{name}: expected at least the precision of bfloat16, got dtype {dtype}")
    return dtype


def _read(name: str, value: ArrayLike) -> np.ndarray:
    array = np.asarray(_concrete(name, value))
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    return array.astype(np.float64)


def _distance(g: np.ndarray, expected: np.ndarray) -> float:
    """‖g − expected‖ / ‖expected‖, where nothing is expected ‖g‖."""
    return float(np.linalg.norm(g - expected) / (np.linalg.norm(expected) or 1))


def _matches(g: np.ndarray, expected: np.ndarray, precision: _Precision) -> bool:
    """Equal within the tolerance as a whole and at each position.

    A position that the model is sure of has a gradient below its rounding, 1 − p in float32; it may
    differ by that much of the longest.
    """
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(expected, axis=-1)
        off = np.linalg.norm(g - expected, axis=-1)
        allowed = precision.tolerance * lengths + 8 * precision.eps * lengths.max(initial=0)
        return bool(_distance(g, expected) <= precision.tolerance and (off <= allowed).all())


def _factor(g: np.ndarray, candidate: np.ndarray, precision: _Precision) -> float | None:
    """The k for which g is k times the candidate, or None."""
    length = float(np.vdot(candidate, candidate))
    k = float(np.vdot(candidate, g)) / length if length else 0.0
    return k if k and np.isfinite(k) and _matches(g, k * candidate, precision) else None


def _how_wrong(g: np.ndarray, expected: np.ndarray, error: float, tolerance: float) -> str:
    """How far an unknown mistake is from the truth, where most, and whether it moves all logits together."""
    off = np.abs(g - expected)
    *position, label = (int(i) for i in np.unravel_index(off.argmax(), off.shape))
    largest_sum = np.abs(g.sum(-1)).max()
    sums = "are zero, as they must be"
    if largest_sum > tolerance * np.abs(g).max():
        sums = f"reach {largest_sum:.3g}, where they must be zero: moving all logits together changes no probability"
    return (
        f"This is no gradient of the cross-entropy that is known here: it is {error:.3g} of its length away from the "
        f"true one. The largest difference is at position {tuple(position)}, class {label}. Its sums over the classes "
        f"{sums}."
    )


def _why_not_finite(z: np.ndarray, t: np.ndarray, g: np.ndarray, dtype: np.dtype) -> str:
    """Repeat the usual causes in the precision of the arrays and see which of them spoils the same positions."""
    dtype = np.promote_types(dtype, np.float32) if dtype.itemsize >= 4 else np.dtype(np.float32)
    z, t, spoilt = z.astype(dtype), t.astype(dtype), ~np.isfinite(g)
    likely = "none of the usual ones (a maximum over the whole array, no maximum, a division by o)"
    with np.errstate(all="ignore"):
        for cause, formula in CAUSES.items():
            # NumPy computes with numbers below the smallest normal one, XLA flushes them to zero: between the two.
            least, most = (~np.isfinite(formula(z, t, tiny)) for tiny in (0, np.finfo(dtype).tiny))
            if (least & t.any(-1, keepdims=True) <= spoilt).all() and (spoilt <= most).all():
                likely = cause
                break
    positions = spoilt.any(-1)
    return f"{int(positions.sum())} of {positions.size} positions have NaN or infinity. The likely cause: {likely}."


def _shifted_softmax(z: np.ndarray, shift: np.ndarray | float, tiny: float) -> np.ndarray:
    e = np.exp(z - shift)
    e = np.where(e < tiny, 0, e)
    return e / e.sum(-1, keepdims=True)


def _divided(z: np.ndarray, t: np.ndarray, tiny: float) -> np.ndarray:
    o = _shifted_softmax(z, z.max(-1, keepdims=True), tiny)
    quotient = t / np.where(o < tiny, 0, o)
    quotient = quotient if tiny else np.where(t == 0, 0, quotient)  # whoever divides the zeros too gets 0/0
    return np.broadcast_to(quotient.sum(-1, keepdims=True), z.shape)  # the Jacobian spreads it over the classes


CAUSES = {
    "softmax was shifted by the maximum of the whole array instead of each vector's own; where a vector lies far "
    "below, all its exponentials are 0, and 0/0 is NaN": lambda z, t, tiny: _shifted_softmax(z, z.max(), tiny),
    "exp(z) overflowed, since no maximum was subtracted": lambda z, t, tiny: _shifted_softmax(z, 0, tiny),
    "−t/o was computed, and where a probability underflows to 0 that divides by zero. Never divide: the o cancels, "
    "and the gradient is τo − t": _divided,
}
