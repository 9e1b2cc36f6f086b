"""Laws that every loss and normaliser holds: of its pullback, of positions that take no part, of what is removed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def cotangents(fn, variables, seed):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda v: jnp.asarray(generator.normal(size=v.shape)), jax.eval_shape(fn, *variables))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_pullback_is_linear_in_its_cotangent_at_zero_too(name):
    fn, variables = FUNCTIONS[name]
    variables = tuple(map(jnp.asarray, variables))
    pullback = jax.vjp(fn, *variables)[1]
    direction, other = cotangents(fn, variables, 1), cotangents(fn, variables, 2)
    expected = pullback(direction)
    for point in (jax.tree.map(jnp.zeros_like, direction), other):
        _, derivative = jax.jvp(pullback, (point,), (direction,))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), derivative, expected)


def test_weights_that_are_0_can_be_learnt():
    """The gradient of Σ ε_i·loss_i has a derivative with respect to each ε at 0: learning to reweight starts there."""
    z, y = jnp.array([[2.0, -1.0, 0.5], [0.0, 1.0, 3.0]]), jnp.array([1, 0])
    direction = jnp.asarray(np.random.default_rng(1).normal(size=z.shape))

    def moved(epsilon):
        return jnp.sum(jax.grad(lambda z: jnp.sum(epsilon * cross_entropy(z, y, reduction="none")))(z) * direction)

    expected = np.sum((reference.softmax(z) - np.eye(3)[np.asarray(y)]) * direction, 1)
    np.testing.assert_allclose(jax.grad(moved)(jnp.zeros(2)), expected, rtol=1e-12)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("kind", ["label", "distribution", "linear", "linear distribution"])
def test_a_position_that_takes_no_part_has_no_gradient_whatever_reaches_it(kind, reduction, bad):
    """Its own cotangent may be infinite, as that of √loss at 0, and its logits anything."""
    weights = jnp.array([1.0, 0, 1, 1, 1, 1])
    t = DISTRIBUTION if "distribution" in kind else LABELS
    linear = kind.startswith("linear")
    x = jnp.asarray(X if linear else Z).at[1].set(bad)

    def loss(x, t, w):
        if linear:
            return linear_cross_entropy(x, w, t, weights=weights, reduction=reduction)
        return cross_entropy(x, t, weights=weights, reduction=reduction)

    variables = tuple(map(jnp.asarray, (x, t, W) if "distribution" in kind else (x, W)))
    of = (lambda x, t, w: loss(x, t, w)) if "distribution" in kind else (lambda x, w: loss(x, t, w))
    value, pullback = jax.vjp(of, *variables)
    clean, clean_pullback = jax.vjp(of, jnp.asarray(X if linear else Z), *variables[1:])
    np.testing.assert_allclose(value, clean, rtol=1e-12)
    cotangent = jnp.ones(6).at[1].set(bad) if reduction == "none" else jnp.ones(())
    expected = clean_pullback(jnp.ones_like(value))
    for gradient, wanted in zip(pullback(cotangent), expected, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-11, atol=1e-13)
    assert not np.any(pullback(cotangent)[0][1])


def test_a_label_where_no_class_is_left_costs_infinity_on_every_platform():
    """Without compiling there is the formula alone, whose log1p meets a −1 that the CPU's program of it would forgive."""
    nothing_left = jnp.full((2, 3), -jnp.inf).at[0].set(0)
    with jax.disable_jit():
        losses = jaxsoft.cross_entropy(nothing_left, jnp.array([0, 1]), reduction="none")
    np.testing.assert_allclose(losses, [np.log(3), np.inf], rtol=1e-6)


def test_no_class_left_has_no_gradient_whatever_reaches_it():
    z = jnp.full((2, 3), -jnp.inf)
    (gradient,) = jax.vjp(logsumexp, z)[1](jnp.array([jnp.inf, 1.0]))
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_zero_cotangent_pulls_back_to_zero(linear, reduction):
    """Also to the targets of a class at −inf, whose gradient is infinite."""
    bias, targets = jnp.asarray(B).at[2].set(-jnp.inf), jnp.asarray(DISTRIBUTION).at[:, 2].set(0)
    if linear:
        value, pullback = jax.vjp(lambda t: linear_cross_entropy(X, W, t, bias, reduction=reduction), targets)
    else:
        value, pullback = jax.vjp(lambda t: cross_entropy(X @ W + bias, t, reduction=reduction), targets)
    np.testing.assert_array_equal(pullback(jnp.zeros_like(value))[0], np.zeros((6, 5)))
    of_class = pullback(jnp.ones_like(value))[0][:, 2]
    assert np.all(of_class == 0 if linear else np.isposinf(of_class))  # the bias of a layer removes the class


