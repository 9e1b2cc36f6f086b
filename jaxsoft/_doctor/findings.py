"""What the doctor finds in a gradient, the most likely first.

A finding is written once, as the mistakes are: its name, a colon, what the person reads, and how it is recognised.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsoft._doctor.mistakes import FITS, MISTAKES, Catalogue, candidates
from jaxsoft._doctor.problem import Comparison, Problem, Vectors, distance, norm, norms

Factors = Float[np.ndarray, " positions"]
# A finding gives the values of its text's placeholders, or whether it is so where the text has none.
Values = dict[str, Any] | bool | np.bool_ | None
Finding = Callable[..., Values]
FINDINGS, WEIGHTS = Catalogue[Finding](), Catalogue[Finding]()
finding, weights = FINDINGS.entry, WEIGHTS.entry


def judge(findings: Catalogue[Finding], *args: Any) -> dict[str, str]:
    """The name and the explanation of the first finding that holds, or nothing."""
    for name, (explanation, find) in findings.items():
        if values := find(*args):
            values = {"name": name} | (values if isinstance(values, dict) else {})
            return {"name": values["name"].format(**values), "explanation": explanation.format(**values)}
    return {}


@finding("not finite: {count} of {positions} positions have NaN or infinity. The likely cause: {cause}.")
def _(c: Comparison) -> Values:
    spoilt = ~np.isfinite(c.g)
    count, positions = int(spoilt.any(-1).sum()), c.p.live.size
    return count > 0 and {"count": count, "positions": positions, "cause": _cause(c, spoilt)}


def _cause(c: Comparison, spoilt: np.ndarray) -> str:
    """Repeat the usual causes in the precision of the arrays and see which of them spoils the same positions."""
    dtype = c.coarsest if c.coarsest.itemsize > 4 else np.dtype(np.float32)
    z, t = c.p.z.astype(dtype), c.p.t.astype(dtype)
    for cause, formula in CAUSES.items():
        # NumPy computes with numbers below the smallest normal one and XLA flushes them to zero: both count.
        least, most = (~np.isfinite(formula(z, t, tiny)) for tiny in (0, float(np.finfo(dtype).tiny)))
        if (least & t.any(-1, keepdims=True) <= spoilt).all() and (spoilt <= most).all():
            return cause
    return "none of the usual ones (a maximum over the whole array, no maximum, a division by o)"


def _softmax(z: Vectors, shift: Any, tiny: float) -> Vectors:
    e = np.exp(z - shift)
    e = np.where(e < tiny, 0, e)
    return e / e.sum(-1, keepdims=True)


def _quotient(z: Vectors, t: Vectors, tiny: float) -> Vectors:
    o = _softmax(z, z.max(-1, keepdims=True), tiny)
    quotient = t / np.where(o < tiny, 0, o)
    return quotient if tiny else np.where(t == 0, 0, quotient)  # dividing targets of 0 too would give 0/0


# Each formula takes z, t and the number below which a device rounds to zero. One formula sums over the classes in
# place of the Jacobian, which spreads a quotient over them.
CAUSES: dict[str, Callable[[Vectors, Vectors, float], Vectors]] = {
    "softmax was shifted by the maximum of the whole array instead of each vector's own; where a vector lies far "
    "below, all its exponentials are 0, and 0/0 is NaN": lambda z, t, tiny: _softmax(z, z.max(), tiny),
    "exp(z) overflowed, since no maximum was subtracted": lambda z, t, tiny: _softmax(z, 0, tiny),
    "−t/o was computed, and where a probability underflows to 0 that divides by zero. Never divide: the o cancels, "
    "and the gradient is τo − t": lambda z, t, tiny: _quotient(z, t, tiny).sum(-1, keepdims=True),
    "this is −t/o, the gradient to the probabilities, and where one of them underflows to 0 that divides by zero. The "
    "gradient to the logits is τo − t": _quotient,
    "the loss was not told which label to ignore, and a label out of range gives NaN in jaxsoft: pass it as "
    "ignore_index": lambda z, t, tiny: np.where(t.any(-1, keepdims=True), z, np.nan),
}


finding("""correct for the {reduction}: This is the gradient of the {reduction} of the
losses.""")(lambda c: next(({"reduction": name} for name, count in c.p.scales.items() if c.is_truth(count)), None))


@finding("""all zero: Every entry is zero, and the true gradient is not. The gradient of sum(softmax(z)) is zero
everywhere, since the probabilities always sum to one: was that differentiated instead of the loss?""")
def _(c: Comparison) -> Values:
    # Softmax's outputs sum to one up to rounding, so the gradient of their sum is only that small.
    rounding = 16 * min(c.eps, 2.0**-23) / max(c.p.scales.values())
    return np.abs(c.g).max() <= (rounding if np.abs(c.p.truth).max() > 1e-3 else 0)


finding("""ignored positions not zeroed: The gradient is right except at ignored
positions: there it must be zero for all classes, not only for the
label's.""")(lambda c: not c.p.live.all() and c.p.live.any() and c.at(c.p.live[..., 0]).is_reduced_truth())


