"""Laws of every loss and normaliser, about its VJP, ignored positions and masked classes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxsoft
import reference
from jaxsoft import caffe, cross_entropy, linear_cross_entropy, log_softmax, logsumexp, softmax

rng = np.random.default_rng(0)
Z = rng.normal(size=(6, 5)) * 2
LABELS = rng.integers(0, 5, 6)
DISTRIBUTION = rng.dirichlet(np.ones(5), 6)
X, W, B = (rng.normal(size=shape) for shape in ((6, 3), (3, 5), (5,)))
EACH = {"reduction": "none", "memory_budget": 4 * 2 * 8 * 5}  # tiles of four positions and of two

# name: (function, the variables at which its pullback is taken)
FUNCTIONS = {
    "softmax": (softmax, (Z,)),
    "log_softmax": (log_softmax, (Z,)),
    "logsumexp": (logsumexp, (Z,)),
    "softmax_vjp": (jaxsoft.softmax_vjp, (Z, Z**2)),
    "softmax_jacobian": (jaxsoft.softmax_jacobian, (Z,)),
    "labels": (lambda z: cross_entropy(z, LABELS, reduction="none"), (Z,)),
    "ignored": (lambda z: cross_entropy(z, LABELS, ignore_index=1, reduction="none"), (Z,)),
    "smoothing": (lambda z: cross_entropy(z, LABELS, label_smoothing=0.2, z_loss=0.1, reduction="none"), (Z,)),
    "distributions": (lambda z, t: cross_entropy(z, t, z_loss=0.1, reduction="none"), (Z, DISTRIBUTION)),
    "mean": (lambda z: cross_entropy(z, LABELS, class_weights=np.arange(5.0)), (Z,)),
    "linear": (lambda x, w, b: linear_cross_entropy(x, w, LABELS, b, **EACH), (X, W, B)),
    "linear ignored": (
        lambda x, w, b: linear_cross_entropy(x, w, LABELS, b, ignore_index=1, label_smoothing=0.1, z_loss=0.1, **EACH),
        (X, W, B),
    ),
    "linear distributions": (lambda x, w, t: linear_cross_entropy(x, w, t, soft_cap=4.0, **EACH), (X, W, DISTRIBUTION)),
    "linear mean": (lambda x, w, b: linear_cross_entropy(x, w, LABELS, b), (X, W, B)),
    "caffe": (lambda z: caffe.softmax_with_loss(z, LABELS, ignore_label=1), (Z,)),
    "infogain": (lambda z: caffe.infogain_loss(z, LABELS, np.eye(5) + 0.1), (Z,)),
}


def at(array, index, value):
    """A copy with some entries replaced."""
    array = array.copy()
    array[index] = value
    return array


def cotangents(fn, variables, seed):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda v: generator.normal(size=v.shape), jax.eval_shape(fn, *variables))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_pullback_is_linear_in_its_cotangent_at_zero_too(name):
    fn, variables = FUNCTIONS[name]
    direction, other = cotangents(fn, variables, 1), cotangents(fn, variables, 2)

    @jax.jit
    def both(variables, point, direction):
        pullback = jax.vjp(fn, *variables)[1]
        return jax.jvp(pullback, (point,), (direction,))[1], pullback(direction)

    for point in (jax.tree.map(np.zeros_like, direction), other):
        derivative, expected = both(variables, point, direction)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), derivative, expected)


def test_weights_of_0_have_a_gradient():
    """The gradient of Σ ε_i·loss_i has a derivative with respect to each ε at 0: learning to reweight starts there."""
    z, y = np.array([[2.0, -1.0, 0.5], [0.0, 1.0, 3.0]]), np.array([1, 0])
    direction = np.random.default_rng(1).normal(size=z.shape)

    def moved(epsilon):
        return jnp.sum(jax.grad(lambda z: jnp.sum(epsilon * cross_entropy(z, y, reduction="none")))(z) * direction)

    probs = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    expected = np.sum((probs - np.eye(3)[y]) * direction, 1)
    np.testing.assert_allclose(jax.jit(jax.grad(moved))(np.zeros(2)), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["label", "distribution", "linear", "linear distribution"])
def test_an_ignored_position_has_no_gradient_whatever_the_cotangent(kind):
    """Its own cotangent may be infinite, as for √loss at 0, and its logits may be anything."""
    weights, of_distribution = np.array([1.0, 0, 1, 1, 1, 1]), "distribution" in kind
    clean, *others = (X, W) if kind.startswith("linear") else (Z,)

    def loss(x, *others, reduction):
        *kernel, t = others if of_distribution else (*others, LABELS)
        if kernel:
            return linear_cross_entropy(x, *kernel, t, weights=weights, reduction=reduction)
        return cross_entropy(x, t, weights=weights, reduction=reduction)

    @jax.jit
    def pulled(variables, cotangents):
        pairs = [jax.vjp(functools.partial(loss, reduction=reduction), *variables) for reduction in cotangents]
        return [(value, pullback(g)) for (value, pullback), g in zip(pairs, cotangents.values(), strict=True)]

    others += [DISTRIBUTION] * of_distribution
    expected = pulled((clean, *others), {"none": np.ones(6), "sum": np.ones(())})
    for bad in (np.inf, np.nan):
        found = pulled((at(clean, 1, bad), *others), {"none": at(np.ones(6), 1, bad), "sum": np.ones(())})
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), found, expected)
        for (value, gradients), (wanted, _) in zip(found, expected, strict=True):
            np.testing.assert_allclose(value, wanted, rtol=1e-12)
            assert not np.any(np.asarray(gradients[0])[1])


def test_a_label_among_masked_classes_has_an_infinite_loss_on_every_platform():
    """Without compiling only the plain formula runs, whose log1p, unlike the CPU's program, must not meet −1."""
    nothing_left = np.array([[0.0] * 3, [-np.inf] * 3])
    with jax.disable_jit():
        losses = jaxsoft.cross_entropy(nothing_left, np.array([0, 1]), reduction="none")
    np.testing.assert_allclose(losses, [np.log(3), np.inf], rtol=1e-6)


