"""softmax, log_softmax, logsumexp and their rules."""

import functools
import re

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from jaxsoft import log_softmax, logsumexp, native_kernels, softmax, softmax_jacobian, softmax_vjp

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
OURS = {"softmax": softmax, "log_softmax": log_softmax, "logsumexp": logsumexp}
CASES = reference.covering(2, OURS, SHAPES_AND_AXES, [False, True])  # a function, where its classes are, masked
vectors = hnp.arrays(np.float64, 6, elements=st.floats(-30, 30))


def normal(seed, shape, scale=3.0):
    return np.random.default_rng(seed).normal(size=shape) * scale


def value_and_vjp(fn, logits, cotangent):
    value, pullback = jax.vjp(fn, logits)
    return value, pullback(cotangent)[0]


@functools.partial(jax.jit, static_argnums=0)
def _pulled(of, logits, cotangents, mask):
    options = {} if mask is None else {"where": mask}
    fns = [functools.partial(fn, axis=-1, **options) for fn in of]
    return [value_and_vjp(fn, logits, cotangent) for fn, cotangent in zip(fns, cotangents, strict=True)]


def pulled(logits, cotangents, mask=None, of=tuple(OURS.values())):
    """The result and the gradient of each function along the last axis, from one program."""
    return jax.tree.map(np.asarray, _pulled(of, logits, cotangents, mask))


def values(logits):
    cotangents = [np.zeros(shape) for shape in (logits.shape, logits.shape, logits.shape[:-1])]
    return [value for value, _ in pulled(logits, cotangents)]


@pytest.mark.parametrize("where", SHAPES_AND_AXES)
def test_equals_jax_nn(where):
    shape, axis = where
    logits = normal(0, shape)
    mask = np.random.default_rng(1).random(shape) < 0.7
    mask.reshape(-1)[:: mask.shape[-1]] = True  # jax.nn gives NaN if every class is masked
    mask |= mask.sum(axis, keepdims=True) == 0

    def both(name, masked, logits, mask):
        options = {"axis": axis, "where": mask if masked else None}
        theirs = functools.partial(getattr(jax.nn, name), **options)
        cotangent = normal(2, jax.eval_shape(theirs, logits).shape)
        return [value_and_vjp(fn, logits, cotangent) for fn in (functools.partial(OURS[name], **options), theirs)]

    cases = [case for case in CASES if case[1] == where]
    found = jax.jit(lambda *a: [both(name, masked, *a) for name, _, masked in cases])(logits, mask)
    for case, (ours, theirs) in zip(cases, found, strict=True):
        for got, want in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12, err_msg=str(case))
            assert (got.shape, got.dtype) == (want.shape, want.dtype)


