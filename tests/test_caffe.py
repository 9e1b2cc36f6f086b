"""jaxsoft.caffe: Caffe's own tests, the cases it never tested, and every entry of its small print.

IDs such as S3.1 and E3.1 number the claims and the errors of a text on softmax in Caffe.
"""

import functools
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
import reference
from jaxsoft import caffe, checked

FUNCTIONS = {name: getattr(caffe, name) for name in caffe.__all__}
CAP = 87.3365448  # −log of the smallest normal float32
EXAMPLE = np.arange(24).reshape(2, 3, 2, 2) % 7 * 0.5
LABELS = np.array([[[0, 1], [255, 2]], [[255, 255], [1, 0]]])
RNG = np.random.default_rng(0)
NORMALIZATIONS = ["FULL", "VALID", "BATCH_SIZE", "NONE"]
STATED = {"FULL": 0.722547, "VALID": 1.156076, "BATCH_SIZE": 2.890190, "NONE": 5.780380}  # of EXAMPLE


def layer(logits, labels, *, axis=1, ignore_label=None, infogain=None, floor=2.0**-126):
    """The layer in Caffe's own loops over a flat buffer, in NumPy: the loss's sum, its gradient, the probabilities."""
    outer, classes, inner = np.prod(logits.shape[:axis], dtype=int), logits.shape[axis], np.prod(logits.shape[axis + 1 :], dtype=int)  # fmt: skip
    gains = np.eye(classes) if infogain is None else infogain
    x, y = logits.reshape(-1), np.asarray(labels).reshape(-1)
    probs, gradient, loss = np.zeros(x.size), np.zeros(x.size), 0.0
    for i in range(outer):
        for j in range(inner):
            at = [i * classes * inner + c * inner + j for c in range(classes)]
            exponentials = np.exp(x[at] - x[at].max())
            p = probs[at] = exponentials / exponentials.sum()
            label = int(y[i * inner + j])
            if label == ignore_label:
                continue
            for c in range(classes):
                loss -= gains[label, c] * np.log(max(p[c], floor))
                gradient[at[c]] = p[c] * gains[label].sum() - gains[label, c]
    return loss, gradient.reshape(logits.shape), probs.reshape(logits.shape)


@functools.partial(jax.jit, static_argnames=("axis", "ignore_label", "normalization"))
def loss_and_gradient(logits, labels, loss_weight=1.0, **options):
    return jax.value_and_grad(lambda z: caffe.softmax_with_loss(z, labels, loss_weight=loss_weight, **options)[0])(
        logits
    )


def losses_and_gradients(logits, labels, layer=caffe.softmax_with_loss, **options):
    """For each normalization losses, gradients and probabilities, from one compiled program."""

    def losses(z):
        found = [layer(z, labels, normalization=name, **options) for name in NORMALIZATIONS]
        together = jnp.stack([loss for loss, _ in found])
        return together, (together, found[0][1])

    gradients, (values, probs) = jax.jit(jax.jacrev(losses, has_aux=True))(logits)
    return zip(NORMALIZATIONS, values, gradients, strict=True), probs


def check_derivatives(fn, x, tolerance):
    """First and second derivatives along a random direction, against differences; reverse, and forward over reverse."""
    gradient, h = jax.grad(fn), 1e-4

    @jax.jit
    def along(x, v):
        around = jax.vmap(jax.value_and_grad(fn))(x + h * v * jnp.array([-1.0, 0, 1]).reshape(3, *[1] * x.ndim))
        forwards = jax.jvp(gradient, (x,), (v,))[1]
        return *around, forwards, jax.grad(lambda x: jnp.vdot(gradient(x), v))(x)

    v = RNG.normal(size=x.shape)
    values, gradients, forwards, backwards = map(np.asarray, along(x, v))
    tolerances = {"rtol": tolerance, "atol": tolerance}
    np.testing.assert_allclose(np.vdot(gradients[1], v), (values[2] - values[0]) / (2 * h), **tolerances)
    np.testing.assert_allclose(backwards, (gradients[2] - gradients[0]) / (2 * h), **tolerances)
    np.testing.assert_allclose(forwards, backwards, atol=1e-12)


def problem(shape, axis=1, scale=1.0, ignore_label=None):
    logits = scale * RNG.normal(size=shape)
    labels = RNG.integers(0, shape[axis], shape[:axis] + shape[axis + 1 :])
    if ignore_label is not None:
        labels = np.where(RNG.random(labels.shape) < 0.3, ignore_label, labels)
    return logits, labels


# Caffe's own tests: sizes and tolerances


@pytest.mark.x32
def test_upstream_softmax_forward():
    """(2,10,2,3): sums to one and equals exp(x)/Σexp(x), to 1e-4."""
    x = RNG.normal(size=(2, 10, 2, 3)).astype(np.float32)
    probs = caffe.softmax(x)
    assert probs.dtype == jnp.float32
    assert probs.shape == x.shape
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-4)
    np.testing.assert_allclose(probs, np.exp(x) / np.exp(x).sum(1, keepdims=True), atol=1e-4)