def test_a_position_whose_classes_are_all_masked_has_no_gradient():
    gradient = jax.jit(lambda z, g: jax.vjp(logsumexp, z)[1](g)[0])(np.full((2, 3), -np.inf), np.array([np.inf, 1.0]))
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


@pytest.mark.parametrize("linear", [False, True])
def test_a_zero_cotangent_pulls_back_to_zero(linear):
    """Also to the targets of a class at −inf, whose gradient is infinite."""
    bias = at(B, 2, -np.inf)

    def loss(t, reduction):
        if linear:
            return linear_cross_entropy(X, W, t, bias, reduction=reduction)
        return cross_entropy(X @ W + bias, t, reduction=reduction)

    @jax.jit
    def pulled(t, g):
        pairs = [jax.vjp(functools.partial(loss, reduction=reduction), t) for reduction in ("none", "sum", "mean")]
        return [pullback(jnp.broadcast_to(g, value.shape))[0] for value, pullback in pairs]

    targets = at(DISTRIBUTION, np.s_[:, 2], 0)
    np.testing.assert_array_equal(pulled(targets, 0.0), np.zeros((3, 6, 5)))
    of_class = np.array(pulled(targets, 1.0))[..., 2]
    assert np.all(of_class == 0 if linear else np.isposinf(of_class))  # the bias of a layer masks the class