def test_rule_is_the_vjp_of_the_definition():
    logits = normal(3, (4, 7))
    cotangents = [normal(4, shape) for shape in ((4, 7), (4, 7), (4,))]
    naive = pulled(logits, cotangents, of=(reference.softmax, reference.log_softmax, reference.logsumexp))
    for (value, gradient), (expected, slope) in zip(pulled(logits, cotangents), naive, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(gradient, slope, rtol=1e-12, atol=1e-13)


def test_mapping_one_vector_over_batch_and_space_equals_axis():
    logits = normal(5, (2, 3, 4, 5))  # batch, classes, height, width

    @jax.jit
    def both(logits):
        found = []
        for ours in OURS.values():
            out = 0 if ours is logsumexp else 1
            one_row = jax.vmap(ours, in_axes=1, out_axes=out)
            one_image = jax.vmap(one_row, in_axes=1, out_axes=out)
            cotangent = normal(6, (2, 4, 5) if ours is logsumexp else (2, 3, 4, 5))
            fns = jax.vmap(one_image), functools.partial(ours, axis=1)
            found.append([value_and_vjp(fn, logits, cotangent) for fn in fns])
        return found

    for (value, gradient), (expected, slope) in both(logits):
        np.testing.assert_allclose(value, expected, rtol=1e-14)
        np.testing.assert_allclose(gradient, slope, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(dtype):
    logits = normal(7, (6, 40)).astype(dtype)
    cotangents = [normal(8, shape).astype(dtype) for shape in ((6, 40), (6, 40), (6,))]
    wide = logits.astype(float), [g.astype(float) for g in cotangents]
    exactly = pulled(*wide, of=(jax.nn.softmax, jax.nn.log_softmax, jax.nn.logsumexp))
    for (value, gradient), (exact, slope) in zip(pulled(logits, cotangents), exactly, strict=True):
        assert value.dtype == gradient.dtype == logits.dtype
        np.testing.assert_allclose(np.asarray(value, float), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        atol = TOLERANCE[dtype] * 4 * np.abs(slope).max()
        np.testing.assert_allclose(np.asarray(gradient, float), slope, rtol=0, atol=atol)


def test_half_precision_is_summed_in_float32():
    # 1000 equal terms: a bfloat16 sum stops growing at 256.
    probs, lse = jax.jit(lambda a, b: (softmax(a), logsumexp(b)))(*(np.zeros(n, jnp.bfloat16) for n in (1000, 1024)))
    np.testing.assert_array_equal(probs, jnp.bfloat16(0.001))
    np.testing.assert_array_equal(lse, jnp.bfloat16(np.log(1024)))


@pytest.mark.x32
def test_logsumexp_near_zero_stays_accurate():
    """It is as accurate as the largest logit or the logarithm of the sum, whichever is less accurate."""
    z = np.full((8, 2, 3), -np.inf, np.float32)
    z[:, 1, 2] = [0, -1e-7, 0, 0, -1e-3, -0.5, 3, 0]
    z[:, 0, 1] = [-20, -16, 0, -60, -7, -0.9, -20, -np.inf]
    wide = np.sort(z.reshape(8, 6).astype(np.longdouble))
    expected = wide[:, -1] + np.log1p(np.exp(wide[:, :-1] - wide[:, -1:]).sum(1))
    mesh = jax.make_mesh((2,), ("classes",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, "classes")

    @jax.jit
    def run(z):
        over_shards = functools.partial(logsumexp, axis=(1, 2), axis_name="classes")
        return (
            [logsumexp(z, (1, 2)), logsumexp(z.reshape(8, 6)), logsumexp(z.reshape(8, 6).T, 0)],
            jax.vmap(lambda z: logsumexp(jnp.where(jnp.isneginf(z), 100, z), None, where=~jnp.isneginf(z)))(z),
            jax.shard_map(over_shards, mesh=mesh, in_specs=spec, out_specs=jax.sharding.PartitionSpec())(z),
        )

    for found in jax.tree.leaves(run(z)):
        error = np.abs(found - expected.astype(float))
        assert (error <= 1e-6 * np.abs(expected) + 6e-8 * np.abs(wide[:, -1])).all(), error


def test_softmax_saves_only_its_output():
    logits = normal(8, (16, 32)).astype(np.float32)
    value, pullback = jax.vjp(softmax, logits)
    saved = [leaf for leaf in jax.tree.leaves(pullback) if isinstance(leaf, jax.Array)]
    assert sum(leaf.nbytes for leaf in saved) == value.nbytes
    np.testing.assert_array_equal(saved[0], value)


def test_each_vector_is_shifted_by_its_own_maximum():
    """Large logits are shifted, but not by the maximum of the whole array, with which the second row would be 0/0."""
    rows = np.array([[1000.0, 1001.0, 1002.0], [0.0, 1.0, 2.0]])
    for found, alone, shift in zip(values(rows), values(rows[1]), (0, 0, 1000), strict=True):
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found[1], alone, rtol=1e-14)
        np.testing.assert_allclose(found[0], alone + shift, rtol=1e-13)


def test_masked_classes_may_hold_nan():
    logits = np.array([[1.0, poison, 2.0] for poison in (np.nan, np.inf, -np.inf, 1e300)])
    given = np.tile([1.0, 5.0, 0.0], (4, 1))
    of_softmax, of_log_softmax, of_logsumexp = pulled(logits, [given, given, np.ones(4)], np.array([True, False, True]))
    for probs, gradient in zip(*of_softmax, strict=True):
        np.testing.assert_allclose(probs, [1 / (1 + np.e), 0, np.e / (1 + np.e)], rtol=1e-14)
        s = probs[0] * probs[2]
        np.testing.assert_allclose(gradient, [s, 0, -s], rtol=1e-13)
    np.testing.assert_array_equal(of_log_softmax[0][:, 1], -np.inf)
    np.testing.assert_allclose(of_logsumexp[0], np.log(np.e + np.e**2), rtol=1e-14)


def test_a_mask_equals_leaving_the_classes_out():
    """Masking the input protects the value from masked logits; masking the output protects the gradient."""
    poison = np.array([0.0, 700.0, np.nan, np.inf, -np.inf])[:, None, None]
    kept, mask = np.array([0, 2, 3]), np.array([True, False, True, True, False])
    logits, of_class, of_row = normal(19, (4, 5)), normal(20, (4, 5)), normal(20, (4,))
    given, to_value = np.where(mask, logits, poison), np.where(mask, of_class, poison)
    found = pulled(given, [to_value, to_value, np.tile(of_row, (5, 1))], mask)
    expected = pulled(logits[:, kept], [of_class[:, kept], of_class[:, kept], of_row])
    for (value, gradient), (wanted, slope), rest in zip(found, expected, [0, -np.inf, None], strict=True):
        if rest is not None:
            np.testing.assert_array_equal(value[..., ~mask], rest)
            value = value[..., kept]
        for each, its_gradient in zip(value, gradient, strict=True):
            np.testing.assert_allclose(each, wanted, rtol=1e-13)
            np.testing.assert_allclose(its_gradient[:, kept], slope, rtol=1e-12, atol=1e-15)
            np.testing.assert_array_equal(its_gradient[:, ~mask], 0)


def test_every_class_masked():
    given = normal(10, (2, 3))
    found = pulled(normal(9, (2, 3)), [given, given, np.ones(2)], np.array([[False] * 3, [True] * 3]))
    (probs, gradient), (log_probs, _), (lse, slope) = found
    np.testing.assert_array_equal(probs[0], 0)
    assert probs[1].sum() == pytest.approx(1)
    np.testing.assert_array_equal(gradient[0], 0)
    assert np.abs(gradient[1]).max() > 0.01
    np.testing.assert_array_equal(log_probs[0], -np.inf)
    assert lse[0] == -np.inf
    np.testing.assert_array_equal(slope[0], 0)


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 1)])
def test_every_logit_minus_infinity(shape):
    @jax.jit
    def results(z, scale):
        scalars = (lambda z: jnp.sum(softmax(z) ** 2)), (lambda z: jnp.sum(logsumexp(z)))
        gradients = [jax.grad(lambda z, scalar=scalar: scale * scalar(z))(z) for scalar in scalars]
        return (softmax(z), log_softmax(z), logsumexp(z)), gradients, [jax.hessian(scalar)(z) for scalar in scalars]

    for scale in (1.0, 1e6):
        found, gradients, hessians = results(np.full(shape, -np.inf), scale)
        for value, expected in zip(found, (0, -np.inf, -np.inf), strict=True):
            np.testing.assert_array_equal(value, expected)
        for gradient, hessian in zip(gradients, hessians, strict=True):
            np.testing.assert_array_equal(gradient, 0)
            assert np.isfinite(hessian).all()