def test_upstream_softmax_gradient():
    """(2,10,2,3): every output's gradient against differences, to 1e-3; against the reference to 1e-12."""
    x, cotangent = RNG.normal(size=(2, 2, 10, 2, 3))
    check_derivatives(lambda x: jnp.vdot(caffe.softmax(x), cotangent), x, 1e-3)

    @jax.jit
    def gradients(x):
        return [jax.vjp(fn, x)[1](cotangent)[0] for fn in (caffe.softmax, lambda x: reference.softmax(x, 1))]

    gradient, expected = gradients(x)
    np.testing.assert_allclose(gradient, expected, atol=1e-12)


@pytest.mark.x32
def test_upstream_loss_gradient():
    """(10,5,2,3) logits of N(0,10²): against differences in float32 to 1e-2, upstream's step 1e-2."""
    logits, labels = problem((10, 5, 2, 3), scale=10)
    logits = logits.astype(np.float32)
    _, gradient = loss_and_gradient(logits, labels, loss_weight=30.0)
    for index in [(0, 0, 0, 0), (3, 2, 1, 2), (9, 4, 1, 1), (5, int(labels[5, 0, 1]), 0, 1)]:
        step = np.zeros_like(logits)
        step[index] = 1e-2
        up, down = (loss_and_gradient(logits + s, labels, loss_weight=30.0)[0] for s in (step, -step))
        np.testing.assert_allclose(gradient[index], (up - down) / 2e-2, atol=1e-2)


@pytest.mark.parametrize("ignore_label", [None, 0, 255, -1])
def test_upstream_loss_gradient_in_double_precision(ignore_label):
    """(10,5,2,3) logits of N(0,10²): loss and gradient against Caffe's loops, to rounding."""
    logits, labels = problem((10, 5, 2, 3), scale=10, ignore_label=ignore_label)
    total, expected, _ = layer(logits, labels, ignore_label=ignore_label)
    valid = int((labels != ignore_label).sum()) if ignore_label is not None else 60
    count = {"FULL": 60, "VALID": valid, "BATCH_SIZE": 10, "NONE": 1}
    for normalization, loss, gradient in losses_and_gradients(logits, labels, ignore_label=ignore_label)[0]:
        np.testing.assert_allclose(loss, total / count[normalization], rtol=1e-12, err_msg=normalization)
        np.testing.assert_allclose(gradient, expected / count[normalization], atol=1e-14, err_msg=normalization)


@pytest.mark.x32
def test_upstream_ignoring_each_class_in_turn():
    """Σ over k of the loss ignoring k = 4·(full loss) for 5 classes, normalize false: upstream's 1e-4."""
    logits, labels = problem((10, 5, 2, 3), scale=10)

    @jax.jit
    def losses(z):
        ignored = None, *range(5)
        return [caffe.softmax_with_loss(z, labels, normalize=False, ignore_label=k)[0] for k in ignored]

    full, *parts = losses(logits.astype(np.float32))
    np.testing.assert_allclose(sum(parts), 4 * full, rtol=1e-4)


# The normalisers


def test_normalisation_table():
    """The worked example to 1e-6, loss and gradient."""
    _, expected, _ = layer(EXAMPLE, LABELS, ignore_label=255)
    for normalization, loss, gradient in losses_and_gradients(EXAMPLE, LABELS, ignore_label=255)[0]:
        stated = STATED[normalization]
        assert loss == pytest.approx(stated, abs=1e-6)
        np.testing.assert_allclose(gradient, expected * stated / 5.780380, atol=1e-6, err_msg=normalization)


def test_batch_size_divides_by_the_dimensions_before_the_axis():
    """(2,4,3,5), axis 2: by 8, not by shape[0]; negative axes count from the end."""
    logits, labels = problem((2, 4, 3, 5), axis=2)
    total, gradient, _ = layer(logits, labels, axis=2)
    for axis in (2, -2):
        loss, computed = loss_and_gradient(logits, labels, axis=axis, normalization="BATCH_SIZE")
        np.testing.assert_allclose(loss, total / 8, rtol=1e-13)
        np.testing.assert_allclose(computed, gradient / 8, atol=1e-15)