def test_smoothing_of_1_leaves_the_targets_no_gradient():
    loss = functools.partial(cross_entropy, at(Z, (0, 2), -np.inf), label_smoothing=1.0, reduction="sum")
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(DISTRIBUTION), np.zeros((6, 5)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_log_softmax_pulls_back_to_gradients_that_sum_to_zero(dtype):
    """In half precision too, where the exponentials of the rounded result do not sum to one."""
    first = [np.eye(1, classes, dtype=dtype)[0] for classes in (50_257, 2**17)]
    for gradient in jax.jit(lambda first: [jax.vjp(log_softmax, 0 * g)[1](g)[0] for g in first])(first):
        assert gradient.dtype == dtype
        # −1/classes to the rounding of the dtype, and for float16 of its subnormal numbers.
        classes = gradient.size
        spacing = max(float(jnp.finfo(dtype).eps) / classes, float(jnp.finfo(dtype).smallest_subnormal))
        rest = np.asarray(gradient).astype(float)[1:]
        np.testing.assert_allclose(rest, -1 / classes, atol=0.51 * spacing + 1e-6 / classes)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_ignored_position_stays_out_of_the_transposed_pullback(reduction):
    """Also for a distribution, whose padding may be NaN."""
    rng = np.random.default_rng(5)
    z, v = rng.normal(size=(2, 4, 5))
    t, u = rng.dirichlet(np.ones(5), 4), rng.normal(size=(4, 5))
    weights = np.array([1.0, 0.0, 2.0, 0.0])

    def transposed(z, t):
        loss = lambda z, t: cross_entropy(z, t, weights=weights, reduction=reduction)  # noqa: E731
        return jax.vjp(jax.vjp(loss, z, t)[1], jnp.ones(()))[1]((v, u))[0]

    padded = np.where(weights[:, None] == 0, np.nan, z), t
    found, plain = jax.jit(lambda: (transposed(*padded), transposed(z, t)))()
    np.testing.assert_allclose(found, plain, rtol=1e-12)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    right = weights @ ((p * t.sum(1, keepdims=True) - t) * v - np.log(p) * u).sum(1)
    np.testing.assert_allclose(found, right / (weights.sum() if reduction == "mean" else 1), rtol=1e-12)


def test_a_saturated_soft_cap_has_a_gradient():
    """1 − tanh² is computed without the subtraction, which is 0 in float32 from 9 on."""
    x, kernel, caps = np.array([[8.0, 1.0]], np.float32), np.eye(2, dtype=np.float32), (1.0, 0.5)

    def gradient(x, cap):
        return jax.grad(lambda x: linear_cross_entropy(x, kernel, np.array([0]), soft_cap=cap))(x)

    for cap, found in zip(caps, jax.jit(lambda x: [gradient(x, c) for c in caps])(x), strict=True):
        z = x[0].astype(float)
        capped = cap * np.tanh(z / cap)
        p = 1 / (1 + np.exp(capped[1] - capped[0]))
        np.testing.assert_allclose(np.asarray(found)[0, 0], -(1 - p) / np.cosh(z[0] / cap) ** 2, rtol=2e-6)


@pytest.mark.x32
@pytest.mark.parametrize("budget", [None, 40])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_tangent_of_a_loss_under_a_saturated_soft_cap_is_its_gradient(reduction, budget):
    """Also after its gradient, where JAX forgets rules inside scans and 1 − tanh² would lose all accuracy."""
    x, v = (np.tile(np.array(row, np.float32), (4, 1)) for row in ([6.0, 8.0], [0.3, -1.0]))
    kernel, labels, options = np.eye(2, dtype=np.float32), np.zeros(4, int), {"soft_cap": 1.0, "memory_budget": budget}

    def loss(x):
        return jnp.sum(linear_cross_entropy(x, kernel, labels, reduction=reduction, **options))

    (_, gradient), (tangent, _) = jax.jit(lambda: jax.jvp(jax.value_and_grad(loss), (x,), (v,)))()
    z, slope = np.tanh(x.astype(float)), 1 / np.cosh(x.astype(float)) ** 2
    right = (np.exp(z) / np.exp(z).sum(1, keepdims=True) - np.array([1.0, 0.0])) * slope
    np.testing.assert_allclose(gradient, right, rtol=1e-5)
    np.testing.assert_allclose(tangent, (right * v).sum(), rtol=1e-5)


def test_a_masked_class_of_a_capped_layer_has_no_second_derivative():
    bias, left = at(B, 2, -np.inf), [0, 1, 3, 4]
    options = {"soft_cap": 3.0, "z_loss": 0.1, "label_smoothing": 0.1}
    labels, narrow = np.array([0, 1, 3, 4, 4, 0]), np.array([0, 1, 2, 3, 3, 0])

    def product(w, bias, labels):
        gradient = jax.grad(lambda w: linear_cross_entropy(X, w, labels, bias, **options))
        return jax.jvp(gradient, (w,), (jnp.cos(w),))[1]

    @jax.jit
    def results(z, w):
        hessian = jax.hessian(lambda z: linear_cross_entropy(z, np.eye(5), labels, bias, **options))(z)
        return product(w, bias, labels), product(w[:, np.array(left)], bias[left], narrow), hessian

    found, expected, hessian = map(np.asarray, results(Z, W))
    np.testing.assert_array_equal(found[:, 2], 0)
    np.testing.assert_allclose(found[:, left], expected, rtol=1e-11, atol=1e-14)
    assert np.all(np.isfinite(hessian))


def test_a_target_without_class_weight_is_no_variable():
    """Its class may be masked: the transpose of a VJP meets no infinity."""
    t, class_weights = at(DISTRIBUTION, np.s_[:, 2], 0), np.array([1.0, 2, 0, 1, 3])

    def gradient(z, cotangent):
        loss = lambda t: cross_entropy(z, t, class_weights=class_weights, reduction="none")  # noqa: E731
        return jax.vjp(loss, t)[1](cotangent)[0]

    @jax.jit
    def moved(z):
        one = jnp.ones(6)
        return gradient(z, one), *jax.vjp(gradient, z, one)[1](np.cos(at(Z, np.s_[:, 2], 0)))

    found, expected = (moved(at(Z, np.s_[:, 2], of_class)) for of_class in (-np.inf, -900.0))
    np.testing.assert_array_equal(np.asarray(found[0])[:, 2], 0)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.x32
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("targets", "atol"), [(np.array([0]), 1e-38), (np.eye(3, dtype=np.float32)[:1], 3e-7)])
def test_the_tangent_of_a_loss_stays_accurate_at_confident_predictions(targets, atol, linear):
    """Σ p_j (v_j − v_label) over the other classes; for a label never the difference of two numbers near 1."""
    eye, v = np.eye(3, dtype=np.float32), np.array([[0.7, -0.4, 1.1]], np.float32)

    def loss(z, reduction):
        if linear:
            return jnp.sum(linear_cross_entropy(z, eye, targets, reduction=reduction))
        return jnp.sum(cross_entropy(z, targets, reduction=reduction))

    @jax.jit
    def tangents(z):
        losses = [functools.partial(loss, reduction=reduction) for reduction in ("sum", "none")]
        return [jax.jvp(jax.value_and_grad(each), (z,), (v,))[1][0] for each in losses]

    for margin in (0.5, 20.0, 80.0, 200.0):
        z = np.array([[margin, 0.0, -1.0]], np.float32)
        others = np.exp((z[0, 1:] - z[0, 0]).astype(float))
        expected = np.sum(others * (v[0, 1:].astype(float) - v[0, 0])) / (1 + np.sum(others))
        np.testing.assert_allclose(tangents(z), [expected] * 2, rtol=2e-6, atol=atol)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("kind", ["label", "distribution"])
