"""The conventions that the doctor of losses knows: how smoothing, weights and means are meant, and by whom.

Each convention is one entry: its name, a colon, the text that the user reads, and the formula. `TELLS` says which input
would show the difference from other conventions.
"""

from collections.abc import Callable

import numpy as np

from jaxsoft._doctor.inputs import Numbers, Rows, Sample
from jaxsoft._doctor.mistakes import Catalogue
from jaxsoft._doctor.problem import log_softmax

# A formula gives None if it equals the usual one, the first of its table.
Smoothing = Callable[[Sample], Rows | None]  # the smoothed targets
Form = Callable[[Rows, Rows], Rows | None]  # what a class costs, of log-probabilities and smoothed targets
Weighting = Callable[[Sample, Rows], tuple[Rows, Numbers] | None]  # weighted targets, and each position's weight
Reduction = Callable[[Sample, Numbers], Numbers | float | None]  # what each position's loss is multiplied by
# Of a mean, what is counted at each position, and the counts of other means that would give the same numbers.
Counts = Callable[[Sample, Numbers], tuple[Numbers, ...] | None]
SMOOTHINGS, FORMS = Catalogue[Smoothing](), Catalogue[Form]()
WEIGHTINGS, REDUCTIONS = Catalogue[Weighting](), Catalogue[Reduction]()
smoothing, form, weighting, reduction = SMOOTHINGS.entry, FORMS.entry, WEIGHTINGS.entry, REDUCTIONS.entry

TELLS = {
    "mean over valid positions": "a position that is ignored",
    "mean over all positions, ignored ones too": "a position that is ignored",
    "mean over all positions": "another number of positions",
    "mean over the weights": "weights whose mean is not 1",
    "mean over the position weights": "class weights, and weights whose mean is not 1",
    "mean over all position weights, of ignored ones too": "an ignored position with a weight",
    "mean over the class weights": "class weights, and weights whose mean is not 1",
    "mean over positions with a weight": "a weight of 0",
    "sum divided by the batch size": "examples of several positions",
    "sum divided by the positions of an example": "a batch of another size",
    "sum divided by positions and classes": "another number of classes",
    "mean of the examples' means": "examples with different numbers of valid positions",
    "mean of the classes' means": "classes that occur unequally often",
    "sum": "several positions",
    "one per example": "examples of several positions",
    "one per position": "several positions",
    "one per position, divided by their number": "another number of positions",
}


def mean(text: str) -> Callable[[Counts], Reduction]:
    """Enter a division by the counts of the positions of each given number."""

    def enter(formula: Counts) -> Reduction:
        def factors(s: Sample, r: Numbers) -> Numbers | None:
            counts = formula(s, r) if s.groups < len(s.w) else None
            if counts is None:
                return None
            total, *others = (s.total(count * s.present) for count in counts)
            return None if any(np.allclose(total, other, rtol=1e-12) for other in others) else _inverse(total)

        return reduction(text)(factors)

    return enter


def smoothed(s: Sample) -> Rows:
    """The targets as this library smooths them."""
    return np.where(s.live[:, None], s.t + s.epsilon * (1 / s.classes - s.t), 0) if s.epsilon else s.t


smoothing("""smoothing of ε/C to every class: The targets are (1 − ε)t + ε/C, as PyTorch, Keras, PaddlePaddle and MLX
smooth.""")(smoothed)


@smoothing("""smoothing of ε/(C − 1) to the other classes: The label keeps 1 − ε and the others share ε, as in MXNet's
SoftmaxOutput, Thinc and fairseq; here label_smoothing = εC/(C − 1).""")
def _(s: Sample) -> Rows | None:
    others = (1 - s.t) / max(s.classes - 1, 1)
    return np.where(s.live[:, None], s.t + s.epsilon * (others - s.t), 0) if s.epsilon and s.classes > 1 else None


smoothing("""smoothing of ignored positions too: An ignored position has no label but keeps its share ε/C of smoothing,
as with tinygrad's default ignore_index.""")(
    lambda s: s.t * (1 - s.epsilon) + s.epsilon / s.classes if s.epsilon and s.has_ignored else None
)
form("cross-entropy: −Σ t log p.")(lambda lp, q: -finite(lp, q))