def test_the_old_flag_counts_only_where_normalization_is_unset():
    meanings = {
        (None, None): "VALID",
        (None, True): "VALID",
        (None, False): "BATCH_SIZE",
        ("FULL", False): "FULL",
        ("VALID", False): "VALID",
        ("NONE", True): "NONE",
    }

    @jax.jit
    def losses(z):
        options = ({"normalization": new, "normalize": old, "ignore_label": 255} for new, old in meanings)
        return [caffe.softmax_with_loss(z, LABELS, **chosen)[0] for chosen in options]

    stated = [STATED[name] for name in meanings.values()]
    np.testing.assert_allclose(losses(EXAMPLE), stated, rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch", [2, 0])
def test_nothing_valid_gives_zero_and_zero(batch):
    """Never a division by zero: an image without a valid pixel, and no image."""
    logits = EXAMPLE[:batch]
    for normalization, loss, gradient in losses_and_gradients(logits, np.full((batch, 2, 2), 7), ignore_label=7)[0]:
        assert loss == 0, normalization
        np.testing.assert_array_equal(gradient, np.zeros(logits.shape), err_msg=normalization)


# What upstream never tested (with FULL, NONE and nothing valid above)


@pytest.mark.parametrize(("shape", "axis"), [((4, 3), 1), ((2, 3, 4), 2), ((2, 3, 4, 2), 3), ((2, 3, 2, 2, 2), 1), ((2, 4, 2), 0)])  # fmt: skip
def test_any_axis_of_any_rank(shape, axis):
    """Against Caffe's loops; with axis 0 the labels must still have the logits' first dimension."""
    logits, labels = problem(shape, axis)
    labels = labels.reshape(shape[0], -1)
    options = {"axis": axis, "normalization": "NONE"}

    @jax.jit
    def run(z):
        return *jax.value_and_grad(lambda z: caffe.softmax_with_loss(z, labels, **options)[0])(z), caffe.softmax(
            z, axis
        )

    total, expected, probs = layer(logits, labels, axis=axis)
    loss, gradient, computed = run(logits)
    np.testing.assert_allclose(loss, total, rtol=1e-13)
    np.testing.assert_allclose(gradient, expected, atol=1e-15)
    np.testing.assert_allclose(computed, probs, rtol=1e-13)


def test_second_output_is_the_probabilities_and_gradients_flow_through_it():
    """By softmax's rule, added to the loss's own gradient."""
    logits, labels = problem((2, 3, 2, 2))
    cotangent = RNG.normal(size=logits.shape)

    @jax.jit
    def run(z, cotangent):
        outputs, vjp = jax.vjp(lambda z: caffe.softmax_with_loss(z, labels, normalization="NONE"), z)
        return outputs, [vjp((of_loss, cotangent))[0] for of_loss in (jnp.array(0.0), jnp.array(2.0))]

    (loss, probs), (alone, added) = run(logits, cotangent)
    total, gradient, expected = layer(logits, labels)
    np.testing.assert_allclose(loss, total, rtol=1e-13)
    np.testing.assert_allclose(probs, expected, rtol=1e-13)
    through = expected * (cotangent - (expected * cotangent).sum(1, keepdims=True))
    np.testing.assert_allclose(alone, through, atol=1e-15)
    np.testing.assert_allclose(added, 2 * gradient + through, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("gap", [80.0, 90.0, 110.0, 1000.0, np.inf])
def test_a_position_costs_at_most_the_clamp_and_its_gradient_ignores_it(gap, dtype):
    """87.3365448 from there on, and always a gradient of −1; at −inf too."""
    logits = np.array([[0.0, -gap]], dtype)
    loss, gradient = loss_and_gradient(logits, np.array([1]))
    assert loss == pytest.approx(min(gap, CAP), abs=5.1e-8 if dtype == "float64" else 4e-6)
    np.testing.assert_allclose(gradient, [[1, -1]], rtol=1e-6)
    assert (loss.dtype, gradient.dtype) == (dtype, dtype)


def test_the_second_scheme_has_a_gradient_where_the_first_has_none():
    """E3.15: Through float32 probabilities and 1/p the label's gradient dies at a gap of 110; directly it is −1."""
    logits = np.array([[0.0, -110.0]], np.float32)
    label = np.array([1])
    first = jax.jit(jax.grad(lambda z: caffe.multinomial_logistic_loss(caffe.softmax(z), label)))(logits)
    assert first[0, 1] == 0
    assert loss_and_gradient(logits, label)[1][0, 1] == -1


def test_infinite_logits():
    """−inf off the label is a class of probability 0; a vector of −inf alone costs the clamp and stays finite."""
    loss, gradient = loss_and_gradient(np.array([[0.0, -np.inf, np.log(3)]]), np.array([0]))
    assert loss == pytest.approx(np.log(4), rel=1e-14)
    np.testing.assert_allclose(gradient, [[-0.75, 0, 0.75]], rtol=1e-14)
    loss, gradient = loss_and_gradient(np.full((1, 3), -np.inf), np.array([0]))
    assert loss == pytest.approx(CAP, abs=5.1e-8)
    assert np.isfinite(gradient).all()


BAD = {
    "int": np.array([3, -1, 1000, -(2**31), 2**32 + 1]),
    "float": np.array([3.0, -1.0, np.nan, np.inf, -np.inf, 1e30, 2.0**32 + 1]),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("ignore_label", [None, -7])
def test_bad_labels_are_nan_there_and_an_error_under_checked(kind, ignore_label):
    """Loss NaN, gradient NaN at those positions and right elsewhere, also under jit."""
    labels = np.append(BAD[kind], [1, 0])
    logits = RNG.normal(size=(len(labels), 3))
    loss, gradient = jax.jit(
        jax.value_and_grad(lambda z: caffe.softmax_with_loss(z, labels, ignore_label=ignore_label)[0])
    )(logits)
    assert np.isnan(loss)
    assert np.isnan(gradient[:-2]).all()
    np.testing.assert_allclose(gradient[-2:], layer(logits[-2:], [1, 0])[1] / len(labels), atol=1e-15)
    allowed = "" if ignore_label is None else f" or ignore_label={ignore_label}"
    with pytest.raises(ValueError, match=re.escape(f"labels[0] is {labels[0]}: expected a label in [0, 3){allowed}")):
        checked(lambda z: caffe.softmax_with_loss(z, labels, ignore_label=ignore_label)[0])(logits)


@pytest.mark.x32
def test_an_ignored_label_that_no_label_can_be():
    """A Python integer beyond the labels' dtype ignores nothing."""
    for labels in (np.array([0, 1], np.int32), np.array([0, 1], np.float32)):
        loss, _ = caffe.softmax_with_loss(np.zeros((2, 3), np.float32), labels, ignore_label=2**40)
        assert loss == pytest.approx(np.log(3), rel=1e-6)


def test_a_nan_label_is_never_the_ignored_one():
    @jax.jit
    def losses(z):
        cases = itertools.product((np.nan, np.inf), (-1, -2))
        return [caffe.softmax_with_loss(z, np.array([0, bad]), ignore_label=ignored)[0] for bad, ignored in cases]

    assert np.isnan(losses(np.zeros((2, 3)))).all()


LOSSES = {
    "softmax_with_loss": caffe.softmax_with_loss,
    "infogain_loss": lambda *args, **options: caffe.infogain_loss(*args, np.eye(3), **options),
}


@pytest.mark.parametrize("name", LOSSES)
def test_an_ignored_position_may_hold_anything(name):
    """With NaN and infinite logits there, loss and gradient equal Caffe's loops, which skip the position."""
    logits, labels = RNG.normal(size=(5, 3)), np.array([0, 255, 2, 255, 255])
    spoiled = logits.copy()
    spoiled[1, 0], spoiled[3, 1], spoiled[4] = np.nan, np.inf, -np.inf
    total, expected, _ = layer(logits, labels, ignore_label=255)
    count = {"FULL": 5, "VALID": 2, "BATCH_SIZE": 5, "NONE": 1}
    for z in (logits, spoiled):
        for normalization, loss, gradient in losses_and_gradients(z, labels, LOSSES[name], ignore_label=255)[0]:
            np.testing.assert_allclose(loss, total / count[normalization], rtol=1e-13, err_msg=normalization)
            np.testing.assert_allclose(gradient, expected / count[normalization], atol=1e-15, err_msg=normalization)
            np.testing.assert_array_equal(gradient[labels == 255], 0, err_msg=normalization)


@pytest.mark.parametrize("name", LOSSES)
def test_an_ignored_position_has_no_gradient_whatever_the_cotangent(name):
    """Loss weights and cotangents that are not finite stay with the positions that are not ignored."""
    loss, labels = LOSSES[name], np.array([0, 255])

    @jax.jit
    def gradients(z):
        weighted = [jax.grad(lambda z, w=w: loss(z, labels, ignore_label=255, loss_weight=w)[0])(z) for w in weights]
        # The loss is 0, where the root has an infinite slope.
        return weighted, jax.grad(lambda z: jnp.sqrt(loss(z, labels[1:], ignore_label=255)[0]))(z[1:])

    weights = np.inf, np.nan
    weighted, of_root = gradients(np.eye(2, 3))
    for gradient in weighted:
        assert not np.isfinite(gradient[0]).all()
        np.testing.assert_array_equal(gradient[1], 0)
    np.testing.assert_array_equal(of_root, 0)


def test_infogain_does_not_change_an_ignored_position():
    """Not class 0's row either, which may hold NaN."""
    gains = np.where(np.arange(3)[:, None] == 0, np.inf, GAINS)
    logits, labels = RNG.normal(size=(2, 3)), np.array([1, 255])
    loss, gradient = jax.jit(jax.value_and_grad(lambda z: caffe.infogain_loss(z, labels, gains, ignore_label=255)[0]))(
        logits
    )
    total, expected, _ = layer(logits, labels, ignore_label=255, infogain=GAINS)
    np.testing.assert_allclose(loss, total, rtol=1e-13)
    np.testing.assert_allclose(gradient, expected, atol=1e-15)


# Labels


WIDE = {  # each a class, or one that is ignored, in its lower bits
    "int64": (np.array([2**32 + 1, 1]), 5),
    "negative": (np.array([1 - 2**33, 1]), 5),
    "uint64": (np.array([2**63 + 2, 1], np.uint64), 5),
    "list": ([2**32 + 1, 1], 5),
    "ignored in its lower bits": (np.array([2**32 + 255, 1]), 255),
    "uint32, read as negative": (np.array([2**32 - 1, 1], np.uint32), -1),
    "float64, rounded to the ignored one": (np.array([2.0**24 + 1, 1]), 2**24),
    "float16, the ignored one beyond its range": (np.array([np.inf, 1], np.float16), 70_000),
}


@pytest.mark.x32
@pytest.mark.parametrize("name", LOSSES)
def test_a_label_wider_than_32_bits_is_out_of_range(name):
    """NaN there and right elsewhere; `checked` names the label as it was given."""
    logits = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)

    def loss_of(kind):
        labels, ignore_label = WIDE[kind]
        return lambda z: LOSSES[name](z, labels, ignore_label=ignore_label)[0]

    found = jax.jit(lambda z: {kind: jax.value_and_grad(loss_of(kind))(z) for kind in WIDE})(logits)
    expected = layer(logits[1:], [1])[1][0] / 2
    for kind, (labels, ignore_label) in WIDE.items():
        value, gradient = found[kind]
        assert np.isnan(value), kind
        assert np.isnan(gradient[0]).all(), kind
        np.testing.assert_allclose(gradient[1], expected, rtol=1e-6, err_msg=kind)
        message = f"labels[0] is {labels[0]}: expected a label in [0, 3) or ignore_label={ignore_label}"
        with pytest.raises(ValueError, match=re.escape(message)):
            checked(loss_of(kind))(logits)


@pytest.mark.x32
def test_multinomial_logistic_loss_of_a_wide_label_is_nan():
    assert np.isnan(caffe.multinomial_logistic_loss(np.full((1, 3), 1 / 3, np.float32), np.array([2**32 + 1])))


@pytest.mark.x32
@pytest.mark.parametrize("name", LOSSES)
def test_a_label_wider_than_32_bits_can_be_ignored(name):
    """The class in its lower 32 bits is not ignored."""
    logits = np.linspace(-1, 1, 9, dtype=np.float32).reshape(3, 3)
    loss = checked(
        jax.jit(jax.value_and_grad(lambda z: LOSSES[name](z, np.array([2**33, 0, 2]), ignore_label=2**33)[0]))
    )
    value, gradient = loss(logits)
    total, expected, _ = layer(logits[1:], [0, 2])
    np.testing.assert_allclose(value, total / 2, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0, 0, 0], *expected / 2], rtol=1e-6)