def test_the_tangent_of_an_infinite_loss_is_finite(kind, linear):
    """Like its gradient: a class at −inf with a target."""
    bias, v = at(B, 2, -np.inf), np.cos(X)
    targets = np.array([2, 0, 1, 2, 3, 4]) if kind == "label" else DISTRIBUTION

    def loss(x):
        if linear:
            return linear_cross_entropy(x, W, targets, bias, z_loss=0.1)
        return cross_entropy(x @ W, targets, where=np.isfinite(bias), z_loss=0.1)

    (value, gradient), (moved, _) = jax.jit(lambda x: jax.jvp(jax.value_and_grad(loss), (x,), (v,)))(X)
    assert np.isposinf(value)
    np.testing.assert_allclose(moved, np.vdot(gradient, v), rtol=1e-12)


def test_the_tangent_of_logsumexp_if_every_class_is_masked():
    z = np.array([[-np.inf, -np.inf], [1.0, 2.0]])
    _, moved = jax.jit(lambda z: jax.jvp(lambda z: jax.vjp(logsumexp, z)[0], (z,), (jnp.ones((2, 2)),)))(z)
    np.testing.assert_allclose(moved, [0, 1])


EVERY_LOSS = list(itertools.product([0, 0.1], [False, True], ["sum", "none"]))
PAIRWISE = reference.covering(2, [0, 0.1], [False, True], ["sum", "none"])


@pytest.mark.parametrize(
    ("smoothing", "linear", "reduction"),
    [pytest.param(*c, marks=[pytest.mark.exhaustive] * (c not in PAIRWISE)) for c in EVERY_LOSS],
)
def test_the_tangent_of_a_loss_is_its_gradient_times_the_tangent(smoothing, linear, reduction):
    """Forward over reverse, of the value: also with respect to targets that are 0 and to masked classes."""
    bias = at(B, 2, -np.inf)
    options = {"label_smoothing": smoothing, "z_loss": 0.1, "reduction": reduction}

    def loss(x, t):
        if linear:
            return jnp.sum(linear_cross_entropy(x, W, t, bias, **options))
        return jnp.sum(cross_entropy(x @ W, t, where=np.isfinite(bias), **options))

    variables = X, np.eye(5)[[0, 1, 3, 4, 0, 1]]
    tangents = tuple(np.random.default_rng(7).normal(size=v.shape) for v in variables)

    @jax.jit
    def derivatives(*variables):
        return jax.jvp(jax.value_and_grad(loss, (0, 1)), variables, tangents)

    (_, gradients), (of_value, _) = derivatives(*variables)
    np.testing.assert_allclose(of_value, sum(map(np.vdot, gradients, tangents)), rtol=1e-12)


