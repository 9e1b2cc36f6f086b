"""The doctor of losses, on fresh random problems with conventions and mistakes written in plain NumPy."""

from typing import NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxsoft.diagnose
from jaxsoft import cross_entropy, diagnose_loss

Z, Y = np.array([[1.0, 2, 3], [0, 0, 0], [3, 1, 2]]), np.array([2, 0, 1])
IGNORING = np.array([2, -100, 1])
LAYOUTS = [((24,), -1), ((7,), 0), ((4, 9), -1), ((3, 4, 5), 1), ((160,), -1), ((6, 50), 1)]


def softmax(z, axis=-1):
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


class Case(NamedTuple):
    """A problem with its classes last and its positions in their shape."""

    z: np.ndarray
    y: np.ndarray | None  # labels, -100 where ignored
    t: np.ndarray  # the same as a distribution, zero where ignored
    w: np.ndarray
    c: np.ndarray
    eps: float
    axis: int
    soft: bool = False

    @property
    def live(self):
        return self.t.any(-1)

    @property
    def q(self):
        return np.where(self.live[..., None], (1 - self.eps) * self.t + self.eps / self.z.shape[-1], 0)

    @property
    def cy(self):
        return np.ones(self.w.shape) * self.live if self.soft else (self.t * self.c).sum(-1)

    def losses(self, log_probs=None, q=None):
        """With the weights."""
        lp = np.log(softmax(self.z)) if log_probs is None else log_probs
        return -(self.w[..., None] * self.c * (self.q if q is None else q) * lp).sum(-1)

    def call(self, value):
        z = np.moveaxis(self.z, -1, self.axis)
        targets = np.moveaxis(self.t, -1, self.axis) if self.soft else self.y
        options = {} if self.soft else {"ignore_index": -100}
        if (self.w != 1).any():
            options["weights"] = self.w
        if (self.c != 1).any():
            options["class_weights"] = self.c
        return diagnose_loss(z, targets, value, self.axis, label_smoothing=self.eps, **options)


def case(rng, soft=None, **needs):
    """A random problem, with the options that it needs, and often with others."""
    layouts = [layout for layout in LAYOUTS if not needs.get("images") or len(layout[0]) > 1]
    shape, axis = layouts[rng.integers(len(layouts))]
    classes = int(rng.choice([3, 5, 10, 21]))
    z = rng.normal(size=(*shape, classes)) * rng.choice([1, 2, 4])
    soft = rng.random() < 0.2 if soft is None else soft
    y = rng.integers(0, classes, shape)

    def has(name, chance):
        return needs.get(name, rng.random() < chance)

    if soft:
        t = softmax(rng.normal(size=z.shape) * 2)
        y = None
    else:
        if has("ignored", 0.4):
            y[rng.random(shape) < 0.3] = -100
            y.flat[:2] = -100, 0
            y[..., -1] = 1
        t = 1.0 * (np.arange(classes) == y[..., None])
    w = rng.uniform(0.2, 3, shape) if has("weights", 0.25) else np.ones(shape)
    if needs.get("zeros"):
        w[rng.random(shape) < 0.3] = 0
        w.flat[-1] = 0
    c = rng.uniform(0.3, 3, classes) if has("class_weights", 0.25) else np.ones(classes)
    eps = float(rng.choice([0.05, 0.1, 0.2])) if has("smoothing", 0.2) else 0.0
    return Case(z, y, t, w, c, eps, axis, soft)


def mean(s, losses):
    """As in PyTorch."""
    return losses.sum() / (s.w * s.cy).sum()


