"""The mistakes that the gradient doctor knows: what to say of each, and the gradient that it makes.

Each mistake is one entry: its name, a colon, the text that the user reads, and the formula. The text is not a
docstring, because `python -OO` removes docstrings.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np

from jaxsoft._doctor.problem import Problem, Vectors, sigmoid, softmax


class Fit(NamedTuple):
    """A mistake that depends on a number, with the number that fits best."""

    gradient: Vectors  # it belongs to the sum of the losses
    divisor: int  # the reduction divides by it
    value: float
    note: str = ""
    likely: bool = True  # whether such a number occurs in practice


# A formula gives the gradient of the sum, or of the mean before its division. A single array is tried with zeros at
# the ignored positions and without them; several arrays are tried as they are.
Formula = Callable[[Problem], Vectors | Iterable[Vectors]]
FitFormula = Callable[[Problem, Vectors], Iterator[Fit]]
F = TypeVar("F", bound=Callable)


class Catalogue(dict[str, tuple[str, F]]):
    """The explanation and the formula of each mistake by its name, the most likely first."""

    def entry(self, text: str) -> Callable[[F], F]:
        """A decorator that enters a formula under "name: explanation"."""
        name, explanation = " ".join(text.split()).split(": ", 1)

        def enter(formula: F) -> F:
            self[name] = explanation, formula
            return formula

        return enter


def _binary(p: Problem) -> Vectors:
    """The derivatives of binary cross-entropy to the probabilities."""
    return np.where(p.live, np.where(p.t == 1, 0, (1 - p.t) / p.rest) - p.quotient, 0)


MISTAKES, FITS = Catalogue[Formula](), Catalogue[FitFormula]()
mistake, fit = MISTAKES.entry, FITS.entry


def candidates(p: Problem) -> Iterator[tuple[str, Vectors]]:
    """Every gradient that a known mistake makes of the problem, with the mistake's name."""
    for name, (_, formula) in MISTAKES.items():
        made = formula(p)
        for candidate in p.spared_or_not(made) if isinstance(made, np.ndarray) else made:
            if candidate.any():
                yield name, candidate


mistake("""off-diagonal terms missing: This is −t(1 − o), the chain rule along ∂o_j/∂z_j alone. Every output depends on
every logit: the terms ∂o_i/∂z_j = −o_i o_j for i ≠ j are missing, and with them every update where t_j = 0. Summed over
all outputs the result is τo − t, where τ is the sum of the targets. What is computed here is the gradient of no
function.""")(lambda p: -p.t * p.rest)
mistake("""Jacobian once too often: This is the true gradient multiplied by softmax's Jacobian once more.
o − t already contains the derivative of softmax; multiplying again gives the gradient of the Brier score
½‖o − t‖².""")(lambda p: p.pulled(p.truth))
mistake("""elementwise derivative: This is (o − t)·o(1 − o), as if softmax acted on each logit alone, like a sigmoid.
o − t already contains the derivative of softmax, and without the off-diagonal terms this is the gradient of no
function.""")(lambda p: (p.truth * p.o * p.rest, (p.o - p.t) * p.o * p.rest))
mistake("""multiplied by the output: This is (o − t)·o. o − t is the gradient to the logits already. Multiplied by o it
is what softmax's rule s (g − s·g) gives for g = o − t without its dot product s·g, and it is the gradient of no
function.""")(lambda p: (p.truth * p.o, (p.o - p.t) * p.o))
mistake("""derivative of softmax alone: This is o(1 − o), the derivatives ∂o_j/∂z_j alone: without the targets, a
network cannot learn them. The chain rule multiplies all of softmax's derivatives by the loss's derivatives, which gives
τo − t.""")(lambda p: p.o * p.rest)
mistake("""gradient to the probabilities: This is −t/o, the derivatives of the loss to the probabilities
o, not to the logits. Multiplied by softmax's Jacobian it becomes τo − t, in which the division has
cancelled.""")(lambda p: -p.quotient)
mistake("""label not subtracted: This is τo: the targets were not subtracted from the
probabilities.""")(lambda p: (p.mass, p.o))
mistake("""targets do not sum to one: This is o − t, but some targets sum to τ ≠ 1: the gradient is
τo − t.""")(lambda p: p.o - p.t if p.has_scaled_targets else ())
mistake("""sigmoid in place of softmax: This is σ(z) − t: every logit went through a sigmoid of its own, as for labels
that do not exclude each other (binary cross-entropy). If exactly one class is right, use softmax, whose probabilities
sum to one.""")(lambda p: sigmoid(p.z) - p.t)
mistake("""squared error of sigmoids: This is (σ(z) − t)·σ(z)(1 − σ(z)), the gradient of ½‖σ(z) − t‖²: every logit went
through a sigmoid of its own, and the loss is the squared error. If exactly one class is right, use softmax and
cross-entropy, whose gradient does not vanish where the output is certain and
wrong.""")(lambda p: (sigmoid(p.z) - p.t) * sigmoid(p.z) * sigmoid(-p.z))


