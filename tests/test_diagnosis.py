"""The gradient doctor, on fresh random problems with mistakes written in plain NumPy."""

import functools
import itertools
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import jaxsoft.diagnose
import reference
from jaxsoft import cross_entropy, diagnose_gradient

# Each shape costs a second of compiling: few of them, on one worker, and most tests use (7, 3).
SIZES = [(1, 3), (7, 3), (7, 300)]
MORE_SIZES = [*itertools.product([1, 2, 16, 64], [3, 4, 10, 50]), (7, 50)]
SQUARE = (3, 3)
VERY_MANY = 20_000
IMAGES = (3, 2, 2)  # positions, of 3 classes
DTYPES = [np.float32, np.float64]
exhaustive = pytest.mark.exhaustive


def problem(n, classes, dtype=np.float64, seed=0, scale=2.0):
    """Logits, labels, one-hot targets, and probabilities that are computed in the dtype."""
    rng = np.random.default_rng([seed, n, classes])
    z = (rng.normal(size=(n, classes)) * scale).astype(dtype)
    e = np.exp(z - z.max(1, keepdims=True))
    labels = rng.integers(0, classes, n)
    return z, labels, e / e.sum(1, keepdims=True), np.eye(classes, dtype=dtype)[labels]


@functools.partial(jax.jit, static_argnames="reduction")
def our_gradient(z, targets, reduction="sum"):
    return jax.grad(lambda z: cross_entropy(z, targets, reduction=reduction))(z)


def with_the_rest_exhaustive(chosen, *factors):
    """All combinations; the default run has the chosen ones."""
    return [
        pytest.param(*combination, marks=() if combination in chosen else exhaustive)
        for combination in itertools.product(*factors)
    ]


def jacobian_times(o, v):
    return o * (v - (o * v).sum(1, keepdims=True))


def softmax(z, axis=1):
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


MISTAKES = {
    "opposite sign": lambda z, o, t: t - o,
    "off-diagonal terms missing": lambda z, o, t: -t * (1 - o),
    "Jacobian once too often": lambda z, o, t: jacobian_times(o, o - t),
    "elementwise derivative": lambda z, o, t: (o - t) * o * (1 - o),
    "multiplied by the output": lambda z, o, t: (o - t) * o,
    "derivative of softmax alone": lambda z, o, t: o * (1 - o),
    "gradient to the probabilities": lambda z, o, t: -t / o,
    "label not subtracted": lambda z, o, t: o,
    "labels shifted by one": lambda z, o, t: o - np.roll(t, 1, axis=1),
    "sigmoid in place of softmax": lambda z, o, t: 1 / (1 + np.exp(-z)) - t,
    "squared error of sigmoids": lambda z, o, t: (1 / (1 + np.exp(-z)) - t) * np.exp(-z) / (1 + np.exp(-z)) ** 2,
    "softmax over the wrong axis": lambda z, o, t: softmax(z, 0) - t,
    "log2 in place of ln": lambda z, o, t: (o - t) / np.log(2).astype(z.dtype),
    "log10 in place of ln": lambda z, o, t: (o - t) / np.log(10).astype(z.dtype),
    "temperature": lambda z, o, t: (softmax(z / 2) - t) / 2,
    "weight decay left in": lambda z, o, t: o - t + z / 8,
    "label smoothing left in": lambda z, o, t: o - 0.875 * t - 0.125 / z.dtype.type(z.shape[1]),
    "z-loss left in": lambda z, o, t: o - t + o * np.log(np.exp(z).sum(1, keepdims=True)) / 128,
    "softmax applied twice": lambda z, o, t: jacobian_times(o, softmax(o) - t),
    "relu before softmax": lambda z, o, t: (softmax(np.maximum(z, 0)) - t) * (z > 0),
    "tanh before softmax": lambda z, o, t: (softmax(np.tanh(z)) - t) * (1 - np.tanh(z) ** 2),
    "sigmoid before softmax": lambda z, o, t: softmax(1 / (1 + np.exp(-z))) - t,
    "probabilities not normalised": lambda z, o, t: np.exp(z) - t,
    "argmax in place of the probabilities": lambda z, o, t: np.eye(z.shape[1], dtype=z.dtype)[z.argmax(1)] - t,
    "logarithm missing": lambda z, o, t: (o * t).sum(1, keepdims=True) * (o - t),
    "log-softmax's rule with a plus": lambda z, o, t: -t + o * (-t).sum(1, keepdims=True),
    "log-softmax's rule with a dot product": lambda z, o, t: -t - (-t * np.log(o)).sum(1, keepdims=True),
    "sum in place of the dot product": lambda z, o, t: o * (-t / o - (-t / o).sum(1, keepdims=True)),
    "binary cross-entropy of softmax's outputs": lambda z, o, t: jacobian_times(o, (1 - t) / (1 - o) - t / o),
    "binary cross-entropy to the probabilities": lambda z, o, t: (1 - t) / (1 - o) - t / o,
    "gradient to the probabilities with a plus": lambda z, o, t: t / o,
    "softmax not applied": lambda z, o, t: z - t,
    "only the targets": lambda z, o, t: -t,
}
# With one position these are the truth.
OF_A_BATCH = {
    "error averaged over the batch": lambda z, o, t: np.broadcast_to((o - t).mean(0), z.shape),
    "labels of the next position": lambda z, o, t: o - np.roll(t, -1, 0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "classes"), [*SIZES, (2, 2), pytest.param(64, 10, marks=exhaustive)])
def test_right_gradients_are_called_right(n, classes, dtype):
    z, labels, o, t = problem(n, classes, dtype)
    for targets in (labels, t):
        diagnosis = diagnose_gradient(z, targets, o - t)
        assert diagnosis.correct
        assert diagnosis.verdict == "correct for the sum"
        mean = diagnose_gradient(jnp.asarray(z), jnp.asarray(targets), jnp.asarray((o - t) / n))
        assert mean.correct
        assert mean.verdict == ("correct for the sum" if n == 1 else f"correct for the mean over {n} positions")
    np.testing.assert_allclose(diagnosis.true_gradient, o - t, atol=1e-6)
    np.testing.assert_allclose(diagnosis.row_sums, 0, atol=1e-6)
    assert diagnosis.error < 1e-5


OPTIONS = MISTAKES, SIZES, DTYPES, [False, True]


@pytest.mark.parametrize(
    ("verdict", "size", "dtype", "mean"), with_the_rest_exhaustive(reference.covering(2, *OPTIONS), *OPTIONS)
)
def test_each_mistake_is_named(verdict, size, dtype, mean):
    check_named(verdict, MISTAKES[verdict], *size, dtype, mean)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_averaged_error_is_named(dtype, mean):
    for verdict, make in OF_A_BATCH.items():
        check_named(verdict, make, 7, 3, dtype, mean)
        check_named(verdict, lambda z, o, t, make=make: make(z, o, t) * z.dtype.type(7), 7, 3, dtype, mean)


examples_of_laws = pytest.mark.parametrize(
    ("examples", "sizes"), [(12, SIZES[:2]), pytest.param(120, MORE_SIZES, marks=exhaustive)], ids=["few", "many"]
)


@examples_of_laws
def test_law_no_mistake_is_taken_for_another(examples, sizes):
    @given(
        st.sampled_from([*MISTAKES, *OF_A_BATCH]),
        st.integers(0, 2**32 - 1),
        st.sampled_from(sizes),
        st.sampled_from([0.5, 1.0, 3.0]),
        st.sampled_from(DTYPES),
        st.booleans(),
    )
    @settings(deadline=None, max_examples=examples)
    def law(verdict, seed, size, scale, dtype, mean):
        n, classes = (7, 3) if verdict in OF_A_BATCH and size[0] == 1 else size
        z, _, o, t = problem(n, classes, dtype, seed, scale)
        wrong = (MISTAKES | OF_A_BATCH)[verdict](z, o, t)
        # Of few positions a relu may change nothing or leave nothing, and the next label may be the same.
        assume(np.any(wrong) and not np.allclose(wrong, o - t, atol=1e-2))
        # In float32 a formula that divides by 1 − o has few digits where o is nearly 1, and no name then.
        assume("binary" not in verdict or (1 - o).min() > 1e-2)
        check_named(verdict, (MISTAKES | OF_A_BATCH)[verdict], n, classes, dtype, mean, seed, scale)

    law()


