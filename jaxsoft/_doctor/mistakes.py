"""The mistakes that the gradient doctor knows: what each computes, and what to say of it."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxsoft._cross_entropy import cross_entropy
from jaxsoft._softmax import softmax, softmax_vjp

Vectors = Float[np.ndarray, "... classes"]

EXPLANATIONS = {
    "transposed": "This is the true gradient transposed: classes and samples are exchanged.",
    "all zero": "Every entry is zero, and the true gradient is not. The gradient of sum(softmax(z)) is zero "
    "everywhere, since the probabilities always sum to one: was that differentiated instead of the loss?",
    "opposite sign": "This is the true gradient with the opposite sign: descending along it climbs.",
    "factor": "The direction is right and the length is not: this is {factor:.6g} times the gradient of the sum, "
    "{note}.",
    "class weights": "This is the gradient with a weight for each class, up to a common factor: {weights}.",
    "a mask": "This is the gradient of {count} of {positions} positions, times {factor:.6g}, and zero at the others: "
    "right if a mask was to leave these out.",
    "weights of positions": "This is the gradient with a weight for each position, from {low:.6g} to {high:.6g}: "
    "right if these were to have such weights. Of another loss than −log p it may look so, too.",
    "class weights of smoothed targets": "This is the gradient for targets that are smoothed, with ε = {epsilon:.6g}, "
    "and then weighted by class, as PyTorch does both, up to a common factor: {weights}.",
    "right numbers in another order": "These are the numbers of the true gradient at other places: was it reshaped "
    "where axes had to be exchanged, or flattened in another order?",
    "one number everywhere": "Every entry is {value:.6g}: this may be a loss or its mean, and is no gradient.",
    "softmax not applied": "This is z − t: softmax was not applied. The gradient is softmax(z) − t.",
    "only the targets": "This is −t, the derivative of the loss to the logarithms of the probabilities. What these "
    "have to do with the logits is left out: log-softmax's rule g − s Σg makes τo − t of it.",
    "weights that two classes cannot tell": "Each vector is its true gradient times a number of its own, from "
    "{low:.6g} to {high:.6g}: right if the positions have such weights. With two classes a mistake may look so, too.",
    "off-diagonal terms missing": "This is −t(1 − o), the chain rule along ∂o_j/∂z_j alone. Every output depends on "
    "every logit: the terms ∂o_i/∂z_j = −o_i o_j for i ≠ j are missing, and with them every update where t_j = 0. "
    "Summed over all outputs the result is τo − t, where τ is the sum of the targets. What is computed here is the "
    "gradient of no function.",
    "Jacobian once too often": "This is the true gradient multiplied by softmax's Jacobian once more. o − t already "
    "contains the derivative of softmax; multiplying again gives the gradient of the Brier score ½‖o − t‖².",
    "elementwise derivative": "This is (o − t)·o(1 − o), as if softmax acted on each logit alone, like a sigmoid. "
    "o − t already contains the derivative of softmax; and with the off-diagonal terms left out this is the gradient "
    "of no function.",
    "probabilities passed as logits": "This is z − t. The logits are at least 0 and sum to one: they are probabilities "
    "already, and this is the gradient to the logits that they were made of. Pass those: softmax of probabilities is "
    "another distribution, nearly uniform.",
    "softmax applied twice": "The probabilities are those of softmax(softmax(z)): softmax was applied to what is "
    "passed to a loss that applies it again. Its result is nearly uniform, and learning slow. Pass the logits.",
    "probabilities not normalised": "This is exp(z) − t: the exponentials were not divided by their sum.",
    "argmax in place of the probabilities": "This is one_hot(argmax z) − t, as the perceptron learns: the "
    "probabilities were rounded to 0 and 1, and a position whose label leads has no gradient.",
    "logarithm missing": "This is o_y (o − t), the gradient of −o_y, or of −Σ t o that of a distribution: the loss of "
    "a label is −log o_y.",
    "log-softmax's rule with a plus": "This is g + s Σg in place of log-softmax's g − s Σg, for the gradient g = −t "
    "to the logarithms: the sign of what the classes have in common is wrong.",
    "log-softmax's rule with a dot product": "This is g − Σ g·log p, for the gradient g = −t to the logarithms. "
    "Log-softmax's rule is g − s Σg: softmax's, s (g − s·g), is another.",
    "sum in place of the dot product": "This is s (g − Σg) for g = −t/o: softmax's rule is s (g − s·g), with the dot "
    "product of both.",
    "binary cross-entropy of softmax's outputs": "This is the gradient of −Σ (t log o + (1 − t) log(1 − o)), which "
    "takes each class for a question of its own. Cross-entropy is −Σ t log o.",
    "binary cross-entropy to the probabilities": "This is (o − t)/(o(1 − o)), the derivatives of binary cross-entropy "
    "to the probabilities o, not to the logits, and of a loss that takes each class for a question of its own.",
    "gradient to the probabilities with a plus": "This is t/o. The derivatives of the loss to the probabilities o are "
    "−t/o, and to the logits τo − t.",
    "labels of the next position": "This is the gradient for the label of the next position, or of the one before. "
    "Were the targets shifted once too often, or not at all?",
    "Jacobian handed over": "This is softmax's Jacobian itself, one matrix a position, and no gradient yet: the "
    "product with the loss's gradient to the probabilities is. It is s (g − s·g), without the matrix.",
    "finite differences": "These are multiples of {value:.3g}, as differences of a loss in float32 are: right to what "
    "they can tell, a relative error of {note}. Take them in float64, or compare with `jax.grad`.",
    "a function of the label's probability": "Each vector is a multiple of its true gradient, and the multiple "
    "follows the probability of the label: this is the gradient of another function of it than −log p, as that of the "
    "focal loss is. The multiples go from {low:.4g} to {high:.4g}.",
    "derivative of softmax alone": "This is o(1 − o), the derivatives ∂o_j/∂z_j alone: the targets are not in it, so "
    "it cannot lead to them. The chain rule multiplies all of softmax's derivatives by those of the loss, and what "
    "is left is τo − t.",
    "gradient to the probabilities": "This is −t/o, the derivatives of the loss to the probabilities o, not to the "
    "logits. Multiplied by softmax's Jacobian it becomes τo − t, in which the division has cancelled.",
    "label not subtracted": "This is τo: the targets were not subtracted from the probabilities.",
    "targets do not sum to one": "This is o − t, but some targets sum to τ ≠ 1: the gradient is τo − t.",
    "sigmoid in place of softmax": "This is σ(z) − t: every logit went through a sigmoid of its own, as for labels "
    "that do not exclude each other (binary cross-entropy). Where one class is right, softmax makes the classes "
    "compete: its probabilities sum to one.",
    "softmax over the wrong axis": "The probabilities were normalised over another axis than that of the classes.",
    "labels shifted by one": "This is the gradient for labels one higher or lower: are the classes counted from 0?",
    "labels counted from 1": "Label {label} is outside [0, {label}), and no label is 0: these labels count the classes "
    "from 1, and here the first class is 0. Subtract 1 from all of them. Of the gradient, for the labels less one: ",
    "classes along another axis": "With the classes along axis {given} this is not the gradient, along axis {right} it "
    "is: pass axis={right}.",
    "error averaged over the batch": "Every position was given the same vector, the errors τo − t averaged or added "
    "over the positions. Each logit moves the loss of its own position alone: its gradient is its own error. Only "
    "gradients to what the positions share, such as weights, are added up over them.",
    "log2 in place of ln": "This is the true gradient divided by ln 2: the loss was taken with log2. The derivative "
    "of log2(o) is 1/(o ln 2); cross-entropy is in nats, with the natural logarithm.",
    "log10 in place of ln": "This is the true gradient divided by ln 10: the loss was taken with log10. The derivative "
    "of log10(o) is 1/(o ln 10); cross-entropy is in nats, with the natural logarithm.",
    "temperature": "The probabilities are those of softmax(z/T), not of softmax(z). By the chain rule the gradient "
    "to z would then be (τo − t)/T. Here T = {value:.6g}, {note}.",
    "weight decay left in": "This is the true gradient plus λz with λ = {value:.6g}: a penalty ½λ‖z‖² on the logits, "
    "such as weight decay, was differentiated too. It is no part of the cross-entropy.",
    "label smoothing left in": "This is the gradient for smoothed targets, (1 − ε)t + {note} over the C classes with "
    "ε = {value:.6g}, not for the targets given.",
    "z-loss left in": "This is the true gradient plus 2ζ·lse·o with ζ = {value:.6g}, lse the logarithm of the sum of "
    "exp(z): the derivative of a z-loss ζ·lse², which is no part of the cross-entropy.",
    "ignored positions not zeroed": "The gradient is right but where positions are ignored: there it must be zero for "
    "all classes, not only for the label's.",
    "sums without keepdims": "Each row's exponentials were divided by the sum of another row: NumPy lines up a sum "
    "over the last axis with the columns, and a square batch hides it. Sum with keepdims=True.",
    "labels of the whole batch": "Every position was given the labels of all: in NumPy p[:, y] -= 1 subtracts in every "
    "row, and p[np.arange(n), y] -= 1 in each its own.",
    "divided in part": "Of τo − t only one term was divided by the number of positions, n, as where parentheses are "
    "missing or a mean's −t/n is added to o. n·o − t is that of one Jacobian of the whole batch, flattened.",
    "reshaped in place of transposed": "The classes are not along the last axis in memory, and the logits were "
    "reshaped to (positions, classes) all the same: each softmax was of what lies side by side. Move the axis first.",
    "divergence the wrong way round": "This is the gradient of Σ o log(o/t), with the distributions exchanged. "
    "Cross-entropy is, up to a constant, Σ t log(t/o).",
    "softmax of the negated logits": "The probabilities are those of softmax(−z), as if z were energies. To these the "
    "gradient would be t − τ·softmax(−z); the logits are −z.",
    "a class without a gradient": "The gradient is right but for one class, where it is zero: right if that is a "
    "reference class, whose logit is held at 0. Of all the logits it is not the gradient.",
    "hinge loss": "This counts the classes within a margin of 1 of the label's score, or above it: the gradient of a "
    "support vector machine's loss, not of the cross-entropy.",
    "class weights by column": "Each class's entries are the true ones times a number of its own: {weights}. The "
    "weight of a label is for its whole vector, w_y (o − t); by column it is the gradient of no function.",
    "clipped": "This is the true gradient with its entries clipped to ±{value:.6g}.",
    "entropy bonus left in": "This is the true gradient plus β o (log o + H) with β = {value:.6g}, H the entropy of o: "
    "a bonus βH, as for a policy, was differentiated too. It is no part of the cross-entropy.",
    "one-sided differences": "These are differences to one side of a step h = {value:.3g}: they are off by "
    "½h ∂²/∂z² = ½hτ o(1 − o). Take them to both sides, (L(z + h) − L(z − h))/2h.",
    "lost to rounding": "This is right to the rounding of one, but smaller than that: p − 1 was computed where p "
    "rounds to 1. The gradient of a label is minus the sum of the other probabilities, as in `cross_entropy`.",
}


EXPLANATIONS |= {
    f"{name} before softmax": f"The probabilities are those of softmax({name}(z)). The layer before softmax has no "
    "activation: it would keep logits from being as low or as high as they need to be."
    for name in ("relu", "tanh", "sigmoid")
}


class Problem(NamedTuple):
    """Everything the mistakes are made of, in float64, classes last."""

    z: Vectors
    t: Vectors  # zero where ignored
    o: Vectors
    truth: Vectors  # of the sum
    scales: dict[str, int]  # by what each reduction divides

    @property
    def tau(self) -> Vectors:
        return self.t.sum(-1, keepdims=True)

    @property
    def live(self) -> Bool[np.ndarray, "... 1"]:
        return np.any(self.t, axis=-1, keepdims=True)

    @property
    def rest(self) -> Vectors:
        """1 − o as the sum of the other probabilities."""
        largest = self.o == self.o.max(-1, keepdims=True)
        others = np.where(largest, 0, self.o).sum(-1, keepdims=True)
        return np.where(largest & (self.o > 0.5), others, 1 - self.o)


def solve(z: Vectors, t: Vectors) -> Problem:
    """The true gradient of the sum of the losses; a position without targets is ignored."""
    # Where one class has all the target it is a label: its 1 − p is then never formed by subtracting.
    hot = np.count_nonzero(t, -1) <= 1

    of_labels, soft = hot * t.sum(-1), np.where(hot[..., None], 0, t)
    truth, o = map(np.asarray, _in_float64(_truth_and_probs, z, t.argmax(-1), of_labels, soft))
    scales = {"sum": 1}
    positions, valid = hot.size, int(t.any(-1).sum())
    if valid < positions:
        if valid:
            scales[f"mean over the {valid} positions not ignored"] = valid
        scales[f"mean over all {positions} positions, ignored ones too"] = positions
    elif positions > 1:
        scales[f"mean over {positions} positions"] = positions
    if t.ndim > 2:  # Caffe and Chainer divide by the one, MXNet's trainer by it after a mean over the other
        for name, count in (("the batch size", len(t)), ("the positions of an example", positions // len(t))):
            if count not in scales.values():
                scales[f"sum divided by {name}, {count}"] = count
    return Problem(z, t, o, truth, scales)


@jax.jit
def _truth_and_probs(z, labels, of_labels, soft):
    def loss(z):
        by_label = cross_entropy(z, labels, weights=of_labels, reduction="sum")
        return by_label + cross_entropy(z, soft, reduction="sum")

    return jax.grad(loss)(z), softmax(z)


def _in_float64(fn: Callable, *args):
    with jax.enable_x64(True):
        return fn(*(jnp.asarray(a) if isinstance(a, np.ndarray) else a for a in args))


def _spared_or_not(p: Problem, gradient: Vectors) -> Iterator[Vectors]:
    """Zero where a position is ignored, and without that."""
    yield np.where(p.live, gradient, 0)
    if not p.live.all():
        yield gradient


def _other_axes(p: Problem) -> Iterator[Vectors]:
    wrong: list[int | None] = list(range(p.z.ndim - 1))
    for axis in wrong + [None] * (p.z.size > p.z.shape[-1]):
        yield np.where(p.live, p.tau * np.asarray(_in_float64(softmax, p.z, axis)) - p.t, 0)


def _unscaled(p: Problem) -> Iterator[Vectors]:
    if (np.abs(p.tau - 1) > 1e-6)[p.tau != 0].any():
        yield from _spared_or_not(p, p.o - p.t)


def _neighbours(p: Problem) -> Iterator[Vectors]:
    for shift, edge in ((1, 0), (-1, -1)):
        shifted = np.roll(p.t, shift, -1)
        yield p.truth + p.t - shifted
        shifted[..., edge] = 0  # a one-hot table has no row for a label beyond the last class
        if shifted.any():
            yield p.truth + p.t - shifted


def _next_position(p: Problem) -> Iterator[Vectors]:
    if p.z.ndim < 2 or p.z.shape[-2] == 1:
        return
    mass = p.truth + p.t
    for shift, edge in ((-1, -1), (1, 0)):
        shifted = np.roll(p.t, shift, -2)
        yield mass - shifted
        shifted = mass - shifted
        shifted[..., edge, :] = 0  # which has none
        yield shifted


ACTIVATIONS: dict[str, Callable[[Vectors], tuple[Vectors, Vectors]]] = {  # a and its derivative
    "relu": lambda z: (np.maximum(z, 0), np.where(z > 0, 1.0, 0.0)),
    "tanh": lambda z: (np.tanh(z), 1 - np.tanh(z) ** 2),
    "sigmoid": lambda z: (_sigmoid(z), _sigmoid(z) * _sigmoid(-z)),
}


def _activated(name: str) -> Callable[[Problem], Iterator[Vectors]]:
    def candidates(p: Problem) -> Iterator[Vectors]:
        activated, slope = ACTIVATIONS[name](p.z)
        error = np.where(p.live, p.tau * _softmax(activated) - p.t, 0)
        yield error * slope
        yield error

    return candidates


def _twice(p: Problem) -> Iterator[Vectors]:
    error = np.where(p.live, p.tau * _softmax(p.o) - p.t, 0)
    yield _pulled(p.o, error)
    yield error


def _of_probabilities(p: Problem) -> Iterator[Vectors]:
    if (p.z >= 0).all() and np.allclose(p.z.sum(-1), 1, atol=1e-2):
        yield np.where(p.live, p.tau * p.z - p.t, 0)


def _binary(p: Problem) -> tuple[Vectors, Vectors]:
    """Of binary cross-entropy the derivatives to the logits and to the probabilities."""
    to_probs = np.where(p.live, np.where(p.t == 1, 0, (1 - p.t) / p.rest) - _divided_by_probs(p), 0)
    return _pulled(p.o, to_probs), to_probs


def _pulled(o: Vectors, g: Vectors) -> Vectors:
    return o * (g - (o * g).sum(-1, keepdims=True))


def _partly_divided(p: Problem) -> Iterator[Vectors]:
    for count in p.scales.values():
        if count > 1:
            yield count * (p.truth + p.t) - p.t
            yield p.truth + p.t - count * p.t


def _reshaped(p: Problem) -> Iterator[Vectors]:
    for axis in range(p.z.ndim - 1):
        of_memory = np.moveaxis(p.z, -1, axis)
        if of_memory.shape != p.z.shape:  # else nothing was reshaped: the classes are along another axis
            error = np.where(p.live, p.tau * _softmax(of_memory.reshape(p.z.shape)) - p.t, 0)
            yield np.moveaxis(error.reshape(of_memory.shape), axis, -1)


def _without_keepdims(p: Problem) -> Iterator[Vectors]:
    if p.z.ndim == 2 and p.z.shape[0] == p.z.shape[1]:
        top = p.z.max(-1)
        for e in (np.exp(p.z - top[:, None]), np.exp(p.z - top)):
            yield np.where(p.live, p.tau * e / e.sum(-1) - p.t, 0)


def _one_class_left_out(p: Problem) -> Iterator[Vectors]:
    for left_out in (0, p.z.shape[-1] - 1) if p.z.shape[-1] > 2 else ():
        yield np.where(np.arange(p.z.shape[-1]) == left_out, 0, p.truth)


def _of_energies(p: Problem) -> Iterator[Vectors]:
    error = np.where(p.live, p.tau * _softmax(-p.z) - p.t, 0)
    yield error
    yield -error


def _hinge(p: Problem) -> Iterator[Vectors]:
    above = p.live & (p.t == 0) & (p.z - (p.z * p.t).sum(-1, keepdims=True) + 1 > 0)
    if p.z.shape[-1] > 2:  # two classes have (−1, 1) for many a reason
        yield above - p.t * above.sum(-1, keepdims=True)


def _argmax(p: Problem) -> Iterator[Vectors]:
    leads = np.eye(p.z.shape[-1])[p.z.argmax(-1)]
    yield np.where(p.live, leads - p.t, 0)


def _divided_by_probs(p: Problem) -> Vectors:
    return np.where(p.t == 0, 0, p.t / p.o)


def _averaged(p: Problem) -> Iterator[Vectors]:
    positions, valid = p.live.size, int(p.live.sum())
    axes = tuple(range(p.z.ndim - 1))
    if positions > 1:
        for over in {axes, axes[:1]}:
            total = np.broadcast_to(p.truth.sum(over, keepdims=True), p.truth.shape)
            for count in {1, positions, valid or 1}:
                yield from _spared_or_not(p, total / count)


def _sigmoid(z: Vectors) -> Vectors:
    return 0.5 + 0.5 * np.tanh(0.5 * z)


# The gradients of the sum, or of the mean before it is divided, of each mistake.
CANDIDATES: dict[str, Callable[[Problem], Iterable[Vectors]]] = {
    "off-diagonal terms missing": lambda p: (-p.t * p.rest,),
    "Jacobian once too often": lambda p: (np.asarray(_in_float64(softmax_vjp, p.o, p.truth)),),
    "elementwise derivative": lambda p: (p.truth * p.o * p.rest, (p.o - p.t) * p.o * p.rest),
    "derivative of softmax alone": lambda p: _spared_or_not(p, p.o * p.rest),
    "gradient to the probabilities": lambda p: (np.where(p.t == 0, 0, -p.t / p.o),),
    "label not subtracted": lambda p: (p.truth + p.t, p.o),
    "targets do not sum to one": _unscaled,
    "sigmoid in place of softmax": lambda p: _spared_or_not(p, _sigmoid(p.z) - p.t),
    "softmax over the wrong axis": _other_axes,
    "labels shifted by one": _neighbours,
    "error averaged over the batch": _averaged,
    "log2 in place of ln": lambda p: (p.truth / np.log(2),),
    "log10 in place of ln": lambda p: (p.truth / np.log(10),),
    "probabilities passed as logits": _of_probabilities,
    "softmax applied twice": _twice,
    **{f"{name} before softmax": _activated(name) for name in ACTIVATIONS},
    "softmax not applied": lambda p: _spared_or_not(p, p.z - p.t),
    "only the targets": lambda p: (-p.t,),
    "probabilities not normalised": lambda p: _spared_or_not(p, np.exp(p.z) - p.t),
    "argmax in place of the probabilities": _argmax,
    "logarithm missing": lambda p: ((p.t * p.o).sum(-1, keepdims=True) * p.truth, _pulled(p.o, -p.t)),
    "log-softmax's rule with a plus": lambda p: _spared_or_not(p, -p.t - p.tau * p.o),
    "log-softmax's rule with a dot product": lambda p: (
        np.where(p.live, (p.t * (p.z - _lse(p))).sum(-1, keepdims=True) - p.t, 0),
    ),
    "sum in place of the dot product": lambda p: (
        p.o * (_divided_by_probs(p).sum(-1, keepdims=True) - _divided_by_probs(p)),
    ),
    "binary cross-entropy of softmax's outputs": lambda p: (_binary(p)[0],),
    "binary cross-entropy to the probabilities": lambda p: (_binary(p)[1],),
    "gradient to the probabilities with a plus": lambda p: (_divided_by_probs(p),),
    "labels of the next position": _next_position,
    "sums without keepdims": _without_keepdims,
    "labels of the whole batch": lambda p: _spared_or_not(p, p.truth + p.t - p.t.any(tuple(range(p.z.ndim - 1)))),
    "divided in part": _partly_divided,
    "reshaped in place of transposed": _reshaped,
    "divergence the wrong way round": lambda p: (_pulled(p.o, p.z - _lse(p) - np.log(p.t)),) if (p.t > 0).all() else (),
    "softmax of the negated logits": _of_energies,
    "a class without a gradient": _one_class_left_out,
    "hinge loss": _hinge,
    "transposed": lambda p: (p.truth.T,) if p.truth.ndim == 2 and p.truth.shape[0] == p.truth.shape[1] else (),
}


class Fit(NamedTuple):
    """A mistake with a number in it, with the number that fits best."""

    gradient: Vectors  # of the sum
    divisor: int  # of the reduction
    value: float
    note: str = ""
    likely: bool = True  # whether anybody would have such a number


def _addition(
    direction: Callable[[Problem], Vectors], value: Callable[[float, int], float], most: float, note: str = ""
):
    """The truth plus k times the direction, where k > 0 and its number at most so large."""

    def fit(p: Problem, g: Vectors) -> Iterator[Fit]:
        for added in _spared_or_not(p, direction(p)):
            length = np.vdot(added, added)
            for count in p.scales.values():
                k = float(np.vdot(added, count * g - p.truth) / length) if length else 0.0
                if k > 0 and np.isfinite(k):
                    number = value(k, count)
                    yield Fit(p.truth + k * added, count, number, note, number <= most)

    return fit


def _smoothings(p: Problem, g: Vectors) -> Iterator[Fit]:
    """Of the mass τ that a position has, and of a mass of one as in `cross_entropy`."""
    classes = p.z.shape[-1]
    yield from _addition(lambda p: p.t - p.tau / classes, lambda k, count: k, 1, "ετ/C")(p, g)
    if (np.abs(p.tau - 1) > 1e-6)[p.tau != 0].any():
        yield from _addition(lambda p: p.t - 1 / classes + (1 - p.tau) * p.o, lambda k, count: k, 1, "ε/C")(p, g)


def _temperatures(p: Problem, g: Vectors) -> Iterator[Fit]:
    """Find T by looking ever closer around the best of a grid, at the vectors that tell most."""
    classes = p.z.shape[-1]
    telling = np.argsort(-np.abs(g).max(-1), axis=None, kind="stable")[: max(1, 4096 // classes)]
    z, t, tau, seen = (a.reshape(-1, a.shape[-1])[telling] for a in (p.z, p.t, p.tau, g))
    forms = {
        0: "without that division",
        -1: "with that division",
        1: "multiplied by T instead, as where a loss times T² is distilled",
    }
    for count in p.scales.values():
        for power, note in forms.items():
            low, high = -5.0, 5.0  # powers of two
            best = 1.0
            while high - low > 1e-9:
                grid = np.linspace(low, high, 33)
                off = [2.0 ** (x * power) * (tau * _softmax(z / 2.0**x) - t) - count * seen for x in grid]
                nearest = int(np.argmin([np.vdot(a, a) for a in off]))
                low, high = grid[max(nearest - 1, 0)], grid[min(nearest + 1, 32)]
                best = float(2.0 ** grid[nearest])
            fitted = np.where(p.live, best**power * (p.tau * _softmax(p.z / best) - p.t), 0)
            yield Fit(fitted, count, best, note, 2.0**-4.9 < best < 2.0**4.9)  # the ends of the grid are no optima


def _clipped(p: Problem, g: Vectors) -> Iterator[Fit]:
    most = float(np.abs(g).max())
    reached = bool(np.count_nonzero(np.abs(g) > most * (1 - 1e-6)) > 1)
    for count in p.scales.values():
        yield Fit(np.clip(p.truth, -most * count, most * count), count, most, likely=reached)


def _softmax(z: Vectors) -> Vectors:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _lse(p: Problem) -> Vectors:
    top = p.z.max(-1, keepdims=True)
    return top + np.log(np.exp(p.z - top).sum(-1, keepdims=True))


FITS: dict[str, Callable[[Problem, Vectors], Iterator[Fit]]] = {
    "temperature": _temperatures,
    "weight decay left in": _addition(lambda p: p.z, lambda k, count: k / count, 2),
    "label smoothing left in": _smoothings,
    "z-loss left in": _addition(lambda p: _lse(p) * p.o, lambda k, count: k / 2, 1),
    "entropy bonus left in": _addition(lambda p: _pulled(p.o, p.z - _lse(p)), lambda k, count: k, 1),
    "one-sided differences": _addition(lambda p: p.tau * p.o * p.rest, lambda k, count: 2 * k, 0.25),
    "clipped": _clipped,
}


def _shifted_softmax(z: Vectors, shift: np.ndarray | float, tiny: float) -> Vectors:
    e = np.exp(z - shift)
    e = np.where(e < tiny, 0, e)
    return e / e.sum(-1, keepdims=True)


def _divided(z: Vectors, t: Vectors, tiny: float) -> Vectors:
    o = _shifted_softmax(z, z.max(-1, keepdims=True), tiny)
    quotient = t / np.where(o < tiny, 0, o)
    return quotient if tiny else np.where(t == 0, 0, quotient)  # whoever divides the zeros too gets 0/0


def _divided_and_multiplied(z: Vectors, t: Vectors, tiny: float) -> Vectors:
    """The Jacobian spreads what was divided over the classes."""
    return np.broadcast_to(_divided(z, t, tiny).sum(-1, keepdims=True), z.shape)


# What makes a gradient infinite or NaN: formulas of z, t and the number below which a device puts zero.
CAUSES: dict[str, Callable[[Vectors, Vectors, float], Vectors]] = {
    "softmax was shifted by the maximum of the whole array instead of each vector's own; where a vector lies far "
    "below, all its exponentials are 0, and 0/0 is NaN": lambda z, t, tiny: _shifted_softmax(z, z.max(), tiny),
    "exp(z) overflowed, since no maximum was subtracted": lambda z, t, tiny: _shifted_softmax(z, 0, tiny),
    "−t/o was computed, and where a probability underflows to 0 that divides by zero. Never divide: the o cancels, "
    "and the gradient is τo − t": _divided_and_multiplied,
    "this is −t/o, the gradient to the probabilities, and where one of them underflows to 0 that divides by zero. The "
    "gradient to the logits is τo − t": _divided,
}