@finding("a known mistake: {explanation}{others}")
def _(c: Comparison) -> Values:
    """Tried before factors and pairs: a mistake alone is likelier than a factor alone, and a factor than both."""
    names = list(dict.fromkeys(name for name, candidate in candidates(c.p) if c.is_candidate(candidate)))
    others = f" Here other mistakes give the same result: {', '.join(names[1:])}." if names[1:] else ""
    return {"name": names[0], "explanation": MISTAKES[names[0]][0], "others": others} if names else None


finding("""lost to rounding: This is right only to the rounding of numbers near 1, and the gradient is smaller: p − 1
was computed where p rounds to 1. Compute the gradient of a label as minus the sum of the other probabilities, as
`cross_entropy` does.""")(lambda c: c.is_reduced_truth(lost=True))
finding("""opposite sign: This is the true gradient with the opposite sign: descending along it increases the loss. The
factor is {factor:.6g}.""")(lambda c: (c.factor_of_truth() or 0) < 0 and {"factor": c.factor_of_truth()})


@finding("""right up to a factor of {factor:.6g}: The direction is right, but the length is not: this is {factor:.6g}
times the gradient of the sum, {note}.""")
def _(c: Comparison) -> Values:
    positions, classes = c.p.live.size, c.p.classes
    if (factor := c.factor_of_truth()) is None:
        return None
    habits = {
        "as for a mean over positions and classes": 1 / (positions * classes),
        "as for mean squared error's 2/(positions · classes)": 2 / (positions * classes),
        "as for a mean over the classes": 1 / classes,
        "as for a mean over positions that was taken twice": 1 / positions**2,
        "a factor that no mean over positions gives": factor,
    }
    return {"factor": factor, "note": next(n for n, k in habits.items() if abs(factor / k - 1) < 1e-3)}


@finding("a mistake with a number: {explanation}")
def _(c: Comparison) -> Values:
    """Fit a mistake's number; the mistake must explain the error, not only be small compared with the right entries."""
    fits = [(name, fit) for name, (_, formula) in FITS.items() for fit in formula(c.p, c.g)]
    name, fit = min(fits, key=lambda named: norm(c.g - named[1].gradient / named[1].divisor))
    changes = norms(fit.gradient - c.p.truth)
    # As many equations as there are unknowns are always solved.
    equations = np.count_nonzero(changes > c.tolerance * norm(changes)) * (c.p.classes - 1)
    explained = equations > 1 and c.explains(fit.gradient / fit.divisor)
    explanation = FITS[name][0].format(value=fit.value, note=fit.note)
    made = fit.likely and explained and c.is_mistake(fit.gradient, fit.divisor)
    return made and {"name": name, "explanation": explanation}


@weights("""right up to a mask: This is the gradient of {count} of {positions} positions, times {factor:.6g}, and zero
at the others: right if a mask was meant to ignore the others.""")
def _(c: Comparison, factors: Factors, hot: Vectors) -> Values:
    taken = factors[factors != 0]
    is_mask = len(taken) < len(factors) and np.ptp(taken) <= 4 * c.tolerance * np.abs(factors).max()
    return is_mask and {"count": len(taken), "positions": len(factors), "factor": float(np.median(taken))}


@weights("""{certainty} class weights: This is the gradient with a weight for each class, up to a common factor:
{weights}.""")
def _(c: Comparison, factors: Factors, hot: Vectors) -> Values:
    labels, close = hot.argmax(-1), 4 * c.tolerance * np.abs(factors).max()
    groups = {int(label): factors[labels == label] for label in np.unique(labels)}
    is_shared = _are_labels(hot) and (factors >= 0).all() and len(groups) < len(factors)
    if not is_shared or any(np.ptp(group) > close for group in groups.values()):
        return None
    least = min(float(group.mean()) for group in groups.values() if group.any())
    # If every class occurs once, class weights cannot be told from weights of positions.
    certainty = "correct for" if min(map(len, groups.values())) > 1 else "right up to"
    return {"certainty": certainty, "weights": _listed((n, group.mean() / least) for n, group in groups.items())}