@form("""divergence: The entropy of the targets is left out, as by PyTorch's KLDivLoss: Σ t log(t/p). The gradient is
the same.""")
def _(lp: Rows, q: Rows) -> Rows | None:
    logs = np.log(np.where(q > 0, q, 1))
    return logs - finite(lp, q) if (logs != 0).any() else None


def _clip(name: str, text: str, least: float, most: float = 0.0) -> None:
    @form(f"{name}: {text}")
    def _(lp: Rows, q: Rows) -> Rows | None:
        clipped = np.clip(lp, least, most)
        return -clipped if (clipped != lp)[q != 0].any() else None


_clip("clamped at 87.34", "No probability counts as less than 2⁻¹²⁶, as in Caffe's SoftmaxWithLoss.", -126 * np.log(2))
_clip("clamped at 46.05", "No probability counts as less than 1e-20, as in Caffe's InfogainLoss.", np.log(1e-20))


@form("""lifted to 64 below the largest: Logits more than 64 below the largest count as 64 below it, as in PaddlePaddle,
in float64 too, though not in its gradient.""")
def _(lp: Rows, q: Rows) -> Rows | None:
    below = lp - lp.max(-1, keepdims=True)
    return -log_softmax(np.maximum(below, -64)) if (below < -64).any() else None


for _eps, _whose in (
    (np.finfo(np.float64).eps, "scikit-learn's log_loss of float64"),
    (np.finfo(np.float32).eps, "scikit-learn's log_loss of float32"),
    (np.finfo(np.float16).eps, "scikit-learn's log_loss of float16"),
    (1e-15, "scikit-learn's log_loss before 1.3"),
    (1e-7, "Keras's losses of probabilities"),
):
    _clip(
        f"probabilities clipped to [{_eps:.3g}, 1 − {_eps:.3g}]",
        f"They are clipped before the logarithm, as in {_whose}.",
        np.log(_eps),
        np.log1p(-_eps),
    )


def finite(lp: Rows, q: Rows) -> Rows:
    """Log-probabilities with 0 where nothing is expected, whose product with −∞ would be NaN."""
    return lp if np.isfinite(lp).all() else np.where(q == 0, 0, lp)


def weighted(s: Sample, q: Rows) -> tuple[Rows, Numbers]:
    """The targets as this library weights them."""
    # Of labels a mean is over their weights, before smoothing; of a distribution over the positions' weights.
    label_weights = s.label_weights() if s.labels is not None else s.live
    return (q * s.c if s.has_class_weights else q) * s.w[:, None], s.w * label_weights


weighting("""weights of classes inside the sum: Σ_j c_j t_j (−log p_j), as PyTorch weights smoothed targets and
distributions.""")(weighted)


@weighting("""one class weight per position: The whole loss of a position is multiplied by Σ_j c_j t_j, the weight of
its target, as in PaddlePaddle and in Keras with class_weight.""")
def _(s: Sample, q: Rows) -> tuple[Rows, Numbers] | None:
    if not s.has_class_weights or (s.labels is not None and np.count_nonzero(q, -1).max() == 1):
        return None
    weights = s.w * np.where(s.live, s.label_weights(), 1)
    return q * weights[:, None], weights * s.live


weighting("class weights without effect on distributions: They are ignored, as in Chainer and TensorFlow.")(
    lambda s, q: (q * s.w[:, None], s.w * s.live) if s.has_class_weights and s.labels is None else None
)


def _inverse(counts: np.ndarray) -> Numbers | None:
    return np.divide(1, counts, out=np.zeros(len(counts)), where=counts > 0) if counts.any() else None


