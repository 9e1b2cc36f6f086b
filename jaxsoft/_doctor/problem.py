"""The problem whose gradient is judged, with the true gradient, and comparisons with it within a dtype's rounding."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxsoft import _softmax
from jaxsoft._cross_entropy import cross_entropy

Vectors = Float[np.ndarray, "... classes"]
# The allowed error of a right gradient, relative to the length of each vector; the keys are bits of the mantissa.
TOLERANCE = {52: 1e-4, 23: 1e-4, 10: 2e-3, 7: 2e-2}
# If p − 1 loses more than this much of a vector's length, the verdict is "lost to rounding".
LOSS = 1e-2


class Problem:
    """Everything from which mistakes are computed, in float64, classes last."""

    def __init__(self, z: Vectors, t: Vectors, o: Vectors, truth: Vectors, scales: dict[str, int]):
        self.z, self.t, self.o = z, t, o  # ignored positions have no targets
        self.truth = truth  # it belongs to the sum of the losses
        self.scales = scales  # each reduction divides by its number
        self.classes, self.is_square = z.shape[-1], z.ndim == 2 and z.shape[0] == z.shape[1]
        self.tau = t.sum(-1, keepdims=True)
        self.has_scaled_targets = bool((np.abs(self.tau - 1) > 1e-6)[self.tau != 0].any())
        self.live = np.any(t, axis=-1, keepdims=True)
        self.mass = truth + t  # this is τo, from which the targets are subtracted
        self.lse = logsumexp(z)
        self.quotient = np.where(t == 0, 0, t / o)
        # 1 − o of the largest is the sum of the others, because a subtraction would round it away.
        largest = o == o.max(-1, keepdims=True)
        others = np.where(largest, 0, o).sum(-1, keepdims=True)
        self.rest = np.where(largest & (o > 0.5), others, 1 - o)

    def at(self, positions: np.ndarray) -> "Problem":
        """The chosen positions alone, with the divisors of all."""
        return Problem(self.z[positions], self.t[positions], self.o[positions], self.truth[positions], self.scales)

    def error(self, probs: Vectors) -> Vectors:
        """The gradient if these were the probabilities."""
        return np.where(self.live, self.tau * probs - self.t, 0)

    def pulled(self, g: Vectors) -> Vectors:
        """The VJP of softmax with a gradient to the probabilities."""
        return self.o * (g - (self.o * g).sum(-1, keepdims=True))

    def spared_or_not(self, gradient: Vectors) -> Iterator[Vectors]:
        """The gradient with zeros where positions are ignored, and without them where that differs."""
        yield np.where(self.live, gradient, 0)
        if np.any(gradient, where=~self.live):
            yield gradient


def solve(z: Vectors, t: Vectors) -> Problem:
    """The true gradient of the sum of the losses; a position without targets is ignored."""
    # Where one class has all the target it is a label: its 1 − p is then never formed by subtracting.
    hot = np.count_nonzero(t, -1) <= 1
    arrays = z, t.argmax(-1), hot * t.sum(-1), np.where(hot[..., None], 0, t)
    with jax.enable_x64(True):
        truth, o = map(np.asarray, _truth_and_probs(*map(jnp.asarray, arrays)))
    positions, valid = hot.size, int(t.any(-1).sum())
    scales = {"sum": 1}
    if 0 < valid < positions:
        scales[f"mean over the {valid} positions not ignored"] = valid
    if valid < positions:
        scales[f"mean over all {positions} positions, ignored ones too"] = positions
    elif positions > 1:
        scales[f"mean over {positions} positions"] = positions
    if t.ndim > 2:  # Caffe and Chainer divide by the one, MXNet's trainer by it after a mean over the other
        for name, count in (("the batch size", len(t)), ("the positions of an example", positions // len(t))):
            if count not in scales.values():
                scales[f"sum divided by {name}, {count}"] = count
    return Problem(z, t, o, truth, scales)


@jax.jit
def _truth_and_probs(z, labels, label_weights, soft):
    def loss(z):
        by_label = cross_entropy(z, labels, weights=label_weights, reduction="sum")
        return by_label + cross_entropy(z, soft, reduction="sum")

    return jax.grad(loss)(z), _softmax.softmax(z)


def logsumexp(z: Vectors, axis: int | None = -1) -> Vectors:
    top = z.max(axis, keepdims=True)
    return top + np.log(np.exp(z - top).sum(axis, keepdims=True))


def log_softmax(z: Vectors, axis: int | None = -1) -> Vectors:
    return z - logsumexp(z, axis)


def softmax(z: Vectors, axis: int | None = -1) -> Vectors:
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def sigmoid(z: Vectors) -> Vectors:
    return 0.5 + 0.5 * np.tanh(0.5 * z)


class Comparison:
    """A gradient, classes last, with its problem and the limits of its dtype."""

    def __init__(self, g: Vectors, p: Problem, dtype: np.dtype, logits_dtype: np.dtype | None = None):
        self.g, self.p, self.dtype = g, p, dtype
        self.coarsest = min(dtype, logits_dtype or dtype, key=lambda d: jnp.finfo(d).nmant)
        limits = jnp.finfo(dtype)
        self.tolerance = TOLERANCE[limits.nmant]  # it is relative to the length of a vector
        self.eps = float(limits.eps)  # numbers at one have this spacing
        self.least = float(limits.smallest_subnormal)  # this is the smallest number, and the spacing there
        # A device may give zero below a few of the smallest normal numbers, because it flushed a factor to zero before.
        self.flushed = 0.0 if dtype == np.float16 else 4 * float(limits.tiny)

    def at(self, positions: np.ndarray) -> "Comparison":
        return Comparison(self.g[positions], self.p.at(positions), self.dtype)

    def is_truth(self, count: float | Vectors = 1.0, *, lost: bool = False) -> bool:
        """Whether `count` times the gradient is the gradient of the sum, within each vector's own rounding.

        With `lost`, p − 1 may have lost all of a label's entry, and otherwise only a little of it.
        """
        p = self.p
        given = count * self.g
        hot = np.count_nonzero(p.t, -1, keepdims=True) == 1
        length = norms(p.truth)
        # z minus the maximum is rounded before exp; 1/count and the result may be the dtype's smallest numbers.
        exponent = self.eps / 2 * (p.z.max(-1, keepdims=True) - p.z) * np.abs(p.tau) * p.o
        smallest = self.least / 2 * abs(count) * (1 + np.abs(p.truth))
        subtraction = 4 * self.eps * np.abs(p.t)
        if not lost:  # with a label the subtraction can be avoided, with a distribution it cannot
            subtraction = np.where(hot, np.minimum(subtraction, LOSS * length), subtraction)
        limit = self.flushed * np.maximum(abs(count), np.maximum(np.abs(p.tau), 1))
        off = given - _flushed(p, given, hot, limit)
        return bool((norms(_beyond(off, exponent + smallest + subtraction)) <= self.tolerance * length).all())

    def is_reduced_truth(self, factor: float = 1.0, *, lost: bool = False) -> bool:
        """Whether the gradient is the factor times the gradient of the sum or of a mean."""
        return any(self.is_truth(count / factor, lost=lost) for count in self.p.scales.values())

    def is_mistake(self, candidate: Vectors, count: float = 1.0) -> bool:
        """Whether `count` times the gradient is the candidate, each vector to the rounding of its targets.

        A vector that is smaller than this rounding may have any value; all vectors together may not.
        """
        length = norms(candidate)
        hidden = 4 * self.eps * np.abs(self.p.t).sum(-1, keepdims=True)
        smallest = (self.least / 2 + self.flushed) * abs(count) * (1 + np.abs(candidate))
        off = count * self.g - candidate
        total = norm(_beyond(off, smallest + np.minimum(hidden, LOSS * length)))
        each = norms(_beyond(off, smallest + hidden))
        return bool(total <= self.tolerance * norm(candidate) and (each <= self.tolerance * length).all())

    def is_candidate(self, candidate: Vectors) -> bool:
        """Whether the gradient is the candidate, of the sum or a mean, and the truth does not explain it as well."""
        made = Comparison(candidate, self.p, self.dtype)
        if made.is_truth(lost=True):  # for instance a relu that changes no logit
            return False
        multiple = made.factor_of_truth()
        if multiple is not None:  # such a candidate must be as close as the truth would have to be
            return self.is_reduced_truth(multiple)
        return any(
            self.is_mistake(candidate, count)
            # The candidate must explain the difference from the truth, not only be small relative to the right entries.
            and norm(count * self.g - candidate) < 0.05 * norm(count * self.g - self.p.truth)
            for count in self.p.scales.values()
        )

    def factor(self, candidate: Vectors) -> float:
        """The k for which k times the candidate is nearest to the gradient; 0 where there is none."""
        length = norm(candidate)
        k = float(np.vdot(candidate / length, self.g / length)) if length else 0.0
        return k if np.isfinite(k) else 0.0

    def factor_of_truth(self) -> float | None:
        """The k for which the gradient is k times the gradient of the sum, or None."""
        factor = self.factor(self.p.truth)
        return factor if factor and self.is_truth(1 / factor, lost=True) else None

    def nearest(self) -> Vectors:
        """The true gradient of the sum or of a mean, whichever is nearest."""
        reduced = (self.p.truth / count for count in self.p.scales.values())
        return min(reduced, key=lambda truth: distance(self.g, truth))

    def explains(self, gradient: Vectors) -> bool:
        """Whether a gradient explains the part that no multiple of the truth explains."""
        apart = norm(self.g - self.factor(self.p.truth) * self.p.truth)
        return norm(self.g - gradient) < 0.05 * apart


def _flushed(p: Problem, given: Vectors, hot: Bool[np.ndarray, "... 1"], limit: Vectors) -> Vectors:
    """The truth, or zero in place of τo, t or their difference where a device may flush it: the nearest to `given`."""
    options = np.stack(
        [
            p.truth,
            np.where(np.abs(p.truth) < limit, 0, p.truth),
            np.where(np.abs(p.mass) < limit, -p.t, p.truth),
            np.where(~hot & (np.abs(p.t) < limit), p.mass, p.truth),
        ]
    )
    nearest = np.take_along_axis(options, np.abs(options - given).argmin(0)[None], 0)[0]
    # A label's entry is minus the sum of the others, of those that became zero as well or without them.
    others = np.where(p.t == 0, p.truth - nearest, 0).sum(-1, keepdims=True)
    between = np.clip(given, np.minimum(p.truth, p.truth + others), np.maximum(p.truth, p.truth + others))
    return np.where(hot & (p.t != 0), between, nearest)


def _beyond(off: Vectors, allowed: Vectors) -> Vectors:
    return np.maximum(np.abs(off) - allowed, 0)


def norms(a: Vectors) -> Vectors:
    """Length of each vector, also if its square overflows or underflows in float64."""
    largest = np.abs(a).max(-1, keepdims=True)
    unit = np.where((largest > 0) & np.isfinite(largest), largest, 1)
    return unit * np.linalg.norm(a / unit, axis=-1, keepdims=True)


def norm(a: Float[np.ndarray, "..."]) -> float:
    return float(norms(a.reshape(1, -1))[0, 0])


def distance(g: Float[np.ndarray, "..."], expected: Float[np.ndarray, "..."]) -> float:
    """‖g − expected‖ / ‖expected‖, or ‖g‖ if zero is expected."""
    return norm(g - expected) / (norm(expected) or 1)