def test_labels_given_as_floats_are_truncated_to_integers():
    """Towards zero, as a cast in C: −0.9 is class 0, 254.5 is not 255."""
    logits = RNG.normal(size=(5, 3))
    loss, gradient = loss_and_gradient(logits, np.array([0.0, 1.9, 2.5, -0.9, 255.7]), ignore_label=255)
    expected = loss_and_gradient(logits, np.array([0, 1, 2, 0, 255]), ignore_label=255)
    assert loss == expected[0]
    np.testing.assert_array_equal(gradient, expected[1])
    assert np.isnan(loss_and_gradient(logits, np.full(5, 254.5), ignore_label=255)[0])
    in_numpy = jax.jit(
        lambda z: caffe.softmax_with_loss(z, np.array([0.0, 1.9, 2.5, -0.9, 255.7]), ignore_label=255)[0]
    )
    np.testing.assert_allclose(in_numpy(logits), loss, rtol=1e-15)


def test_labels_of_any_dtype():
    """Also more classes than the dtype of the labels counts, and an ignored label it cannot hold."""
    logits, labels = RNG.normal(size=(3, 200)), np.array([0, 100, 127])
    given = {dtype: labels.astype(dtype) for dtype in ("int8", "uint8", "int32", "uint32", "uint64", "float16")}

    @jax.jit
    def losses(z, traced):
        return [
            {dtype: caffe.softmax_with_loss(z, labels, ignore_label=-1)[0] for dtype, labels in arrays.items()}
            for arrays in (given, traced)  # NumPy's, and JAX's
        ]

    expected = layer(logits, labels)[0] / 3
    for found in losses(logits, given):
        for dtype, loss in found.items():
            np.testing.assert_allclose(loss, expected, rtol=1e-13, err_msg=dtype)


