"""The gradient doctor: compare a gradient with the true one, and with those of the usual mistakes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Int

from jaxsoft._arrays.checks import as_axis, as_integer, refuse_mask, refuse_values
from jaxsoft._doctor.mistakes import CANDIDATES, CAUSES, EXPLANATIONS, FITS, Problem, Vectors, solve
from jaxsoft._jax_internals import Tracer

# What a right gradient may be off by, relative to the length of each of its vectors, by the bits of its mantissa.
TOLERANCE = {52: 1e-4, 23: 1e-4, 10: 2e-3, 7: 2e-2}
# How much of a vector's length p − 1 may lose before it is said.
LOSS = 1e-2
# Labels that by custom mark what is ignored: Keras and scikit-learn, PyTorch, images of 8 and 16 bits, the least int32.
IGNORED = (-1, -100, 255, 65535, -(2**31))


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
    targets: Int[ArrayLike, "..."] | Float[ArrayLike, "..."] | Bool[ArrayLike, "..."],
    gradient: Float[ArrayLike, "..."],
    axis: int = -1,
    *,
    ignore_index: int | None = None,
) -> Diagnosis:
    """Say whether a gradient of the cross-entropy to the logits is right, and if not, why.

    The truth is τ·softmax(z) − t, with τ = Σ_j t_j, divided by the number of positions for a mean.

    Args:
        logits: the scores z at which the gradient was computed, NumPy or JAX, classes along `axis`.
        targets: integer labels of the logits' shape without the class axis; or a distribution of the
            logits' shape, also one-hot as integers or booleans.
        gradient: what is to be judged, of the logits' shape (or, of a matrix, transposed).
        axis: the class axis. Labels that fit another axis only are judged along that one, which the
            explanation then names.
        ignore_index: label of the positions that take no part. With None these are the labels -1,
            -100, 255, 65535 and -2**31 where they are no classes.

    Returns:
        A `Diagnosis`: whether the gradient is that of the sum or of a mean, a verdict, an explanation,
        the true gradient, how far the given one is from it, and its sums over the classes.

    Edges: the comparison is made in float64, for each position by itself, however long the vectors of
    the others. A vector may be off by 1e-4 of its length in float32 and float64, 2e-3 in float16 and
    2e-2 in bfloat16, by what the dtype's smallest numbers cannot say, and by what subtracting a target
    costs; where a label's p − 1 loses more than 1 % of the vector, the verdict is "lost to rounding".
    Logits finer than the gradient may have been rounded to its dtype. Mistakes are recognised whether
    summed or averaged. With two classes and one position some are the truth up to a factor; such a
    mistake is named where its factor is exact. Labels from 1 to the number of classes are judged less
    one, and never called right. This is a tool for concrete arrays, not for `jit`.

    Raises:
        TypeError: traced arrays, or arrays that are not real numbers.
        ValueError: shapes that do not fit, logits or targets that are not finite, no positions, other
            labels outside [0, classes) than those above.

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
    z, t, g = (_concrete(*a) for a in (("logits", logits), ("targets", targets), ("gradient", gradient)))
    axis = as_axis(axis, z.ndim)
    index = None if ignore_index is None else as_integer("ignore_index", ignore_index)
    t = _as_labels(t, z.shape, axis)
    fitting = _fitting_axes(z, t)
    others = [n for n in fitting if n != axis]
    if others and axis not in fitting:
        found = {n: _diagnose(z, t, g, n, index) for n in others}
        taken = min(found, key=lambda n: (not found[n].correct, found[n].verdict == "wrong"))
        remark = f"The targets fit classes along axis {taken}, not {axis}, and were judged so: pass axis={taken}. "
        return replace(found[taken], explanation=remark + found[taken].explanation)
    diagnosis = _diagnose(z, t, g, axis, index)
    if diagnosis.verdict in ("wrong", "softmax over the wrong axis"):
        for other in others or range(z.ndim) if t.shape == z.shape else others:
            if other == axis:
                continue
            turned = _diagnose(z, t, g, other, index)
            explanation = EXPLANATIONS["classes along another axis"].format(given=axis, right=other)
            if turned.correct and diagnosis.verdict != "wrong":  # targets that are one-hot along both axes do not tell
                return replace(diagnosis, explanation=f"{diagnosis.explanation} Or else: {explanation}")
            if turned.correct:
                return replace(turned, correct=False, verdict="classes along another axis", explanation=explanation)
            if other in fitting and diagnosis.verdict == "wrong" != turned.verdict:
                remark = f"With the classes along axis {axis} this has no name, along axis {other}: "
                return replace(turned, explanation=remark + turned.explanation)
    return diagnosis