def test_cotangents_at_masked_classes_are_ignored():
    logits, mask = np.tile([1.0, 2.0, 3.0], (4, 1)), np.array([True, True, False])
    given = np.array([[1.0, -0.5, poison] for poison in (1.0, np.nan, np.inf, -np.inf)])
    found = pulled(logits, [given, given, np.ones(4)], mask)[:2]
    expected = pulled(logits[:, :2], [given[:, :2]] * 2, of=(jax.nn.softmax, jax.nn.log_softmax))
    for (_, gradient), (_, slope) in zip(found, expected, strict=True):
        np.testing.assert_allclose(gradient, np.pad(slope, [(0, 0), (0, 1)]), rtol=1e-12, atol=1e-15)
    entropy = jax.jit(jax.grad(lambda z: jnp.sum(jax.scipy.special.entr(softmax(z, where=mask)))))(logits)
    assert np.isfinite(entropy).all()


def test_infinite_and_nan_logits():
    rows = np.array([[1.0, np.inf], [1.0, np.nan], [1.0, 2.0], [-np.inf, 0.0]])
    for repeats in (1, 5000):  # many rows run through another kernel of XLA's, in which a maximum loses NaN
        probs, log_probs, lse = values(np.tile(rows, (repeats, 1)))
        for bad in (np.isnan(probs), np.isnan(log_probs)):
            assert bad.all(-1).tolist() == [True, True, False, False] * repeats
            assert (bad.any(-1) == bad.all(-1)).all()
        np.testing.assert_array_equal(lse[::4], np.inf)
        np.testing.assert_array_equal(probs[3::4], [[0, 1]] * repeats)