def test_labels_are_stored_at_i_inner_plus_j():
    """S3.31: Any shape of the right size whose first dimension is the batch, read in memory's order."""
    logits, labels = problem((2, 3, 2, 2))
    shapes = (2, 2, 2), (2, 1, 2, 2), (2, 4), (2, 4, 1, 1)
    losses = jax.jit(lambda z: [caffe.softmax_with_loss(z, labels.reshape(shape))[0] for shape in shapes])(logits)
    assert len({float(loss) for loss in losses}) == 1
    np.testing.assert_allclose(losses[0], layer(logits, labels)[0] / 8, rtol=1e-13)


def test_all_gradients_of_an_ignored_pixel_are_zero():
    """E3.8: p_i − 1 at the label, p_i off it, 0 for the whole class vector where ignored, the label being a class."""
    logits = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    loss, gradient = loss_and_gradient(logits, np.array([2, 0]), ignore_label=0)
    assert loss == pytest.approx(0.40760596, abs=5.1e-9)
    np.testing.assert_allclose(gradient[0], [0.09003057, 0.24472847, -0.33475904], atol=5.1e-9)
    np.testing.assert_array_equal(gradient[1], np.zeros(3))


def test_loss_weight_multiplies_loss_and_gradient():
    """Python numbers, arrays and tracers alike; the probabilities are not touched."""
    logits, labels = problem((2, 3, 2))
    weights = 1, 2, -0.5, np.float32(3)

    @jax.jit
    def weighted(z, traced):
        loss = functools.partial(caffe.softmax_with_loss, labels=labels)
        return [jax.value_and_grad(lambda z, w=w: loss(z, loss_weight=w), has_aux=True)(z) for w in (*weights, traced)]

    ((loss, probs), gradient), *others = weighted(logits, np.array(0.25))
    for weight, ((value, untouched), computed) in zip((*weights[1:], 0.25), others, strict=True):
        np.testing.assert_allclose(value, float(weight) * loss, rtol=1e-14)
        np.testing.assert_allclose(computed, float(weight) * gradient, rtol=1e-14, atol=1e-17)
        np.testing.assert_array_equal(untouched, probs)


