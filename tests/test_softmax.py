"""softmax, log_softmax, logsumexp and their rules."""

import re

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import reference
from jaxsoft import log_softmax, logsumexp, softmax, softmax_jacobian, softmax_vjp

TOLERANCE = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-10}
SHAPES_AND_AXES = [
    ((5,), 0),
    ((4, 7), -1),
    ((4, 7), 0),
    ((2, 3, 4, 5), 1),
    ((2, 3, 4, 5), -3),
    ((2, 3, 4, 5), (1, 3)),
    ((2, 3, 4, 5), None),
    ((3, 1), 1),
]
PAIRS = [(softmax, jax.nn.softmax), (log_softmax, jax.nn.log_softmax), (logsumexp, jax.nn.logsumexp)]
vectors = hnp.arrays(np.float64, 6, elements=st.floats(-30, 30))


def normal(seed, shape, scale=3.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale)


def value_and_vjp(fn, logits, cotangent):
    value, pullback = jax.vjp(fn, logits)
    return value, pullback(cotangent)[0]


@pytest.mark.parametrize(("pair", "where", "masked"), reference.covering(2, PAIRS, SHAPES_AND_AXES, [False, True]))
def test_equals_jax_nn(pair, where, masked):
    (ours, theirs), (shape, axis) = pair, where
    logits = normal(0, shape)
    mask = None
    if masked:
        mask = np.random.default_rng(1).random(shape) < 0.7
        mask.reshape(-1)[:: mask.shape[-1]] = True  # jax.nn gives NaN where no class is left
        mask = jnp.asarray(mask | (mask.sum(axis, keepdims=True) == 0))
    cotangent = normal(2, jax.eval_shape(lambda z: theirs(z, axis), logits).shape)

    @jax.jit
    def both(logits, cotangent, mask):
        return (
            value_and_vjp(lambda z: ours(z, axis, mask), logits, cotangent),
            value_and_vjp(lambda z: theirs(z, axis, where=mask), logits, cotangent),
        )

    for got, want in zip(*both(logits, cotangent, mask), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
        assert (got.shape, got.dtype) == (want.shape, want.dtype)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_rule_is_the_vjp_of_the_definition(name):
    ours = {"softmax": softmax, "log_softmax": log_softmax, "logsumexp": logsumexp}[name]
    logits = normal(3, (4, 7))
    value, pullback = jax.vjp(ours, logits)
    expected, expected_pullback = jax.vjp(getattr(reference, name), logits)
    np.testing.assert_allclose(value, expected, rtol=1e-13, atol=1e-15)
    cotangent = normal(4, value.shape)
    np.testing.assert_allclose(pullback(cotangent)[0], expected_pullback(cotangent)[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("ours", [softmax, log_softmax, logsumexp])
def test_mapping_one_vector_over_batch_and_space_equals_axis(ours):
    logits = normal(5, (2, 3, 4, 5))  # batch, classes, height, width
    out = 0 if ours is logsumexp else 1
    one_row = jax.vmap(ours, in_axes=1, out_axes=out)
    one_image = jax.vmap(one_row, in_axes=1, out_axes=out)
    value, pullback = jax.vjp(jax.vmap(one_image), logits)
    expected, expected_pullback = jax.vjp(lambda z: ours(z, 1), logits)
    np.testing.assert_allclose(value, expected, rtol=1e-14)
    cotangent = normal(6, expected.shape)
    np.testing.assert_allclose(pullback(cotangent)[0], expected_pullback(cotangent)[0], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_dtypes(ours, theirs, dtype):
    logits = normal(7, (6, 40)).astype(dtype)
    cotangent = normal(8, (6,) if ours is logsumexp else (6, 40)).astype(dtype)
    value, gradient = jax.jit(lambda *a: value_and_vjp(ours, *a))(logits, cotangent)
    assert value.dtype == gradient.dtype == logits.dtype
    wide = np.asarray(logits, float), np.asarray(cotangent, float)
    exact, slope = jax.jit(lambda *a: value_and_vjp(lambda z: theirs(z, axis=-1), *a))(*wide)
    np.testing.assert_allclose(np.asarray(value, float), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    atol = TOLERANCE[dtype] * 4 * np.abs(slope).max()
    np.testing.assert_allclose(np.asarray(gradient, float), slope, rtol=0, atol=atol)


def test_half_precision_is_summed_in_float32():
    # 1000 equal terms: a bfloat16 sum stops growing at 256.
    np.testing.assert_array_equal(softmax(jnp.zeros(1000, jnp.bfloat16)), jnp.bfloat16(0.001))
    assert logsumexp(jnp.zeros(1024, jnp.bfloat16)) == jnp.bfloat16(np.log(1024))


def test_softmax_saves_its_output_alone():
    logits = normal(8, (16, 32)).astype(jnp.float32)
    value, pullback = jax.vjp(softmax, logits)
    saved = [leaf for leaf in jax.tree.leaves(pullback) if isinstance(leaf, jax.Array)]
    assert sum(leaf.nbytes for leaf in saved) == value.nbytes
    np.testing.assert_array_equal(saved[0], value)


@pytest.mark.parametrize("ours", [softmax, log_softmax, logsumexp])
def test_large_logits_are_shifted(ours):
    logits = jnp.array([1000.0, 1001.0, 1002.0])
    expected = ours(jnp.array([0.0, 1.0, 2.0])) + (1000 if ours is logsumexp else 0)
    np.testing.assert_allclose(ours(logits), expected, rtol=1e-13)


@pytest.mark.parametrize("ours", [softmax, log_softmax, logsumexp])
def test_the_shift_is_each_vectors_own_maximum(ours):
    # A shift by the largest logit of the whole array makes 0/0 of the second row.
    logits = jnp.array([[1000.0, 1001.0], [0.0, 1.0]])
    np.testing.assert_allclose(ours(logits)[1], ours(logits[1]), rtol=1e-14)
    assert np.isfinite(ours(logits)).all()


def test_removed_classes_poison_nothing():
    mask = jnp.array([True, False, True])
    for poison in (np.nan, np.inf, -np.inf, 1e300):
        logits = jnp.array([1.0, poison, 2.0])
        value, pullback = jax.vjp(lambda z: softmax(z, where=mask), logits)
        np.testing.assert_allclose(value, [1 / (1 + np.e), 0, np.e / (1 + np.e)], rtol=1e-14)
        s = value[0] * value[2]
        np.testing.assert_allclose(pullback(jnp.array([1.0, 5.0, 0.0]))[0], [s, 0, -s], rtol=1e-13)
        np.testing.assert_array_equal(log_softmax(logits, where=mask)[1], -np.inf)
        np.testing.assert_allclose(logsumexp(logits, where=mask), np.log(np.e + np.e**2), rtol=1e-14)


@pytest.mark.parametrize("ours", [softmax, log_softmax, logsumexp])
def test_a_mask_is_that_of_the_classes_left(ours):
    """Its input half keeps removed logits out of the value, its output half removed cotangents out of the gradient."""
    logits, cotangent = normal(19, (4, 5)), normal(20, (4,) if ours is logsumexp else (4, 5))
    kept, mask = np.array([0, 2, 3]), jnp.array([True, False, True, True, False])
    rest = {softmax: 0, log_softmax: -np.inf, logsumexp: None}[ours]
    of_kept = cotangent if rest is None else cotangent[:, kept]
    expected, wanted = value_and_vjp(ours, logits[:, kept], of_kept)
    for poison in (0.0, 700.0, np.nan, np.inf, -np.inf):
        given = jnp.where(mask, logits, poison)
        to_value = cotangent if rest is None else jnp.where(mask, cotangent, poison)
        value, gradient = value_and_vjp(lambda z: ours(z, where=mask), given, to_value)
        if rest is not None:
            np.testing.assert_array_equal(value[:, ~mask], rest)
            value = value[:, kept]
        np.testing.assert_allclose(value, expected, rtol=1e-13)
        np.testing.assert_allclose(gradient[:, kept], wanted, rtol=1e-12, atol=1e-15)
        np.testing.assert_array_equal(gradient[:, ~mask], 0)


def test_no_class_left():
    nothing = jnp.zeros((2, 3), bool).at[1].set(True)
    logits = normal(9, (2, 3))
    value, pullback = jax.vjp(lambda z: softmax(z, where=nothing), logits)
    np.testing.assert_array_equal(value[0], 0)
    assert value[1].sum() == pytest.approx(1)
    gradient = pullback(normal(10, (2, 3)))[0]
    np.testing.assert_array_equal(gradient[0], 0)
    assert np.abs(gradient[1]).max() > 0.01
    np.testing.assert_array_equal(softmax(jnp.full(3, -jnp.inf)), 0)
    np.testing.assert_array_equal(log_softmax(logits, where=nothing)[0], -np.inf)
    lse, pullback = jax.vjp(lambda z: logsumexp(z, where=nothing), logits)
    assert lse[0] == -np.inf
    np.testing.assert_array_equal(pullback(jnp.ones(2))[0][0], 0)


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 1)])
def test_every_logit_minus_infinity(shape):
    logits = jnp.full(shape, -jnp.inf)
    np.testing.assert_array_equal(softmax(logits), 0)
    np.testing.assert_array_equal(log_softmax(logits), -np.inf)
    np.testing.assert_array_equal(logsumexp(logits), -np.inf)
    for scalar in (lambda z: jnp.sum(softmax(z) ** 2), lambda z: jnp.sum(logsumexp(z))):
        gradient = jax.jit(jax.grad(lambda z, scale, scalar=scalar: scale * scalar(z)))
        for scale in (1.0, 1e6):
            np.testing.assert_array_equal(gradient(logits, scale), 0)
        assert np.isfinite(jax.jit(jax.hessian(scalar))(logits)).all()


def test_cotangents_at_removed_classes_are_dropped():
    logits, mask = jnp.array([1.0, 2.0, 3.0]), jnp.array([True, True, False])
    for ours, theirs in ((softmax, jax.nn.softmax), (log_softmax, jax.nn.log_softmax)):
        for poison in (1.0, jnp.nan, jnp.inf):
            cotangent = jnp.array([1.0, -0.5, poison])
            expected = jax.vjp(lambda z, f=theirs: f(z[:2]), logits)[1](cotangent[:2])[0]
            actual = jax.vjp(lambda z, f=ours: f(z, where=mask), logits)[1](cotangent)[0]
            np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-15)
    entropy = jax.grad(lambda z: jnp.sum(jax.scipy.special.entr(softmax(z, where=mask))))(logits)
    assert np.isfinite(entropy).all()


def test_infinite_and_nan_logits():
    assert logsumexp(jnp.array([1.0, jnp.inf])) == np.inf
    rows = jnp.array([[1.0, jnp.inf], [1.0, jnp.nan], [1.0, 2.0]])
    for repeats in (1, 5000):  # many rows run through another kernel of XLA's, in which a maximum loses NaN
        for fn in (softmax, log_softmax):
            bad = np.isnan(fn(jnp.tile(rows, (repeats, 1))))
            assert bad.all(-1).tolist() == [True, True, False] * repeats
            assert (bad.any(-1) == bad.all(-1)).all()
    np.testing.assert_array_equal(softmax(jnp.array([-jnp.inf, 0.0])), [0, 1])


def test_derivatives_of_second_order():
    logits, mix = normal(11, 5), normal(12, 5)
    for ours, naive in ((softmax, reference.softmax), (log_softmax, reference.log_softmax)):

        def scalar(z, fn):
            return jnp.sum(mix * fn(z) ** 2)

        @jax.jit
        def hessians(z, ours=ours, naive=naive, scalar=scalar):
            reverse_over_reverse = jax.jacrev(jax.grad(scalar))
            return jax.hessian(scalar)(z, ours), reverse_over_reverse(z, ours), jax.hessian(scalar)(z, naive)

        *found, expected = hessians(logits)
        for matrix in found:
            np.testing.assert_allclose(matrix, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(
        jax.jit(jax.hessian(logsumexp))(logits), reference.jacobian(reference.softmax(logits)), rtol=1e-12, atol=1e-14
    )
    for ours in (softmax, log_softmax, logsumexp):
        check_grads(jax.jit(jax.checkpoint(ours)), (logits,), order=2, modes=["rev"])


def test_forward_mode_refuses():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(softmax, (jnp.ones(3),), (jnp.ones(3),))


def test_softmax_vjp_is_the_product_with_the_jacobian_and_so_is_forward_mode():
    logits, vector = normal(13, 6), normal(14, 6)
    probs = softmax(logits)
    matrix = jax.jacfwd(reference.softmax)(logits)
    np.testing.assert_allclose(softmax_jacobian(probs), matrix, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(softmax_vjp(probs, vector), matrix.T @ vector, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(softmax_vjp(probs, vector), matrix @ vector, rtol=1e-12, atol=1e-15)


def test_softmax_vjp_along_an_axis():
    logits, vector = normal(15, (2, 3, 4)), normal(16, (2, 3, 4))
    for axis in (0, 1, 2, (0, 2), None):
        probs, expected = jax.jit(lambda *a, axis=axis: value_and_vjp(lambda z: reference.softmax(z, axis), *a))(
            logits, vector
        )
        np.testing.assert_allclose(softmax_vjp(probs, vector, axis), expected, rtol=1e-12, atol=1e-15)


def test_softmax_vjp_keeps_the_dtype_of_half_precision():
    probs = softmax(normal(17, (3, 50))).astype(jnp.bfloat16)
    assert softmax_vjp(probs, probs).dtype == jnp.bfloat16


def test_jacobians_of_a_batch_are_a_stack():
    probs = softmax(normal(18, (100, 3)))
    stack = softmax_jacobian(probs)
    assert stack.shape == (100, 3, 3)
    np.testing.assert_allclose(stack[7], reference.jacobian(probs[7]), rtol=1e-14, atol=1e-17)


@given(vectors, st.floats(-1e3, 1e3))
@settings(deadline=None, max_examples=50)
def test_law_shift_invariance(logits, shift):
    np.testing.assert_allclose(
        softmax(jnp.asarray(logits + shift)), softmax(jnp.asarray(logits)), rtol=1e-11, atol=1e-300
    )


@given(vectors)
@settings(deadline=None, max_examples=50)
def test_law_probabilities_sum_to_one_and_gradients_to_zero(logits):
    probs, pullback = jax.vjp(softmax, jnp.asarray(logits))
    assert probs.sum() == pytest.approx(1, abs=1e-15)
    assert (probs >= 0).all()
    assert float(pullback(jnp.arange(6.0))[0].sum()) == pytest.approx(0, abs=1e-14)


@given(vectors, st.permutations(range(6)))
@settings(deadline=None, max_examples=50)
def test_law_permutation_equivariance(logits, order):
    order = np.array(order)
    np.testing.assert_allclose(softmax(jnp.asarray(logits[order])), softmax(jnp.asarray(logits))[order], rtol=1e-14)


def test_lists_and_integers_are_promoted():
    np.testing.assert_allclose(softmax([1, 2, 3]), softmax(jnp.array([1.0, 2.0, 3.0])), rtol=1e-15)
    assert logsumexp(jnp.zeros((2, 3)), keepdims=True).shape == (2, 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: softmax(jnp.ones(3, bool)), TypeError, "logits: expected real numbers, got dtype bool"),
        (lambda: softmax(jnp.ones(3, complex)), TypeError, "logits: expected real numbers, got dtype complex"),
        (lambda: softmax(jnp.ones((2, 3)), 2), ValueError, "axis: expected an integer in [-2, 2), got 2"),
        (lambda: softmax(jnp.ones((2, 3)), 1.0), TypeError, "axis: expected an integer, got 1.0"),
        (lambda: softmax(jnp.ones((2, 3)), True), TypeError, "axis: expected an integer, got True"),
        (lambda: softmax(jnp.ones((2, 3)), (1, -1)), ValueError, "axis: expected distinct axes, got (1, -1)"),
        (lambda: softmax(jnp.ones((2, 3)), -1, jnp.ones(2, bool)), ValueError, "where: expected a shape that broadcasts to (2, 3), got (2,)"),
        (lambda: softmax(jnp.ones((2, 3)), -1, jnp.ones(3)), TypeError, "where: expected booleans, got dtype float"),
        (lambda: softmax_vjp(jnp.ones(3), jnp.ones(4)), ValueError, "cotangent: expected the shape of probs (3,), got (4,)"),
        (lambda: softmax_jacobian(jnp.ones(())), ValueError, "probs: expected at least one axis"),
    ],
)  # fmt: skip
def test_errors_name_argument_expected_and_actual(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