LAYOUTS = {  # of logits, one-hot targets and gradients of shape (n, classes), and whether the axis is to be guessed
    "last": lambda a: a,
    "columns": lambda a: a.T,
    "NCHW": lambda a: np.moveaxis(a.reshape(-1, 2, 2, a.shape[1]), -1, 1),
}


def check_named(verdict, make, n, classes, dtype, mean, seed=0, scale=2.0, layout=None):
    z, labels, o, t = problem(n, classes, dtype, seed, scale)
    wrong = make(z, o, t) / dtype(n if mean else 1)
    assert wrong.dtype == dtype
    if layout is None:
        diagnosis = diagnose_gradient(z, labels, wrong)
    else:
        diagnosis = diagnose_gradient(*map(LAYOUTS[layout], (z, t, wrong)))
    assert not diagnosis.correct
    if diagnosis.verdict != verdict:  # several fit
        assert f"the same result: {verdict}" in str(diagnosis) or f", {verdict}" in str(diagnosis), diagnosis.verdict


@pytest.mark.parametrize(
    ("layout", "seeds"),
    [
        *zip(LAYOUTS, ([0], [1], [2]), strict=True),
        *(pytest.param(layout, range(40), marks=exhaustive, id=f"{layout}-many") for layout in LAYOUTS),
    ],
)
def test_law_each_mistake_is_named_in_every_layout(layout, seeds):
    """With one-hot targets and without the axis."""
    for verdict, make in (MISTAKES | OF_A_BATCH).items():
        if verdict in ("softmax over the wrong axis", "labels of the next position") and layout == "NCHW":
            continue  # the two are of an array of two axes
        for seed in seeds:
            dtype, scale = DTYPES[seed % 2], (0.5, 1.0, 3.0)[seed % 3]
            check_named(verdict, make, 12, 5, dtype, bool(seed % 4 // 2), seed, scale, layout)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=exhaustive)])
def test_one_sample_has_names_too(every):
    """As a row, a vector or a column, in turn or each of them. If more than one explanation fits, all are given."""
    of_several = {"softmax over the wrong axis", "temperature"}
    layouts = [lambda a: a, lambda a: a[0], lambda a: a.T]
    for n, (verdict, make) in enumerate(MISTAKES.items()):
        z, _, o, t = problem(1, 5, seed=3)
        for shown in layouts if every else layouts[n % 3 :][:1]:
            diagnosis = diagnose_gradient(shown(z), shown(t), shown(make(z, o, t)))
            assert not diagnosis.correct or verdict in of_several, verdict
            if verdict not in of_several:
                assert verdict == diagnosis.verdict or verdict in str(diagnosis), (verdict, diagnosis.verdict)


def test_a_class_axis_of_length_one_is_none_where_another_fits():
    z, t = np.array([[1.0], [2], [3]]), np.array([[0.0], [1], [0]])
    diagnosis = diagnose_gradient(z, t, np.zeros((3, 1)))
    assert (diagnosis.correct, diagnosis.verdict) == (False, "all zero")
    assert "pass axis=0" in str(diagnosis)
    right = diagnose_gradient(z, t, softmax(z, 0) - t)
    assert right.correct
    assert "pass axis=0" in str(right)
    assert diagnose_gradient(np.ones((3, 1)), np.ones((3, 1)), np.zeros((3, 1))).correct


WEIGHTS = np.array([0.5, 1.0, 3.0, 0.25, 2.0])


WEIGHED = [1, 40, "weights"], DTYPES


@pytest.mark.parametrize(
    ("divisor", "dtype"),
    with_the_rest_exhaustive(list(zip(WEIGHED[0], itertools.cycle(DTYPES), strict=False)), *WEIGHED),
)
def test_weighted_gradients_are_named(divisor, dtype):
    z, labels, o, t = problem(40, 5, dtype)
    rng = np.random.default_rng(0)

    def judged(weights, error=None):
        divided = weights.sum() if divisor == "weights" else divisor
        gradient = (weights[:, None] * ((o - t) if error is None else error) / divided).astype(dtype)
        return diagnose_gradient(z, labels, gradient)

    of_classes = judged(WEIGHTS[labels])
    assert (of_classes.correct, of_classes.verdict) == (True, "correct for class weights")
    assert "0: 2, 1: 4, 2: 12, 3: 1, 4: 8" in str(of_classes)
    without_one = judged(np.where(labels == 2, 0, WEIGHTS[labels]))
    assert without_one.verdict == "correct for class weights"
    assert "2: 0" in str(without_one)
    of_positions = judged(rng.uniform(0.1, 2, 40))
    assert of_positions.verdict == "right up to weights of positions"
    mask = rng.uniform(size=40) < 0.6
    masked = judged(mask.astype(float))
    assert masked.verdict == "right up to a mask"
    assert f"{mask.sum()} of 40 positions" in str(masked)
    smoothed = o - 0.9 * t - 0.1 / 5
    for weights, named in ((WEIGHTS[labels], "class weights"), (rng.uniform(0.1, 2, 40), "weights of positions")):
        found = judged(weights, smoothed)
        assert found.verdict == f"label smoothing and {named}"
        assert "ε = 0.1." in str(found)


def test_the_loss_of_another_function_of_the_label_s_probability_is_not_called_weighted():
    z, labels, o, t = problem(40, 5)
    p = (o * t).sum(1, keepdims=True)
    focal = (1 - p) ** 2 - 2 * p * (1 - p) * np.log(p)
    diagnosis = diagnose_gradient(z, labels, focal * (o - t))
    assert (diagnosis.correct, diagnosis.verdict) == (False, "a function of the label's probability")


def test_with_two_classes_weights_cannot_be_told_from_mistakes():
    z, labels, o, t = problem(9, 2)
    weights = np.random.default_rng(0).uniform(0.1, 2, (9, 1))
    diagnosis = diagnose_gradient(z, labels, weights * (o - t))
    assert (diagnosis.correct, diagnosis.verdict) == (False, "right up to weights")


@pytest.mark.parametrize(
    ("divisor", "verdict"),
    [
        (1, "correct for the sum"),
        (24, "correct for the mean over 24 positions"),
        (4, "correct for the sum divided by the batch size, 4"),
        (6, "correct for the sum divided by the positions of an example, 6"),
    ],
)
def test_divisors_of_other_frameworks_are_known(divisor, verdict):
    """Caffe's BATCH_SIZE and Chainer; MXNet."""
    z, labels, o, t = problem(24, 5)
    z, t, gradient = (np.moveaxis(a.reshape(4, 2, 3, 5), -1, 1) for a in (z, t, (o - t) / divisor))
    for targets in (labels.reshape(4, 2, 3), t):
        diagnosis = diagnose_gradient(z, targets, gradient)
        assert (diagnosis.correct, diagnosis.verdict) == (True, verdict)


@pytest.mark.parametrize(
    ("divisor", "habit"),
    [
        (24 * 5, "a mean over positions and classes"),
        (24 * 5 / 2, "mean squared error's 2/(positions · classes)"),
        (5, "a mean over the classes"),
        (24**2, "a mean over positions that was taken twice"),
    ],
)
def test_other_divisors_are_named(divisor, habit):
    z, labels, o, t = problem(24, 5)
    diagnosis = diagnose_gradient(z, labels, (o - t) / divisor)
    assert diagnosis.verdict == f"right up to a factor of {1 / divisor:.6g}"
    assert f"times the gradient of the sum, as for {habit}." in str(diagnosis)


def test_probabilities_passed_as_logits():
    _, labels, o, t = problem(7, 3)
    for targets in (labels, t):
        assert diagnose_gradient(o, targets, o - t).verdict == "probabilities passed as logits"


def test_jaxsoft_s_smoothing_of_targets_that_do_not_sum_to_one_is_recognised():
    z, _, _, t = problem(12, 5)
    for smoothing in (0.1, 0.3):
        gradient = jax.grad(lambda z, e=smoothing: cross_entropy(z, 0.5 * t, label_smoothing=e, reduction="sum"))(z)
        diagnosis = diagnose_gradient(z, 0.5 * t, np.asarray(gradient))
        assert diagnosis.verdict == "label smoothing left in"
        assert f"ε/C over the C classes with ε = {smoothing}," in str(diagnosis)


def test_an_unlikely_number_is_no_explanation():
    """A z-loss of 4, and a temperature at the end of the tried range."""
    z, labels, o, t = problem(12, 5)
    lse = np.log(np.exp(z).sum(1, keepdims=True))
    assert diagnose_gradient(z, labels, o - t + 8 * lse * o).verdict == "wrong"
    assert diagnose_gradient(z / 8, labels, softmax(z * 40 / 8) - t).verdict == "wrong"


def test_the_gradient_of_a_sum_of_probabilities_is_only_rounding_error():
    z, labels, o, _ = problem(12, 5)
    nothing = (o * (1 - o.sum(1, keepdims=True))).astype(float) + 1e-17
    assert diagnose_gradient(z, labels, nothing).verdict == "all zero"


def test_nan_at_a_label_that_the_loss_was_not_told_to_ignore():
    z, labels, *_ = problem(7, 3)
    labels[[1, 5]] = -100
    gradient = jax.grad(cross_entropy)(jnp.asarray(z), jnp.asarray(labels))
    diagnosis = diagnose_gradient(z, labels, gradient)
    assert diagnosis.verdict == "not finite"
    assert "pass it as ignore_index" in str(diagnosis)


def test_the_jacobian_itself_and_the_gradient_to_weights():
    z, labels, o, t = problem(7, 3)
    jacobian = np.einsum("ni,ij->nij", o, np.eye(3)) - np.einsum("ni,nj->nij", o, o)
    for shown in (slice(None), 0):
        diagnosis = diagnose_gradient(z[shown], labels[shown], jacobian[shown])
        assert (diagnosis.correct, diagnosis.verdict) == (False, "Jacobian handed over")
    features = np.random.default_rng(0).normal(size=(7, 4))
    with pytest.raises(ValueError, match=r"got \(4, 3\); weights of shape \(features, classes\) have another gradient"):
        diagnose_gradient(z, labels, features.T @ (o - t))


def test_class_weights_of_smoothed_targets_as_in_pytorch():
    z, labels, o, t = problem(30, 5)
    q = WEIGHTS * (0.9 * t + 0.1 / 5)
    gradient = (q.sum(1, keepdims=True) * o - q) / WEIGHTS[labels].sum()
    np.testing.assert_allclose(
        gradient,
        jax.grad(lambda z: cross_entropy(z, labels, class_weights=WEIGHTS, label_smoothing=0.1))(z),
        rtol=1e-10,
    )
    diagnosis = diagnose_gradient(z, labels, gradient)
    assert diagnosis.verdict == "right up to class weights of smoothed targets"
    assert "ε = 0.1," in str(diagnosis)
    assert "0: 2, 1: 4, 2: 12, 3: 1, 4: 8" in str(diagnosis)


def test_the_same_numbers_in_another_order_and_one_number_everywhere():
    z, labels, o, t = problem(12, 5)
    turned = np.ascontiguousarray((o - t).T).reshape(12, 5)
    assert diagnose_gradient(z, labels, turned).verdict == "right numbers in another order"
    assert diagnose_gradient(z, labels, np.full((12, 5), 0.7)).verdict == "one number everywhere"


def test_labels_with_an_axis_of_length_one_and_whole_floats_are_labels():
    z, labels, o, t = problem(12, 5)
    for targets in (labels[:, None], labels.astype(np.float32), labels[:, None].astype(float)):
        assert diagnose_gradient(z, targets, o - t).correct
    images, gradient = (np.moveaxis(a.reshape(*IMAGES, 5), -1, 1) for a in (z, o - t))
    assert diagnose_gradient(images, labels.reshape(3, 1, 2, 2).astype(np.float32), gradient, 1).correct


def test_columns_in_which_each_class_is_the_label_at_most_once():
    """Then sums over the samples are 0 or 1, like the sums of ignored and other positions."""
    z, _, o, _ = problem(4, 5)
    t = np.eye(5)[[2, 0, 4, 1]]
    diagnosis = diagnose_gradient(z.T, t.T, (o - t).T)
    assert diagnosis.correct
    assert "pass axis=0" in str(diagnosis)


def test_half_precision_is_not_called_all_zero():
    """The loss of accuracy of a label's p − 1 in bfloat16 is far above 0."""
    z = np.zeros((8, 64))
    z[:, 0] = 9
    o = softmax(z)
    g = np.array((o / 8).astype(jnp.bfloat16))
    g[:, 0] = (g[:, 0] - np.array(1 / 8, jnp.bfloat16)).astype(jnp.bfloat16)
    assert diagnose_gradient(z, np.zeros(8, int), g).verdict != "all zero"


def test_finite_differences_in_float32():
    z, labels, _, _ = problem(6, 4, np.float32)

    def loss(z):
        e = np.exp(z - z.max(1, keepdims=True))
        return -np.log((e / e.sum(1, keepdims=True))[np.arange(6), labels]).sum(dtype=np.float32)

    h, gradient = np.float32(2**-10), np.zeros_like(z)
    for index in np.ndindex(*z.shape):
        step = np.zeros_like(z)
        step[index] = h
        gradient[index] = (loss(z + step) - loss(z - step)) / (2 * h)
    diagnosis = diagnose_gradient(z, labels, gradient)
    assert (diagnosis.correct, diagnosis.verdict) == (False, "finite differences")


def test_a_mistake_is_named_at_confident_predictions_too():
    z = np.array([[9.0, 0.0, 1.0]], np.float32)
    t = np.array([[1, 0, 0]], np.float32)
    o = softmax(z)
    assert abs(float(1 - o[0, 0]) / (np.exp([-9.0, -8]).sum() / (1 + np.exp([-9.0, -8]).sum())) - 1) > 1e-4
    assert diagnose_gradient(z, np.array([0]), -t * (1 - o)).verdict == "off-diagonal terms missing"


def test_a_mistake_is_named_only_where_every_vector_has_it():
    z, _, o, t = problem(7, 3)
    t[0] *= 1e6
    tau = t.sum(1, keepdims=True)
    wrong = -t * (1 - o)
    assert diagnose_gradient(z, t, wrong).verdict == "off-diagonal terms missing"
    wrong[1:] = (tau * o - t)[1:]
    assert diagnose_gradient(z, t, wrong).verdict == "wrong"


def test_one_number_is_not_explained_by_one_unknown():
    """For one vector some temperature gives any length."""
    z, labels = np.array([[1.0, 0.0], [3.0, 0.0]]), np.array([0, 0])
    wrong = (softmax(z / 2) - np.eye(2)[labels]) / 2
    assert diagnose_gradient(z, labels, wrong).verdict == "temperature"
    z[0] = 0
    wrong = softmax(z / 2) - np.eye(2)[labels]
    assert diagnose_gradient(z, labels, wrong).verdict == "right up to weights"


def test_negative_weight_decay_has_no_name():
    z, labels, o, t = problem(7, 3)
    assert diagnose_gradient(z, labels, o - t + z / 8).verdict == "weight decay left in"
    assert diagnose_gradient(z, labels, o - t - z / 8).verdict == "wrong"


def test_a_temperature_is_found_if_only_a_few_of_many_vectors_show_it():
    """All except ten vectors have equal logits."""
    z, labels, _, t = problem(VERY_MANY // 4, 3)
    z[:-10] = 0
    diagnosis = diagnose_gradient(z, labels, softmax(z / 3) - t)
    assert diagnosis.verdict == "temperature"
    assert "T = 3, without" in str(diagnosis)


@pytest.mark.parametrize("spared", [False, True])
def test_mistakes_where_positions_are_ignored(spared):
    z, labels, o, t = problem(7, 3)
    labels[[1, 5]] = -1
    live = (labels >= 0)[:, None]
    t = np.where(live, t, 0)
    errors = np.where(live, o - t, 0)
    wrong = {
        "derivative of softmax alone": o * (1 - o),
        "sigmoid in place of softmax": 1 / (1 + np.exp(-z)) - t,
        "weight decay left in": errors + z / 8,
        "error averaged over the batch": np.broadcast_to(errors.sum(0) / 5, z.shape),
    }
    for verdict, gradient in wrong.items():
        assert diagnose_gradient(z, labels, np.where(live | (not spared), gradient, errors)).verdict == verdict


@pytest.mark.parametrize("over", [(0,), (0, 1, 2)])
@pytest.mark.parametrize("divided", [1, 3])
def test_an_error_averaged_over_the_first_axis_or_all_and_perhaps_again(over, divided):
    z, labels, o, t = problem(12, 3)
    errors = (o - t).reshape(*IMAGES, 3)
    wrong = np.broadcast_to(errors.mean(over, keepdims=True), errors.shape) / (1 if divided == 1 else 12)
    diagnosis = diagnose_gradient(z.reshape(errors.shape), labels.reshape(IMAGES), wrong)
    assert diagnosis.verdict == "error averaged over the batch"
    assert "multiplied" not in str(diagnosis) or over == (0,)


def test_the_number_of_a_mistake_is_stated():
    z, labels, o, t = problem(7, 3)
    said = {
        "T = 3, with that division": (softmax(z / 3) - t) / 3,
        "T = 0.5, without that division": softmax(z / 0.5) - t,
        "T = 4, multiplied by T instead": (softmax(z / 4) - t) * 4,
        "λ = 0.01:": (o - t) / 7 + 0.01 * z,
        "ε = 0.1,": (o - 0.9 * t - 0.1 / 3) / 7,
        "ζ = 0.001,": (o - t + 0.002 * o * np.log(np.exp(z).sum(1, keepdims=True))) / 7,
    }
    for words, wrong in said.items():
        assert words in str(diagnose_gradient(z, labels, wrong))


@pytest.mark.parametrize("seeds", [range(15), pytest.param(range(15, 40), marks=exhaustive)], ids=["few", "many"])
def test_a_small_difference_from_the_truth_gets_no_cause(seeds):
    """Noise of 2e-4 has some direction; with three numbers, every direction is near some mistake's."""
    for seed in seeds:
        z, labels, o, t = problem(1, 3, seed=seed)
        noise = np.random.default_rng(seed).normal(size=z.shape)
        noisy = o - t + 2.5e-4 * np.linalg.norm(o - t) / np.linalg.norm(noise) * noise
        verdict = diagnose_gradient(z, labels, noisy).verdict
        assert verdict == "wrong" or verdict.startswith("right up to a factor of ")


@pytest.mark.parametrize("shift", [-1, 1])
def test_labels_counted_from_one_whose_last_class_has_no_one_hot_row(shift):
    z, labels, o, _ = problem(7, 3)
    assert {0, 2} <= set(labels)
    wrong = o - ((labels + shift)[:, None] == np.arange(3))
    assert diagnose_gradient(z, labels, wrong).verdict == "labels shifted by one"


def test_one_entry_at_the_label_is_not_taken_for_a_known_mistake_times_a_number():
    z, labels, _, t = problem(1, 3)
    assert diagnose_gradient(z, labels, -7 * t).verdict == "wrong"


@pytest.mark.parametrize("factor", [3.0, 0.37])
def test_a_factor_is_named(factor):
    z, labels, o, t = problem(7, 3)
    diagnosis = diagnose_gradient(z, labels, factor * (o - t))
    assert diagnosis.verdict == f"right up to a factor of {factor:g}"


def test_a_mistake_with_an_odd_factor_is_still_named():
    z, labels, o, t = problem(7, 3)
    diagnosis = diagnose_gradient(z, labels, 0.3 * MISTAKES["Jacobian once too often"](z, o, t))
    assert diagnosis.verdict == "Jacobian once too often"
    assert "multiplied by 0.3" in str(diagnosis)


@pytest.mark.parametrize(("n", "classes"), [(7, 3), SQUARE])
def test_a_transposed_gradient(n, classes):
    z, labels, o, t = problem(n, classes)
    assert diagnose_gradient(z, labels, (o - t).T).verdict == "transposed"
    columns = diagnose_gradient(z.T, labels, o - t, 0)
    assert (columns.correct, columns.verdict) == (False, "transposed")
    assert diagnose_gradient(z.T, labels, (o - t).T, 0).correct


def test_unnormalised_targets_need_tau():
    z, _, o, t = problem(7, 3)
    t = t * np.linspace(0.5, 2, 7)[:, None] + 0.1
    tau = t.sum(1, keepdims=True)
    assert diagnose_gradient(z, t, tau * o - t).correct
    assert diagnose_gradient(z, t, (o - t) / 7).verdict == "targets do not sum to one"


@pytest.mark.parametrize("ignored", [255, -1, -100])
def test_ignored_positions(ignored):
    z, labels, o, t = problem(7, 3)
    labels[[1, 5]] = ignored
    right = np.where((labels == ignored)[:, None], 0, o - t)
    assert diagnose_gradient(z, labels, right).correct
    assert diagnose_gradient(z, labels, right / 5).verdict == "correct for the mean over the 5 positions not ignored"
    assert (
        diagnose_gradient(z, labels, right / 7).verdict == "correct for the mean over all 7 positions, ignored ones too"
    )
    not_zeroed = np.where((labels == ignored)[:, None], o, o - t)
    for wrong in (not_zeroed, not_zeroed / 5):
        assert diagnose_gradient(z, labels, wrong).verdict == "ignored positions not zeroed"
    labels[:] = ignored
    assert diagnose_gradient(z, labels, np.zeros_like(z)).correct
    assert not diagnose_gradient(z, labels, o).correct


@pytest.mark.parametrize("marker", [-1, -100, 255, 65535, -(2**31)])
def test_usual_markers_are_ignored_and_other_labels_outside_are_not(marker):
    z, labels, o, t = problem(7, 3)
    labels[[1, 5]] = marker
    right = np.where((labels == marker)[:, None], 0, o - t)
    assert diagnose_gradient(z, labels, right).correct
    with pytest.raises(
        ValueError, match=re.escape(f"targets[1] is {marker}: expected a label in [0, 3) or ignore_index=7")
    ):
        diagnose_gradient(z, labels, right, ignore_index=7)
    labels[[1, 5]] = 7
    assert diagnose_gradient(z, labels, right, ignore_index=7).correct
    with pytest.raises(
        ValueError,
        match=re.escape("targets[1] is 7: expected a label in [0, 3) or an ignored one (name it with ignore_index)"),
    ):
        diagnose_gradient(z, labels, right)


def test_a_class_may_be_ignored_and_a_marker_that_is_a_class_is_one():
    z, labels, o, t = problem(7, 3)
    right = np.where((labels == 2)[:, None], 0, o - t)
    assert diagnose_gradient(z, labels, right, ignore_index=2).correct
    z, labels, o, t = problem(7, 300)
    labels[0] = 255
    t = np.eye(300)[labels]
    assert diagnose_gradient(z, labels, o - t).correct


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_labels_counted_from_one(dtype):
    z, labels, o, t = problem(7, 3)
    one_more = (labels + 1).astype(dtype)
    diagnosis = diagnose_gradient(z, one_more, (o - t) / 7)
    assert (diagnosis.correct, diagnosis.verdict) == (False, "labels counted from 1")
    assert str(diagnosis).startswith("Label 3 is outside [0, 3), and no label is 0")
    assert "for the labels minus 1: correct for the mean over 7 positions." in str(diagnosis)
    np.testing.assert_allclose(diagnosis.true_gradient, o - t, atol=1e-12)
    # A one-hot table without a row for label 3, and labels that are wrong in another way.
    table = (one_more[:, None] == np.arange(3)).astype(float)
    assert "for the labels minus 1: labels shifted by one." in str(diagnose_gradient(z, one_more, o - table))
    one_more[3] = 255
    right = np.where((one_more == 255)[:, None], 0, o - t)
    assert "minus 1: correct for the sum" in str(diagnose_gradient(z, one_more, right))
    one_more[3] = 0
    with pytest.raises(ValueError, match=re.escape("is 3: expected a label in [0, 3)")):
        diagnose_gradient(z, one_more, o - t)


@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint8])
def test_one_hot_targets_need_not_be_floating(dtype):
    z, _, o, t = problem(7, 3)
    assert diagnose_gradient(z, t.astype(dtype), o - t).correct
    assert diagnose_gradient(z, t.astype(dtype), t - o).verdict == "opposite sign"
    assert diagnose_gradient(z.T, t.T.astype(dtype), (o - t).T, 0).correct
    assert diagnose_gradient(z[0], t[0].astype(dtype), (o - t)[0]).correct


def test_dummies_of_pandas_where_an_unknown_class_is_ignored():
    pandas = pytest.importorskip("pandas")
    z, labels, o, t = problem(7, 3)
    names = pandas.Series(pandas.Categorical.from_codes(labels, ["setosa", "versicolor", "virginica"]))
    names[2] = None
    right = np.where(np.arange(7)[:, None] == 2, 0, o - t)
    dummies = pandas.get_dummies(names)
    assert diagnose_gradient(pandas.DataFrame(z), dummies, pandas.DataFrame(right)).correct
    assert diagnose_gradient(z, dummies, right / 6).verdict == "correct for the mean over the 6 positions not ignored"
    assert (
        diagnose_gradient(z, dummies, np.where(np.arange(7)[:, None] == 2, o, o - t)).verdict
        == "ignored positions not zeroed"
    )


def test_labels_that_fit_another_axis_are_judged_along_it():
    z, labels, o, t = problem(7, 3)
    for gradient, verdict in ((o - t, "correct for the sum"), (t - o, "opposite sign")):
        diagnosis = diagnose_gradient(z.T, labels, gradient.T)
        assert (diagnosis.correct, diagnosis.verdict) == (verdict.startswith("correct"), verdict)
        assert str(diagnosis).startswith(
            "The targets fit classes along axis 0, not 1, and were judged along it: pass axis=0. "
        )
    z, labels, o, t = problem(12, 3)
    images, gradient = (np.moveaxis(a.reshape(*IMAGES, 3), -1, 2) for a in (z, o - t))
    diagnosis = diagnose_gradient(images, labels.reshape(IMAGES), gradient)
    assert diagnosis.correct
    assert "pass axis=2." in str(diagnosis)


@pytest.mark.parametrize("axis", [0, 1])
def test_of_several_axes_that_the_labels_fit_the_one_is_taken_where_the_gradient_is_right(axis):
    z, labels, o, t = problem(12, 3)
    images, gradient = (np.moveaxis(a.reshape(*IMAGES, 3), -1, axis) for a in (z, o - t))
    diagnosis = diagnose_gradient(images, labels.reshape(IMAGES), gradient)
    assert diagnosis.correct
    assert f"pass axis={axis}." in str(diagnosis)
    assert diagnose_gradient(images, labels.reshape(IMAGES), -gradient).verdict == "opposite sign"


def test_a_gradient_that_is_right_along_another_axis_only_is_not_called_right():
    z, labels, o, t = problem(*SQUARE)
    diagnosis = diagnose_gradient(z.T, labels, (o - t).T)
    assert (diagnosis.correct, diagnosis.verdict) == (False, "classes along another axis")
    assert "axis 0 it is: pass axis=0" in str(diagnosis)
    t = np.eye(3)  # one-hot along both axes
    diagnosis = diagnose_gradient(z.T, t, (o - t).T)
    assert diagnosis.verdict == "softmax over the wrong axis"
    assert "Or else: With the classes along axis 1 this is not the gradient, along axis 0 it is" in str(diagnosis)


def test_all_zero():
    z, labels, *_ = problem(7, 3)
    assert diagnose_gradient(z, labels, np.zeros_like(z)).verdict == "all zero"


def test_a_vector_of_a_confident_prediction_is_judged_too():
    z, labels, *_ = problem(7, 3)
    z[2] = np.where(np.arange(3) == labels[2], 16.0, 0.0)
    right = np.array(our_gradient(z, labels))
    assert diagnose_gradient(z, labels, right).correct
    for factor in (-1, 0):
        wrong = right.copy()
        wrong[2] *= factor
        assert not diagnose_gradient(z, labels, wrong).correct


MARGINS = dict.fromkeys((np.float32, np.float64, jnp.bfloat16), (8, 12, 16, 20))
MARGINS[np.float16] = 8, 9, 10, 11  # at 16, two or three of its smallest numbers
SPOILT = [lambda g: -g, lambda g: 0 * g, lambda g: 5 * g, lambda g: 1.25 * g, lambda g: g[::-1]]
VECTORS = MARGINS, range(4), SPOILT, [False, True]


@pytest.mark.parametrize(
    ("dtype", "level", "spoil", "leading"), with_the_rest_exhaustive(reference.covering(2, *VECTORS), *VECTORS)
)
def test_each_vector_is_judged_by_its_own_rounding(dtype, level, spoil, leading):
    """However long the other vectors are: the shorter has the wrong sign, is zero or too long."""
    margin = MARGINS[dtype][level]
    q = 1 / (1 + np.exp(margin))
    rows = np.array([-0.5, 0.5]), np.array([-q, q])
    logits, wrong = np.array([[0.0, 0.0], [margin, 0.0]]), [rows[0], spoil(rows[1])]
    if leading:
        logits, wrong, rows = logits[::-1], wrong[::-1], rows[::-1]
    labels = np.array([0, 0])
    assert diagnose_gradient(logits.astype(dtype), labels, np.array(rows).astype(dtype)).correct
    assert not diagnose_gradient(logits.astype(dtype), labels, np.array(wrong).astype(dtype)).correct


def test_a_vector_hidden_by_rounding_does_not_name_a_mistake():
    """The second vector has the wrong sign but is negligible relative to 1; the first is a multiple of the truth."""
    z, q = np.array([[0, 0], [16, 0]], np.float32), 1 / (1 + np.exp(16))
    gradient = np.array([[-0.5, 0.5], [q, -q]], np.float32)
    assert diagnose_gradient(z, np.array([0, 0]), gradient).verdict == "wrong"


FACTORS = [np.float32, np.float64, jnp.bfloat16], [1e-37, 1e-20, 1e20], [False, True]


@pytest.mark.parametrize(
    ("dtype", "weight", "soft"), with_the_rest_exhaustive(reference.covering(2, *FACTORS), *FACTORS)
)
def test_a_factor_is_seen_however_small_or_large_the_targets(dtype, weight, soft):
    z = np.array([[0.5, -0.25, 1.0], [0.0, 0.0, 0.0], [-1.0, 0.5, 0.25]])
    t = weight * np.array([[0.5, 0.25, 0.25] if soft else [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    right = t.sum(1, keepdims=True) * softmax(z) - t
    for one in (slice(None), slice(1)):
        arrays = [a[one].astype(dtype) for a in (z, t, right)]
        assert diagnose_gradient(*arrays).correct
        assert not diagnose_gradient(arrays[0], arrays[1], (1.5 * right[one]).astype(dtype)).correct


def test_a_vector_whose_square_overflows_is_judged_too():
    z, p = np.array([[500.0, 0, 0]]), np.exp(-500)
    exact = np.array([[-2 * p, p, p]])
    assert diagnose_gradient(z, np.array([0]), exact).correct
    assert diagnose_gradient(z, np.array([0]), 5 * exact).verdict == "right up to a factor of 5"
    assert diagnose_gradient(z, np.array([0]), exact[:, [1, 0, 2]]).verdict == "wrong"


def test_a_vector_that_dwarfs_the_others_hides_none_of_them():
    z, _, o, t = problem(7, 3, np.float32)
    t *= np.array([1e10, *[1] * 6], np.float32)[:, None]
    right = t.sum(1, keepdims=True) * o - t
    assert diagnose_gradient(z, t, right).correct
    for row in range(1, 7):
        wrong = right.copy()
        wrong[row] *= 1.01
        assert not diagnose_gradient(z, t, wrong).correct


@pytest.mark.parametrize("n", [VERY_MANY, pytest.param(10 * VERY_MANY, marks=exhaustive)])
def test_a_mean_in_float16_over_very_many_positions(n):
    z, labels, *_ = problem(n, 3, np.float16)
    gradient = np.asarray(our_gradient(z, labels, "mean"))
    assert np.abs(gradient).max() < jnp.finfo(jnp.float16).tiny  # all are below the smallest normal number
    assert diagnose_gradient(z, labels, gradient).verdict == f"correct for the mean over {n} positions"
    assert diagnose_gradient(z, labels, -gradient).verdict == "opposite sign"


@exhaustive
def test_a_mean_in_float16_over_very_many_positions_that_is_wrong():
    z, labels, *_ = problem(VERY_MANY, 3, np.float16)
    gradient = np.asarray(our_gradient(z, labels, "mean"))
    assert not diagnose_gradient(z, labels, gradient * np.float16(1.5)).correct
    assert not diagnose_gradient(z, labels, np.where(np.arange(VERY_MANY)[:, None] == 7, -gradient, gradient)).correct


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_a_learned_distribution_leaves_only_rounding_error(dtype):
    """Every method subtracts t from τo, so the remaining noise is no mistake."""
    z = problem(7, 3)[0].astype(dtype)
    targets = softmax(z.astype(np.float32)).astype(dtype)
    gradient = np.array(our_gradient(z, targets))
    assert diagnose_gradient(z, targets, gradient).correct
    gradient[:, 2] += 10 * jnp.finfo(dtype).eps
    assert not diagnose_gradient(z, targets, gradient).correct


def test_logits_finer_than_the_gradient_may_have_been_rounded_to_it():
    z, labels, _, t = problem(7, 3)
    z += 1e5  # to be rounded by up to 4e-3 in float32
    narrow = z.astype(np.float32).astype(float)
    for right in (softmax(z) - t, softmax(narrow) - t):
        assert diagnose_gradient(z, labels, right.astype(np.float32)).correct
    assert not diagnose_gradient(z, labels, softmax(narrow) - t).correct
    assert diagnose_gradient(z, labels, (t - softmax(narrow)).astype(np.float32)).verdict == "opposite sign"


@pytest.mark.parametrize("margin", [88, 90, 95])
def test_entries_that_a_device_flushes_must_be_zero_or_right(margin):
    """Below the smallest normal number of float32."""
    z = np.array([[margin, 0.0, 1.0]], np.float32)
    p = np.exp([0.0, -margin, 1.0 - margin])
    for kept in ([1, 1], [0, 1], [0, 0]):
        others = p[1:] * kept
        assert diagnose_gradient(z, np.array([0]), np.array([[-others.sum(), *others]], np.float32)).correct
    others = p[1:]
    assert diagnose_gradient(z, np.array([0]), np.array([[-others.sum(), 0, 0]], np.float32)).correct
    for wrong in (
        [others.sum(), *others],
        [-others.sum(), *(1.5 * others)],
        [-2 * others.sum(), 0, 0],
        [others.sum(), 0, 0],
    ):
        assert not diagnose_gradient(z, np.array([0]), np.array([wrong], np.float32)).correct


def test_parts_of_a_distribution_that_a_device_flushes_to_zero():
    z = np.array([[0.0, -3.0, 0.0]], np.float32)
    targets, product = np.array([[1e-38, 9e-38, 4e-38]], np.float32), np.float32(14e-38) * softmax(z)
    least = jnp.finfo(np.float32).tiny
    assert product[0, 1] < least > targets[0, 0]
    for t, part in ((0, 1), (1, 0), (1, 1)):
        kept = np.where(product < least, product * np.float32(part), product)
        kept -= np.where(targets < least, targets * np.float32(t), targets)
        assert kept.dtype == np.float32
        assert diagnose_gradient(z, targets, kept).correct
    assert not diagnose_gradient(z, targets, np.float32(1.5) * (product - targets)).correct
    below = np.array([[1e-39, 4e-39, 4e-39]], np.float32)
    assert diagnose_gradient(z, below, np.zeros((1, 3), np.float32)).correct
    # A label that is flushed takes its whole vector along.
    label = np.array([[0, 3e-38, 0]], np.float32)
    assert not diagnose_gradient(z, label, label.sum() * softmax(z)).correct


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_the_exponent_is_rounded_in_half_precision(dtype):
    """z minus the maximum, of size 10, is rounded before exp: the tail is off by up to half of 10 eps."""
    rng = np.random.default_rng(3)
    z = np.asarray(rng.uniform(0, 1, (7, 3)) + np.array([10, 0, 0]), dtype)
    rounded = (z - z.max(1, keepdims=True)).astype(float)  # subtracted in the dtype
    assert (rounded != z.astype(float) - z.astype(float).max(1, keepdims=True)).any()
    p = np.exp(rounded)
    p /= p.sum(1, keepdims=True)
    right = np.stack([-p[:, 1] - p[:, 2], p[:, 1], p[:, 2]], 1).astype(dtype)
    assert diagnose_gradient(z, np.zeros(7, int), right).correct


def test_p_minus_one_is_right_if_it_loses_little_and_lost_to_rounding_if_it_loses_much():
    labels = np.array([0, 1, 0])
    for margin, correct in ((9.0, True), (11.0, True), (15.0, False)):
        z = np.array([[margin, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], np.float32)
        diagnosis = diagnose_gradient(z, labels, softmax(z) - np.eye(3, dtype=np.float32)[labels])
        assert diagnosis.correct is correct
        assert (diagnosis.verdict == "lost to rounding") is not correct


@pytest.mark.parametrize(("dtype", "gap"), [(np.float32, 104), (np.float64, 746)])
def test_the_global_maximum_is_recognised(dtype, gap):
    z = np.array([[gap, gap + 1.0], [0.0, 1.0]], dtype)
    with np.errstate(all="ignore"):
        e = np.exp(z - z.max())
        diagnosis = diagnose_gradient(z, np.array([0, 1]), e / e.sum(1, keepdims=True) - np.eye(2, dtype=dtype))
    assert diagnosis.verdict == "not finite"
    assert "maximum of the whole array" in str(diagnosis)
    assert str(diagnosis).startswith("1 of 2 positions")


def test_the_division_by_o_is_recognised():
    z = np.array([[110.0, 0.0], [0.0, 1.0]], np.float32)
    t = np.array([[0, 1], [0, 1]], np.float32)
    with np.errstate(all="ignore"):
        o = np.exp(z - z.max(1, keepdims=True))
        o /= o.sum(1, keepdims=True)
        diagnosis = diagnose_gradient(z, t, jacobian_times(o, -t / o))
    assert diagnosis.verdict == "not finite"
    assert "divides by zero" in str(diagnosis)


def test_the_gradient_to_probabilities_that_underflow_is_recognised():
    z = np.array([[110.0, 0.0], [0.0, 1.0]], np.float32)
    t = np.array([[0, 1], [0, 1]], np.float32)
    with np.errstate(all="ignore"):
        diagnosis = diagnose_gradient(z, t, -t / softmax(z))
    assert diagnosis.verdict == "not finite"
    assert "this is −t/o" in str(diagnosis)
    assert diagnosis.error == np.inf


def test_a_missing_maximum_is_recognised_and_an_unknown_cause_admitted():
    z = np.array([[200.0, 0.0], [0.0, 1.0]], np.float32)
    with np.errstate(all="ignore"):
        e = np.exp(z)
        diagnosis = diagnose_gradient(
            z, np.array([0, 0]), e / e.sum(1, keepdims=True) - np.eye(2, dtype=np.float32)[[0, 0]]
        )
    assert "no maximum was subtracted" in str(diagnosis)
    assert "none of the usual ones" in str(
        diagnose_gradient(np.zeros((2, 2)), np.array([0, 0]), np.array([[np.nan, 0], [0, 0]]))
    )


@jax.jit
def causes(z, labels):
    """The three usual causes in JAX, which flushes the smallest numbers to zero where NumPy does not."""
    t = jax.nn.one_hot(labels, z.shape[1], dtype=z.dtype)
    whole, bare = jnp.exp(z - z.max()), jnp.exp(z)
    return {
        "maximum of the whole array": whole / whole.sum(1, keepdims=True) - t,
        "no maximum was subtracted": bare / bare.sum(1, keepdims=True) - t,
        "divides by zero": jax.grad(lambda z: -jnp.sum(t * jnp.log(jax.nn.softmax(z))))(z),
    }


@pytest.mark.parametrize("gap", [95, 110])
@pytest.mark.parametrize("dtype", DTYPES)
def test_causes_are_recognised_in_float32_on_the_device_whatever_the_dtype_of_the_logits(gap, dtype):
    z = np.array([[gap, 0, 2], [gap, gap + 1, gap + 2], [0, 0, 1]], dtype)
    labels = np.array([1, 1, 2])
    for cause, gradient in causes(jnp.asarray(z, jnp.float32), labels).items():
        assert cause in str(diagnose_gradient(z, labels, gradient))


@pytest.mark.parametrize("gap", [90, 110])
def test_the_product_with_the_explicit_jacobian(gap):
    """E3.15: −inf at a gap of 90 in float32, NaN at 110."""
    z, t = np.array([[gap, 0, 1]], np.float32), np.array([0, 1, 0], np.float32)
    o = np.exp(z[0] - gap) / np.exp(z[0] - gap).sum()
    with np.errstate(all="ignore"):
        gradient = (np.diag(o) - np.outer(o, o)) @ (-t / o)
    assert "divides by zero" in str(diagnose_gradient(z, np.array([1]), gradient[None]))


def test_p_minus_one_in_float32_is_called_lost_not_right():
    z = np.array([[14.0, 0.0, 0.0], [0.0, 15.0, 0.0], [0.0, 0.0, 1.0]], np.float32)
    e = np.exp(z - z.max(1, keepdims=True))
    labels = np.array([0, 1, 0])
    diagnosis = diagnose_gradient(z, labels, e / e.sum(1, keepdims=True) - np.eye(3, dtype=np.float32)[labels])
    assert (diagnosis.correct, diagnosis.verdict) == (False, "lost to rounding")
    assert diagnose_gradient(z, labels, our_gradient(z, labels)).correct


LEADS = [16, 30, 40, 60, 80, 87, 88, 90, 104, 200], DTYPES, [False, True]
FEW_LEADS = [16, 40, 80, 87, 88, 104, 200], *LEADS[1:]


@pytest.mark.parametrize(
    ("margin", "dtype", "one_hot"), with_the_rest_exhaustive(reference.covering(2, *FEW_LEADS), *LEADS)
)
def test_a_label_with_a_large_margin_is_judged_by_the_other_classes(margin, dtype, one_hot):
    """The other classes' sum, by hand: also in float64 the truth must not be p − 1."""
    z = np.array([[margin, 0, 0]], dtype)
    targets = np.eye(3)[[0]] if one_hot else np.array([0])
    p = np.exp(-float(margin)) / (1 + 2 * np.exp(-float(margin)))
    exact = np.array([[-2 * p, p, p]], dtype)
    diagnosis = diagnose_gradient(z, targets, exact)
    assert diagnosis.correct
    np.testing.assert_allclose(diagnosis.true_gradient, [[-2 * p, p, p]], rtol=1e-12)
    assert diagnose_gradient(z, targets, our_gradient(z, np.array([0]))).correct
    if margin <= 80:  # the tail is a normal number of float32
        wrong = {"lost to rounding": [[0, p, p]], "opposite sign": -exact, "right up to a factor of 3": 3 * exact, "wrong": exact[:, [1, 0, 2]], "all zero": 0 * exact}  # fmt: skip
        for verdict, gradient in wrong.items():
            diagnosis = diagnose_gradient(z, targets, np.asarray(gradient, dtype))
            assert not diagnosis.correct
            if verdict != "lost to rounding" or margin > 40:  # before, a label's zero is no rounding of float64
                assert diagnosis.verdict == verdict


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("n", [1, 7])
def test_half_precision(n, dtype):
    z, labels, *_ = problem(n, 3, dtype)
    gradient = np.asarray(our_gradient(z, labels, "mean"))
    assert gradient.dtype == dtype
    assert diagnose_gradient(z, labels, gradient).correct
    assert not diagnose_gradient(z, labels, (gradient * np.float32(1.1)).astype(dtype)).correct


def test_an_unknown_gradient_is_wrong_by_how_much_and_where():
    z, labels, o, t = problem(7, 3)
    wrong = o - t
    wrong[4, 2] += 0.5
    diagnosis = diagnose_gradient(z, labels, wrong)
    assert diagnosis.verdict == "wrong"
    assert "at position (4,), class 2" in str(diagnosis)
    assert "reach 0.5" in str(diagnosis)
    assert diagnosis.error == pytest.approx(0.5 / np.linalg.norm(o - t), rel=1e-6)
    assert "are zero" in str(diagnose_gradient(z, labels, o - t + np.array([0.3, -0.3, 0])))


def test_class_axis():
    z, labels, o, t = problem(12, 3)
    images = [np.moveaxis(a.reshape(*IMAGES, 3), -1, 1) for a in (z, o - t)]
    assert diagnose_gradient(images[0], labels.reshape(IMAGES), images[1], 1).correct
    assert diagnose_gradient(images[0], labels.reshape(IMAGES), -images[1], 1).verdict == "opposite sign"
    vector = diagnose_gradient(z[0], labels[0], (o - t)[0])
    assert vector.correct


@pytest.mark.parametrize(
    ("examples", "sizes"), [(7, [7]), pytest.param(80, [1, 16], marks=exhaustive)], ids=["few", "many"]
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, jnp.bfloat16, np.float16])
def test_law_jaxsoft_s_gradient_is_called_right_and_with_one_wrong_vector_is_not(dtype, examples, sizes):
    limits = jnp.finfo(dtype)

    @jax.jit
    def gradients(z, targets):
        return {name: our_gradient(z, targets, name) for name in ("sum", "mean")}

    @given(
        st.integers(0, 2**32 - 1),
        st.sampled_from(sizes),
        st.sampled_from([0.5, 2.0, 6.0, 20.0]),
        st.sampled_from(["labels", "soft", "learned", "scaled"]),
        st.sampled_from([-1.0, 0.0, 1.5]),
        st.sampled_from(["sum", "mean"]),
    )
    @settings(deadline=None, max_examples=examples)
    def law(seed, n, scale, kind, factor, reduction):
        rng = np.random.default_rng(seed)
        z = (rng.normal(size=(n, 3)) * scale).astype(dtype)
        targets = {
            "labels": lambda: rng.integers(0, 3, n),
            "soft": lambda: rng.dirichlet(np.ones(3), n).astype(dtype),
            "learned": lambda: softmax(z.astype(float)).astype(dtype),
            "scaled": lambda: (rng.dirichlet(np.ones(3), n) * 10 ** rng.uniform(-3, 3, (n, 1))).astype(dtype),
        }[kind]()
        gradient = np.asarray(gradients(z, targets)[reduction])
        diagnosis = diagnose_gradient(z, targets, gradient)
        assert diagnosis.correct
        # What is beyond the rounding of 1, relative to the targets, and of the smallest numbers.
        row = seed % n
        largest = np.abs(diagnosis.true_gradient[row]).max()
        total = 1 if kind == "labels" else float(targets[row].sum())
        told = largest > 100 * max(float(limits.smallest_subnormal), float(limits.tiny) * (dtype != np.float16)) * n
        if told and (kind == "labels" or largest > 40 * float(limits.eps) * total):
            wrong = gradient.astype(float)
            wrong[row] *= factor
            assert not diagnose_gradient(z, targets, wrong.astype(dtype)).correct

    law()


@examples_of_laws
def test_law_no_perturbed_gradient_is_called_right(examples, sizes):
    @given(
        st.integers(0, 2**32 - 1),
        st.sampled_from(sizes),
        st.floats(1e-3, 10),
        st.booleans(),
        st.booleans(),
    )
    @settings(deadline=None, max_examples=examples)
    def law(seed, shape, size, single, narrow):
        z, labels, o, t = problem(*shape, np.float32 if narrow else np.float64, seed)
        noise = np.random.default_rng(seed).normal(size=z.shape)
        if single:  # all of it in one vector
            noise[np.arange(len(z)) != seed % len(z)] = 0
        gradient = o - t
        perturbed = gradient + size * np.linalg.norm(gradient) / np.linalg.norm(noise) * noise
        assert diagnose_gradient(z, labels, gradient).correct
        assert not diagnose_gradient(z, labels, perturbed.astype(z.dtype)).correct

    law()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z, y, g: diagnose_gradient(z, y, g[:2]), ValueError, "gradient: expected the logits' shape (7, 3), got (2, 3)"),
        (lambda z, y, g: diagnose_gradient(z, y[:2], g), ValueError, "targets: expected integer labels of shape (7,) or one-hot of (7, 3), got (2,)"),
        (lambda z, y, g: diagnose_gradient(z, y + 0.5, g), ValueError, "targets: expected the logits' shape (7, 3), got (7,); labels must be integers"),
        (lambda z, y, g: diagnose_gradient(z, y > 0, g), ValueError, "targets: expected the logits' shape (7, 3), got (7,); labels must be integers"),
        (lambda z, y, g: diagnose_gradient(z, np.eye(3)[y] * np.nan, g), ValueError, "targets: expected finite numbers, got NaN or infinity"),
        (lambda z, y, g: diagnose_gradient(z, np.eye(3)[y], g, ignore_index=1), ValueError, "ignore_index: expected None with a distribution"),
        (lambda z, y, g: diagnose_gradient(z, y, g, ignore_index=1.5), TypeError, "ignore_index: expected an integer, got 1.5"),
        (lambda z, y, g: diagnose_gradient(z[0], np.array(-7), g[0]), ValueError, "targets is -7: expected a label in [0, 3)"),
        (lambda z, y, g: diagnose_gradient(z * np.nan, y, g), ValueError, "logits: expected finite numbers"),
        (lambda z, y, g: diagnose_gradient(z, np.array(["setter", "beagle"])[y % 2], g), TypeError, "targets: expected an array of numbers, got strings; number the classes"),
        (lambda z, y, g: diagnose_gradient(z, y, g > 0), TypeError, "gradient: expected real numbers, got dtype bool"),
        (lambda z, y, g: diagnose_gradient(z, y, jnp.asarray(g, jnp.float8_e4m3fn)), TypeError, "gradient: expected at least the precision of bfloat16, got dtype float8_e4m3fn"),
        (lambda z, y, g: diagnose_gradient(z, y, g, 2), ValueError, "axis: expected an integer in [-2, 2), got 2"),
        (lambda z, y, g: diagnose_gradient(z[:0], y[:0], g[:0]), ValueError, "logits: expected at least one position"),
        (lambda z, y, g: jax.jit(lambda a: diagnose_gradient(a, y, g).error)(z), TypeError, "logits: expected a concrete array, got a traced one"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    z, labels, o, t = problem(7, 3)
    with pytest.raises(error, match=re.escape(message)):
        call(z, labels, o - t)


def test_the_command_ends_with_status_one_for_a_wrong_gradient_and_zero_for_a_right_one(tmp_path, capsys):
    z, labels, o, t = problem(7, 3)
    scripts = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]
    command = EntryPoint("jaxsoft-diagnose", scripts["jaxsoft-diagnose"], "console_scripts")
    assert command.load() is jaxsoft.diagnose.main
    np.savez(tmp_path / "right.npz", logits=z, targets=labels, gradient=o - t)
    assert jaxsoft.diagnose.main([str(tmp_path / "right.npz")]) == 0
    assert capsys.readouterr().out.startswith("correct for the sum\n\nThis is the gradient of the sum of the losses.")
    np.savez(tmp_path / "wrong.npz", logits=z, targets=labels, gradient=-t * (1 - o))
    done = subprocess.run(
        [sys.executable, "-m", "jaxsoft.diagnose", tmp_path / "wrong.npz"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},  # a terminal that knows no −
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("off-diagonal terms missing\n\nThis is ?t(1 ? o)")


def test_options_of_the_command(tmp_path, capsys):
    z, labels, o, t = problem(7, 3)
    labels[1] = -7
    path = str(tmp_path / "file.npz")
    np.savez(path, logits=z.T, targets=labels, gradient=np.where(labels == -7, 0, (o - t).T))
    assert jaxsoft.diagnose.main([path, "--axis", "0", "--ignore-index", "-7"]) == 0
    assert capsys.readouterr().out.startswith("correct for the sum\n\nThis is the gradient")
    assert jaxsoft.diagnose.main([path, "--axis", "0"]) == 2
    assert capsys.readouterr().err == (
        f"error: {path}: targets[1] is -7: expected a label in [0, 3) or an ignored one (name it with ignore_index)\n"
    )


def test_files_that_cannot_be_judged(tmp_path, capsys):
    z, labels, _, t = problem(7, 3)
    path = tmp_path / "file.npz"

    def error_of(path):
        assert jaxsoft.diagnose.main([str(path)]) == 2
        out, line = capsys.readouterr()
        assert out == ""
        assert line.count("\n") == 1
        assert line.startswith(f"error: {path}: ")
        return line

    cases = {
        "expected array 'gradient', got logits, targets": {"logits": z, "targets": labels},
        "expected array 'logits', got none": {},
        "gradient: expected the logits' shape (7, 3), got (3,)": {"logits": z, "targets": labels, "gradient": t[0]},
        "gradient: expected an array of numbers, got strings": {
            "logits": z,
            "targets": labels,
            "gradient": np.array("x"),
        },
        "expected an NPZ file of plain numbers": {"logits": np.array([{}]), "targets": labels, "gradient": t},
    }
    for message, arrays in cases.items():
        np.savez(path, **arrays)
        assert message in error_of(path)
    np.savez(path, logits=z, targets=labels, gradient=t)
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes(60) + whole[260:])
    assert "expected an NPZ file of plain numbers" in error_of(path)
    for other in (b"no archive", b"", whole[:-100]):
        path.write_bytes(other)
        assert "expected an NPZ file, as numpy.savez writes, got another kind of file" in error_of(path)
    with open(path, "wb") as file:
        np.save(file, z)
    assert "got another kind of file" in error_of(path)
    assert "No such file" in error_of(tmp_path / "missing.npz")
    assert "Is a directory" in error_of(tmp_path)