mistake("""softmax over the wrong axis: The probabilities were normalised over another axis than the
class axis.""")(lambda p: (p.error(softmax(p.z, n)) for n in [*range(p.z.ndim - 1)] + [None] * (p.z.size > p.classes)))


@mistake("""labels shifted by one: This is the gradient for labels one higher or lower: are the classes counted from
0?""")
def _(p: Problem) -> Iterator[Vectors]:
    for shift, edge in ((1, 0), (-1, -1)):
        shifted = np.roll(p.t, shift, -1)
        yield p.mass - shifted
        shifted[..., edge] = 0  # a one-hot table has no row for a label beyond the last class
        if shifted.any():
            yield p.mass - shifted


@mistake("""error averaged over the batch: Every position was given the same vector, the errors τo − t averaged or added
over the positions. Each logit affects only its own position's loss, so its gradient is its own error. Only gradients
to parameters that the positions share, such as weights, are added up over them.""")
def _(p: Problem) -> Iterator[Vectors]:
    axes = tuple(range(p.z.ndim - 1))
    for over in {axes, axes[:1]} if p.live.size > 1 else ():
        total = np.broadcast_to(p.truth.sum(over, keepdims=True), p.truth.shape)
        for count in {1, p.live.size, int(p.live.sum()) or 1}:
            yield from p.spared_or_not(total / count)


for base in (2, 10):
    mistake(f"""log{base} in place of ln: This is the true gradient divided by ln {base}: the loss was taken with
    log{base}. The derivative of log{base}(o) is 1/(o ln {base}); cross-entropy is in nats, with the natural
    logarithm.""")(lambda p, base=base: p.truth / np.log(base))
mistake("""probabilities passed as logits: This is z − t. The logits are at least 0 and
sum to one: they are probabilities already, and this is the gradient to the logits that
they were computed from. Pass those logits: softmax of probabilities is another distribution, nearly
uniform.""")(lambda p: p.error(p.z) if (p.z >= 0).all() and np.allclose(p.z.sum(-1), 1, atol=1e-2) else ())
mistake("""softmax applied twice: The probabilities are softmax(softmax(z)): softmax was applied before the loss,
and again by the loss. The result is nearly uniform, and learning is slow. Pass the
logits.""")(lambda p: (p.pulled(p.error(softmax(p.o))), p.error(softmax(p.o))))

