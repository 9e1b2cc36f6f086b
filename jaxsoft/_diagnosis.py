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


@dataclass(frozen=True)
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
    rounding of the gradient's dtype: 1e-4 of a vector's length in float32 and float64. Mistakes are
    recognised whether summed or averaged. With two classes and one position some coincide with the
    truth up to a factor; then the factor is named. This is a tool for concrete arrays, not for `jit`.

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
    if g.shape == np.shape(logits):
        g = np.moveaxis(g, axis, -1)
    elif not (g.ndim == 2 and g.shape == np.shape(logits)[::-1]):
        raise ValueError(f"gradient: expected the logits' shape {np.shape(logits)}, got {g.shape}")
    given = _dtype("gradient", gradient)
    tolerance = TOLERANCE[jnp.finfo(given).nmant] if jnp.issubdtype(given, jnp.floating) else TOLERANCE[52]

    truth = problem.truth
    restored = np.moveaxis(truth, -1, axis)
    if g.shape != truth.shape:
        if _factor(g.T, truth, tolerance) is not None:
            return Diagnosis(False, "transposed", MISTAKES["transposed"], restored, np.inf, g.T.sum(-1))
        raise ValueError(f"gradient: expected the logits' shape {np.shape(logits)}, got {g.shape}")
    row_sums = g.sum(-1)
    scales = problem.scales
    error = min(_distance(g, truth / n) for n in scales.values())

    def found(verdict: str, explanation: str, *, correct: bool = False) -> Diagnosis:
        return Diagnosis(correct, verdict, explanation, restored, error, row_sums)

    if not np.isfinite(g).all():
        return found("not finite", _why_not_finite(z, t, g, dtype))
    for name, count in scales.items():
        if _matches(g, truth / count, tolerance):
            return found(f"correct for the {name}", f"This is the gradient of the {name} of the losses.", correct=True)
    if not g.any():
        return found("all zero", MISTAKES["all zero"])
    live = ~ignored
    if ignored.any() and any(_matches(g[live], truth[live] / count, tolerance) for count in scales.values()):
        return found("ignored positions not zeroed", MISTAKES["ignored positions not zeroed"])
    candidates = [(name, candidate) for name, make in CANDIDATES.items() for candidate in make(problem)]
    # A mistake in a sum or a mean is likelier than the truth times an odd number, and that than both at once.
    for name, candidate in candidates:
        if any(_matches(g, candidate / count, tolerance) for count in scales.values()):
            return found(name, MISTAKES[name])
    rounding = 4 * float(jnp.finfo(given).eps) if jnp.issubdtype(given, jnp.floating) else 0.0
    if any(np.abs(count * g - truth).max() <= rounding * problem.t.max() for count in scales.values()):
        return found("lost to rounding", MISTAKES["lost to rounding"])
    factor = _factor(g, truth, tolerance)
    if factor is not None and factor < 0:
        return found("opposite sign", MISTAKES["opposite sign"] + f" The factor is {factor:.6g}.")
    if factor is not None:
        return found(f"right up to a factor of {factor:.6g}", MISTAKES["factor"].format(factor=factor))
    for name, candidate in candidates:
        if (factor := _factor(g, candidate, tolerance)) is not None and factor > 0:
            return found(name, MISTAKES[name] + f" Besides, it is multiplied by {factor:.6g}.")
    nearest = truth / min(scales.values(), key=lambda n: _distance(g, truth / n))
    return found("wrong", _how_wrong(g, nearest, error, tolerance))


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
    if p.z.ndim > 1:
        whole = np.asarray(_in_float64(softmax, p.z, None))
        yield np.where(live, p.t.sum(-1, keepdims=True) * whole - p.t, 0)