# Infogain and multinomial logistic loss

GAINS = np.array([[1.0, 0.2, 0.0], [0.0, 2.0, 0.5], [-0.3, 0.1, 1.0]])


@pytest.mark.parametrize(("shape", "axis"), [((4, 3), 1), ((2, 3, 2, 2), 1), ((2, 2, 3, 2), 2), ((2, 3, 2, 3), -1)])
def test_infogain_loss(shape, axis):
    """−Σ H[y,l] log p_l and p_l ΣH[y,:] − H[y,l]; ignored positions and normalisers as softmax_with_loss."""
    logits, labels = problem(shape, axis % len(shape), ignore_label=255)
    found, probs = losses_and_gradients(
        logits, labels, functools.partial(caffe.infogain_loss, infogain=GAINS), axis=axis, ignore_label=255
    )
    axis %= len(shape)
    total, expected, all_probs = layer(logits, labels, axis=axis, ignore_label=255, infogain=GAINS, floor=1e-20)
    outer = int(np.prod(shape[:axis]))
    valid = int((labels != 255).sum())
    count = {"FULL": labels.size, "VALID": max(valid, 1), "BATCH_SIZE": outer, "NONE": 1}
    np.testing.assert_allclose(probs, all_probs, rtol=1e-13)
    for normalization, loss, gradient in found:
        np.testing.assert_allclose(loss, total / count[normalization], rtol=1e-12, atol=1e-15, err_msg=normalization)
        np.testing.assert_allclose(gradient, expected / count[normalization], atol=1e-15, err_msg=normalization)


def test_infogain_clamp_is_1e_20_and_its_gradient_ignores_it():
    """20 log 10 per class, also at −inf; the gradient is τo − t."""
    logits = np.array([[0.0, -100.0, -np.inf]])
    loss, gradient = jax.jit(jax.value_and_grad(lambda z: caffe.infogain_loss(z, np.array([0]), np.ones((3, 3)))[0]))(
        logits
    )
    assert loss == pytest.approx(2 * 20 * np.log(10), rel=1e-13)
    np.testing.assert_allclose(gradient, [[2, -1, -1]], rtol=1e-13)


@pytest.mark.parametrize("mode", ["forward over reverse", "reverse over reverse"])
def test_a_clamped_probability_has_second_derivatives_inside_a_scan(mode):
    """The gradient is −1/1e-20, as if there were no clamp: its derivative is 1/1e-40. JAX forgets custom rules there."""

    def loss(p):
        def step(total, p):
            return total + caffe.multinomial_logistic_loss(p[None], np.array([0])), None

        return jax.lax.scan(step, jnp.zeros((), p.dtype), p)[0]

    p, v = jnp.array([[1e-21, 0.5, 0.5]]), jnp.array([[3.0, 2.0, 1.0]])
    if mode == "forward over reverse":
        _, product = jax.jvp(jax.grad(loss), (p,), (v,))
    else:
        product = jax.grad(lambda p: jnp.vdot(jax.grad(loss)(p), v))(p)
    np.testing.assert_allclose(product, [[3e40, 0, 0]], rtol=1e-12)


def test_infogain_with_the_identity_is_softmax_with_loss():
    logits, labels = problem((2, 3, 2, 2), scale=3)
    found = jax.jit(lambda z: (caffe.infogain_loss(z, labels, np.eye(3)), caffe.softmax_with_loss(z, labels)))(logits)
    for output, expected in zip(*found, strict=True):
        np.testing.assert_allclose(output, expected, rtol=1e-12)