# The options that each convention needs to differ from the others, and its value.
CONVENTIONS = {
    "sum": ({}, lambda s: s.losses().sum()),
    "mean over valid positions": ({"ignored": True, "soft": False}, lambda s: s.losses().sum() / s.live.sum()),
    "mean over all positions, ignored": ({"ignored": True, "soft": False}, lambda s: s.losses().sum() / s.live.size),
    "mean over all positions": ({"ignored": False}, lambda s: s.losses().sum() / s.live.size),
    "mean over the weights": ({"class_weights": True, "soft": False}, lambda s: mean(s, s.losses())),
    "mean over the weights ": ({"weights": True}, lambda s: mean(s, s.losses())),
    "mean over the position weights": (
        {"weights": True, "class_weights": True, "soft": False},
        lambda s: s.losses().sum() / (s.w * s.live).sum(),
    ),
    "mean over the class weights": (
        {"weights": True, "class_weights": True, "soft": False},
        lambda s: s.losses().sum() / s.cy.sum(),
    ),
    "mean over all position weights": (
        {"weights": True, "ignored": True, "soft": False},
        lambda s: s.losses().sum() / s.w.sum(),
    ),
    "mean over positions with a weight": (
        {"weights": True, "zeros": True},
        lambda s: s.losses().sum() / np.count_nonzero(s.w),
    ),
    "sum divided by the batch size": ({"images": True}, lambda s: s.losses().sum() / len(s.z)),
    "sum divided by the positions of an example": ({"images": True}, lambda s: s.losses().sum() / s.live[0].size),
    "sum divided by positions and classes": ({}, lambda s: s.losses().sum() / s.z.size),
    "mean of the examples' means": (
        {"images": True, "ignored": True, "soft": False},
        lambda s: (s.losses().reshape(len(s.z), -1).sum(1) / s.live.reshape(len(s.z), -1).sum(1)).mean(),
    ),
    "mean of the classes' means": (
        {"soft": False},
        lambda s: np.mean([s.losses()[(s.y == k)].mean() for k in np.unique(s.y) if k >= 0]),
    ),
    "ε/(C − 1)": (
        {"smoothing": True},
        lambda s: mean(
            s,
            s.losses(q=np.where(s.live[..., None], (1 - s.eps) * s.t + s.eps * (1 - s.t) / (s.z.shape[-1] - 1), 0)),
        ),
    ),
    "ignored positions too": (
        {"smoothing": True, "ignored": True, "soft": False, "weights": False, "class_weights": False},
        lambda s: s.losses(q=(1 - s.eps) * s.t + s.eps / s.z.shape[-1]).sum() / s.live.size,
    ),
    "one class weight per position": (
        {"soft": True, "class_weights": True},
        lambda s: -((s.q * np.log(softmax(s.z))).sum(-1) * s.w * (s.c * s.t).sum(-1)).sum(),
    ),
    "without effect": (
        {"soft": True, "class_weights": True},
        lambda s: -((s.q * np.log(softmax(s.z))).sum(-1) * s.w).sum() / s.w.sum(),
    ),
    "divergence": (
        {"soft": True, "class_weights": False},
        lambda s: mean(s, (s.w[..., None] * s.q * (np.log(s.q) - np.log(softmax(s.z)))).sum(-1)),
    ),
    "one per position": ({"several": True}, lambda s: s.losses()),
}


def with_labels(s, y):
    return s._replace(t=np.where((s.live[..., None]), 1.0 * (np.arange(s.z.shape[-1]) == y[..., None]), 0))


def plus(s, addition, k):
    return mean(s, s.losses() + k * s.w * s.live * addition)


def next_labels(s):
    t = np.roll(s.t, -1, s.t.ndim - 2)
    return mean(s._replace(t=t), s._replace(t=t).losses())


def lse(z):
    return np.log(np.exp(z).sum(-1))


def half(s, dtype):
    rows = s.losses().reshape(-1).astype(dtype)
    total = dtype(0)
    for row in rows:
        total = dtype(total + row)
    return float(total) / (s.w * s.cy).sum()


def in_bits(s):
    return mean(s, s.losses()) / np.log(2)