@weights("""a function of the label's probability: Each vector is a multiple of its true gradient, and the multiple
depends on the label's probability p: this is the gradient of another function of p than −log p, such as the focal
loss. The multiples go from {low:.4g} to {high:.4g}.""")
def _(c: Comparison, factors: Factors, hot: Vectors) -> Values:
    taken, probs = factors != 0, (c.p.o * hot).sum(-1)
    rises = np.diff(factors[taken][np.argsort(probs[taken])]) > 0
    # Numbers in random order pass this test at most once in 150 times.
    follows = _are_labels(hot) and rises.size > 6 and np.count_nonzero(rises[1:] != rises[:-1]) < 2
    return follows and {"low": factors.min(), "high": factors.max()}


weights("""right up to weights: Each vector is its true gradient times a number of its own, from
{low:.6g} to {high:.6g}: right if the positions have such weights. With two classes a mistake may look
the same.""")(lambda c, factors, hot: c.p.classes == 2 and {"low": factors.min(), "high": factors.max()})


@weights("""right up to weights of positions: This is the gradient with a weight for each position, from {low:.6g} to
{high:.6g}: right if the positions have such weights. The gradient of another loss than −log p may look the
same.{climbs}""")
def _(c: Comparison, factors: Factors, hot: Vectors) -> Values:
    climbs = " A factor below 0 increases the loss: right for an advantage, as in REINFORCE, not for a weight."
    return {"low": factors.min(), "high": factors.max(), "climbs": climbs if factors.min() < 0 else ""}


def _are_labels(hot: Vectors) -> bool:
    return bool((np.count_nonzero(hot, -1) == 1).all())


def _listed(numbers: Iterable[tuple[int, float]]) -> str:
    return ", ".join(f"{label}: {number:.4g}" for label, number in numbers)


def _weighted(c: Comparison, hot: Vectors) -> dict[str, str]:
    """The finding if each vector is its true gradient times a number of its own; `hot` marks the labels."""
    classes, live = c.p.classes, c.p.live[..., 0] & c.p.truth.any(-1)
    if c.g[~c.p.live[..., 0]].any() or np.count_nonzero(live) < 2:
        return {}
    c = c.at(live)
    length = norms(c.p.truth)
    factors = np.where(c.g.any(-1), np.sum(c.g / length * (c.p.truth / length), -1), 0.0)
    # An advantage may be negative; with two classes any vector is a number times the truth.
    if not factors.any() or ((factors < 0).any() and (classes == 2 or not (factors > 0).any())):
        return {}
    taken = factors != 0
    return judge(WEIGHTS, c, factors, hot[live]) if c.at(taken).is_truth(1 / factors[taken, None]) else {}


finding("weights: {explanation}")(lambda c: _weighted(c, c.p.t))


@finding("""right up to class weights of smoothed targets: This is the gradient for targets that are smoothed, with
ε = {epsilon:.6g}, and then weighted by class, as PyTorch does both, up to a common factor: {weights}.""")
def _(c: Comparison) -> Values:
    """Solve Σ_j w_j q_j·o − w q, for labels smoothed to q and weights w of classes.

    That is (b_y + Σ_j a_j) o − b_y·hot − a with the unknowns a = wε/C and b = w(1 − ε): linear in both.
    """
    live, classes = c.p.live[..., 0], c.p.classes
    t, o = c.p.t[live], c.p.o[live]
    if not 3 <= classes <= 64 or len(t) < 4 or not _are_labels(t) or c.g[~live].any():
        return None
    design = np.concatenate([o[:, :, None] - np.eye(classes), (o - t)[:, :, None] * t[:, None, :]], -1)
    unknowns, *_ = np.linalg.lstsq(design.reshape(-1, 2 * classes), c.g[live].reshape(-1), rcond=None)
    a, b = unknowns[:classes], unknowns[classes:]
    present = t.any(0)
    quotients = a[present] * classes / b[present]  # ε/(1 − ε) of each class
    ratio = float(np.median(quotients))
    fitted = np.zeros_like(c.g)
    fitted[live] = design @ unknowns
    if not 1e-4 < ratio < 1e4 or np.ptp(quotients) > 100 * c.tolerance * ratio or (a < 0).any():
        return None
    weights = _listed(enumerate(a / a[a > 0].min()))
    return c.is_mistake(fitted) and {"epsilon": ratio / (1 + ratio), "weights": weights}