def _as_labels(t: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Labels as integers without the class axis: Keras keeps it with length one, Caffe and MXNet have floats."""
    if t.shape != shape and t.shape == (*shape[:axis], 1, *shape[axis + 1 :]):
        t = t.squeeze(axis)
    is_label = t.shape == shape[:axis] + shape[axis + 1 :] and np.issubdtype(t.dtype, np.floating)
    return t.astype(np.int64) if is_label and (t == np.trunc(t)).all() and (np.abs(t) < 2**53).all() else t


def _fitting_axes(z: np.ndarray, t: np.ndarray) -> list[int]:
    """The axes along which the targets may have the classes: labels without that axis, or along it a sum of one or 0.

    Along an axis of length one anything sums to what it is: it is taken where no other fits.
    """
    axes = range(z.ndim)
    if t.shape != z.shape:
        return [n for n in axes if t.shape == z.shape[:n] + z.shape[n + 1 :]]
    numbers = t.astype(np.float64)
    sums = {n: numbers.sum(n) for n in axes}
    fitting = [n for n in axes if sums[n].any() and (np.isclose(sums[n], 1, atol=1e-2) | (sums[n] == 0)).all()]
    # Nothing is what ignored positions have: along another axis so has a class that does not occur.
    full = [n for n in fitting if (sums[n] != 0).all()] or fitting
    return [n for n in full if z.shape[n] > 1] or [n for n in fitting if z.shape[n] > 1] or full


def _diagnose(
    logits: np.ndarray, t: np.ndarray, gradient: np.ndarray, axis: int, ignore_index: int | None
) -> Diagnosis:
    z, g = _read("logits", logits), _read("gradient", gradient)
    given, dtype = _floating_dtype("gradient", gradient), _floating_dtype("logits", logits)
    if not np.isfinite(z).all():
        raise ValueError("logits: expected finite numbers, got NaN or infinity")
    if z.size == 0:
        raise ValueError(f"logits: expected at least one position and class, got shape {z.shape}")
    z = np.moveaxis(z, axis, -1)
    t, counted_from_one = _read_targets(t, logits.shape, axis, ignore_index)
    problem, rounding = solve(z, t), _Rounding.of(given)
    restored = np.moveaxis(problem.truth, -1, axis)
    if g.shape != restored.shape:
        turned = np.moveaxis(g.T, axis, -1) if g.ndim == 2 and g.T.shape == restored.shape else None
        if turned is not None and _factor_of_truth(turned, problem, rounding) is not None:
            return Diagnosis(False, "transposed", EXPLANATIONS["transposed"], restored, np.inf, turned.sum(-1))
        if g.shape == (*problem.o.shape, z.shape[-1]) and np.allclose(g.sum(-1), 0, atol=1e-3 * np.abs(g).max()):
            name = "Jacobian handed over"
            return Diagnosis(False, name, EXPLANATIONS[name], restored, np.inf, g.sum(-1))
        remark = ""
        if g.ndim == 2 and z.shape[-1] in g.shape:
            remark = "; weights of shape (features, classes) have another gradient, features.T @ this one"
        raise ValueError(f"gradient: expected the logits' shape {restored.shape}, got {g.shape}{remark}")
    g = np.moveaxis(g, axis, -1)
    with np.errstate(all="ignore"):  # inf − inf, or the square of a huge number
        row_sums = g.sum(-1)
        error = min(_distance(g, problem.truth / n) for n in problem.scales.values())
        if np.isfinite(g).all():
            verdict, explanation = _judge(g, problem, rounding)
            narrow = z.astype(given).astype(np.float64)
            if verdict == "wrong" and np.isfinite(narrow).all() and (narrow != z).any():
                second, why = _judge(g, solve(narrow, t), rounding)
                verdict, explanation = (verdict, explanation) if second == "wrong" else (second, why)
        else:
            coarsest = min(given, dtype, key=lambda d: jnp.finfo(d).nmant)
            verdict, explanation = "not finite", _why_not_finite(z, t, g, coarsest)
    correct = verdict.startswith("correct") and not counted_from_one
    if counted_from_one:
        explanation = EXPLANATIONS["labels counted from 1"].format(label=z.shape[-1]) + f"{verdict}. {explanation}"
        verdict = "labels counted from 1"
    return Diagnosis(correct, verdict, explanation, restored, error, row_sums)


def _judge(g: Vectors, problem: Problem, rounding: "_Rounding") -> tuple[str, str]:
    """Verdict and explanation of a finite gradient, classes last."""
    counts = problem.scales.values()
    for name, count in problem.scales.items():
        if _is_truth(g, problem, count, rounding):
            return f"correct for the {name}", f"This is the gradient of the {name} of the losses."
    # Softmax's outputs sum to one but for rounding, and so do what is differentiated of that sum.
    nothing = 16 * min(rounding.eps, 2.0**-23) / max(counts) if np.abs(problem.truth).max() > 1e-3 else 0
    if np.abs(g).max() <= nothing:
        return "all zero", EXPLANATIONS["all zero"]
    live = problem.live[..., 0]
    if not live.all() and live.any():
        judged = problem._replace(z=problem.z[live], t=problem.t[live], o=problem.o[live], truth=problem.truth[live])
        if any(_is_truth(g[live], judged, count, rounding) for count in counts):
            return "ignored positions not zeroed", EXPLANATIONS["ignored positions not zeroed"]
    # A mistake in a sum or a mean is likelier than the truth times an odd number, and that than both at once.
    named = dict.fromkeys(
        name for name, candidate in _candidates(problem) if _has_made(candidate, g, problem, rounding)
    )
    if named:
        name, *others = named
        beside = f" Here the result is the same as of: {', '.join(others)}." if others else ""
        return name, EXPLANATIONS[name] + beside
    if any(_is_truth(g, problem, count, rounding, lost=True) for count in counts):
        return "lost to rounding", EXPLANATIONS["lost to rounding"]
    factor = _factor_of_truth(g, problem, rounding)
    if factor is not None and factor < 0:
        return "opposite sign", EXPLANATIONS["opposite sign"] + f" The factor is {factor:.6g}."
    if factor is not None:
        note = _where_from(factor, problem)
        return f"right up to a factor of {factor:.6g}", EXPLANATIONS["factor"].format(factor=factor, note=note)
    # What has a number to fit must account for what is wrong, not only be lost in what is right.
    apart = _norm(g - _factor(g, problem.truth) * problem.truth)
    fits = [(name, fit) for name, make in FITS.items() for fit in make(problem, g)]
    name, fit = min(fits, key=lambda named: _norm(g - named[1].gradient / named[1].divisor))
    changes = _norms(fit.gradient - problem.truth)
    # As many equations as there are unknowns are always solved.
    fitted = np.count_nonzero(changes > rounding.tolerance * _norm(changes)) * (g.shape[-1] - 1) > 1
    explained = fitted and _norm(g - fit.gradient / fit.divisor) < 0.05 * apart
    if fit.likely and explained and _is_mistake(g, fit.gradient, problem, fit.divisor, rounding):
        return name, EXPLANATIONS[name].format(value=fit.value, note=fit.note)
    if (weighted := _weighted(g, problem, rounding, problem.t)) is not None:
        return weighted
    if (weighted := _weighted_smoothing(g, problem, rounding)) is not None:
        return weighted
    if (smoothed := _smoothed_and_weighted(g, problem, rounding)) is not None:
        return smoothed
    if (by_column := _weighted_by_column(g, problem, rounding)) is not None:
        return by_column
    for name, candidate in _candidates(problem):
        factor = _factor(g, candidate) if np.count_nonzero(candidate) > 1 else 0
        explained = factor != 0 and _norm(g - factor * candidate) < 0.05 * apart
        if explained and _is_mistake(g, candidate, problem, 1 / factor, rounding):
            return name, EXPLANATIONS[name] + f" Besides, it is multiplied by {factor:.6g}."
    nearest = problem.truth / min(counts, key=lambda n: _distance(g, problem.truth / n))
    distance, unit = _distance(g, nearest), _unit(g)
    if np.ptp(g) <= rounding.tolerance * np.abs(g).max():
        return "one number everywhere", EXPLANATIONS["one number everywhere"].format(value=g.flat[0])
    in_order = np.sort(g, None), np.sort(nearest, None)
    if distance > 0.1 and g.size > 4 and np.allclose(*in_order, rtol=10 * rounding.tolerance, atol=rounding.least):
        name = "right numbers in another order"
        return name, EXPLANATIONS[name]
    if unit and distance < 0.1:
        note = f"{distance:.2g}"
        return "finite differences", EXPLANATIONS["finite differences"].format(value=unit, note=note)
    return "wrong", _how_wrong(g, nearest, rounding.tolerance)


def _where_from(factor: float, p: Problem) -> str:
    """Which habit makes a factor that is no mean over positions, if one is known."""
    positions, classes = p.live.size, p.z.shape[-1]
    habits = {
        "the mean over positions and classes": 1 / (positions * classes),
        "mean squared error's 2/(positions · classes)": 2 / (positions * classes),
        "a mean over the classes": 1 / classes,
        "a mean over positions that was taken twice": 1 / positions**2,
    }
    found = (f"that of {habit}" for habit, k in habits.items() if abs(factor / k - 1) < 1e-3)
    return next(found, "and no mean over positions makes that factor")


def _weighted(g: Vectors, p: Problem, rounding: "_Rounding", hot: Vectors) -> tuple[str, str] | None:
    """The verdict on vectors each of which is a number ≥ 0 times its true gradient, or None; `hot` is at the label."""
    live = p.live[..., 0] & p.truth.any(-1)
    if g[~p.live[..., 0]].any() or np.count_nonzero(live) < 2:
        return None
    g, truth = g[live], p.truth[live]
    length = _norms(truth)
    factors = np.sum(g / length * (truth / length), -1)
    factors = np.where(g.any(-1), factors, 0.0)
    taken = factors != 0
    # An advantage may be negative; with two classes any vector is a number times the truth.
    signed = bool((factors < 0).any())
    if not taken.any() or (signed and (p.z.shape[-1] == 2 or not (factors > 0).any())):
        return None
    of_taken = p._replace(z=p.z[live][taken], t=p.t[live][taken], o=p.o[live][taken], truth=truth[taken])
    if not _is_truth(g[taken], of_taken, 1 / factors[taken, None], rounding):
        return None
    close = 4 * rounding.tolerance * np.abs(factors).max()
    low, high, positions = factors.min(), factors.max(), len(factors)
    if not taken.all() and np.ptp(factors[taken]) <= close:
        factor = float(np.median(factors[taken]))
        text = EXPLANATIONS["a mask"].format(count=int(taken.sum()), positions=positions, factor=factor)
        return "right up to a mask", text
    t = hot[live]
    if (np.count_nonzero(t, -1) == 1).all():
        labels = t.argmax(-1)
        groups = {int(label): factors[labels == label] for label in np.unique(labels)}
        if not signed and len(groups) < positions and all(np.ptp(of_label) <= close for of_label in groups.values()):
            least = min(float(f.mean()) for f in groups.values() if f.any())
            weights = ", ".join(f"{label}: {f.mean() / least:.4g}" for label, f in groups.items())
            # Of classes that occur once each a weight would be a number of the position's own.
            verdict = "correct for" if min(map(len, groups.values())) > 1 else "right up to"
            return f"{verdict} class weights", EXPLANATIONS["class weights"].format(weights=weights)
        of_label = (p.o[live] * t).sum(-1)
        rises = np.diff(factors[taken][np.argsort(of_label[taken])]) > 0
        if rises.size > 6 and np.count_nonzero(rises[1:] != rises[:-1]) < 2:  # by chance 1 time in 150, or less often
            name = "a function of the label's probability"
            return name, EXPLANATIONS[name].format(low=low, high=high)
    if p.z.shape[-1] == 2:
        return "right up to weights", EXPLANATIONS["weights that two classes cannot tell"].format(low=low, high=high)
    below = " One below 0 climbs: right for an advantage, as in REINFORCE, not for a weight." if signed else ""
    return "right up to weights of positions", EXPLANATIONS["weights of positions"].format(low=low, high=high) + below


def _smoothed_and_weighted(g: Vectors, p: Problem, rounding: "_Rounding") -> tuple[str, str] | None:
    """The verdict where one smoothing of the targets leaves a number ≥ 0 times the gradient of each position."""
    classes, live = p.z.shape[-1], p.live[..., 0] & g.any(-1)
    if classes < 4 or np.count_nonzero(live) < 2:
        return None
    smoothing = (p.t - p.tau / classes)[live]
    first, second, seen = p.truth[live], smoothing, g[live]
    # Two unknowns a vector, k and k·ε: of the latter's quotient all have to have the same.
    dots = np.array([[np.sum(a * b, -1) for b in (first, second, seen)] for a in (first, second)])
    determinant = dots[0, 0] * dots[1, 1] - dots[0, 1] ** 2
    determinant = np.where(determinant == 0, np.nan, determinant)
    k = (dots[0, 2] * dots[1, 1] - dots[1, 2] * dots[0, 1]) / determinant
    amounts = (dots[1, 2] * dots[0, 0] - dots[0, 2] * dots[0, 1]) / determinant / k
    epsilon = float(np.median(amounts))
    if not 1e-4 < epsilon < 1:
        return None
    smoothed = p._replace(t=np.where(p.live, p.t - epsilon * (p.t - p.tau / classes), 0))
    smoothed = smoothed._replace(truth=p.truth + epsilon * (p.t - p.tau / classes) * p.live)
    found = _weighted(g, smoothed, rounding, p.t)
    if found is None:
        return None
    smoothing_text = f"The targets are smoothed, with ε = {epsilon:.6g}. "
    return f"label smoothing and {found[0].split(' ', 2)[2].removeprefix('to ')}", smoothing_text + found[1]


def _weighted_smoothing(g: Vectors, p: Problem, rounding: "_Rounding") -> tuple[str, str] | None:
    """The verdict on Σ_j w_j q_j·o − w q for labels smoothed to q and weights w of classes, which PyTorch has, or None.

    That is (b_y + Σ_j a_j) o − b_y·hot − a with the unknowns a = wε/C and b = w(1 − ε): linear in both.
    """
    live, classes = p.live[..., 0], p.z.shape[-1]
    t, o, seen = p.t[live], p.o[live], g[live]
    if not 3 <= classes <= 64 or len(t) < 4 or (np.count_nonzero(t, -1) != 1).any() or g[~live].any():
        return None
    eye = np.eye(classes)
    of_a = np.repeat(o[:, :, None], classes, -1) - eye
    of_b = (o - t)[:, :, None] * t[:, None, :]
    design = np.concatenate([of_a, of_b], -1).reshape(-1, 2 * classes)
    unknowns, *_ = np.linalg.lstsq(design, seen.reshape(-1), rcond=None)
    a, b = unknowns[:classes], unknowns[classes:]
    present = t.any(0)
    quotients = a[present] * classes / np.where(b[present] == 0, np.nan, b[present])  # ε/(1 − ε) of each class
    ratio = float(np.median(quotients))
    fitted = np.zeros_like(g)
    fitted[live] = (design @ unknowns).reshape(seen.shape)
    if not 1e-4 < ratio < 1e4 or np.ptp(quotients) > 100 * rounding.tolerance * ratio or (a < 0).any():
        return None
    if not _is_mistake(g, fitted, p, 1, rounding):
        return None
    shown = ", ".join(f"{n}: {weight:.4g}" for n, weight in enumerate(a / a[a > 0].min()))
    name = "class weights of smoothed targets"
    return f"right up to {name}", EXPLANATIONS[name].format(epsilon=ratio / (1 + ratio), weights=shown)


def _weighted_by_column(g: Vectors, p: Problem, rounding: "_Rounding") -> tuple[str, str] | None:
    """The verdict where each class has a number ≥ 0 for its entries of all positions, or None."""
    positions = tuple(range(g.ndim - 1))
    of_class = np.sum(p.truth**2, positions)
    weights = np.sum(g * p.truth, positions) / np.where(of_class > 0, of_class, np.nan)
    if (
        np.count_nonzero(p.live) < 3
        or not (weights >= 0).all()
        or not _is_mistake(g, weights * p.truth, p, 1, rounding)
    ):
        return None
    name = "class weights by column"
    shown = ", ".join(f"{n}: {weight:.4g}" for n, weight in enumerate(weights))
    return name, EXPLANATIONS[name].format(weights=shown)


def _unit(g: Vectors) -> float:
    """The number of which all entries are small multiples, as differences of rounded losses are; 0 where none is."""
    sizes = np.unique(np.abs(g[g != 0]))
    if sizes.size < 2:
        return 0.0
    unit = float(np.diff(sizes, prepend=0)[np.diff(sizes, prepend=0) > 1e-3 * sizes[0]].min())
    multiples = sizes / unit
    off = np.abs(multiples - np.round(multiples)).max()
    return unit if g.size >= 8 and multiples[-1] < 1e5 and off < 0.02 * max(1.0, multiples[-1] * 1e-4) else 0.0


def _candidates(problem: Problem) -> Iterator[tuple[str, Vectors]]:
    for name, make in CANDIDATES.items():
        for candidate in make(problem):
            if candidate.any():
                yield name, candidate


class _Rounding(NamedTuple):
    """What a dtype can tell."""

    tolerance: float  # relative to a vector
    eps: float  # the spacing of numbers at one
    least: float  # the smallest number, and the spacing there
    flushed: float  # below this a device may put zero

    @classmethod
    def of(cls, dtype: np.dtype) -> "_Rounding":
        limits = jnp.finfo(dtype)
        # A few of the smallest normal numbers, since what is multiplied was flushed before. Not so in float16.
        flushed = 0.0 if dtype == np.float16 else 4 * float(limits.tiny)
        return cls(TOLERANCE[limits.nmant], float(limits.eps), float(limits.smallest_subnormal), flushed)


def _is_truth(g: Vectors, p: Problem, count: float | Vectors, rounding: _Rounding, *, lost: bool = False) -> bool:
    """Whether `count` times the gradient is that of the sum, as far as each vector's own rounding can tell.

    With `lost`, p − 1 may have lost all of a label's entry, and otherwise only a little of it.
    """
    given = count * g
    hot = np.count_nonzero(p.t, -1, keepdims=True) == 1
    length = _norms(p.truth)
    # z less the maximum is rounded before it is exponentiated; 1/count and the result may be the smallest numbers.
    exponent = rounding.eps / 2 * (p.z.max(-1, keepdims=True) - p.z) * np.abs(p.tau) * p.o
    smallest = rounding.least / 2 * abs(count) * (1 + np.abs(p.truth))
    subtraction = 4 * rounding.eps * np.abs(p.t)
    if not lost:  # a label alone need not be subtracted from, a distribution must be
        subtraction = np.where(hot, np.minimum(subtraction, LOSS * length), subtraction)
    limit = rounding.flushed * np.maximum(abs(count), np.maximum(np.abs(p.tau), 1))
    off = given - _flushed(p, given, hot, limit)
    return bool((_norms(_beyond(off, exponent + smallest + subtraction)) <= rounding.tolerance * length).all())


def _flushed(p: Problem, given: Vectors, hot: Bool[np.ndarray, "... 1"], limit: Vectors) -> Vectors:
    """The truth where a device may put zero for τo, t or their difference, whichever is nearest to what is given."""
    product = p.truth + p.t
    options = np.stack(
        [
            p.truth,
            np.where(np.abs(p.truth) < limit, 0, p.truth),
            np.where(np.abs(product) < limit, -p.t, p.truth),
            np.where(~hot & (np.abs(p.t) < limit), product, p.truth),
        ]
    )
    nearest = np.take_along_axis(options, np.abs(options - given).argmin(0)[None], 0)[0]
    # A label's entry is minus the sum of the others, of those that became zero as well or without them.
    others = np.where(p.t == 0, p.truth - nearest, 0).sum(-1, keepdims=True)
    between = np.clip(given, np.minimum(p.truth, p.truth + others), np.maximum(p.truth, p.truth + others))
    return np.where(hot & (p.t != 0), between, nearest)


def _has_made(candidate: Vectors, g: Vectors, p: Problem, rounding: _Rounding) -> bool:
    """Whether the gradient is the candidate, of the sum or a mean."""
    counts = p.scales.values()
    if _is_truth(candidate, p, 1, rounding, lost=True):  # as a relu has it that changes no logit
        return False
    multiple = _factor_of_truth(candidate, p, rounding)
    if multiple is not None:  # is held to what the truth is
        return any(_is_truth(g, p, count / multiple, rounding) for count in counts)
    return any(
        _is_mistake(g, candidate, p, count, rounding)
        # What differs from the truth is to be accounted for, not only to be lost in what is right.
        and _norm(count * g - candidate) < 0.05 * _norm(count * g - p.truth)
        for count in counts
    )


def _is_mistake(g: Vectors, candidate: Vectors, p: Problem, count: float, rounding: _Rounding) -> bool:
    """Whether `count` times the gradient is the candidate, each vector to the rounding of its targets.

    A vector that this rounding hides may be anything so small; all of them together may not.
    """
    length = _norms(candidate)
    hidden = 4 * rounding.eps * np.abs(p.t).sum(-1, keepdims=True)
    smallest = (rounding.least / 2 + rounding.flushed) * abs(count) * (1 + np.abs(candidate))
    off = count * g - candidate
    whole = _norm(_beyond(off, smallest + np.minimum(hidden, LOSS * length)))
    return bool(
        whole <= rounding.tolerance * _norm(candidate)
        and (_norms(_beyond(off, smallest + hidden)) <= rounding.tolerance * length).all()
    )


def _beyond(off: Vectors, allowed: Vectors) -> Vectors:
    return np.maximum(np.abs(off) - allowed, 0)


def _norms(a: Vectors) -> Vectors:
    """Length of each vector, also where its square is no number of float64."""
    largest = np.abs(a).max(-1, keepdims=True)
    unit = np.where((largest > 0) & np.isfinite(largest), largest, 1)
    return unit * np.linalg.norm(a / unit, axis=-1, keepdims=True)


def _norm(a: np.ndarray) -> float:
    return float(_norms(a.reshape(1, -1))[0, 0])


def _distance(g: np.ndarray, expected: np.ndarray) -> float:
    """‖g − expected‖ / ‖expected‖, where nothing is expected ‖g‖."""
    return _norm(g - expected) / (_norm(expected) or 1)


def _factor(g: Vectors, candidate: Vectors) -> float:
    """The k for which k times the candidate is nearest to the gradient; 0 where there is none."""
    length = _norm(candidate)
    k = float(np.vdot(candidate / length, g / length)) if length else 0.0
    return k if np.isfinite(k) else 0.0


def _factor_of_truth(g: Vectors, problem: Problem, rounding: _Rounding) -> float | None:
    factor = _factor(g, problem.truth)
    return factor if factor and _is_truth(g, problem, 1 / factor, rounding, lost=True) else None


def _how_wrong(g: Vectors, expected: Vectors, tolerance: float) -> str:
    """How far an unknown mistake is from the truth, where most, and whether it moves all logits together."""
    off = np.abs(g - expected)
    own = _norms(expected)
    parts = (_norms(off) / np.where(own > 0, own, 1))[..., 0]
    position = tuple(int(i) for i in np.unravel_index(parts.argmax(), parts.shape))
    where = f"position {position}, " if position else ""
    worst = int(off[position].argmax())
    shown = f"{g[position][worst]:.6g} where {expected[position][worst]:.6g} is right"
    largest_sum = np.abs(g.sum(-1)).max()
    sums = "are zero, as they must be"
    if largest_sum > tolerance * np.abs(g).max():
        sums = f"reach {largest_sum:.3g}, where they must be zero: moving all logits together changes no probability"
    return (
        f"This is no gradient of the cross-entropy that is known here: relative error "
        f"{_distance(g, expected):.3g}. The largest difference, for the length of the vector, is at {where}class "
        f"{worst}: {shown}. Its sums over the classes {sums}."
    )


def _why_not_finite(z: Vectors, t: Vectors, g: Vectors, dtype: np.dtype) -> str:
    """Repeat the usual causes in the precision of the arrays and see which of them spoils the same positions."""
    dtype = np.promote_types(dtype, np.float32) if dtype.itemsize >= 4 else np.dtype(np.float32)
    z, t, spoilt = z.astype(dtype), t.astype(dtype), ~np.isfinite(g)
    likely = "none of the usual ones (a maximum over the whole array, no maximum, a division by o)"
    for cause, formula in CAUSES.items():
        # NumPy computes with numbers below the smallest normal one, XLA flushes them to zero: between the two.
        least, most = (~np.isfinite(formula(z, t, tiny)) for tiny in (0, np.finfo(dtype).tiny))
        if (least & t.any(-1, keepdims=True) <= spoilt).all() and (spoilt <= most).all():
            likely = cause
            break
    positions = spoilt.any(-1)
    return f"{int(positions.sum())} of {positions.size} positions have NaN or infinity. The likely cause: {likely}."


def _read_targets(t: np.ndarray, shape: tuple[int, ...], axis: int, ignore_index: int | None) -> tuple[Vectors, bool]:
    """The targets as a distribution in float64 with the classes last, and whether labels were counted from 1."""
    positions, classes = shape[:axis] + shape[axis + 1 :], shape[axis]
    if np.issubdtype(t.dtype, np.integer) and t.shape != shape:
        if t.shape != positions:
            raise ValueError(
                f"targets: expected integer labels of shape {positions} or one-hot of {shape}, got {t.shape}"
            )
        return _read_labels(t, classes, ignore_index)
    t = _read("targets", t.astype(np.int8) if t.dtype == np.bool_ else t)
    if t.shape != shape:
        remark = "; labels must be integers" if t.shape == positions else ""
        raise ValueError(f"targets: expected the logits' shape {shape}, got {t.shape}{remark}")
    if ignore_index is not None:
        raise ValueError("ignore_index: expected None with a distribution, where a vector of zeros is ignored")
    if not np.isfinite(t).all():
        raise ValueError("targets: expected finite numbers, got NaN or infinity")
    return np.moveaxis(t, axis, -1), False


def _read_labels(labels: np.ndarray, classes: int, ignore_index: int | None) -> tuple[Vectors, bool]:
    inside = (labels >= 0) & (labels < classes)
    ignored = np.zeros(labels.shape, bool)
    for marker in IGNORED if ignore_index is None else (ignore_index,):
        ignored |= (labels == marker) & (~inside | (ignore_index is not None))
    live = labels[~ignored]
    counted_from_one = bool(live.size and live.min() >= 1 and live.max() == classes)
    if not counted_from_one:
        named = "an ignored one (name it with ignore_index)" if ignore_index is None else f"ignore_index={ignore_index}"
        refuse_values("targets", labels, inside | ignored, f"a label in [0, {classes}) or {named}")
    hot = np.arange(classes) + int(counted_from_one) == labels[..., None]
    return np.where(ignored[..., None], 0.0, hot), counted_from_one


def _concrete(name: str, value: ArrayLike) -> np.ndarray:
    if isinstance(value, Tracer):
        raise TypeError(f"{name}: expected a concrete array, got a traced one; call this outside jit, grad and vmap")
    refuse_mask(name, value)
    return np.asarray(value)


def _floating_dtype(name: str, array: np.ndarray) -> np.dtype:
    """The dtype whose rounding to expect: no finer than float64, which is also what integers are read as."""
    if not jnp.issubdtype(array.dtype, jnp.floating) or jnp.finfo(array.dtype).nmant > 52:
        return np.dtype(np.float64)
    if jnp.finfo(array.dtype).nmant not in TOLERANCE:
        raise TypeError(f"{name}: expected at least the precision of bfloat16, got dtype {array.dtype}")
    return array.dtype


def _read(name: str, array: np.ndarray) -> np.ndarray:
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    return array.astype(np.float64)