def test_derivatives_of_second_order():
    """Forward over reverse, reverse over reverse, and both under `jax.checkpoint`."""
    logits, mix = normal(11, 5), normal(12, 5)

    def hessians(ours, scalar):
        of = scalar(ours)
        again = scalar(jax.checkpoint(ours))
        return jax.hessian(of)(logits), jax.jacrev(jax.grad(of))(logits), jax.jacrev(jax.grad(again))(logits)

    def squared(fn):
        return lambda z: jnp.sum(mix * fn(z) ** 2)

    @jax.jit
    def results():
        naive = [jax.hessian(squared(fn))(logits) for fn in (reference.softmax, reference.log_softmax)]
        of_squares = [hessians(ours, squared) for ours in (softmax, log_softmax)]
        return of_squares, naive, hessians(logsumexp, lambda fn: fn)

    of_squares, naive, of_logsumexp = results()
    for found, expected in zip(of_squares, naive, strict=True):
        for matrix in found:
            np.testing.assert_allclose(matrix, expected, rtol=1e-10, atol=1e-12)
    probs = np.exp(logits) / np.exp(logits).sum()
    for matrix in of_logsumexp:
        np.testing.assert_allclose(matrix, reference.jacobian(probs), rtol=1e-12, atol=1e-14)


def test_softmax_vjp_and_forward_mode_are_the_product_with_the_jacobian():
    logits, vector = normal(13, 6), normal(14, 6)

    @jax.jit
    def results(logits):
        probs, forward = jax.jvp(softmax, (logits,), (vector,))
        return softmax_jacobian(probs), softmax_vjp(probs, vector), forward, jax.jacfwd(reference.softmax)(logits)

    jacobian, product, forward, matrix = map(np.asarray, results(logits))
    np.testing.assert_allclose(forward, product, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(jacobian, matrix, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(product, matrix.T @ vector, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(product, matrix @ vector, rtol=1e-12, atol=1e-15)


def exact_pullbacks(z, g):
    """The VJPs of softmax and log_softmax along axis 1, and their sizes without cancellation; other classes are summed."""
    z, g = z.astype(np.longdouble), g.astype(np.longdouble)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    others = 1 - np.eye(z.shape[1])

    def of_others(terms):
        return np.einsum("ij,bjn->bin", others, terms)

    def pulled(g, sign):
        rest = g * of_others(p)
        return p * (rest + sign * of_others(p * g)), rest + sign * p * of_others(g)

    return tuple(zip(pulled(g, -1), pulled(np.abs(g), 1), strict=True))


@pytest.mark.skipif(not native_kernels().loaded, reason="of the CPU's kernels, see docs/exactness.md")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(60, 2, 1), (60, 5, 1), (9, 5, 40), (60, 70, 1), (20, 1000, 1)])
def test_pullbacks_stay_accurate_at_a_class_of_probability_one(shape, dtype):
    """With kernels, for every margin: 1 − s is never a difference. Half-precision probabilities do not sum to 1 accurately."""
    rng = np.random.default_rng(23)
    z, g = rng.normal(size=(2, *shape))
    z[:, :1] = z[:, 1:].max(1, keepdims=True) + np.linspace(-60, 80, z[:, :1].size).reshape(z[:, :1].shape)
    z[1, 1] = z[1].max()  # two classes lead
    z[3:5, -1], g[3:5, -1] = -np.inf, 0  # the cotangent of a masked logarithm is dropped
    g[::2, 1:] = 0  # as from the loss of a label that has the largest logit: its entry is its 1 − p
    z, g = z.astype(dtype), g.astype(dtype)
    # What is so small is 0: probabilities in the logits' dtype, exponentials in float32.
    lost = 4 * shape[1] * max(float(jnp.finfo(dtype).smallest_subnormal), float(jnp.finfo(jnp.float32).tiny))

    @jax.jit
    def results(z, g):
        fns = softmax, log_softmax
        alone = [jax.vmap(jax.vmap(lambda z, g, fn=fn: value_and_vjp(fn, z, g)[1], 1, 1))(z, g) for fn in fns]
        kept = [value_and_vjp(functools.partial(fn, axis=1, where=z > -jnp.inf), z, g)[1] for fn in fns]
        return [value_and_vjp(functools.partial(fn, axis=1), z, g)[1] for fn in fns], alone, kept

    of_log_alone = slice(jnp.finfo(dtype).bits < 32, None)
    for found in results(z, g):
        exact_and_sizes = exact_pullbacks(z.astype(float), g.astype(float))[of_log_alone]
        for gradient, (exact, size) in zip(found[of_log_alone], exact_and_sizes, strict=True):
            error = np.abs(np.asarray(gradient, float) - exact.astype(float))
            allowed = 10 * TOLERANCE[dtype] * size.astype(float) + lost
            np.testing.assert_array_less(error, allowed)


def test_softmax_vjp_along_an_axis():
    logits, vector = normal(15, (2, 3, 4)), normal(16, (2, 3, 4))

    def both(logits, axis):
        probs, expected = value_and_vjp(lambda z: reference.softmax(z, axis), logits, vector)
        return softmax_vjp(probs, vector, axis), expected

    for found, expected in jax.jit(lambda z: [both(z, axis) for axis in (0, 1, 2, (0, 2), None)])(logits):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_softmax_vjp_of_probabilities_in_half_precision_is_the_rule_of_these(dtype):
    """They sum to 1 within the rounding of float32, but the largest of them was rounded by much more."""
    probs, vector = jnp.array([1, 8.345e-7], dtype), jnp.array([18.8, 32.66], dtype)
    s, g = np.asarray(probs, np.float64), np.asarray(vector, np.float64)
    np.testing.assert_allclose(
        np.asarray(softmax_vjp(probs, vector), np.float64), s * (g - s @ g), rtol=float(jnp.finfo(dtype).eps), atol=4e-6
    )


def test_softmax_vjp_keeps_the_dtype_of_half_precision():
    probs = np.random.default_rng(17).dirichlet(np.ones(50), 3).astype(jnp.bfloat16)
    assert softmax_vjp(probs, probs).dtype == jnp.bfloat16


def test_jacobians_of_a_batch_are_a_stack():
    probs = np.random.default_rng(18).dirichlet(np.ones(3), 100)
    stack = jax.jit(softmax_jacobian)(probs)
    assert stack.shape == (100, 3, 3)
    np.testing.assert_allclose(np.asarray(stack)[7], reference.jacobian(probs[7]), rtol=1e-14, atol=1e-17)


@given(vectors, st.floats(-1e3, 1e3))
@settings(deadline=None, max_examples=50)
def test_law_shift_invariance(logits, shift):
    np.testing.assert_allclose(values(logits + shift)[0], values(logits)[0], rtol=1e-11, atol=1e-300)


@given(vectors)
@settings(deadline=None, max_examples=50)
def test_law_probabilities_sum_to_one_and_gradients_to_zero(logits):
    probs, gradient = pulled(logits, [np.arange(6.0), np.zeros(6), np.zeros(())])[0]
    assert probs.sum() == pytest.approx(1, abs=1e-15)
    assert (probs >= 0).all()
    assert gradient.sum() == pytest.approx(0, abs=1e-14)


@given(vectors, st.permutations(range(6)))
@settings(deadline=None, max_examples=50)
def test_law_permutation_equivariance(logits, order):
    order = np.array(order)
    np.testing.assert_allclose(values(logits[order])[0], values(logits)[0][order], rtol=1e-14)


def test_lists_and_integers_are_promoted():
    np.testing.assert_allclose(softmax([1, 2, 3]), softmax(np.array([1.0, 2.0, 3.0])), rtol=1e-15)
    assert logsumexp(np.zeros((2, 3)), keepdims=True).shape == (2, 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: softmax(np.ones(3, bool)), TypeError, "logits: expected real numbers, got dtype bool"),
        (lambda: softmax(np.ones(3, complex)), TypeError, "logits: expected real numbers, got dtype complex"),
        (lambda: softmax(np.ones((2, 3)), 2), ValueError, "axis: expected an integer in [-2, 2), got 2"),
        (lambda: softmax(np.ones((2, 3)), 1.0), TypeError, "axis: expected an integer, got 1.0"),
        (lambda: softmax(np.ones((2, 3)), True), TypeError, "axis: expected an integer, got True"),
        (lambda: softmax(np.ones((2, 3)), (1, -1)), ValueError, "axis: expected distinct axes, got (1, -1)"),
        (lambda: softmax(np.ones((2, 3)), -1, np.ones(2, bool)), ValueError, "where: expected a shape that broadcasts to (2, 3), got (2,)"),
        (lambda: softmax(np.ones((2, 3)), -1, np.ones(3)), TypeError, "where: expected booleans, got dtype float"),
        (lambda: softmax_vjp(np.ones(3), np.ones(4)), ValueError, "cotangent: expected the shape of probs (3,), got (4,)"),
        (lambda: softmax_vjp(np.ones((3, 1)), np.ones(3)), ValueError, "cotangent: expected the shape of probs (3, 1), got (3,)"),
        (lambda: softmax_jacobian(np.ones(())), ValueError, "probs: expected at least one axis"),
    ],
)  # fmt: skip
def test_errors_name_argument_expected_and_actual(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