for name, activation, slope in (
    ("relu", lambda z: np.maximum(z, 0), lambda z: z > 0),
    ("tanh", np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    ("sigmoid", sigmoid, lambda z: sigmoid(z) * sigmoid(-z)),
):

    @mistake(f"""{name} before softmax: The probabilities are softmax({name}(z)). The layer before softmax needs
    no activation, which would keep logits from being as low or as high as they need to be.""")
    def _(p: Problem, activation=activation, slope=slope) -> Iterator[Vectors]:
        error = p.error(softmax(activation(p.z)))
        yield error * slope(p.z)
        yield error


mistake("""softmax not applied: This is z − t: softmax was not applied. The gradient is
softmax(z) − t.""")(lambda p: p.z - p.t)
mistake("""only the targets: This is −t, the derivative of the loss to the logarithms of the probabilities. The
logarithms' derivative to the logits is missing: log-softmax's rule g − s Σg gives τo − t.""")(lambda p: -p.t)
mistake("""probabilities not normalised: This is exp(z) − t: the exponentials were not divided by their
sum.""")(lambda p: np.exp(p.z) - p.t)
mistake("""argmax in place of the probabilities: This is one_hot(argmax z) − t, the perceptron's
rule: the probabilities were rounded to 0 and 1, and a position whose label is the most likely class has
no gradient.""")(lambda p: np.where(p.live, np.eye(p.classes)[p.z.argmax(-1)] - p.t, 0))
mistake("""logarithm missing: This is o_y (o − t), the gradient of −o_y (for a distribution, of −Σ t o). The loss
of a label is −log o_y.""")(lambda p: ((p.t * p.o).sum(-1, keepdims=True) * p.truth, p.pulled(-p.t)))
mistake("""log-softmax's rule with a plus: This is g + s Σg in place of log-softmax's g − s Σg, for the gradient g = −t
to the logarithms: the sign of the sum is wrong.""")(lambda p: -p.t - p.tau * p.o)
mistake("""log-softmax's rule with a dot product: This is g − Σ g·log p, for the gradient
g = −t to the logarithms. Log-softmax's rule is g − s Σg: softmax's, s (g − s·g), is
another.""")(lambda p: np.where(p.live, (p.t * (p.z - p.lse)).sum(-1, keepdims=True) - p.t, 0))
mistake("""sum in place of the dot product: This is s (g − Σg) for g = −t/o. Softmax's rule is s (g − s·g), with the dot
product s·g.""")(lambda p: p.o * (p.quotient.sum(-1, keepdims=True) - p.quotient))
mistake("""binary cross-entropy of softmax's outputs: This is the gradient of −Σ (t log o + (1 − t) log(1 − o)), which
treats each class as a separate yes-or-no question. Cross-entropy is −Σ t log o.""")(lambda p: p.pulled(_binary(p)))
mistake("""binary cross-entropy to the probabilities: This is (o − t)/(o(1 − o)), the derivatives of binary
cross-entropy to the probabilities o, not to the logits, and of a loss that treats each class as a separate yes-or-no
question.""")(_binary)
mistake("""gradient to the probabilities with a plus: This is t/o. The derivatives of the loss to the probabilities o
are −t/o, and to the logits τo − t.""")(lambda p: p.quotient)


@mistake("""labels of the next position: This is the gradient for the label of the next position, or of the one before.
Were the targets shifted once too often, or not at all?""")
def _(p: Problem) -> Iterator[Vectors]:
    for shift, edge in ((-1, -1), (1, 0)) if p.z.ndim > 1 and p.z.shape[-2] > 1 else ():
        error = p.mass - np.roll(p.t, shift, -2)
        yield error.copy()
        error[..., edge, :] = 0  # the position at the edge has no next one
        yield error


@mistake("""sums without keepdims: Each row's exponentials were divided by the sum of another row: NumPy aligns a sum
over the last axis with the columns, which is no error for a square batch. Sum with keepdims=True.""")
def _(p: Problem) -> Iterator[Vectors]:
    for top in (p.z.max(-1, keepdims=True), p.z.max(-1)) if p.is_square else ():
        e = np.exp(p.z - top)
        yield p.error(e / e.sum(-1))


mistake("""labels of the whole batch: The labels of all positions were subtracted at every position: in
NumPy p[:, y] -= 1 subtracts all labels in every row, but p[np.arange(n), y] -= 1 subtracts each row's
own.""")(lambda p: p.mass - p.t.any(tuple(range(p.z.ndim - 1))))


mistake("""divided in part: Only one term of τo − t was divided by the number of positions, n: parentheses are
missing, or a mean's −t/n was added to o. n·o − t comes from one Jacobian of the whole batch,
flattened.""")(lambda p: (e for n in p.scales.values() if n > 1 for e in (n * p.mass - p.t, p.mass - n * p.t)))


@mistake("""reshaped in place of transposed: The classes are not along the last axis in memory, but the logits were
reshaped to (positions, classes): each softmax mixed classes of several positions. Move the axis first.""")
def _(p: Problem) -> Iterator[Vectors]:
    for axis in range(p.z.ndim - 1):
        memory = np.moveaxis(p.z, -1, axis)
        if memory.shape != p.z.shape:  # otherwise nothing was reshaped
            error = p.error(softmax(memory.reshape(p.z.shape)))
            yield np.moveaxis(error.reshape(memory.shape), axis, -1)


mistake("""divergence the wrong way round: This is the gradient of Σ o log(o/t),
with the distributions exchanged. Cross-entropy is, up to a constant, Σ t
log(t/o).""")(lambda p: p.pulled(p.z - p.lse - np.log(p.t)) if (p.t > 0).all() else ())
mistake("""softmax of the negated logits: The probabilities are softmax(−z), as if z
were energies. The gradient to energies would be t − τ·softmax(−z); their logits are
−z.""")(lambda p: (p.error(softmax(-p.z)), -p.error(softmax(-p.z))))
mistake("""a class without a gradient: The gradient is right except for one class, where it is zero:
right if that is a reference class, whose logit is fixed at 0, but not the gradient to all
logits.""")(lambda p: (np.where(np.arange(p.classes) == n, 0, p.truth) for n in (0, p.classes - 1) if p.classes > 2))


@mistake("""hinge loss: This counts the classes whose score is above the label's, or below it by less than 1: the
gradient of a support vector machine's loss, not of the cross-entropy.""")
def _(p: Problem) -> Iterator[Vectors]:
    above = p.live & (p.t == 0) & (p.z - (p.z * p.t).sum(-1, keepdims=True) + 1 > 0)
    if p.classes > 2:  # with two classes, (−1, 1) has many other causes
        yield above - p.t * above.sum(-1, keepdims=True)


mistake("""transposed: This is the true gradient transposed: classes and samples are
exchanged.""")(lambda p: (p.truth.T,) if p.is_square else ())


@fit("""temperature: The probabilities are softmax(z/T), not softmax(z). By the chain rule the gradient to z
would then be (τo − t)/T. Here T = {value:.6g}, {note}.""")
def _(p: Problem, g: Vectors) -> Iterator[Fit]:
    """Find T by refining a grid around its best value, on the vectors with the largest gradients."""
    telling = np.argsort(-np.abs(g).max(-1), axis=None, kind="stable")[: max(1, 4096 // p.classes)]
    z, t, tau, seen = (a.reshape(-1, a.shape[-1])[telling] for a in (p.z, p.t, p.tau, g))
    forms = {
        0: "without that division",
        -1: "with that division",
        1: "multiplied by T instead, as when a distillation loss is multiplied by T²",
    }
    for count in p.scales.values():
        for power, note in forms.items():
            low, high, best = -5.0, 5.0, 1.0  # T lies between 2 to these powers
            while high - low > 1e-9:
                grid = np.linspace(low, high, 33)
                off = [2.0 ** (x * power) * (tau * softmax(z / 2.0**x) - t) - count * seen for x in grid]
                nearest = int(np.argmin([np.vdot(a, a) for a in off]))
                low, high = grid[max(nearest - 1, 0)], grid[min(nearest + 1, 32)]
                best = float(2.0 ** grid[nearest])
            likely = 2.0**-4.9 < best < 2.0**4.9  # the ends of the grid are no optima
            yield Fit(best**power * p.error(softmax(p.z / best)), count, best, note, likely)


def _addition(direction: Callable[[Problem], Vectors], value=lambda k, count: k, most=1.0, note="") -> FitFormula:
    """The truth plus k times the direction, with k > 0 and the printed value at most `most`."""

    def formula(p: Problem, g: Vectors) -> Iterator[Fit]:
        for added in p.spared_or_not(direction(p)):
            length = np.vdot(added, added)
            for count in p.scales.values():
                k = float(np.vdot(added, count * g - p.truth) / length) if length else 0.0
                if k > 0 and np.isfinite(k):
                    yield Fit(p.truth + k * added, count, value(k, count), note, value(k, count) <= most)

    return formula


fit("""weight decay left in: This is the true gradient plus λz with λ = {value:.6g}: a penalty
½λ‖z‖² on the logits, such as weight decay, was differentiated too. It does not belong to the
cross-entropy.""")(_addition(lambda p: p.z, lambda k, count: k / count, most=2))


@fit("""label smoothing left in: This is the gradient for smoothed targets, (1 − ε)t + {note} over the C classes with
ε = {value:.6g}, not for the targets given.""")
def _(p: Problem, g: Vectors) -> Iterator[Fit]:
    """Smooth to a sum of τ, a position's own, and to a sum of one as in `cross_entropy`."""
    yield from _addition(lambda p: p.t - p.tau / p.classes, note="ετ/C")(p, g)
    if p.has_scaled_targets:
        yield from _addition(lambda p: p.t - 1 / p.classes + (1 - p.tau) * p.o, note="ε/C")(p, g)


fit("""z-loss left in: This is the true gradient plus 2ζ·lse·o with ζ = {value:.6g}, lse the
logarithm of the sum of exp(z): the derivative of a z-loss ζ·lse², which does not belong to the
cross-entropy.""")(_addition(lambda p: p.lse * p.o, lambda k, count: k / 2))
fit("""entropy bonus left in: This is the true gradient plus β o (log o + H) with β = {value:.6g}, H
the entropy of o: a bonus βH, as for a policy, was differentiated too. It does not belong to the
cross-entropy.""")(_addition(lambda p: p.pulled(p.z - p.lse)))
fit("""one-sided differences: These are one-sided differences with a step h = {value:.3g}:
they are off by ½h ∂²/∂z² = ½hτ o(1 − o). Take central differences,
(L(z + h) − L(z − h))/2h.""")(_addition(lambda p: p.tau * p.o * p.rest, lambda k, count: 2 * k, most=0.25))


@fit("clipped: This is the true gradient with its entries clipped to ±{value:.6g}.")
def _(p: Problem, g: Vectors) -> Iterator[Fit]:
    most = float(np.abs(g).max())
    reached = bool(np.count_nonzero(np.abs(g) > most * (1 - 1e-6)) > 1)
    for count in p.scales.values():
        yield Fit(np.clip(p.truth, -most * count, most * count), count, most, likely=reached)
