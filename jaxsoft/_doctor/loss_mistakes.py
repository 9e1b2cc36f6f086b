"""The mistakes that the doctor of losses knows: what to say of each, and what it makes of the arrays.

Each mistake is one entry: its name, a colon, the text that the user reads, and the formula. There is a table for each
place where mistakes happen: inputs (targets, logits, weights), log-probabilities, the loss of a position, the value.
"""

from collections.abc import Callable, Iterable, Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxsoft._doctor.inputs import Numbers, Rows, Sample
from jaxsoft._doctor.mistakes import Catalogue
from jaxsoft._doctor.problem import log_softmax, logsumexp, sigmoid, softmax

Given = Float[np.ndarray, " groups"]
Inputs = Callable[[Sample], Iterable[Sample]]
LogProbs = Callable[[Sample], Iterable[Rows]]
Losses = Callable[[Sample, Rows, Rows], Iterable[Numbers]]
Outer = Callable[[Sample, Given], Iterable[Given]]  # of what was given, the numbers that it was made of
Addition = Callable[[Sample, Rows], Numbers]  # what is added to each position's loss, times a number
INPUTS, LOG_PROBS, LOSSES = Catalogue[Inputs](), Catalogue[LogProbs](), Catalogue[Losses]()
OUTERS, ADDITIONS = Catalogue[Outer](), Catalogue[Addition]()
inputs, log_probs, losses = INPUTS.entry, LOG_PROBS.entry, LOSSES.entry
outer, addition = OUTERS.entry, ADDITIONS.entry

TEMPERATURES = (0.05, 0.07, 0.1, 0.2, 0.25, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.2, 1.5, 2, 2.5, 3, 4, 5, 8, 10, 16, 20, 64)
# The numbers that a penalty or a smoothing is usually given.
USUAL = (*(m * 10.0**-k for k in range(1, 7) for m in (1, 2, 3, 4, 5)), 0.15, 0.25, 0.6, 0.7, 0.8, 0.9, 1.0)

# What is done to the logits.


@inputs("""probabilities passed as logits: The given logits are probabilities, at least 0 and with sum 1, and the number
is right for them, not for their softmax. Pass the logits that they were computed from, or their logarithms.""")
def _(s: Sample) -> Iterator[Sample]:
    if (s.z >= 0).all() and np.allclose(s.z.sum(-1), 1, atol=1e-2):
        with np.errstate(divide="ignore"):
            yield s._replace(z=np.maximum(np.log(s.z), -1e30))


inputs("""softmax applied twice: Softmax was applied before the loss, which applies it again: probabilities
were passed as logits. The loss cannot fall below log(1 + (C − 1)/e). Pass the
logits.""")(lambda s: [s._replace(z=softmax(s.z))])
for _name, _activation in (
    ("relu", lambda z: np.maximum(z, 0)),
    ("sigmoid", sigmoid),
    ("tanh", np.tanh),
):
    inputs(f"""{_name} before softmax: This is the loss of {_name}(z). The layer before softmax needs no
    activation.""")(lambda s, activation=_activation: [s._replace(z=activation(s.z))])
inputs("""softmax of the negated logits: This is the loss of −z, as if z were
energies.""")(lambda s: [s._replace(z=-s.z)])


@inputs("""reshaped in place of transposed: The classes are not along the last axis in memory, and the logits were
reshaped to (positions, classes) all the same. Move the axis first.""")
def _(s: Sample) -> Iterator[Sample]:
    if s.axis % (len(s.shape) + 1) < len(s.shape):
        memory = np.moveaxis(s.z.reshape(*s.shape, s.classes), -1, s.axis)
        yield s._replace(z=memory.reshape(s.z.shape))


for _value in TEMPERATURES:
    inputs(f"""temperature {_value:g}: This is the loss of z/T with T = {_value:g}. Divide the logits by T, or leave T
    out.""")(lambda s, value=_value: [s._replace(z=s.z / value)])


# What is done to the targets.


@inputs("""labels shifted by one: This is the loss of labels one higher or lower: are the classes counted from 0? A
label beyond the last class was taken as the first, or as the last.""")
def _(s: Sample) -> Iterator[Sample]:
    if s.labels is None:
        yield from (s._replace(t=np.roll(s.t, shift, -1)) for shift in (1, -1))
        return
    for shift in (-1, 1):
        moved = s.labels + shift
        for labels in (moved % s.classes, np.clip(moved, 0, s.classes - 1)):
            yield s._replace(t=hot(s, labels))


