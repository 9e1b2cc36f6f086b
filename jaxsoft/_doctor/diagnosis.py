"""The gradient doctor: compare a gradient with the true one, and with the results of the usual mistakes."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Int

from jaxsoft._arrays.checks import as_axis, as_integer
from jaxsoft._doctor.findings import FINDINGS, judge
from jaxsoft._doctor.inputs import (
    COUNTED_FROM_ONE,
    as_labels,
    concrete,
    fitting_axes,
    floating_dtype,
    read,
    read_logits,
    read_targets,
)
from jaxsoft._doctor.mistakes import MISTAKES
from jaxsoft._doctor.problem import Comparison, Problem, distance, solve

OTHER_SHAPES = {
    "transposed": MISTAKES["transposed"][0],
    "Jacobian handed over": "This is softmax's Jacobian itself, one matrix per position, not a gradient. The gradient "
    "is the Jacobian times g, the loss's gradient to the probabilities: s (g − s·g), which needs no matrix.",
}


@dataclass(frozen=True, eq=False)  # comparing arrays does not give a single truth value
class Diagnosis:
    """The result of `diagnose_gradient` or `diagnose_loss`; printing it prints the explanation."""

    correct: bool
    verdict: str  # a few words, the same for the same finding
    explanation: str  # sentences
    true_gradient: Float[np.ndarray, "..."]  # of the sum of the losses
    error: float  # distance to the true gradient of the sum or a mean, whichever is nearer, divided by its norm
    row_sums: Float[np.ndarray, "..."]  # sums over the classes; zero in every right gradient
    true_loss: Float[np.ndarray, "..."] | None = None  # of each position, if a loss was judged
    found: tuple[str, ...] = ()  # if a loss was judged, at most three explanations, the most likely first

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
    """Say whether a gradient of cross-entropy with respect to the logits is right, and if not, why.

    The truth is τ·softmax(z) − t, with τ = Σ_j t_j, divided by the number of positions for a mean.

    Args:
        logits: the scores z at which the gradient was computed, NumPy or JAX, classes along `axis`.
        targets: integer labels of the logits' shape without the class axis; or a distribution or one-hot of that shape.
        gradient: the gradient to judge, of the logits' shape (a matrix may be transposed).
        axis: the class axis. Labels that fit only another axis are judged along it, and the explanation names it.
        ignore_index: label of the ignored positions; by default -1, -100, 255, 65535 and -2**31 unless they are
            classes.

    Returns:
        A `Diagnosis`: whether the gradient is right for the sum or a mean, a verdict, an explanation,
        the true gradient, how far the given one is from it, and its sums over the classes.

    Edges: each position is compared separately, in float64, relative to the norm of its own gradient. A vector may be
    off by 1e-4 of its norm in float32 and float64, 2e-3 in float16 and 2e-2 in bfloat16, by the spacing of the dtype's
    smallest numbers, and by the rounding of subtracting a target. If a label's p − 1 loses more than 1 % of the vector,
    the verdict is "lost to rounding". Mistakes are recognised in sums and in means. With two classes and one position
    some mistakes equal the true gradient up to a factor; they are named if that factor is exact. Labels from 1 to the
    number of classes are judged minus 1, and never called right. This is a tool for concrete arrays, not for `jit`.

    Raises:
        TypeError: traced arrays, or arrays that are not real numbers.
        ValueError: shapes that do not fit, logits or targets that are not finite, zero positions, labels
            outside [0, classes) that are not ignored.

    Example:
        >>> import numpy as np
        >>> from jaxsoft import diagnose_gradient
        >>> z, t = np.array([-1.34, -0.02, 1.48]), np.array([0.0, 1.0, 0.0])
        >>> o = np.exp(z) / np.exp(z).sum()
        >>> diagnose_gradient(z, t, o - t).verdict
        'correct for the sum'
        >>> diagnose_gradient(z, t, -t * (1 - o)).verdict
        'off-diagonal terms missing'

    Source: J. S. Bridle (1990) for the truth; the mistakes are collected from public questions and answers.
    """
    z, t, g = (concrete(*a) for a in (("logits", logits), ("targets", targets), ("gradient", gradient)))
    axis = as_axis(axis, z.ndim)
    index = None if ignore_index is None else as_integer("ignore_index", ignore_index)
    t = as_labels(t, z.shape, axis)
    fitting = fitting_axes(z, t)
    others = [n for n in fitting if n != axis]
    if others and axis not in fitting:
        diagnoses = {n: _diagnose(z, t, g, n, index) for n in others}
        best = min(others, key=lambda n: (not diagnoses[n].correct, diagnoses[n].verdict == "wrong"))
        return _remarked(
            diagnoses[best],
            f"The targets fit classes along axis {best}, not {axis}, and were judged along it: pass axis={best}.",
        )
    diagnosis = _diagnose(z, t, g, axis, index)
    if diagnosis.verdict not in ("wrong", "softmax over the wrong axis"):
        return diagnosis
    for other in others or (n for n in range(z.ndim) if n != axis and t.shape == z.shape):
        turned = _diagnose(z, t, g, other, index)
        explanation = (
            f"With the classes along axis {axis} this is not the gradient, along axis {other} it is: pass axis={other}."
        )
        if turned.correct and diagnosis.verdict != "wrong":  # targets that are one-hot along both axes fit both
            return replace(diagnosis, explanation=f"{diagnosis.explanation} Or else: {explanation}")
        if turned.correct:
            return replace(turned, correct=False, verdict="classes along another axis", explanation=explanation)
        if other in fitting and diagnosis.verdict == "wrong" != turned.verdict:
            return _remarked(turned, f"With classes along axis {axis} this is no known mistake; along axis {other}:")
    return diagnosis


def _remarked(diagnosis: Diagnosis, remark: str) -> Diagnosis:
    return replace(diagnosis, explanation=f"{remark} {diagnosis.explanation}")


@np.errstate(all="ignore")  # inf − inf, a division by a zero target, or the square of a huge number
def _diagnose(
    logits: np.ndarray, targets: np.ndarray, gradient: np.ndarray, axis: int, ignore_index: int | None
) -> Diagnosis:
    """The diagnosis with the classes along this axis."""
    z, g = read_logits(logits), read("gradient", gradient)
    dtype, logits_dtype = floating_dtype("gradient", gradient), floating_dtype("logits", logits)
    t, counted_from_one = read_targets(targets, logits.shape, axis, ignore_index)
    problem = solve(np.moveaxis(z, axis, -1), t)
    truth, narrow = np.moveaxis(problem.truth, -1, axis), problem.z.astype(dtype).astype(np.float64)
    if g.shape != z.shape:
        name, sums = _judge_other_shape(g, problem, axis, dtype)
        return Diagnosis(False, name, OTHER_SHAPES[name], truth, np.inf, sums)
    c = Comparison(np.moveaxis(g, axis, -1), problem, dtype, logits_dtype)
    verdict = judge(FINDINGS, c)
    if verdict["name"] == "wrong" and np.isfinite(narrow).all() and (narrow != problem.z).any():
        second = judge(FINDINGS, Comparison(c.g, solve(narrow, t), dtype))
        verdict = verdict if second["name"] == "wrong" else second
    name, explanation = verdict["name"], verdict["explanation"]
    correct = name.startswith("correct") and not counted_from_one
    if counted_from_one:
        remark = COUNTED_FROM_ONE.format(label=problem.classes, judged="gradient")
        name, explanation = "labels counted from 1", f"{remark}{name}. {explanation}"
    return Diagnosis(correct, name, explanation, truth, distance(c.g, c.nearest()), c.g.sum(-1))


def _judge_other_shape(
    g: np.ndarray, problem: Problem, axis: int, dtype: np.dtype
) -> tuple[str, Float[np.ndarray, "..."]]:
    """The verdict on a gradient whose shape is not the logits', and its sums over the classes."""
    shape, classes = np.moveaxis(problem.z, -1, axis).shape, problem.classes
    if g.ndim == 2 and g.T.shape == shape:
        turned = np.moveaxis(g.T, axis, -1)
        if Comparison(turned, problem, dtype).factor_of_truth() is not None:
            return "transposed", turned.sum(-1)
    if g.shape == (*problem.z.shape, classes) and np.allclose(g.sum(-1), 0, atol=1e-3 * np.abs(g).max()):
        return "Jacobian handed over", g.sum(-1)
    remark = ""
    if g.ndim == 2 and classes in g.shape:
        remark = "; weights of shape (features, classes) have another gradient, features.T @ this one"
    raise ValueError(f"gradient: expected the logits' shape {shape}, got {g.shape}{remark}")
