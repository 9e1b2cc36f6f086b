"""The doctor of losses: which convention gives a number, or what is wrong with it."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Int

from jaxsoft._arrays.checks import as_axis
from jaxsoft._cross_entropy import cross_entropy
from jaxsoft._doctor.diagnosis import Diagnosis
from jaxsoft._doctor.inputs import COUNTED_FROM_ONE, Options, Sample, concrete, read, read_sample
from jaxsoft._doctor.loss_conventions import FORMS, REDUCTIONS, SMOOTHINGS, TELLS, WEIGHTINGS, smoothed, weighted
from jaxsoft._doctor.loss_mistakes import TEXTS
from jaxsoft._doctor.loss_search import Precision, Way, distinct, search
from jaxsoft._doctor.problem import log_softmax

USUAL = {next(iter(table)) for table in (SMOOTHINGS, FORMS, WEIGHTINGS)}
NOTHING = "Every position is ignored or has weight 0: a sum of 0 divided by a count of 0"


def diagnose_loss(
    logits: Float[ArrayLike, "..."],
    targets: Int[ArrayLike, "..."] | Float[ArrayLike, "..."] | Bool[ArrayLike, "..."],
    value: Float[ArrayLike, "..."],
    axis: int = -1,
    *,
    ignore_index: int | None = None,
    weights: Float[ArrayLike, "..."] | None = None,
    class_weights: Float[ArrayLike, " classes"] | None = None,
    label_smoothing: float = 0.0,
) -> Diagnosis:
    """Say which convention gives a cross-entropy's value, or what is wrong with it.

    The value is compared with Σ_i k_i w_i Σ_j c_j t_ij (−log p_ij), for all frameworks' choices of the factors k of
    a mean, the weights and the smoothed targets t; and with the results of the usual mistakes.

    Args:
        logits: the scores z that the loss was computed from, NumPy or JAX, classes along `axis`.
        targets: integer labels of the logits' shape without the class axis; or a distribution of the logits' shape.
        value: the loss to judge: one number, or one per position, or one per example (index of the first axis).
        axis: the class axis.
        ignore_index: label of the ignored positions; by default -1, -100, 255, 65535 and -2**31 unless they are
            classes.
        weights: weights of the positions that the loss should have.
        class_weights: weights of the classes that the loss should have.
        label_smoothing: ε in [0, 1] that the loss should have.

    Returns:
        A `Diagnosis`: whether some convention gives the value, a verdict, an explanation that names frameworks, in
        `found` the names of at most three explanations, the most likely first, in `true_loss` the loss of each position
        with these options, how far the value is from the nearest of its sum and means, and the gradient of the sum.

    Edges: everything is computed in float64. A value that float32 represents may be off by 1e-5 of the losses plus one;
    in half precision by the dtype's own rounding; with three to six digits by half a unit of the last digit. One
    mistake is preferred to two, and pairs are tried for at most 100,000 logits, if the value has more than six digits.
    Numbers such as ζ or ε are found from one value if they are usual (1 to 5 times a power of ten, for instance), from
    three or more values in any case. Where conventions coincide, the explanation names an input that would distinguish
    them. NaN is right if every position is ignored. This is a tool for concrete arrays, not for `jit`.

    Raises:
        TypeError: traced arrays, or arrays that are not real numbers.
        ValueError: shapes that do not fit, logits or targets that are not finite, zero positions, labels
            outside [0, classes) that are not ignored.

    Example:
        >>> import numpy as np
        >>> from jaxsoft import diagnose_loss
        >>> z, y = np.array([[1.0, 2, 3], [0, 0, 0], [3, 1, 2]]), np.array([2, -100, 1])
        >>> print(diagnose_loss(z, y, 0.9384, ignore_index=-100).verdict)
        correct: mean over all positions, ignored ones too
        >>> print(diagnose_loss(z, y, 4.0615, ignore_index=-100).verdict)
        log2 in place of ln

    Source: the conventions of seventeen frameworks, observed by running them in `experiments/frameworks`.
    """
    given, shape = concrete("value", value), np.shape(logits)
    axis = as_axis(axis, len(shape))
    positions = shape[:axis] + shape[axis + 1 :]
    numbers = _read_value(given, positions)
    options = Options(ignore_index, weights, class_weights, label_smoothing)
    sample, from_one = read_sample(logits, targets, axis, len(numbers), options)
    with jax.enable_x64(True):
        true, gradient = map(np.asarray, _truth(sample.z, smoothed(sample) * sample.c, sample.w))
    error, nearest = _nearest(sample, true, numbers)
    found = distinct(search(sample, numbers, _precision(given, numbers))) if np.isfinite(numbers).all() else []
    verdict, explanation, correct = _judged(sample, numbers, found, nearest)
    if from_one:
        explanation = COUNTED_FROM_ONE.format(label=sample.classes, judged="loss") + explanation
        verdict, correct = "labels counted from 1", False
    whole = (*positions, sample.classes)
    return Diagnosis(
        correct,
        verdict,
        explanation,
        np.moveaxis(gradient.reshape(whole), -1, axis),
        error,
        gradient.sum(-1).reshape(positions),
        true_loss=true.reshape(positions),
        found=tuple(_name(way) for way in found),
    )


def _read_value(given: np.ndarray, positions: tuple[int, ...]) -> Float[np.ndarray, " groups"]:
    if given.shape not in ((), positions, positions[:1]):
        each = f", or one per example, shape {positions[:1]}" if len(positions) > 1 else ""
        expected = f"one number, or one per position, shape {positions}{each}"
        raise ValueError(f"value: expected {expected}, got shape {given.shape}")
    return read("value", given).reshape(-1)


@jax.jit
def _truth(z, targets, weights):
    """The loss of each position as it was asked for, and the gradient of their sum."""
    losses, pullback = jax.vjp(lambda z: cross_entropy(z, targets, weights=weights, reduction="none"), z)
    return losses, *pullback(jnp.ones_like(losses))


def _precision(given: np.ndarray, numbers: np.ndarray) -> Precision:
    """How exactly the value is known, by its dtype and its digits."""
    if jnp.issubdtype(given.dtype, jnp.floating) and jnp.finfo(given.dtype).nmant < 23:
        eps = float(jnp.finfo(given.dtype).eps)
        return Precision(eps, 4 * eps, np.zeros(len(numbers)))
    with np.errstate(over="ignore"):
        is_single = bool((numbers.astype(np.float32) == numbers).all())
    tight = 1e-6 if is_single else 1e-11
    dtype = np.float32 if is_single else np.float64
    return Precision(tight, 1e-5, np.array([_half_unit(np.format_float_scientific(dtype(v))) for v in numbers]))


def _half_unit(number: str) -> float:
    """Half a unit of the last digit of a typed number; a computed number has more than six digits."""
    mantissa, _, exponent = number.partition("e")
    digits = len(mantissa.replace(".", "").replace("-", "").rstrip("0"))
    return 0.51 * 10.0 ** (int(exponent) - digits + 1) if 3 <= digits <= 6 else 0.0


def _judged(s: Sample, numbers: np.ndarray, found: list[Way], nearest: str) -> tuple[str, str, bool]:
    """Verdict, explanation, and whether the value is a right one."""
    if not np.isfinite(numbers).all():
        return _judged_not_finite(s, numbers)
    if not (s.live.any() and s.w[s.live].any()) and not numbers.any():
        return "correct: 0 of nothing", f"{NOTHING} is taken as 0, as in jaxsoft, Chainer and Keras.", True
    if not found:
        text = "No known convention gives this, nor do one or two known mistakes."
        return "wrong", f"{text} {nearest} Compare the losses per position.", False
    best = found[0]
    sentences = [_explained(s, best)]
    if others := found[1:]:
        sentences.append(f"These give the same number: {'; '.join(map(_name, others))}.")
        if not best.mistakes:
            tells = dict.fromkeys(TELLS[way.conventions[-1]] for way in found if way.conventions[-1] in TELLS)
            sentences.append(f"What would tell them apart: {'; '.join(tells)}.")
        else:
            sentences.append("One loss per position, or other logits, would tell them apart.")
    verdict = _name(best) if best.mistakes else f"correct: {_name(best)}"
    return verdict, " ".join(sentences), not best.mistakes


def _name(way: Way) -> str:
    """Mistakes by their names, a convention by its unusual parts."""
    if way.mistakes:
        return " and ".join(way.mistakes)
    smoothing, form, weighting, reduction = way.conventions
    return ", ".join([reduction, *(name for name in (form, smoothing, weighting) if name not in USUAL)])


def _explained(s: Sample, way: Way) -> str:
    """The text that the user reads about one way."""
    sentences = [TEXTS[name].format(value=way.value) for name in way.mistakes]
    counts = {
        "positions": len(s.w) // s.groups if s.groups < len(s.w) else len(s.w),
        "valid": int(s.live.sum()),
        "batch": s.shape[0] if s.shape else 1,
        "inner": len(s.w) // s.shape[0] if s.shape else 1,
        "classes": s.classes,
    }
    for name, table in zip(reversed(way.conventions), (REDUCTIONS, WEIGHTINGS, FORMS, SMOOTHINGS), strict=True):
        if name not in USUAL:
            sentences.append(f"{name[0].upper()}{name[1:]}: {table[name][0].format(**counts)}")
    return " ".join(sentences)


def _judged_not_finite(s: Sample, numbers: np.ndarray) -> tuple[str, str, bool]:
    count = int((~np.isfinite(numbers)).sum())
    if np.isnan(numbers).all() and not (s.live.any() and s.w[s.live].any()):
        verdict = "correct: NaN of nothing"
        return verdict, f"{NOTHING} is NaN, as in PyTorch, ONNX and MindSpore; in jaxsoft it is 0.", True
    least = float((log_softmax(s.z)[s.t > 0]).min()) if (s.t > 0).any() else 0.0
    causes: Iterable[tuple[bool, str]] = (
        (least < -745, "a probability is 0 in float64 and its logarithm −∞: take log_softmax, not the log of softmax"),
        (least < -103, "a probability is 0 in float32 and its logarithm −∞: take log_softmax, not the log of softmax"),
        (float(s.z.max()) > 88.7, "exp(z) overflows in float32, since no maximum was subtracted"),
        (least < -16, "a probability is 0 in float16 and its logarithm −∞: take log_softmax in float32"),
        (
            s.has_ignored,
            "a label to ignore was used as a class that does not exist (in jaxsoft, pass it as ignore_index), or its "
            "loss was only multiplied by 0",
        ),
    )
    cause = next((text for holds, text in causes if holds), "none of the usual ones: no logit or target is extreme")
    return "not finite", f"{count} of {len(numbers)} numbers are NaN or infinity. The likely cause: {cause}.", False


@np.errstate(all="ignore")  # a loss may be infinite
def _nearest(s: Sample, true: np.ndarray, numbers: np.ndarray) -> tuple[float, str]:
    """The distance to the nearest of the sum and the means, relative to it, and what the person reads of it."""
    _, r = weighted(s, smoothed(s))
    factors = {name: formula(s, r) for name, (_, formula) in REDUCTIONS.items()}
    right = {name: s.reduced(k * true) for name, k in factors.items() if k is not None}
    name, nearest = min(right.items(), key=lambda item: np.nan_to_num(np.abs(item[1] - numbers).max(), nan=np.inf))
    off = np.abs(nearest - numbers)
    error, n = off.max() / (np.abs(nearest).max() or 1), int(off.argmax())
    text = f"The nearest is {name}, {nearest[n]:.6g} where {numbers[n]:.6g} is given."
    return float(error) if np.isfinite(error) else float("inf"), text