@inputs("""labels of the next position: This is the loss for the label of the next position, or of the one before. Were
the targets shifted once too often, or not at all?""")
def _(s: Sample) -> Iterator[Sample]:
    if not s.shape or s.shape[-1] < 2:
        return
    t, live = s.t.reshape(*s.shape, s.classes), s.live.reshape(s.shape)
    for shift, edge in ((-1, -1), (1, 0)):
        rolled, kept = np.roll(t, shift, len(s.shape) - 1), np.roll(live, shift, -1)
        yield s._replace(t=rolled.reshape(s.t.shape), live=kept.reshape(-1))
        inside, there = kept.copy(), np.ones(s.shape, bool)
        inside[..., edge], there[..., edge] = False, False  # the position at the edge has no next one
        cut = np.where(inside[..., None], rolled, 0).reshape(s.t.shape)
        yield s._replace(t=cut, live=inside.reshape(-1), present=there.reshape(-1))
        yield s._replace(t=cut, live=inside.reshape(-1))


@inputs("""ignored positions counted: The ignored positions have a loss: their label was used as a class, unchanged,
counted from the end, or moved to the nearest class.""")
def _(s: Sample) -> Iterator[Sample]:
    if s.labels is None or not s.has_ignored:
        return
    everywhere = s._replace(live=np.ones(len(s.w), bool))
    outside = s.labels[~s.live]
    if ((outside >= 0) & (outside < s.classes)).all():
        yield everywhere._replace(t=hot(everywhere, s.labels))
        return
    for labels in (s.labels % s.classes, np.clip(s.labels, 0, s.classes - 1), np.where(s.live, s.labels, 0)):
        yield everywhere._replace(t=hot(everywhere, labels))


inputs("targets rounded to a label: This is the loss of the most likely class of each distribution.")(
    lambda s: [s._replace(t=hot(s, s.t.argmax(-1)))] if s.labels is None else []
)


@inputs("targets made to sum to one: Some targets sum to τ ≠ 1, and were divided by τ first.")
def _(s: Sample) -> Iterator[Sample]:
    tau = s.t.sum(-1, keepdims=True)
    if (np.abs(tau[s.live] - 1) > 1e-6).any():
        yield s._replace(t=s.t / np.where(tau == 0, 1, tau))


inputs("label smoothing left out: This is the loss of the given targets, without smoothing.")(
    lambda s: [s._replace(epsilon=0.0)] if s.epsilon else []
)


def hot(s: Sample, labels: np.ndarray) -> Rows:
    return np.where(s.live[:, None], np.arange(s.classes) == labels[:, None], 0.0)


# What is done to the weights.

inputs("weights left out: The positions' weights were not applied.")(
    lambda s: [s._replace(w=np.ones(len(s.w)))] if s.has_weights else []
)
inputs("weights applied twice: Each position's weight is squared: it was applied again after the loss applied it.")(
    lambda s: [s._replace(w=s.w**2)] if s.has_weights and (s.w != s.w**2).any() else []
)
inputs("class weights left out: The weights of the classes were not applied.")(
    lambda s: [s._replace(c=np.ones(s.classes))] if s.has_class_weights else []
)
inputs("class weights applied twice: The weight of each class is squared.")(
    lambda s: [s._replace(c=s.c**2)] if s.has_class_weights else []
)
inputs("class weights divided by: The loss is divided by the weights of the classes: are they frequencies?")(
    lambda s: [s._replace(c=1 / s.c)] if s.has_class_weights and (s.c > 0).all() else []
)

# What is taken for the logarithms of the probabilities.


@log_probs("""softmax over the wrong axis: The probabilities were normalised over another axis than the class
axis.""")
def _(s: Sample) -> Iterator[Rows]:
    z = s.z.reshape(*s.shape, s.classes)
    for axis in [*range(len(s.shape))] + [None] * (len(s.w) > 1):
        yield log_softmax(z, axis).reshape(s.z.shape)


log_probs("""softmax not applied: The logits were taken for logarithms of probabilities, as by PyTorch's nll_loss, whose
input must be log_softmax(z).""")(lambda s: [s.z])
log_probs("""logarithm missing: This is −p of the label, as PyTorch's nll_loss gives for probabilities. Its input must
be their logarithm.""")(lambda s: [softmax(s.z)])
log_probs("""sigmoid in place of softmax: This is −log σ(z) of the label: every logit went through a sigmoid of its
own.""")(lambda s: [-np.logaddexp(0, -s.z)])

# What is taken for the loss of a position that is not ignored.