def test_smoothing_of_1_leaves_the_targets_no_gradient():
    z = jnp.asarray(Z).at[0, 2].set(-jnp.inf)
    gradient = jax.grad(lambda t: cross_entropy(z, t, label_smoothing=1.0, reduction="sum"))(jnp.asarray(DISTRIBUTION))
    np.testing.assert_array_equal(gradient, np.zeros((6, 5)))


@pytest.mark.parametrize("classes", [50_257, 2**17])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_log_softmax_pulls_back_to_what_sums_to_zero(dtype, classes):
    """In half precision too, where the exponentials of the rounded result do not sum to one."""
    z = jnp.zeros(classes, dtype)
    (gradient,) = jax.vjp(log_softmax, z)[1](jnp.zeros(classes, dtype).at[0].set(1))
    assert gradient.dtype == dtype
    # −1/classes to the rounding of the dtype, and for float16 of its subnormal numbers.
    spacing = max(float(jnp.finfo(dtype).eps) / classes, float(jnp.finfo(dtype).smallest_subnormal))
    np.testing.assert_allclose(np.asarray(gradient[1:], float), -1 / classes, atol=0.51 * spacing + 1e-6 / classes)


def test_a_saturated_soft_cap_has_a_gradient():
    """1 − tanh² is formed without the subtraction, which is 0 in float32 from 9 on."""
    x = jnp.array([[8.0, 1.0]], jnp.float32)
    kernel = jnp.array([[1.0, 0.0], [0.0, 1.0]], jnp.float32)
    for cap in (1.0, 0.5):
        gradient = jax.grad(lambda x: linear_cross_entropy(x, kernel, jnp.array([0]), soft_cap=cap))(x)  # noqa: B023
        z = np.asarray(x[0], np.float64)
        capped = cap * np.tanh(z / cap)
        p = 1 / (1 + np.exp(capped[1] - capped[0]))
        np.testing.assert_allclose(gradient[0, 0], -(1 - p) / np.cosh(z[0] / cap) ** 2, rtol=2e-6)


def test_a_removed_class_of_a_capped_layer_has_no_second_derivative():
    bias, z = jnp.asarray(B).at[2].set(-jnp.inf), jnp.asarray(Z)
    left = [0, 1, 3, 4]
    options = {"soft_cap": 3.0, "z_loss": 0.1, "label_smoothing": 0.1}
    labels, narrow = jnp.array([0, 1, 3, 4, 4, 0]), jnp.array([0, 1, 2, 3, 3, 0])

    def product(w, bias, labels):
        gradient = jax.grad(lambda w: linear_cross_entropy(X, w, labels, bias, **options))
        return jax.jvp(gradient, (w,), (jnp.cos(w),))[1]

    w = jnp.asarray(W)
    found, expected = product(w, bias, labels), product(w[:, left], bias[jnp.array(left)], narrow)
    np.testing.assert_array_equal(found[:, 2], 0)
    np.testing.assert_allclose(found[:, left], expected, rtol=1e-11, atol=1e-14)
    assert np.all(np.isfinite(jax.hessian(lambda z: linear_cross_entropy(z, jnp.eye(5), labels, bias, **options))(z)))