def test_features_of_a_label_without_class_weight_may_be_anything():
    """Its position has weight 0, and does not affect the kernel's gradient or its derivative."""
    class_weights, labels = np.array([1.0, 1, 0, 2, 1]), np.array([2, 0, 1, 2, 3, 4])

    @jax.jit
    def derivatives(x):
        loss = lambda w: linear_cross_entropy(x, w, labels, class_weights=class_weights)  # noqa: E731
        return jax.jvp(jax.grad(loss), (W,), (np.cos(W),))

    dirty = at(X, [0, 3], [[np.nan], [np.inf]])
    for found, expected in zip(derivatives(dirty), derivatives(X), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_the_kernels_gradient_stays_accurate_over_a_million_positions():
    """A matmul with one feature sums in sequence; every term here is −2/3 or 1/3."""
    x, y = np.ones((1_000_000, 1), np.float32), np.zeros(1_000_000, np.int32)
    slope = jax.jit(jax.grad(lambda w, x, y: linear_cross_entropy(x, w, y, reduction="sum")))
    gradient = slope(np.zeros((1, 3), np.float32), x, y)
    np.testing.assert_allclose(np.asarray(gradient)[0], np.array([-2, 1, 1]) * 1e6 / 3, rtol=4e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_if_any_label_may_be_ignored(reduction):
    """−2³¹, the lowest label, is no class either."""

    @functools.partial(jax.jit, static_argnums=1)
    def derivatives(w, ignored):
        y = np.array([0, 2, ignored, 1, 3, 4], np.int32)

        def loss(w):
            return jnp.sum(linear_cross_entropy(X, w, y, ignore_index=ignored, z_loss=0.1, reduction=reduction) ** 2)

        return jax.jvp(jax.grad(loss), (w,), (jnp.ones(W.shape),))

    for value, wanted in zip(derivatives(W, -(2**31)), derivatives(W, -1), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-12)


def assert_padding_keeps_still(moved):
    """An ignored position of any value reaches neither the transpose of a VJP nor the gradient of a gradient."""
    moved = jax.jit(moved)
    expected = moved(Z)
    for bad in (np.inf, np.nan):
        found = moved(at(Z, 1, bad))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15), found, expected)


def test_an_ignored_position_has_second_derivatives_of_0():
    weights, v = np.array([1.0, 0, 1, 1, 1, 1]), np.random.default_rng(3).normal(size=Z.shape)

    def moved(z, g):
        pullback = jax.vjp(lambda z: cross_entropy(z, LABELS, weights=weights, z_loss=0.1, reduction="none"), z)[1]
        return jnp.vdot(pullback(g)[0], v)

    assert_padding_keeps_still(lambda z: jax.grad(moved, (0, 1))(z, jnp.ones(6)))


def test_the_targets_of_padding_have_second_derivatives_of_0():
    weights = np.array([1.0, 0, 1, 1, 1, 1])

    def moved(t, z):
        gradient = jax.grad(lambda z: cross_entropy(z, t, weights=weights, reduction="sum"))(z)
        return jnp.vdot(gradient, np.cos(Z))

    assert_padding_keeps_still(lambda z: jax.grad(moved)(DISTRIBUTION, z))