@finding("label smoothing and weights: The targets are smoothed, with ε = {epsilon:.6g}. {explanation}")
def _(c: Comparison) -> Values:
    """Two unknowns a vector, k and k·ε: the quotient ε must be the same for all."""
    p, live = c.p, c.p.live[..., 0] & c.g.any(-1)
    if p.classes < 4 or np.count_nonzero(live) < 2:
        return None
    smoothing = p.t - p.tau / p.classes
    first, second, seen = p.truth[live], smoothing[live], c.g[live]
    dots = np.array([[np.sum(a * b, -1) for b in (first, second, seen)] for a in (first, second)])
    determinant = dots[0, 0] * dots[1, 1] - dots[0, 1] ** 2
    k = (dots[0, 2] * dots[1, 1] - dots[1, 2] * dots[0, 1]) / determinant
    epsilon = float(np.median((dots[1, 2] * dots[0, 0] - dots[0, 2] * dots[0, 1]) / determinant / k))
    if not 1e-4 < epsilon < 1:
        return None
    targets = np.where(p.live, p.t - epsilon * smoothing, 0)
    smoothed = Problem(p.z, targets, p.o, p.truth + epsilon * smoothing * p.live, p.scales)
    if verdict := _weighted(Comparison(c.g, smoothed, c.dtype), p.t):
        kind = verdict["name"].split(" ", 2)[2].removeprefix("to ")
        return verdict | {"name": f"label smoothing and {kind}", "epsilon": epsilon}
    return None


@finding("""class weights by column: Each class's entries are the true entries times a number of its own: {weights}. The
weight of a label multiplies its whole vector, w_y (o − t); multiplied by column it is the gradient of no function.""")
def _(c: Comparison) -> Values:
    p, positions = c.p, tuple(range(c.g.ndim - 1))
    squares = np.sum(p.truth**2, positions)
    weights = np.sum(c.g * p.truth, positions) / np.where(squares > 0, squares, np.nan)
    are_weights = np.count_nonzero(p.live) > 2 and (weights >= 0).all() and c.is_mistake(weights * p.truth)
    return are_weights and {"weights": _listed(enumerate(weights))}


@finding("a known mistake times a number: {explanation} In addition, it is multiplied by {factor:.6g}.")
def _(c: Comparison) -> Values:
    for name, candidate in candidates(c.p):
        factor = c.factor(candidate) if np.count_nonzero(candidate) > 1 else 0
        if factor != 0 and c.explains(factor * candidate) and c.is_mistake(candidate, 1 / factor):
            return {"name": name, "explanation": MISTAKES[name][0], "factor": factor}
    return None


finding("""one number everywhere: Every entry is {value:.6g}: this is no gradient, but may be a loss or its
mean.""")(lambda c: np.ptp(c.g) <= c.tolerance * np.abs(c.g).max() and {"value": c.g.flat[0]})


@finding("""right numbers in another order: These are the numbers of the true gradient at other places: was it reshaped
instead of transposed, or flattened in another order?""")
def _(c: Comparison) -> Values:
    truth = c.nearest()
    numbers = np.sort(c.g, None), np.sort(truth, None)
    far = distance(c.g, truth) > 0.1 and c.g.size > 4
    return far and np.allclose(*numbers, rtol=10 * c.tolerance, atol=c.least)


@finding("""finite differences: These are multiples of {unit:.3g}, as differences of a loss in float32 are: right within
their accuracy, a relative error of {error:.2g}. Take them in float64, or compare with `jax.grad`.""")
def _(c: Comparison) -> Values:
    """Look for a number such that all entries are small multiples of it."""
    sizes, error = np.unique(np.abs(c.g[c.g != 0])), distance(c.g, c.nearest())
    if sizes.size < 2 or c.g.size < 8 or error >= 0.1:
        return None
    steps = np.diff(sizes, prepend=0)
    unit = float(steps[steps > 1e-3 * sizes[0]].min())
    multiples = sizes / unit
    off = np.abs(multiples - np.round(multiples)).max()
    close = multiples[-1] < 1e5 and off < 0.02 * max(1.0, multiples[-1] * 1e-4)
    return close and {"unit": unit, "error": error}


@finding("""wrong: This is neither the gradient of the cross-entropy nor a known mistake: relative error {error:.3g}.
The largest difference, relative to the length of the vector, is at {where}class {worst}: {given:.6g} instead of
{right:.6g}. Its sums over the classes {sums}.""")
def _(c: Comparison) -> Values:
    """How far an unknown mistake is from the truth, where it is farthest, and whether it moves all logits together."""
    g, expected = c.g, c.nearest()
    off, own = np.abs(g - expected), norms(expected)
    parts = (norms(off) / np.where(own > 0, own, 1))[..., 0]
    position = tuple(int(i) for i in np.unravel_index(parts.argmax(), parts.shape))
    worst = int(off[position].argmax())
    largest, sums = np.abs(g.sum(-1)).max(), "are zero, as they must be"
    if largest > c.tolerance * np.abs(g).max():
        sums = f"reach {largest:.3g} but must be zero, since moving all logits together changes no probability"
    return {
        "error": distance(g, expected),
        "where": f"position {position}, " if position else "",
        "worst": worst,
        "given": g[position][worst],
        "right": expected[position][worst],
        "sums": sums,
    }