def test_a_target_without_class_weight_is_no_variable():
    """Its class may be removed: the transpose of a pullback meets no infinity."""
    t = jnp.asarray(DISTRIBUTION).at[:, 2].set(0)
    class_weights = jnp.array([1.0, 2, 0, 1, 3])

    def gradient(z, cotangent):
        loss = lambda t: cross_entropy(z, t, class_weights=class_weights, reduction="none")  # noqa: E731
        return jax.vjp(loss, t)[1](cotangent)[0]

    def moved(of_class):
        z, one = jnp.asarray(Z).at[:, 2].set(of_class), jnp.ones(6)
        return gradient(z, one), *jax.vjp(gradient, z, one)[1](jnp.cos(z.at[:, 2].set(0)))

    found = moved(-jnp.inf)
    np.testing.assert_array_equal(found[0][:, 2], 0)
    for got, want in zip(found, moved(-900.0), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.x32
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("targets", "atol"), [(np.array([0]), 1e-38), (np.eye(3, dtype=np.float32)[:1], 3e-7)])
@pytest.mark.parametrize("margin", [0.5, 20.0, 80.0, 200.0])
def test_the_tangent_of_a_loss_keeps_its_digits_where_the_label_leads(margin, targets, atol, linear, reduction):
    """Σ p_j (v_j − v_label) over the other classes, of a label never the difference of two ones."""
    z, v = jnp.array([[margin, 0.0, -1.0]]), jnp.array([[0.7, -0.4, 1.1]])
    eye = jnp.eye(3, dtype=jnp.float32)

    def loss(z):
        if linear:
            return jnp.sum(linear_cross_entropy(z, eye, targets, reduction=reduction))
        return jnp.sum(cross_entropy(z, targets, reduction=reduction))

    _, (moved, _) = jax.jvp(jax.value_and_grad(loss), (z,), (v,))
    others = np.exp(np.asarray(z[0, 1:] - z[0, 0], np.float64))
    expected = np.sum(others * (np.asarray(v[0, 1:], np.float64) - float(v[0, 0]))) / (1 + np.sum(others))
    np.testing.assert_allclose(moved, expected, rtol=2e-6, atol=atol)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("kind", ["label", "distribution"])
def test_the_tangent_of_an_infinite_loss_is_finite(kind, linear):
    """As its gradient: a class at −inf that has target mass."""
    bias, x = jnp.asarray(B).at[2].set(-jnp.inf), jnp.asarray(X)
    targets = jnp.array([2, 0, 1, 2, 3, 4]) if kind == "label" else jnp.asarray(DISTRIBUTION)

    def loss(x):
        if linear:
            return linear_cross_entropy(x, W, targets, bias, z_loss=0.1)
        return cross_entropy(x @ W, targets, where=jnp.isfinite(bias), z_loss=0.1)

    v = jnp.cos(x)
    (value, gradient), (moved, _) = jax.jvp(jax.value_and_grad(loss), (x,), (v,))
    assert np.isposinf(value)
    np.testing.assert_allclose(moved, jnp.vdot(gradient, v), rtol=1e-12)


def test_the_tangent_of_logsumexp_where_no_class_is_left():
    z = jnp.array([[-jnp.inf, -jnp.inf], [1.0, 2.0]])
    _, moved = jax.jvp(lambda z: jax.vjp(logsumexp, z)[0], (z,), (jnp.ones((2, 2)),))
    np.testing.assert_allclose(moved, [0, 1])


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_the_tangent_of_a_loss_is_its_gradient_times_the_tangent(smoothing, linear, reduction):
    """Forward over reverse, of the value: to targets that are 0 and to classes that are removed too."""
    bias, t = jnp.asarray(B).at[2].set(-jnp.inf), jnp.eye(5)[jnp.array([0, 1, 3, 4, 0, 1])]
    options = {"label_smoothing": smoothing, "z_loss": 0.1, "reduction": reduction}

    def loss(x, t):
        if linear:
            return jnp.sum(linear_cross_entropy(x, W, t, bias, **options))
        return jnp.sum(cross_entropy(x @ W, t, where=jnp.isfinite(bias), **options))

    variables = jnp.asarray(X), t
    tangents = tuple(jnp.asarray(np.random.default_rng(7).normal(size=v.shape)) for v in variables)
    _, gradients = jax.value_and_grad(loss, (0, 1))(*variables)
    _, (of_value, _) = jax.jvp(jax.value_and_grad(loss, (0, 1)), variables, tangents)
    np.testing.assert_allclose(of_value, sum(map(jnp.vdot, gradients, tangents)), rtol=1e-12)


@pytest.mark.parametrize("derivatives", [1, 2])
def test_features_of_a_label_without_class_weight_may_be_anything(derivatives):
    """Its position has no weight, and no part in the kernel's gradient."""
    class_weights, x = jnp.array([1.0, 1, 0, 2, 1]), jnp.asarray(X)
    labels = jnp.array([2, 0, 1, 2, 3, 4])

    def gradient(x):
        loss = lambda w: linear_cross_entropy(x, w, labels, class_weights=class_weights)  # noqa: E731
        if derivatives == 1:
            return jax.grad(loss)(jnp.asarray(W))
        return jax.jvp(jax.grad(loss), (jnp.asarray(W),), (jnp.cos(W),))[1]

    dirty = x.at[jnp.array([0, 3])].set(jnp.array([[jnp.nan], [jnp.inf]]))
    np.testing.assert_allclose(gradient(dirty), gradient(x), rtol=1e-12, atol=1e-15)