MISTAKES = {
    "log2 in place of ln": ({}, in_bits),
    "log10 in place of ln": ({}, lambda s: mean(s, s.losses()) / np.log(10)),
    "opposite sign": ({}, lambda s: -mean(s, s.losses())),
    "perplexity": ({}, lambda s: np.exp(mean(s, s.losses()))),
    "averaged twice": ({"ignored": False}, lambda s: mean(s, s.losses()) / s.live.size),
    "softmax applied twice": ({}, lambda s: mean(s, s.losses(np.log(softmax(softmax(s.z)))))),
    "softmax over the wrong axis": ({}, lambda s: mean(s, s.losses(np.log(softmax(s.z, 0))))),
    "softmax not applied": ({}, lambda s: mean(s, s.losses(s.z))),
    "logarithm missing": ({}, lambda s: mean(s, s.losses(softmax(s.z)))),
    "temperature": ({}, lambda s: mean(s, s.losses(np.log(softmax(s.z / 2))))),
    "temperature ": ({}, lambda s: mean(s, s.losses(np.log(softmax(s.z / 0.7))))),
    "softmax of the negated logits": ({}, lambda s: mean(s, s.losses(np.log(softmax(-s.z))))),
    "relu before softmax": ({}, lambda s: mean(s, s.losses(np.log(softmax(np.maximum(s.z, 0)))))),
    "sigmoid before softmax": ({}, lambda s: mean(s, s.losses(np.log(softmax(1 / (1 + np.exp(-s.z))))))),
    "tanh before softmax": ({}, lambda s: mean(s, s.losses(np.log(softmax(np.tanh(s.z)))))),
    "labels shifted by one": ({"soft": False}, lambda s: mean(s, with_labels(s, (s.y + 1) % s.z.shape[-1]).losses())),
    "labels shifted by one ": (
        {"soft": False, "class_weights": False},
        lambda s: mean(s, with_labels(s, (s.y - 1).clip(0)).losses()),
    ),
    "labels of the next position": ({"soft": False, "weights": False, "class_weights": False}, next_labels),
    "ignored positions counted": (
        {"soft": False, "ignored": True, "weights": False, "class_weights": False},
        lambda s: s._replace(t=1.0 * (np.arange(s.z.shape[-1]) == s.y.clip(0)[..., None])).losses().mean(),
    ),
    "targets rounded": (
        {"soft": True, "class_weights": False},
        lambda s: mean(s, s._replace(t=1.0 * (s.t == s.t.max(-1, keepdims=True))).losses()),
    ),
    "label smoothing left out": ({"smoothing": True}, lambda s: mean(s, s._replace(eps=0).losses())),
    "label smoothing in it": (
        {"smoothing": False},
        lambda s: mean(s, s._replace(eps=0.1).losses()),
    ),
    "weights left out": (
        {"weights": True, "class_weights": False},
        lambda s: s._replace(w=np.ones(s.w.shape)).losses().sum() / s.live.sum(),
    ),
    "weights applied twice": (
        {"weights": True, "class_weights": False},
        lambda s: (s.losses() * s.w).sum() / s.live.sum(),
    ),
    "class weights left out": (
        {"class_weights": True, "weights": False},
        lambda s: s._replace(c=np.ones(len(s.c))).losses().sum() / s.live.sum(),
    ),
    "z-loss in it": ({}, lambda s: plus(s, lse(s.z) ** 2, 1e-3)),
    "z-loss in it ": ({}, lambda s: plus(s, lse(s.z) ** 2, 1e-2)),
    "weight decay in it": ({}, lambda s: plus(s, 0.5 * (s.z**2).sum(-1), 1e-3)),
    "confidence penalty in it": ({}, lambda s: plus(s, (softmax(s.z) * np.log(softmax(s.z))).sum(-1), 0.1)),
    "binary cross-entropy": (
        {"soft": False, "smoothing": False, "weights": False, "class_weights": False},
        lambda s: ((np.log1p(np.exp(s.z)) - s.t * s.z).sum(-1) * s.live).sum() / s.live.sum(),
    ),
    "squared error": (
        {"smoothing": False, "weights": False, "class_weights": False},
        lambda s: (((softmax(s.z) - s.t) ** 2).sum(-1) * s.live).sum() / s.live.sum(),
    ),
    "focal loss": (
        {"soft": False, "smoothing": False, "class_weights": False},
        lambda s: mean(s, s.losses() * (1 - (softmax(s.z) * s.t).sum(-1)) ** 2),
    ),
    "1e-05 added": ({}, lambda s: mean(s, s.losses(np.log(softmax(s.z) + 1e-5)))),
    "half precision accumulated": (
        {"weights": False, "class_weights": False, "smoothing": False},
        lambda s: half(s, ml_dtypes.bfloat16),
    ),
    "logits rounded": ({}, lambda s: mean(s, s._replace(z=s.z.astype(np.float16).astype(float)).losses())),
}

# Each mistake is in a different place, so that one loss can have two of them.
OF_LOGITS = {
    "softmax applied twice": softmax,
    "temperature": lambda z: z / 2,
    "tanh before softmax": np.tanh,
    "relu before softmax": lambda z: np.maximum(z, 0),
    "softmax of the negated logits": lambda z: -z,
}
OF_TARGETS = {
    "labels shifted by one": lambda s: with_labels(s, (s.y + 1) % s.z.shape[-1]),
    "ignored positions counted": lambda s: s._replace(t=1.0 * (np.arange(s.z.shape[-1]) == s.y.clip(0)[..., None])),
}
OF_NUMBERS = {
    "log2 in place of ln": lambda v: v / np.log(2),
    "opposite sign": lambda v: -v,
    "perplexity": np.exp,
}


