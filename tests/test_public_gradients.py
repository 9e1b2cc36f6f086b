"""Gradients that people wrote in public questions and reports, on new random numbers, with the doctor's verdict.

The verdicts were written down from the mathematics before the doctor saw the gradients.
"""

import zlib

import numpy as np
import pytest

from jaxsoft import diagnose_gradient

N, CLASSES = 12, 5


def softmax(z, axis=-1):
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


class Samples:
    """A batch of logits z, labels y and the same one-hot t, softmax's outputs o, soft targets q, class weights w."""

    def __init__(self, words):
        self.rng = np.random.default_rng(zlib.crc32(words.encode()))
        self.z = 2 * self.rng.normal(size=(N, CLASSES))
        self.y = self.rng.permutation(np.arange(N) % CLASSES)  # each class twice at least
        self.t = np.eye(CLASSES)[self.y]
        self.o = softmax(self.z)
        self.q = softmax(self.rng.normal(size=(N, CLASSES)))
        self.w = self.rng.uniform(0.5, 4, CLASSES)

    @property
    def p(self):
        """The probability of each label."""
        return (self.o * self.t).sum(1, keepdims=True)


def through_softmax(o, g):
    """Softmax's rule, right."""
    return o * (g - (o * g).sum(1, keepdims=True))


def images(a):
    """Two images of 3 × 2 pixels, as PyTorch has them."""
    return np.moveaxis(a.reshape(2, 3, 2, CLASSES), -1, 1)


def loss(z, t):
    return -(t * np.log(softmax(z))).sum() / len(z)


def differences(s, forward, backward):
    """Central differences of the mean loss."""
    g = np.empty_like(s.z)
    for index in np.ndindex(*s.z.shape):
        step = np.zeros_like(s.z)
        step[index] = 1
        g[index] = (loss(s.z + forward * step, s.t) - loss(s.z - backward * step, s.t)) / (forward + backward)
    return g


def all_labels_in_every_row(s):
    g, y = s.o.copy(), s.y % 3
    g[:, y] -= 1
    return s.z, y, g / N


def square_without_keepdims(s):
    z, y = s.z[:CLASSES], s.y[:CLASSES]
    e = np.exp(z - z.max(1))
    return z, y, e / e.sum(1) - np.eye(CLASSES)[y]


def jacobian_of_the_flattened_batch(s):
    o = s.o.ravel()
    return s.z, s.y, ((np.diagflat(o) - np.outer(o, o)) @ (-s.t / s.o).ravel()).reshape(s.z.shape)


def viewed_without_permuting(s):
    z = images(s.z)
    error = softmax(z.reshape(-1, CLASSES)) - s.t
    return z, s.y.reshape(2, 3, 2), error.reshape(z.shape) / N


def without_some_targets(s):
    t = np.where(np.arange(N)[:, None] % 4, s.t, 0)
    return s.z, t, s.o - t


def several_labels(s):
    t = np.maximum(s.t, np.roll(s.t, 2, 1))
    return s.z, t, s.o - t


def padding_as_an_index(s):
    y = np.where(np.arange(N) % 4, s.y, -1)
    g = s.o.copy()
    g[np.arange(N), y] -= 1
    return s.z, y, g / N


def clipped_probabilities(s):
    z = s.z.copy()
    z[np.arange(0, N, 3), s.y[::3]] = -40
    o = softmax(z)
    return z, s.y, np.where((o * s.t).sum(1, keepdims=True) < 1e-7, 0, o - s.t) / N


def margins(s):
    violated = ((s.z - (s.z * s.t).sum(1, keepdims=True) + 1 > 0) & (s.t == 0)).astype(float)
    return s.z, s.y, (violated - s.t * violated.sum(1, keepdims=True)) / N


def overflown_quotient(s):
    z, t = np.array([[-431, 279, 427]], np.float32), np.array([[1, 0, 0]], np.float32)
    with np.errstate(all="ignore"):
        return z, t, through_softmax(softmax(z), -t / softmax(z))