def test_the_kernels_gradient_keeps_its_digits_over_a_million_positions():
    """A product over one feature sums in sequence; every term here is −2/3 or 1/3."""
    x, w = jnp.ones((1_000_000, 1), jnp.float32), jnp.zeros((1, 3), jnp.float32)
    y = jnp.zeros(1_000_000, jnp.int32)
    gradient = jax.grad(lambda w: linear_cross_entropy(x, w, y, reduction="sum"))(w)
    np.testing.assert_allclose(gradient[0], np.array([-2, 1, 1]) * 1e6 / 3, rtol=4e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_where_any_label_may_be_ignored(reduction):
    """−2³¹, the lowest label there is, is no class either."""
    labels = jnp.array([0, 2, -(2**31), 1, 3, 4], jnp.int32)

    def gradient(w, ignored):
        y = jnp.where(labels == -(2**31), ignored, labels)

        def loss(w):
            return jnp.sum(linear_cross_entropy(X, w, y, ignore_index=ignored, z_loss=0.1, reduction=reduction) ** 2)

        return jax.grad(loss)(w)

    w, tangent = jnp.asarray(W), jnp.ones(W.shape)
    expected = jax.jvp(lambda w: gradient(w, -1), (w,), (tangent,))
    for value, wanted in zip(jax.jvp(lambda w: gradient(w, -(2**31)), (w,), (tangent,)), expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-12)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_position_that_takes_no_part_is_still_in_second_derivatives(bad):
    """Its padding reaches neither the transpose of a pullback nor the gradient of a gradient."""
    weights, clean = jnp.array([1.0, 0, 1, 1, 1, 1]), jnp.asarray(Z)
    dirty, v = clean.at[1].set(bad), jnp.asarray(np.random.default_rng(3).normal(size=Z.shape))

    def moved(z, g):
        pullback = jax.vjp(lambda z: cross_entropy(z, LABELS, weights=weights, z_loss=0.1, reduction="none"), z)[1]
        return jnp.vdot(pullback(g)[0], v)

    found, expected = (jax.grad(moved, (0, 1))(z, jnp.ones(6)) for z in (dirty, clean))
    for gradient, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_the_targets_of_padding_are_still_in_second_derivatives(bad):
    weights, clean, t = jnp.array([1.0, 0, 1, 1, 1, 1]), jnp.asarray(Z), jnp.asarray(DISTRIBUTION)

    def moved(t, z):
        gradient = jax.grad(lambda z: cross_entropy(z, t, weights=weights, reduction="sum"))(z)
        return jnp.vdot(gradient, jnp.cos(clean))

    found, expected = (jax.grad(moved)(t, z) for z in (clean.at[1].set(bad), clean))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("targets", [LABELS, DISTRIBUTION], ids=["labels", "distributions"])
def test_padding_is_still_in_second_derivatives_inside_a_scan(targets, bad):
    """There JAX drops a `custom_jvp` after reverse mode: what holds padding still is no such rule."""
    weights, clean = jnp.array([1.0, 0, 1, 1, 1, 1]), jnp.asarray(Z)

    def moved(z):
        def each(row):
            logits, target, weight = (a[None] for a in row)
            return cross_entropy(logits, target, weights=weight, z_loss=0.1, reduction="none")

        loss = lambda z: jnp.sum(jax.lax.map(each, (z, jnp.asarray(targets), weights)))  # noqa: E731
        return jnp.vdot(jax.grad(loss)(z), jnp.cos(clean))

    np.testing.assert_allclose(jax.grad(moved)(clean.at[1].set(bad)), jax.grad(moved)(clean), rtol=1e-12, atol=1e-15)


def test_shards_that_are_all_nan_have_no_normaliser():
    mesh = jax.make_mesh((2,), ("classes",), axis_types=(jax.sharding.AxisType.Auto,))
    layout = jax.sharding.PartitionSpec("classes")
    sharded = jax.shard_map(
        lambda z: logsumexp(z, axis_name="classes"), mesh=mesh, in_specs=layout, out_specs=jax.sharding.PartitionSpec()
    )
    assert np.isnan(sharded(jnp.array([0.0, jnp.nan, jnp.nan, 1.0])))