mean("""mean over valid positions: It is divided by the {valid} positions that are not ignored, as PyTorch divides
without weights, Keras with ignore_class, Chainer, and PaddlePaddle for an ignore_index of 0 or
more.""")(lambda s, r: (s.live,) if s.has_ignored else None)
mean("""mean over all positions: It is divided by their number, {positions}, as every framework does where nothing is
ignored and nothing has a weight; with weights Keras, MLX and MXNet
do.""")(lambda s, r: None if s.has_ignored else (np.ones(len(s.w)),))
mean("""mean over the weights: It is divided by the sum of the weights that count, Σ w_i c_y, as PyTorch with weight,
ONNX, PaddlePaddle, and Keras's mean_with_sample_weight divide.""")(lambda s, r: (r, s.live))
mean("""mean over all positions, ignored ones too: It is divided by all {positions} positions, though only {valid}
count, as Keras divides with sample_weight, PaddlePaddle with an ignore_index below 0, tinygrad by default, and
mmsegmentation.""")(lambda s, r: (np.ones(len(s.w)),) if s.has_ignored else None)
reduction("""sum: Nothing is divided, as with reduction "sum", Caffe's NONE and MXNet's
"null".""")(lambda s, r: 1.0 if s.groups == 1 else None)
reduction("""one per position: These are the losses of each position, as with reduction
"none".""")(lambda s, r: 1.0 if s.groups == len(s.w) and s.groups > 1 else None)
reduction("""one per example: These are the sums over the positions of each
example.""")(lambda s, r: 1.0 if 1 < s.groups < len(s.w) else None)
reduction("""sum divided by the batch size: It is divided by the {batch} examples, not by their positions, as in Chainer
with normalize=False, Caffe's BATCH_SIZE, and PyTorch's
"batchmean".""")(lambda s, r: 1 / s.shape[0] if s.has_examples and s.groups == 1 else None)
reduction("""sum divided by the positions of an example: It is divided by the {inner} positions of one example, not by
the batch size, as in MXNet's SoftmaxOutput with multi_output and
"null".""")(lambda s, r: s.shape[0] / len(s.w) if s.has_examples and s.groups == 1 < s.shape[0] else None)
mean("""mean over the position weights: It is divided by Σ w_i of the valid positions, without the weights of their
classes.""")(lambda s, r: (s.w * s.live, r) if s.has_weights else None)
mean("""mean over the class weights: It is divided by Σ c_y of the valid positions, without the positions' own
weights.""")(lambda s, r: (s.label_weights(), r) if s.has_class_weights and s.has_weights else None)
mean("""mean over all position weights, of ignored ones too: It is divided by Σ w_i of all
positions.""")(lambda s, r: (s.w, s.w * s.live) if s.has_weights and s.has_ignored else None)
mean("""mean over positions with a weight: It is divided by the number of positions whose weight is not 0, as
TensorFlow's SUM_BY_NONZERO_WEIGHTS does.""")(lambda s, r: (s.w != 0, s.live) if (s.w == 0).any() else None)


@reduction("""mean of the examples' means: Each example counts the same, however many of its positions are valid, as
losses of sequences are averaged by TRL's GRPO and others.""")
def _(s: Sample, r: Numbers) -> Numbers | None:
    if not s.has_examples or s.groups > 1:
        return None
    counts = s._replace(groups=s.shape[0]).total(s.live & s.present)
    return None if (counts == counts[0]).all() else np.where(counts > 0, 1 / np.maximum(counts, 1), 0) / s.shape[0]


@reduction("""mean of the classes' means: Each class that occurs counts the same, however often it does: a balanced
loss.""")
def _(s: Sample, r: Numbers) -> Numbers | None:
    if s.groups > 1 or s.labels is None:
        return None
    labels, live = s.t.argmax(-1), s.live & s.present
    counts = np.bincount(labels[live], minlength=s.classes)
    return _inverse(np.where(live, counts[labels], 0) * np.count_nonzero(counts))


reduction("""sum divided by positions and classes: It is divided by {positions} positions times {classes} classes, as a
mean over all entries, and as in PaddlePaddle with smoothed labels if the ignored label is a
class.""")(lambda s, r: _inverse(s.total(s.present) * s.classes) if s.classes > 1 else None)
reduction("""one per position, divided by their number: Each is already divided by the number of all positions,
{positions}: add them up.""")(lambda s, r: 1 / len(s.w) if s.groups > 1 else None)
reduction("""one per position, divided by the valid ones: Each is already divided by the number of valid positions,
{valid}: add them up.""")(lambda s, r: 1 / s.live.sum() if s.groups > 1 and s.has_ignored and s.live.any() else None)