# fmt: off
WRONG = {
    "Stack Overflow, 2016: divides the exponentials of a batch by their total":
        ("softmax over the wrong axis", lambda s: (s.z, s.y, (np.exp(s.z) / np.exp(s.z).sum() - s.t) / N)),
    "course forum: samples are columns, and softmax runs along the rows":
        ("softmax over the wrong axis", lambda s: (s.z.T, s.t.T, (softmax(s.z.T, 1) - s.t.T) / N), {"axis": 0}),
    "Triton, 2026: the sums lose their axis, and a square batch hides it":
        ("sums without keepdims", square_without_keepdims),
    "NumPy indexing: subtracts 1 at p[:, y], so every row has all labels of the batch":
        ("labels of the whole batch", all_labels_in_every_row),
    "PyTorch forum: NLLLoss of softmax's outputs, float32":
        ("logarithm missing", lambda s: (s.z.astype("f"), s.y, through_softmax(s.o, -s.t / N).astype("f"))),
    "GitHub, 2021: KL divergence of probabilities where log-probabilities belong":
        ("logarithm missing", lambda s: (s.z, s.q, through_softmax(s.o, -s.q) / N)),
    "GitHub, 2018: KL divergence with student and teacher exchanged":
        ("divergence the wrong way round", lambda s: (s.z, s.q, through_softmax(s.o, np.log(s.o / s.q)) / N)),
    "GitHub, 2018: cross-entropy from logits, behind a softmax layer":
        ("softmax applied twice", lambda s: (s.z, s.y, through_softmax(s.o, softmax(s.o) - s.t) / N)),
    "AI Stack Exchange, 2018: squared error's 2(o − t) times o(1 − o), as with sigmoids":
        ("elementwise derivative", lambda s: (s.z, s.t, 2 * (s.o - s.t) * s.o * (1 - s.o))),
    "AI Stack Exchange, 2018: averages the errors over the examples and propagates that":
        ("error averaged over the batch", lambda s: (s.z, s.t, np.tile((s.o - s.t).mean(0), (N, 1)))),
    "darknet, 2017: softmax's backward pass copies the gradient":
        ("gradient to the probabilities", lambda s: (s.z, s.y, -s.t / s.o / N)),
    "Caffe, 2017: derives p(q − 1) for a teacher's p":
        ("off-diagonal terms missing", lambda s: (s.z, s.q, s.q * (s.o - 1))),
    "mlpack, 2020: log-softmax's backward pass adds the probabilities to a mean's gradient":
        ("divided in part", lambda s: (s.z, s.y, -s.t / N + s.o)),
    "Stack Overflow: one Jacobian of the flattened batch":
        ("divided in part", jacobian_of_the_flattened_batch),
    "course forum: samples are columns, and A / m − Y lacks parentheses":
        ("divided in part", lambda s: (s.z.T, s.t.T, s.o.T / N - s.t.T), {"axis": 0}),
    "JAX, 2019: the mean is taken over samples and classes":
        ("right up to a factor of 0.0166667", lambda s: (s.z, s.t, (s.o - s.t) / s.z.size)),
    "distillation: T² times the mean KL divergence at T = 4":
        ("temperature", lambda s: (s.z, s.q, 4 * (softmax(s.z / 4) - s.q) / N)),
    "softmax with powers of two":
        ("temperature", lambda s: (s.z, s.y, 2**s.z / (2**s.z).sum(1, keepdims=True) - s.t)),
    "TensorFlow, 2023: samples without any target get the probabilities":
        ("ignored positions not zeroed", without_some_targets),
    "several labels a sample, all of them ones":
        ("targets do not sum to one", several_labels),
    "padding labels of -1 used as an index, so they mean the last class":
        ("ignored positions not zeroed", padding_as_an_index),
    "hands over the update, minus the learning rate times the gradient":
        ("opposite sign", lambda s: (s.z, s.y, -0.1 * (s.o - s.t) / N)),
    "LightGBM: scores come class after class and are reshaped to rows":
        ("reshaped in place of transposed", lambda s: (s.z, s.y, (softmax(s.z.T.reshape(N, CLASSES)) - s.t).reshape(CLASSES, N).T)),
    "segmentation: images viewed as rows of classes without permuting":
        ("reshaped in place of transposed", viewed_without_permuting, {"axis": 1}),
    "XGBoost: the second derivative 2p(1 − p) in place of the first":
        ("derivative of softmax alone", lambda s: (s.z, s.y, 2 * s.o * (1 - s.o))),
    "Keras: binary cross-entropy, a mean over classes, behind softmax":
        ("binary cross-entropy of softmax's outputs", lambda s: (s.z, s.t, through_softmax(s.o, (1 - s.t) / (1 - s.o) - s.t / s.o) / CLASSES / N)),
    "multiplies the columns of p − y by the class weights":
        ("class weights by column", lambda s: (s.z, s.y, s.w * (s.o - s.t) / N)),
    "checks against forward differences with a step of 0.01":
        ("one-sided differences", lambda s: (s.z, s.y, differences(s, 0.01, 0))),
    "actor-critic: the bonus for entropy is in the gradient":
        ("entropy bonus left in", lambda s: (s.z, s.y, s.o - s.t + 0.05 * through_softmax(s.o, np.log(s.o)))),
    "fastai, 2019: ε shared among the other classes only":
        ("label smoothing left in", lambda s: (s.z, s.y, (s.o - 0.9 * s.t - 0.1 / (CLASSES - 1) * (1 - s.t)) / N)),
    "physics: energies, so exp(−E)/Z, and then p − t":
        ("softmax of the negated logits", lambda s: (s.z, s.y, softmax(-s.z) - s.t)),
    "econometrics: the last class is the reference and has no gradient":
        ("a class without a gradient", lambda s: (s.z, s.y, (s.o - s.t) * (np.arange(CLASSES) < CLASSES - 1))),
    "recurrent network: clips every entry to ±0.5":
        ("clipped", lambda s: (s.z, s.y, np.clip(s.o - s.t, -0.5, 0.5))),
    "CS231n: counts violated margins, as for the SVM":
        ("hinge loss", margins),
    "Flux, 2018: divides by softmax's outputs and multiplies again, float32":
        ("not finite", overflown_quotient),
    "focal loss: a sign in the derivative of (1 − p)² is wrong":
        ("a function of the label's probability", lambda s: (s.z, s.y, ((1 - s.p) ** 2 + 2 * s.p * (1 - s.p) * np.log(s.p)) * (s.o - s.t))),
    "Keras: probabilities clipped at 1e-7, so the worst mistakes have no gradient":
        ("right up to a mask", clipped_probabilities),
}

