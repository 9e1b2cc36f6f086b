"""The problem whose gradient is judged: logits, targets, probabilities and the true gradient, classes last."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxsoft import _softmax
from jaxsoft._cross_entropy import cross_entropy

Vectors = Float[np.ndarray, "... classes"]


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


def softmax(z: Vectors, axis: int | None = -1) -> Vectors:
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def sigmoid(z: Vectors) -> Vectors:
    return 0.5 + 0.5 * np.tanh(0.5 * z)