losses("""binary cross-entropy: This is −Σ t log σ(z) + (1 − t) log σ(−z), which treats each class as a separate
yes-or-no question. Cross-entropy is −Σ t log softmax(z).""")(
    lambda s, lp, q: [np.sum(q * np.logaddexp(0, -s.z) + (1 - q) * np.logaddexp(0, s.z), -1)]
)
losses("""binary cross-entropy of softmax's outputs: This is −Σ t log p + (1 − t) log(1 − p): the other classes count
once more.""")(
    lambda s, lp, q: [-np.sum(q * lp + (1 - q) * np.log(np.maximum(-np.expm1(np.minimum(lp, 0)), 1e-300)), -1)]
)
losses("squared error: This is Σ (p − t)², or half of it: the Brier score, not the cross-entropy.")(
    lambda s, lp, q: [factor * np.sum((np.exp(np.minimum(lp, 700)) - q) ** 2, -1) for factor in (1, 0.5)]
)
losses("divergence the wrong way round: This is Σ p log(p/t), with the distributions exchanged.")(
    lambda s, lp, q: [np.sum(np.exp(lp) * (lp - np.log(np.where(q > 0, q, 1))), -1)] if (q[s.live] > 0).all() else []
)
for _gamma in (0.5, 1, 2, 3, 5):
    losses(f"""focal loss, γ = {_gamma:g}: Each loss is multiplied by (1 − p)^{_gamma:g}, p the probability of its
    label.""")(
        lambda s, lp, q, gamma=_gamma: (
            [-np.sum(q * lp * (-np.expm1(np.minimum(lp, 0))) ** gamma, -1)] if s.labels is not None else []
        )
    )
for _tiny in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-12):
    losses(f"""{_tiny:g} added before the logarithm: This is −Σ t log(p + {_tiny:g}), which hides a logarithm of 0 and
    changes every loss: take log_softmax.""")(
        lambda s, lp, q, tiny=_tiny: [-np.sum(q * np.logaddexp(lp, np.log(tiny)), -1)]
    )


# What is done to the number itself: each formula undoes it.

outer("log2 in place of ln: It is in bits, computed with log2; cross-entropy is in nats, with the natural logarithm.")(
    lambda s, v: [v * np.log(2)]
)
outer("opposite sign: The sign is missing: this is the mean or sum of log p, and minimising it lowers p.")(
    lambda s, v: [-v]
)
outer("averaged twice: It was divided once more by the number of positions or examples.")(
    lambda s, v: [v * count for count in _counts(s)]
)
outer("multiplied by the batch size: A mean was multiplied by the number of positions or examples.")(
    lambda s, v: [v / count for count in _counts(s)]
)
outer("perplexity: This is the exponential of the loss.")(lambda s, v: [np.log(v)] if (v > 0).all() else [])
outer("log10 in place of ln: It was computed with log10; cross-entropy is in nats, with the natural logarithm.")(
    lambda s, v: [v * np.log(10)]
)
for _value in (2, 3, 4, 5, 8, 10, 20):
    outer(f"""multiplied by T² with T = {_value:g}: It was multiplied by {_value**2:g}, as in distillation.""")(
        lambda s, v, value=_value: [v / value**2]
    )


def _counts(s: Sample) -> list[int]:
    return [n for n in dict.fromkeys((len(s.w), int(s.live.sum()), *s.shape[:1])) if n > 1]


# What is added, times a number that is found.

addition("""z-loss in it: It includes a z-loss ζ·lse² with ζ = {value:.6g}, where lse is the logarithm of the sum of
exp(z).""")(lambda s, lp: logsumexp(s.z)[:, 0] ** 2)
addition("""weight decay in it: It includes a penalty ½λ‖z‖² on the logits, with λ =
{value:.6g}.""")(lambda s, lp: 0.5 * np.sum(s.z**2, -1))
addition("""confidence penalty in it: It includes −β times the entropy of the probabilities, with β =
{value:.6g}.""")(lambda s, lp: np.sum(np.exp(np.minimum(lp, 700)) * lp, -1))
CONSTANT = "a constant in it"
addition(f"""{CONSTANT}: It is larger by {{value:.6g}} at every position: a penalty on something else, such as
weight decay.""")(lambda s, lp: np.ones(len(s.w)))
SMOOTHED = "label smoothing in it"
addition(f"""{SMOOTHED}: Its targets are smoothed, with ε = {{value:.6g}}, but no smoothing was
expected.""")(lambda s, lp: np.zeros(len(s.w)))  # found from the loss with ε = 1, since the loss is linear in ε

# What half precision makes of it.

HALF = "half precision accumulated"


@inputs("logits rounded to half precision: The logits were rounded to half precision, float16 or bfloat16.")
def _(s: Sample) -> Iterator[Sample]:
    for dtype in (jnp.float16, jnp.bfloat16):
        with np.errstate(over="ignore"):
            z = s.z.astype(dtype).astype(np.float64)
        if (z != s.z).any() and np.isfinite(z).all():
            yield s._replace(z=z)


def half_sums(weighted: Numbers) -> Iterator[tuple[str, float]]:
    """The sum of the losses, each rounded to half precision, in half precision."""
    for dtype in (jnp.float16, jnp.bfloat16):
        with np.errstate(all="ignore"):
            yield jnp.dtype(dtype).name, float(np.add.accumulate(weighted.astype(dtype))[-1])


# What the person reads of each mistake; the most likely first.
TEXTS = {name: text for table in (INPUTS, LOG_PROBS, LOSSES, OUTERS, ADDITIONS) for name, (text, _) in table.items()}
TEXTS[HALF] = "The losses were rounded to {value} and added one after another in {value}. Add them in float32."