# These have a number for each class, a second distribution, or a slip of nobody else's.
UNNAMED = {
    "Stack Overflow, 2016: logits in place of outputs in softmax's derivatives, each written over the last":
        lambda s: (s.z[0], s.t[0], np.append(-s.o[0, :-1] * s.z[0, -1], s.o[0, -1] * (1 - s.z[0, -1]))),
    "Stack Overflow, 2016: multiplies the logits by the class weights":
        lambda s: (s.z, s.y, s.w * (softmax(s.w * s.z) - s.t)),
    "distillation: half of the gradient is the teacher's at T = 4, judged by the labels":
        lambda s: (s.z, s.y, 0.5 * (s.o - s.t) + 2 * (softmax(s.z / 4) - s.q)),
}
# fmt: on


def weighted_by_advantages(s):
    return s.z, s.y, s.rng.normal(size=(N, 1)) * (s.o - s.t) / N


def mean_of_sentences(s):
    lengths = np.array([4, 2, 3])
    live = np.arange(4) < lengths[:, None]
    g = ((s.o - s.t).reshape(3, 4, -1) * live[..., None]) / lengths[:, None, None] / 3
    return s.z.reshape(3, 4, -1), np.where(live, s.y.reshape(3, 4), -100), g


def ignored(s, divisor):
    live = np.arange(N) % 4 > 0
    return (
        s.z.reshape(3, 4, -1),
        np.where(live, s.y, -100).reshape(3, 4),
        (live[:, None] * (s.o - s.t) / divisor).reshape(3, 4, -1),
    )


def forbidden_actions(s):
    z = np.where((s.rng.uniform(size=s.z.shape) < 0.3) & (s.t == 0), -1e9, s.z).astype(np.float32)
    return z, s.y, softmax(z) - s.t.astype(np.float32)


def mixed_precision(s):
    z = s.z.astype(np.float16)
    return z, s.y, ((softmax(z.astype(np.float32)) - s.t) / N).astype(np.float16)


def centred(s):
    g = softmax(s.z - s.z.mean(1, keepdims=True)) - s.t
    return s.z, s.y, g - g.mean(1, keepdims=True)


def mixed_up(s):
    t = 0.7 * s.t + 0.3 * s.t[::-1]
    return s.z, t, (s.o - t) / N