def two_mistakes(rng):
    """A problem with two mistakes in it, their names, and the value."""
    s = case(rng, soft=False, weights=False, class_weights=False, smoothing=False, ignored=True)
    kinds = rng.choice(4, 2, replace=False)
    made, names, scale, k = s, [], lambda v: v, 0.0
    for kind in sorted(kinds):
        table = [OF_LOGITS, OF_TARGETS, OF_NUMBERS, {"z-loss in it": None}][kind]
        name = str(rng.choice(list(table)))
        names.append(name)
        if kind == 0:
            made = made._replace(z=table[name](made.z))
        elif kind == 1:
            made = table[name](made)
        elif kind == 2:
            scale = table[name]
        else:
            k = 1e-2
    losses = made.losses() + k * lse(made.z) ** 2 * made.live
    counts = [made.live.sum(), made.live.size] + [1] * ("perplexity" not in names)  # whose sum overflows
    return s, names, scale(losses.sum() / rng.choice(counts))


def as_given(rng, value):
    """The value as a program computes it, in float64 or float32."""
    return np.float32(value) if rng.random() < 0.5 else value


def trial(rng, name):
    needs, compute = (CONVENTIONS | MISTAKES)[name]
    s = case(rng, **needs)
    diagnosis = s.call(as_given(rng, compute(s)))
    named = any(name.strip() in found for found in diagnosis.found)
    return named, name in MISTAKES or diagnosis.correct, diagnosis


def shares(seed, count):
    """The number of trials that named the mistake, and the trials that called a right loss wrong."""
    rng = np.random.default_rng(seed)
    names = [*CONVENTIONS, *MISTAKES]
    missed, wronged = [], []
    for n in range(count):
        name = names[n % len(names)]
        named, right, diagnosis = trial(rng, name)
        missed += [] if named else [(n, name, diagnosis.found)]
        wronged += [] if right else [(n, name, diagnosis.verdict)]
    return missed, wronged


def test_every_convention_and_mistake_is_named():
    missed, wronged = shares(0, len(CONVENTIONS) + len(MISTAKES))
    assert len(missed) <= 1, missed
    assert not wronged


@pytest.mark.exhaustive
def test_nearly_all_of_a_thousand_losses_are_named_and_no_right_loss_is_called_wrong():
    missed, wronged = shares(1, 1000)
    assert len(missed) <= 20, missed
    assert not wronged


def pairs_missed(seed, count):
    rng, missed = np.random.default_rng(seed), []
    for n in range(count):
        s, names, value = two_mistakes(rng)
        found = s.call(value).found
        if not any(all(name in way for name in names) for way in found):
            missed.append((n, names, found))
    return missed


def test_pairs_of_mistakes_are_named():
    assert not pairs_missed(0, 2)


@pytest.mark.exhaustive
def test_four_fifths_of_many_pairs_of_mistakes_are_named():
    missed = pairs_missed(1, 200)
    assert len(missed) <= 40, missed


def test_conventions_that_give_the_same_number_are_listed_with_a_distinguishing_input():
    diagnosis = diagnose_loss(Z, IGNORING, cross_entropy(Z, IGNORING, ignore_index=-100))
    assert diagnosis.found == ("mean over valid positions", "mean of the classes' means")
    assert "tell them apart: a position that is ignored; classes that occur unequally often" in str(diagnosis)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_jaxsoft_s_own_losses_are_right(dtype, reduction):
    rng = np.random.default_rng(0)
    z, y, w = rng.normal(size=(50, 7)).astype(dtype), rng.integers(-1, 7, 50), rng.uniform(0, 2, 50).astype(np.float32)
    for options in ({}, {"label_smoothing": 0.1}, {"class_weights": np.arange(1.0, 8)}, {"weights": w}):
        value = cross_entropy(jnp.asarray(z), y, ignore_index=-1, reduction=reduction, **options).astype(dtype)
        diagnosis = diagnose_loss(z, y, value, ignore_index=-1, **options)
        assert diagnosis.correct, (diagnosis.verdict, options)


def test_the_nearest_of_the_sum_and_the_means_is_named_with_its_distance():
    value, right = 1.3123456789, float(cross_entropy(Z, Y))
    diagnosis = diagnose_loss(Z, Y, value)
    assert diagnosis.error == pytest.approx((value - right) / right, rel=1e-9)
    assert "The nearest is mean over all positions, 1.30461 where 1.31235 is given." in str(diagnosis)
    assert diagnose_loss(Z, Y, np.inf).error == np.inf