def test_infogain_matrix_is_a_constant_of_any_shape_with_classes_squared_entries():
    logits, labels = problem((2, 3))
    loss = jax.value_and_grad(lambda h: caffe.infogain_loss(logits, labels, h)[0])
    (loss, gradient), expected = jax.jit(lambda h: (loss(h[None, None]), loss(h)[0]))(GAINS)
    assert loss == expected
    assert not gradient.any()


def test_a_bad_label_is_nan_among_thousands():
    """The clamp keeps a NaN, which XLA's vectorised maximum took for the other argument."""
    labels = np.zeros((6001, 1), np.int32)
    labels[4321] = 7
    for fn in (caffe.softmax_with_loss, jax.jit(caffe.softmax_with_loss)):
        assert np.isnan(fn(np.zeros((6001, 3, 1), np.float32), labels)[0])


def test_infogain_bad_label_is_nan_there_and_an_error_under_checked():
    logits = RNG.normal(size=(2, 3))
    fn = jax.jit(jax.value_and_grad(lambda z: caffe.infogain_loss(z, np.array([-1, 2]), GAINS)[0]))
    loss, gradient = fn(logits)
    assert np.isnan(loss)
    assert np.isnan(gradient[0]).all()
    assert np.isfinite(gradient[1]).all()
    with pytest.raises(ValueError, match=re.escape("labels[0] is -1: expected a label in [0, 3)")):
        checked(fn)(logits)
    bad = np.where(GAINS == 0.5, np.nan, GAINS)
    with pytest.raises(ValueError, match=re.escape("infogain[1, 2] is nan: expected a finite number")):
        checked(jax.jit(lambda z: caffe.infogain_loss(z, np.array([0, 2]), bad)[0]))(logits)


multinomial = jax.jit(jax.value_and_grad(caffe.multinomial_logistic_loss))


def test_multinomial_logistic_loss():
    """−Σ log p_label / N over the first dimension, the rest flattened into the classes; −1/(N p) at the label."""
    probs = RNG.dirichlet(np.ones(6), 4).reshape(4, 3, 2)
    labels = np.array([5, 0, 3, 3])
    at = np.arange(4), labels
    expected = np.zeros((4, 6))
    expected[at] = -1 / (4 * probs.reshape(4, 6)[at])
    for shape in [(4,), (4, 1, 1, 1)]:
        loss, gradient = multinomial(probs, labels.reshape(shape) + 0.5)
        np.testing.assert_allclose(loss, -np.log(probs.reshape(4, 6)[at]).mean(), rtol=1e-13)
        np.testing.assert_allclose(gradient.reshape(4, 6), expected, rtol=1e-13)


def test_multinomial_clamp_holds_forward_and_backward():
    """log 1e-20 and 1/1e-20, at probability 0 and below the clamp."""
    for p in (0.0, 1e-30):
        loss, gradient = multinomial(np.array([[p, 1.0]]), np.array([0]))
        assert loss == pytest.approx(20 * np.log(10), rel=1e-13)
        np.testing.assert_allclose(gradient, [[-1e20, 0]], rtol=1e-13)


def test_multinomial_bad_label_is_nan_and_an_error_under_checked():
    probs = np.full((2, 2), 0.5)
    loss, gradient = multinomial(probs, np.array([0, -1]))
    assert np.isnan(loss)
    assert np.isnan(gradient[1]).any()
    np.testing.assert_array_equal(gradient[0], [-1, 0])
    with pytest.raises(ValueError, match=re.escape("labels[1] is -1: expected a label in [0, 2)")):
        checked(multinomial)(probs, np.array([0, -1]))
    assert caffe.multinomial_logistic_loss(np.ones((0, 2)), np.ones(0)) == 0


# The interface


CALLS = {  # each of an array of shape (2, 3, 2)
    "infogain_loss": lambda z: caffe.infogain_loss(z, jnp.zeros((2, 2)), GAINS)[0],
    "multinomial_logistic_loss": lambda z: caffe.multinomial_logistic_loss(caffe.softmax(z), jnp.zeros(2, int)),
    "softmax": lambda z: jnp.sum(caffe.softmax(z) ** 2),
    "softmax_with_loss": lambda z: caffe.softmax_with_loss(z, jnp.zeros((2, 2), int))[0],
}