@pytest.mark.parametrize("targets", [LABELS, DISTRIBUTION], ids=["labels", "distributions"])
def test_padding_has_second_derivatives_of_0_inside_a_scan(targets):
    """Inside a scan JAX drops a `custom_jvp` after reverse mode, so padding is not frozen by such a rule."""
    weights = np.array([1.0, 0, 1, 1, 1, 1])

    def moved(z):
        def each(row):
            logits, target, weight = (a[None] for a in row)
            return cross_entropy(logits, target, weights=weight, z_loss=0.1, reduction="none")

        loss = lambda z: jnp.sum(jax.lax.map(each, (z, targets, weights)))  # noqa: E731
        return jnp.vdot(jax.grad(loss)(z), np.cos(Z))

    assert_padding_keeps_still(jax.grad(moved))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_inside_a_scan_have_derivatives_if_positions_may_be_ignored(reduction):
    """Loops over as many tiles as positions are not ignored, whose number is unknown when they are traced."""
    x, labels = X.reshape(2, 3, 3), LABELS.reshape(2, 3)
    weights = np.array([[1.0, 0, 2], [0.5, 0, 0]])

    def mapped(loss, x, w):
        each = jax.lax.map(lambda of: loss(of[0], w, of[1], weights=of[2], reduction=reduction), (x, labels, weights))
        return jnp.sum(jnp.cos(each))

    @jax.jit
    def run(x, w):
        def products(loss):
            gradients = jax.grad(functools.partial(mapped, loss), (0, 1))
            return jax.vjp(gradients, x, w)[1]((jnp.cos(x), jnp.sin(w)))

        return [
            products(loss) for loss in (linear_cross_entropy, lambda x, w, *a, **of: cross_entropy(x @ w, *a, **of))
        ]

    for got, want in zip(*run(x, W), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_shards_that_are_all_nan_have_no_normaliser():
    mesh = jax.make_mesh((2,), ("classes",), axis_types=(jax.sharding.AxisType.Auto,))
    layout = jax.sharding.PartitionSpec("classes")
    sharded = jax.shard_map(
        lambda z: logsumexp(z, axis_name="classes"), mesh=mesh, in_specs=layout, out_specs=jax.sharding.PartitionSpec()
    )
    assert np.isnan(jax.jit(sharded)(np.array([0.0, np.nan, np.nan, 1.0])))


def tails(margin, classes, second):
    """Logits with a margin of the first class, a distribution with nearly all weight on it, and the truth."""
    generator = np.random.default_rng(classes)
    z = generator.normal(size=classes).astype(np.float32)
    z[0] = z[1:].max() + np.float32(margin)
    q = np.zeros(classes, np.float32)
    q[0], q[-1] = 1, second
    wide, weights = z.astype(np.float64), q.astype(np.float64)
    e = np.exp(wide - wide.max())
    others, top = e[1:].sum(), wide.argmax()
    log_sum = np.log1p(np.delete(e, top).sum())
    loss = np.sum(weights * (log_sum + (wide.max() - wide)))
    gradient = e * weights.sum() / e.sum() - weights
    gradient[0] = (weights[1:].sum() * e[0] - weights[0] * others) / e.sum()
    return z, q, loss, gradient


@pytest.mark.x32
@pytest.mark.parametrize(
    ("classes", "second"),
    [
        *((2, 0.0), (70, 1e-9), (1000, 0.0)),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in ((2, 1e-9), (5, 0.0), (5, 1e-9), (70, 0.0), (1000, 1e-9))
        ),
    ],
)
def test_a_distribution_is_as_accurate_as_a_label(classes, second):
    """Loss and gradient at the most likely class, where 1 − p and the others' weight would be lost in rounding 1."""
    margins = np.linspace(-60, 80, 15)
    z, q, losses, gradients = map(np.stack, zip(*(tails(m, classes, second) for m in margins), strict=True))
    mesh = jax.make_mesh((2,), ("classes",), axis_types=(AxisType.Auto,))
    blocks = P(None, "classes")
    over_shards = jax.shard_map(
        functools.partial(cross_entropy, reduction="none", axis_name="classes"),
        mesh=mesh,
        in_specs=(blocks, blocks),
        out_specs=P(),
    )
    ways = {
        "one pass": lambda z, q: jax.lax.map(lambda pair: cross_entropy(*pair), (z[:, None], q[:, None])),
        "two passes": functools.partial(cross_entropy, reduction="none"),
        "tiles": lambda z, q: linear_cross_entropy(z, np.eye(classes, dtype=np.float32), q, reduction="none"),
    }
    if classes % 2 == 0:
        ways["shards"] = over_shards
    for name, fn in ways.items():
        value, pullback = jax.jit(lambda z, q, fn=fn: jax.vjp(lambda z: fn(z, q), z))(z, q)
        np.testing.assert_allclose(value, losses, rtol=1e-5, err_msg=name)
        (found,) = pullback(np.ones(len(margins), np.float32))
        np.testing.assert_allclose(found[:, 0], gradients[:, 0], rtol=1e-5, err_msg=name)