def test_results_other_than_the_verdict():
    diagnosis = diagnose_loss(Z, Y, 2.8, class_weights=[1, 2, 3])
    losses = cross_entropy(Z, Y, class_weights=np.array([1.0, 2, 3]), reduction="none")
    np.testing.assert_allclose(diagnosis.true_loss, losses, rtol=1e-12)
    np.testing.assert_allclose(diagnosis.row_sums, 0, atol=1e-12)
    p = softmax(Z)
    np.testing.assert_allclose(diagnosis.true_gradient, np.array([[3], [1], [2]]) * (p - np.eye(3)[Y]), rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "verdict", "correct"),
    [(np.nan, "correct: NaN of nothing", True), (0.0, "correct: 0 of nothing", True), (1.5, "wrong", False)],
)
def test_every_position_ignored(value, verdict, correct):
    diagnosis = diagnose_loss(Z, np.full(3, -100), value)
    assert (diagnosis.verdict, diagnosis.correct) == (verdict, correct)


def test_infinities_have_a_likely_cause():
    far = np.array([[0.0, 200, 0], [1, 2, 3]])
    assert "take log_softmax" in str(diagnose_loss(far, np.array([0, 1]), np.inf))
    assert diagnose_loss(Z, Y, np.nan).verdict == "not finite"


def test_clamps_are_named_with_their_framework():
    far, y = np.array([[0.0, 200, 0], [1, 2, 3], [3, 2, 1]]), np.array([0, 1, 0])
    clean = cross_entropy(far[1:], y[1:], reduction="sum")
    for most, words in (
        (126 * np.log(2), "Caffe"),
        (64 + np.log1p(2 * np.exp(-64.0)), "PaddlePaddle"),
        (-np.log(1e-15), "1.3"),
    ):
        assert words in str(diagnose_loss(far, y, (clean + most) / 3))


def test_labels_counted_from_one_and_probabilities_in_place_of_logits():
    z = np.random.default_rng(0).normal(size=(9, 4))
    y = np.arange(9) % 4
    right = float(cross_entropy(z, y))
    assert diagnose_loss(z, y + 1, right).verdict == "labels counted from 1"
    assert diagnose_loss(softmax(z), y, right).verdict == "probabilities passed as logits"


def test_one_number_per_position_determines_any_multiple_and_a_constant():
    z = np.random.default_rng(0).normal(size=(9, 4))
    y = np.arange(9) % 4
    losses = cross_entropy(z, y, reduction="none")
    assert "ζ = 0.00123," in str(diagnose_loss(z, y, losses + 0.00123 * lse(z) ** 2))
    assert "larger by 0.3456 at every position" in str(diagnose_loss(z, y, losses + 0.3456))
    images = z[:8].reshape(2, 4, 4), y[:8].reshape(2, 4)
    of_examples = cross_entropy(*images, reduction="none").mean(1)
    assert diagnose_loss(*images, of_examples).verdict == "correct: mean over all positions"


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Z, Y, [1.0, 2.0]), {}, r"value: expected one number, or one per position, shape \(3,\), got shape \(2,\)"),
        ((Z, Y, 1.0), {"weights": [1, 2]}, r"weights: expected shape \(3,\), got \(2,\)"),
        ((Z, Y, 1.0), {"label_smoothing": 2}, r"label_smoothing: expected a number in \[0, 1\], got 2"),
        ((Z, np.array([0, 1, 7]), 1.0), {}, r"targets\[2\] is 7: expected a label in \[0, 3\)"),
        ((np.full((3, 3), np.nan), Y, 1.0), {}, "logits: expected finite numbers"),
        ((np.zeros((0, 3)), np.zeros(0, int), 1.0), {}, "logits: expected at least one position"),
    ],
)
def test_losses_that_cannot_be_judged_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        diagnose_loss(*arguments, **options)


def test_the_command_judges_a_loss(tmp_path, capsys):
    path = tmp_path / "loss.npz"
    np.savez(path, logits=Z, targets=IGNORING, loss=0.9384)
    assert jaxsoft.diagnose.main([str(path), "--ignore-index", "-100"]) == 0
    assert capsys.readouterr().out.startswith("correct: mean over all positions, ignored ones too\n\nMean over all")
    wrong = float(cross_entropy(Z, Y, class_weights=np.array([1.0, 2, 3]), label_smoothing=0.1)) / np.log(2)
    np.savez(path, logits=Z, targets=Y, loss=wrong, class_weights=[1, 2, 3])
    assert jaxsoft.diagnose.main([str(path), "--label-smoothing", "0.1"]) == 1
    assert capsys.readouterr().out.startswith("log2 in place of ln\n\n")