def every_call(z):
    return {name: jax.value_and_grad(call)(z) for name, call in CALLS.items()}


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_works_under_jit_and_vmap_and_reduces_half_precision_in_float32(dtype):
    batch = RNG.normal(size=(4, 2, 3, 2)).astype(jnp.dtype(dtype))
    one = jax.jit(every_call)
    one_by_one, together = [one(z) for z in batch], jax.jit(jax.vmap(every_call))(batch)
    tolerance = {"float64": 1e-13, "bfloat16": 1e-2}[dtype]
    assert CALLS.keys() == FUNCTIONS.keys()
    for name, (values, gradients) in together.items():
        for n, single in enumerate(one_by_one):
            for many, few in zip((values[n], gradients[n]), single[name], strict=True):
                assert many.dtype == few.dtype
                np.testing.assert_allclose(
                    np.asarray(many, float), np.asarray(few, float), rtol=tolerance, atol=tolerance, err_msg=name
                )
        assert gradients.dtype == dtype
        if name.endswith("_loss"):
            assert values.dtype == ("float64" if dtype == "float64" else "float32")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives(name):
    """In reverse mode, and forward over reverse, where no clamp is active."""
    check_derivatives(CALLS[name], RNG.normal(size=(2, 3, 2)), 1e-6)


@pytest.mark.x32
def test_works_in_default_mode():
    for name, (value, gradient) in jax.jit(every_call)(np.linspace(-1, 1, 12).reshape(2, 3, 2)).items():
        assert value.dtype == gradient.dtype == jnp.float32, name


def test_softmax_equals_jaxsoft_softmax_with_another_default_axis():
    x = RNG.normal(size=(2, 3, 4))
    ours, expected = jax.jit(
        lambda x: ([caffe.softmax(x), caffe.softmax(x, -1)], [jaxsoft.softmax(x, 1), jaxsoft.softmax(x)])
    )(x)
    for output, same in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(output, same)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_states_everything_and_options_are_keyword_only(name):
    doc = inspect.getdoc(FUNCTIONS[name]) or ""
    for part in ("Args:", "Returns:", "Edges", "Raises:", "Example:", ">>> ", "Source:"):
        assert part in doc, f"{name} has no {part!r}"
    for parameter in inspect.signature(FUNCTIONS[name]).parameters.values():
        by_position = parameter.name in {"x", "logits", "probs", "labels", "infogain"} or name == "softmax"
        assert by_position == (parameter.kind is parameter.POSITIONAL_OR_KEYWORD)


Z, Y = np.zeros((2, 3, 2, 2)), np.zeros((2, 2, 2), int)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: caffe.softmax(1.0), ValueError, "axis: expected an array with at least one axis, the classes, got a scalar"),
        (lambda: caffe.softmax(Z, (1, 2)), TypeError, "axis: expected an integer, got (1, 2)"),
        (lambda: caffe.softmax_with_loss(Z, Y, axis=4), ValueError, "axis: expected an integer in [-4, 4), got 4"),
        (lambda: caffe.softmax_with_loss(Z, Y[:, :1]), ValueError, "labels: expected 8 labels, one per position of shape (2, 3, 2, 2) without axis 1, got 4 of shape (2, 1, 2)"),
        (lambda: caffe.softmax_with_loss(Z, Y.reshape(4, 2)), ValueError, "labels: expected 2 as first dimension like the scores, got shape (4, 2)"),
        (lambda: caffe.softmax_with_loss(Z, Y.reshape(8)), ValueError, "labels: expected 2 as first dimension like the scores, got shape (8,)"),
        (lambda: caffe.softmax_with_loss(Z, Y > 0), TypeError, "labels: expected real numbers, got dtype bool"),
        (lambda: caffe.softmax_with_loss(Z > 0, Y), TypeError, "logits: expected real numbers, got dtype bool"),
        (lambda: caffe.softmax_with_loss(Z[:, :0], Y), ValueError, "logits: expected at least one class along axis 1, got shape (2, 0, 2, 2)"),
        (lambda: caffe.softmax_with_loss(Z, Y, ignore_label=0.5), TypeError, "ignore_label: expected an integer, got 0.5"),
        (lambda: caffe.softmax_with_loss(Z, Y, normalization="valid"), ValueError, "normalization: expected one of FULL, VALID, BATCH_SIZE, NONE or None, got 'valid'"),
        (lambda: caffe.softmax_with_loss(Z, Y, normalize=1), TypeError, "normalize: expected True, False or None, got 1"),
        (lambda: caffe.softmax_with_loss(Z, Y, loss_weight=np.ones(2)), ValueError, "loss_weight: expected a scalar, got shape (2,)"),
        (lambda: caffe.infogain_loss(Z, Y, np.eye(2)), ValueError, "infogain: expected shape (3, 3), got (2, 2)"),
        (lambda: caffe.infogain_loss(Z, Y[:, :1], np.eye(3)), ValueError, "labels: expected 8 labels, one per position of shape (2, 3, 2, 2) without axis 1, got 4 of shape (2, 1, 2)"),
        (lambda: caffe.multinomial_logistic_loss(1.0, 0), ValueError, "probs: expected at least one axis, the samples, got a scalar"),
        (lambda: caffe.multinomial_logistic_loss(Z, Y), ValueError, "labels: expected 2 labels, one per position of shape (2, 12) without axis 1, got 8 of shape (2, 2, 2)"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        jax.eval_shape(call)