def smoothed(s):
    t = 0.9 * s.t + 0.1 / (CLASSES - 1) * (1 - s.t)
    return s.z, t, s.o - t


MEAN = f"correct for the mean over {N} positions"
# fmt: off
RIGHT = {
    "GitHub, 2019: cross-entropy of log-softmax, which changes nothing the second time":
        (MEAN, lambda s: (np.log(s.o), s.y, (s.o - s.t) / N)),
    "subtracts the maximum of the whole batch":
        ("correct for the sum", lambda s: (s.z, s.y, np.exp(s.z - s.z.max()) / np.exp(s.z - s.z.max()).sum(1, keepdims=True) - s.t)),
    "centres the logits first, and differentiates that too":
        ("correct for the sum", centred),
    "TensorFlow tutorial, 2017: multiplies the mean over samples and classes by their number":
        ("correct for the sum", lambda s: (s.z, s.t, s.z.size * ((s.o - s.t) / s.z.size))),
    "a sigmoid's rule on both sides, which cancels":
        ("correct for the sum", lambda s: (s.z, s.t, (s.o - s.t) / (s.o * (1 - s.o)) * (s.o * (1 - s.o)))),
    "mlpack, 2020: log-softmax's backward pass adds the probabilities, and each label's gradient is -1":
        ("correct for the sum", lambda s: (s.z, s.y, -s.t + s.o)),
    "AI Stack Exchange, 2022: multiplies every row by a Jacobian of its own":
        ("correct for the sum", lambda s: (s.z, s.t, np.einsum("ni,nij->nj", -s.t / s.o, [np.diagflat(o) - np.outer(o, o) for o in s.o]))),
    "PyTorch: class weights, divided by the weights of the labels":
        ("correct for class weights", lambda s: (s.z, s.y, s.w[s.y, None] * (s.o - s.t) / s.w[s.y].sum())),
    "Hugging Face: padding of -100, a mean over the other tokens":
        ("correct for the mean over the 9 positions not ignored", lambda s: ignored(s, 9)),
    "Chainer, 2016: divides by all positions, ignored ones too":
        (f"correct for the mean over all {N} positions, ignored ones too", lambda s: ignored(s, N)),
    "multiplies the losses of padding by 0, its labels being kept":
        ("right up to a mask", lambda s: (s.z, s.y, (np.arange(N) < 9)[:, None] * (s.o - s.t) / 9)),
    "the mean of each sentence, and then of the sentences":
        ("right up to weights of positions", mean_of_sentences),
    "REINFORCE: multiplies by advantages, some of them negative":
        ("right up to weights of positions", weighted_by_advantages),
    "course forum: samples are columns, and nothing is said of it":
        (MEAN, lambda s: (s.z.T, s.t.T, (s.o - s.t).T / N)),
    "segmentation: channels first, a mean over all pixels":
        (MEAN, lambda s: (images(s.z), s.y.reshape(2, 3, 2), images(s.o - s.t) / N), {"axis": 1}),
    "mixup: two labels a sample":
        (MEAN, mixed_up),
    "smoothed targets are handed over, not the labels":
        ("correct for the sum", smoothed),
    "mixed precision: softmax in float32, the gradient in float16":
        (MEAN, mixed_precision),
    "reinforcement learning: logits of forbidden actions are -1e9":
        ("correct for the sum", forbidden_actions),
    "CS231n: central differences with a step of 1e-5":
        (MEAN, lambda s: (s.z, s.y, differences(s, 1e-5, 1e-5))),
}
# fmt: on


def judged(words, make, *options):
    return diagnose_gradient(*make(Samples(words)), **dict(*options))


@pytest.mark.parametrize("words", WRONG)
def test_what_was_wrong(words):
    verdict, *case = WRONG[words]
    diagnosis = judged(words, *case)
    assert (diagnosis.correct, diagnosis.verdict) == (False, verdict)


@pytest.mark.parametrize("words", UNNAMED)
def test_what_has_no_name(words):
    diagnosis = judged(words, UNNAMED[words])
    assert (diagnosis.correct, diagnosis.verdict) == (False, "wrong")


@pytest.mark.parametrize("words", RIGHT)
def test_what_was_right(words):
    verdict, *case = RIGHT[words]
    diagnosis = judged(words, *case)
    assert (diagnosis.correct, diagnosis.verdict) == (verdict.startswith("correct"), verdict)