CANDIDATES: dict[str, Callable[[_Problem], Iterator[np.ndarray] | tuple[np.ndarray, ...]]] = {
    "off-diagonal terms missing": lambda p: (-p.t * (1 - p.o),),
    "Jacobian once too often": lambda p: (np.asarray(_in_float64(softmax_vjp, p.o, p.truth)),),
    "elementwise derivative": lambda p: (p.truth * p.o * (1 - p.o), (p.o - p.t) * p.o * (1 - p.o)),
    "label not subtracted": lambda p: (p.truth + p.t, p.o),
    "targets do not sum to one": lambda p: (p.o - p.t, np.where(p.t.any(-1, keepdims=True), p.o - p.t, 0)),
    "softmax over the wrong axis": _other_axes,
    "labels shifted by one": lambda p: tuple(p.truth + p.t - np.roll(p.t, shift, -1) for shift in (1, -1)),
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
            raise ValueError(f"targets: expected labels of shape {z.shape[:-1]}, got {t.shape}")
        ignored = (t < 0) | (t >= z.shape[-1])
        t = np.where(ignored[..., None], 0.0, np.arange(z.shape[-1]) == t[..., None])
    else:
        t = _read("targets", targets)
        if t.shape != np.shape(logits):
            raise ValueError(f"targets: expected the logits' shape {np.shape(logits)}, got {t.shape}")
        if not np.isfinite(t).all():
            raise ValueError("targets: expected finite numbers, got NaN or infinity")
        t, ignored = np.moveaxis(t, axis, -1), np.zeros(z.shape[:-1], bool)
    return z, t, ignored, _dtype("logits", logits)


def _solve(z: np.ndarray, t: np.ndarray, ignored: np.ndarray) -> _Problem:
    truth = _in_float64(jax.grad(lambda z: cross_entropy(z, jnp.asarray(t), reduction="sum")), z)
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


def _dtype(name: str, value: ArrayLike) -> np.dtype:
    return np.asarray(_concrete(name, value)).dtype


def _read(name: str, value: ArrayLike) -> np.ndarray:
    array = np.asarray(_concrete(name, value))
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    return array.astype(np.float64)


def _distance(g: np.ndarray, expected: np.ndarray) -> float:
    """‖g − expected‖ / ‖expected‖, where nothing is expected ‖g‖."""
    return float(np.linalg.norm(g - expected) / (np.linalg.norm(expected) or 1))


def _matches(g: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    """Equal within the tolerance as a whole and at each position.

    A position that the model is sure of has a gradient below its rounding, 1 − p in float32; it may
    differ by that much of the largest.
    """
    lengths = np.linalg.norm(expected, axis=-1)
    off = np.linalg.norm(g - expected, axis=-1)
    sure = 1e-2 * tolerance * lengths.max(initial=0)
    return bool(_distance(g, expected) <= tolerance and (off <= tolerance * lengths + sure).all())


def _factor(g: np.ndarray, candidate: np.ndarray, tolerance: float) -> float | None:
    """The k for which g is k times the candidate, or None."""
    length = float(np.vdot(candidate, candidate))
    k = float(np.vdot(candidate, g)) / length if length else 0.0
    return k if k and np.isfinite(k) and _matches(g, k * candidate, tolerance) else None


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
    """Repeat the usual causes in the logits' own precision and see which of them spoils the same positions."""
    narrow = z.astype(dtype if dtype.itemsize >= 4 and np.issubdtype(dtype, np.floating) else np.float32)
    spoilt = ~np.isfinite(g)
    with np.errstate(all="ignore"):
        bare = np.exp(narrow)
        whole = np.exp(narrow - narrow.max())
        own = np.exp(narrow - narrow.max(-1, keepdims=True))
        divided = np.where(t > 0, t / (own / own.sum(-1, keepdims=True)), 0)
        if np.array_equal(spoilt, ~np.isfinite(whole / whole.sum(-1, keepdims=True))):
            cause = (
                "softmax was shifted by the maximum of the whole array instead of each vector's own; where a vector "
                "lies far below, all its exponentials are 0, and 0/0 is NaN"
            )
        elif np.array_equal(spoilt, ~np.isfinite(bare / bare.sum(-1, keepdims=True))):
            cause = "exp(z) overflowed, since no maximum was subtracted"
        elif np.array_equal(spoilt.any(-1), ~np.isfinite(divided).all(-1)):
            cause = (
                "−t/o was computed, and where a probability underflows to 0 that divides by zero. Never divide: the o "
                "cancels, and the gradient is τo − t"
            )
        else:
            cause = "none of the usual ones (a maximum over the whole array, no maximum, a division by o)"
    positions = spoilt.any(-1)
    return f"{int(positions.sum())} of {positions.size} positions have NaN or infinity. The likely cause: {cause}."
