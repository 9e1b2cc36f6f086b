"""linear_cross_entropy: values, gradients, work and memory."""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from jaxsoft import checked, cross_entropy, linear_cross_entropy, plan_linear_cross_entropy

SIZES = [(37, 8, 101), (130, 16, 2049), (1064, 24, 301), (1, 3, 2), (5, 4, 128_256)]
FORMED_ALONG, FORMED_BACKWARD = "smooth", "each"  # gradients of a scalar, and those of "none"
OPTIONS = {
    "plain": {},
    "ignored": {"ignore_index": -100},
    "weighted": {"weights", "class_weights"},
    "smooth": {"label_smoothing": 0.1, "z_loss": 0.01, "ignore_index": -100},
    "capped": {"soft_cap": 20.0, "reduction": "sum"},
    "each": {"reduction": "none", "z_loss": 0.01, "ignore_index": -100, "label_smoothing": 0.2, "soft_cap": 30.0},
    "distributions": {"distributions", "label_smoothing", "class_weights"},
}


MORE = [
    *zip(SIZES[1:], (FORMED_BACKWARD, FORMED_ALONG) * 2, strict=True),
    *(((1064, 24, 3001), case) for case in (FORMED_ALONG, FORMED_BACKWARD)),
    ((130, 16, 2049), "distributions"),
    ((1, 3, 2), "weighted"),
]


def problem(positions, width, classes, seed=0):
    """Features, kernel, strongly negative bias, labels, position and class weights, distributions."""
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(positions, width)), rng.normal(size=(width, classes))
    labels, b = rng.integers(0, classes, positions), rng.normal(size=classes) - 10
    weights, class_weights = rng.uniform(0.1, 2, positions), rng.uniform(0.1, 2, classes)
    # The last, and a function, because it takes a second for many classes.
    return x, w, b, labels, weights, class_weights, lambda: rng.gamma(0.1, size=(positions, classes))


def compiled(fn):
    """One program, whose results are NumPy arrays: JAX would compile another for each way of indexing them."""
    fn = jax.jit(fn)
    return lambda *arguments: jax.device_get(fn(*arguments))


def value_and_pullback(fn, variables, cotangent):
    """The value and the gradients in one tuple."""
    value, pullback = jax.vjp(fn, *variables)
    return value, *pullback(cotangent)


def naive(x, w, b, q, weights, denominators, cap=None, z_loss=0.0):
    """Each position's contribution, from all logits at once, in float64."""
    z = x @ w + b
    z = z if cap is None else cap * jnp.tanh(z / cap)
    squares = reference.logsumexp(z) ** 2
    return weights * (reference.losses(z, q) / denominators[0] + z_loss * squares / denominators[1])


def relative(actual, expected):
    return np.abs(np.asarray(actual, float) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    ("size", "case"),
    [(SIZES[0], case) for case in OPTIONS]
    + list(zip(SIZES[1:], (FORMED_ALONG, FORMED_BACKWARD) * 2, strict=True))
    + [pytest.param(*size_and_case, marks=pytest.mark.exhaustive) for size_and_case in MORE],
    ids=str,
)
def test_equals_the_unfused_computation(size, case):
    x, w, b, labels, weights, class_weights, distributions = problem(*size)
    distributions = distributions() if case == "distributions" else None
    positions, _, classes = size
    given = OPTIONS[case]
    options = dict(given) if isinstance(given, dict) else {}
    if "weights" in given:
        options["weights"] = weights.astype(np.float32)
    if "class_weights" in given:
        options["class_weights"] = class_weights.astype(np.float32)
    if case == "weighted":
        options["z_loss"] = 0.01
    if case == "distributions":
        options["label_smoothing"] = 0.1
    smoothing = options.get("label_smoothing", 0.0)

    ignored = (np.arange(positions) % 3 == 1) if "ignore_index" in options else np.zeros(positions, bool)
    c = class_weights if "class_weights" in options else np.ones(classes)
    t = distributions if case == "distributions" else np.equal.outer(labels, np.arange(classes))
    q = c * ((1 - smoothing) * t + smoothing / classes)
    counted = np.where(ignored, 0.0, weights if "weights" in options else 1.0)
    denominators = 1.0, 1.0
    if options.get("reduction", "mean") == "mean":
        denominators = np.sum(counted * (1 if case == "distributions" else c[labels])), np.sum(counted)
    cotangent = (
        np.random.default_rng(1).normal(size=positions) if options.get("reduction") == "none" else np.float64(1.7)
    )

    def expected(x, w, b, q, counted, cotangent):
        terms = naive(x, w, b, q, counted, denominators, options.get("soft_cap"), options.get("z_loss", 0.0))
        return jnp.sum(cotangent * terms)

    targets = distributions.astype(np.float32) if case == "distributions" else np.where(ignored, -100, labels)
    row = 8 * classes * (3 if case == "distributions" else 1)
    budget = row * max(1, positions // 3)  # three tiles and a ragged one

    def ours(x, w, b, targets, cotangent):
        loss = linear_cross_entropy(x, w, targets, b, memory_budget=budget, **options)
        assert loss.dtype == jnp.float32
        return jnp.sum(cotangent * loss)

    @compiled
    def run(wide, narrow):
        expectation = jax.value_and_grad(expected, (0, 1, 2))(*wide)
        return expectation, jax.value_and_grad(ours, (0, 1, 2))(*narrow), ours(*narrow)  # without differentiation too

    narrow = [*(a.astype(np.float32) for a in (x, w, b)), targets, cotangent.astype(np.float32)]
    (value, gradients), (actual, actual_gradients), alone = run((x, w, b, q, counted, cotangent), narrow)
    np.testing.assert_allclose([actual, alone], [value, value], rtol=1e-5)
    for got, want in zip(actual_gradients, gradients, strict=True):
        assert got.dtype == np.float32
        assert relative(got, want) < 3e-5
    assert (actual_gradients[0][ignored] == 0).all()


@functools.cache
def float64_problem(positions=21):
    x, w, b, labels, *_, distributions = problem(positions, 4, 13)
    return x, w, b + 10, np.where(np.arange(positions) % 4 == 0, -100, labels), distributions()


def unfused(x, w, targets, b=0.0, *, soft_cap=None, **options):
    """The loss of all logits, by `cross_entropy`."""
    z = jnp.dot(x, w) + b
    return cross_entropy(z if soft_cap is None else soft_cap * jnp.tanh(z / soft_cap), targets, **options)


TWICE = {
    "mean": {"ignore_index": -100, "z_loss": 0.1},
    "none": {"ignore_index": -100, "reduction": "none", "soft_cap": 4.0, "label_smoothing": 0.1},
}


@pytest.mark.parametrize("case", [*TWICE, "distributions"])
def test_derivatives_of_second_order(case):
    x, w, b, labels, distributions = float64_problem()
    variables, options = (x, w, b), TWICE.get(case, {})
    if case == "distributions":
        variables = (x, w, b, distributions)
    cotangent = np.random.default_rng(2).normal(size=21)
    every = tuple(range(len(variables)))
    directions = tuple(np.random.default_rng(n).normal(size=v.shape) for n, v in enumerate(variables))

    def value(loss, **more):
        return lambda x, w, b, t=labels: jnp.sum(cotangent * loss(x, w, t, b, **options, **more))

    def forward(fn, variables):
        return jax.jvp(jax.value_and_grad(fn, every), variables, directions)[1]

    @compiled
    def run(*variables):
        ours, expected = value(linear_cross_entropy, memory_budget=8 * 16 * 13), value(unfused)

        def slope(*variables):
            return sum(jnp.vdot(d, g) for d, g in zip(directions, jax.grad(ours, every)(*variables), strict=True))

        reverse = jax.value_and_grad(slope, every)(*variables)
        slope_and_products = jax.tree.leaves(forward(expected, variables))
        return (reverse, slope_and_products), (forward(ours, variables), slope_and_products)

    for found, wanted in run(*variables):
        for got, want in zip(jax.tree.leaves(found), wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


def test_gradient_to_distributions():
    x, w, b, _, distributions = float64_problem()
    losses = lambda t: linear_cross_entropy(x, w, t, b, memory_budget=32 * 16 * 13)  # noqa: E731
    naive = lambda t: reference.losses(x @ w + b, t).mean()  # noqa: E731
    got, want = compiled(lambda t: (jax.grad(losses)(t), jax.grad(naive)(t)))(distributions)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_transformations():
    x, w, b, labels, _ = float64_problem()
    xs = x.reshape(3, 7, 4)
    # Each mapped problem ignores another number of positions.
    many = np.stack([labels[:7], np.full(7, -100), np.arange(7)])

    def loss(w, x, labels):
        return linear_cross_entropy(x, w, labels, b, ignore_index=-100, memory_budget=8 * 16 * 13)

    @compiled
    def run(x, xs, w, labels, many):
        gradient = jax.jit(jax.grad(loss))
        plain, shaped = gradient(w, x, labels), gradient(w, xs, labels.reshape(3, 7))
        rematerialised = jax.grad(jax.checkpoint(loss))(w, x, labels)
        mapped = jax.vmap(gradient, (None, 0, 0))(w, xs, many)
        each = lambda at: jax.grad(lambda w: unfused(at[0], w, at[1], b, ignore_index=-100))(w)  # noqa: E731
        return plain, (shaped, rematerialised), mapped, jax.lax.map(each, (xs, many))

    plain, same, mapped, looped = run(x, xs, w, labels, many)
    for gradient in same:
        np.testing.assert_allclose(gradient, plain, rtol=1e-13)
    np.testing.assert_allclose(mapped, looped, rtol=1e-12)


@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.exhaustive), {"weights"}, {"reduction": "none"}, {"distributions"}],
    ids=str,
)
def test_mapped_over_sequences(options):
    """Once and twice, over features and targets alone: the values and gradients of a loop over them."""
    x, w, b, labels, distributions = float64_problem(24)
    # Inner axes last: mapped from positions that `vmap` finds at any axis.
    sequences, y = x.reshape(2, 3, 4, 4), labels.reshape(2, 3, 4)
    more = dict(options) if isinstance(options, dict) else {}
    if "distributions" in options:
        y = distributions.reshape(2, 3, 4, 13)
    else:
        more["ignore_index"] = -100
    if "weights" in options:
        more["weights"] = np.random.default_rng(4).uniform(size=4)

    def mapped(x, w, b):
        loss = lambda x, w, b, y: linear_cross_entropy(x, w, y, b, memory_budget=8 * 13 * 8, **more)  # noqa: E731
        inner = jax.vmap(loss, (0, None, None, 0))
        return jax.vmap(inner, (2, None, None, 0))(jnp.moveaxis(x, 0, 2), w, b, y)

    def looped(x, w, b):
        loop = lambda at: jax.lax.map(lambda at: unfused(at[0], w, at[1], b, **more), at)  # noqa: E731
        return jax.lax.map(loop, (x, y))

    cotangent = np.random.default_rng(5).normal(size=(2, 3, 4) if "reduction" in options else (2, 3))
    run = compiled(lambda *at: [value_and_pullback(fn, at, cotangent) for fn in (mapped, looped)])
    (value, *gradients), (expected, *wanted) = run(sequences, w, b)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "in_axes",
    [(None, 0, None), (0, 0, 0), pytest.param((0, 0, None), marks=pytest.mark.exhaustive), (None, None, 0)],
    ids=str,
)
def test_mapped_over_any_of_the_arguments(in_axes):
    """If the examples do not share their layer, or share their features, JAX's own `vmap` is used."""
    x, w, _, labels, _ = float64_problem()
    stacks = np.stack([x, -x, 2 * x]), np.stack([w, 2 * w, -w]), np.stack([labels, labels[::-1], labels])
    *variables, y = (stack[0] if axis is None else stack for stack, axis in zip(stacks, in_axes, strict=True))

    def mapped(x, w):
        return jax.vmap(lambda x, w, y: linear_cross_entropy(x, w, y, ignore_index=-100), in_axes)(x, w, y)

    def looped(x, w):
        arrays = list(zip((x, w, jnp.asarray(y)), in_axes, strict=True))
        at = lambda n: [a if axis is None else a[n] for a, axis in arrays]  # noqa: E731
        return jax.lax.map(lambda n: unfused(*at(n), ignore_index=-100), np.arange(3))

    cotangent = np.array([1.0, -2.0, 0.5])
    run = compiled(lambda *at: [value_and_pullback(fn, at, cotangent) for fn in (mapped, looped)])
    (value, *gradients), (expected, *wanted) = run(*variables)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-14)


def test_a_gradient_mapped_over_layers_can_be_differentiated_in_reverse():
    """A loop whose length is known only at run time, as with ignored positions, has no reverse mode."""
    x, w, _, labels, _ = float64_problem()
    stacks, v = (np.stack([x, -x]), np.stack([w, 2 * w])), (np.stack([x[::-1], x]), np.stack([w[::-1], w]))
    removed = np.where(np.isin(np.arange(w.shape[1]), [*labels, 0]), 0, -np.inf)

    def bends(loss, cap):
        mapped = lambda x, w: jnp.sum(jax.vmap(lambda x, w: loss(x, w, cap))(x, w) ** 2)  # noqa: E731
        gradient = jax.grad(mapped, (0, 1))
        return jax.vjp(gradient, *stacks)[1](v), jax.jvp(gradient, stacks, v)[1]

    def ours(x, w, cap):
        return linear_cross_entropy(x, w, labels, removed, ignore_index=-100, soft_cap=cap)

    def dense(x, w, cap):
        z = x @ w if cap is None else cap * jnp.tanh(x @ w / cap)
        return cross_entropy(z + removed, labels, ignore_index=-100)

    found, right = compiled(lambda: [[bends(fn, cap) for cap in (None, 3.0)] for fn in (ours, dense)])()
    for got, want in zip(*map(jax.tree.leaves, (found, right)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bfloat16(reduction):
    x, w, b, labels, *_ = problem(130, 16, 2049)
    half = [a.astype(jnp.bfloat16) for a in (x, w, b + 10)]
    cotangent = np.random.default_rng(3).normal(size=130 if reduction == "none" else ()).astype(np.float32)

    @compiled
    def run(half, single):
        ours = lambda *at: linear_cross_entropy(*at[:2], labels, at[2], reduction=reduction, memory_budget=2**20)  # noqa: E731
        exact = lambda *at: unfused(*at[:2], labels, at[2], reduction=reduction)  # noqa: E731
        return value_and_pullback(ours, half, cotangent), value_and_pullback(exact, single, cotangent)

    (value, *gradients), (exact, *exact_gradients) = run(half, [a.astype(np.float32) for a in half])
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, exact, rtol=1e-5)  # products of bfloat16 are exact in float32
    for got, want in zip(gradients, exact_gradients, strict=True):
        assert got.dtype == jnp.bfloat16
        assert relative(got, want) < 6e-3


def test_the_kernels_gradient_is_summed_in_float32():
    """4096 positions of one label: each tile adds 1/256 of the sum, which bfloat16 would round away."""
    x, labels, w = np.ones((4096, 1), jnp.bfloat16), np.zeros(4096, int), np.zeros((1, 2), jnp.bfloat16)
    loss = lambda w, x: linear_cross_entropy(x, w, labels, reduction="sum", memory_budget=8 * 2 * 8)  # noqa: E731
    np.testing.assert_array_equal(compiled(jax.grad(loss))(w, x).astype(float), [[-2048, 2048]])


def test_second_derivatives_of_half_precision_are_summed_in_float32():
    """Forward over reverse; tiles added up in bfloat16 would be off by a tenth after 4096 positions."""
    rng = np.random.default_rng(6)
    x, w, tangent = (rng.normal(size=s).astype(jnp.bfloat16) for s in ((4096, 2), (2, 3), (2, 3)))
    labels = np.zeros(4096, int)

    def moved(loss, x, w, tangent, **options):
        gradients = jax.grad(lambda x, w: loss(x, w, labels, reduction="sum", **options), (0, 1))
        return jax.jvp(lambda w: gradients(x, w), (w,), (tangent,))[1]

    @compiled
    def run(half, wide):
        return moved(linear_cross_entropy, *half, memory_budget=8 * 3 * 16), moved(unfused, *wide)

    half = x, w, tangent
    for got, want in zip(*run(half, [a.astype(float) for a in half]), strict=True):
        assert got.dtype == jnp.bfloat16
        assert relative(got, want) < 2.0**-7


def test_only_a_label_out_of_range_gives_nan():
    x, w, b, labels, _ = float64_problem()
    options = {"ignore_index": -100, "memory_budget": 8 * 16 * 13}

    @compiled
    def run(x, y):
        gradient = jax.grad(lambda x: linear_cross_entropy(x, w, y, b, **options))(x)
        return linear_cross_entropy(x, w, y, b, reduction="none", **options), gradient

    call = checked(lambda y: linear_cross_entropy(x, w, y, ignore_index=-100))
    for bad in (-1, 13):
        wrong = np.where(np.arange(21) == 1, bad, labels)
        losses, gradient = run(x, wrong)
        assert np.isnan(losses).nonzero()[0].tolist() == [1]
        assert np.isnan(gradient).all(1).nonzero()[0].tolist() == [1]
        with pytest.raises(ValueError, match=rf"targets\[1\] is {bad}: expected a label in \[0, 13\) or ignore_index"):
            call(wrong)


def test_every_position_ignored():
    x, w, b, labels, _ = float64_problem()
    loss = lambda x, w, b: linear_cross_entropy(x, w, 0 * labels, b, ignore_index=0)  # noqa: E731
    for array in jax.tree.leaves(compiled(jax.value_and_grad(loss, (0, 1, 2)))(x * np.nan, w, b)):  # of padding
        assert (array == 0).all()
    of_none = lambda x: [linear_cross_entropy(x, w, labels[:0], reduction=r) for r in ("mean", "none")]  # noqa: E731
    mean, losses = compiled(of_none)(x[:0])
    assert mean == 0
    assert losses.shape == (0,)


def gemms(fn, *variables):
    """The matmuls in the program, with those of a loop's body counted once."""
    text = jax.jit(fn).lower(*variables).as_text()
    return len(re.findall(r"stablehlo\.dot_general", text))


def test_unneeded_matmuls_are_not_computed():
    x, w, _b, labels, _ = float64_problem()
    y = np.maximum(labels, 0)

    def loss(x, w, reduction="mean"):
        return jnp.sum(linear_cross_entropy(x, w, y, reduction=reduction))

    assert gemms(loss, x, w) == 1
    assert gemms(jax.grad(loss, (0, 1)), x, w) == 3
    assert gemms(jax.grad(loss, 0), x, w) == 2
    assert gemms(jax.grad(loss, 1), x, w) == 2
    mapped = lambda x, w: jnp.sum(jax.vmap(linear_cross_entropy, (0, None, 0))(x.reshape(3, 7, 4), w, y.reshape(3, 7)))  # noqa: E731
    assert gemms(jax.value_and_grad(mapped, (0, 1)), x, w) == 4
    assert gemms(jax.value_and_grad(mapped, 0), x, w) == 3
    each = lambda x, w: loss(x, w, "none")  # noqa: E731
    assert gemms(jax.value_and_grad(each, (0, 1)), x, w) == 4
    assert gemms(jax.value_and_grad(each, 1), x, w) == 3


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_pullback_survives_derivatives_to_other_variables(reduction):
    """JAX caches a rule's residuals with the traced function."""
    x, w, _, labels, _ = float64_problem()
    labels = np.maximum(labels, 0)

    def loss(x, w):
        return jnp.sum(linear_cross_entropy(x, w, labels, reduction=reduction))

    def expected(x, w):
        return jnp.sum(unfused(x, w, labels, reduction=reduction))

    def slope(loss, *at):
        return jax.jvp(jax.grad(loss, 1), at, at)[1]

    @compiled
    def run(*at):
        _, pullback = jax.vjp(loss, *at)
        alone, found = jax.grad(loss, 1)(*at), (slope(loss, *at), slope(expected, *at))
        return alone, found, (pullback(1.0), jax.grad(loss, (0, 1))(*at)), jax.grad(expected, (0, 1))(*at)

    alone, slopes, found, wanted = run(x, w)
    np.testing.assert_allclose(alone, wanted[1], rtol=1e-12)
    np.testing.assert_allclose(*slopes, rtol=1e-10, atol=1e-13)
    for gradients in found:
        for got, want in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12)


def test_float16_gradients_neither_vanish_nor_overflow():
    # Without the mean the sum is 65536, which float16 cannot hold.
    x, w, labels = np.full((32768, 1), 4, np.float16), np.zeros((1, 2), np.float16), np.zeros(32768, int)

    @compiled
    def run(w, x):
        scaled = jax.grad(lambda w: 2.0**10 * linear_cross_entropy(x, w, labels))(w)
        return scaled, jax.grad(lambda w: linear_cross_entropy(x, w, labels, reduction="sum") / 32768)(w)

    scaled, many = run(w, x)
    np.testing.assert_array_equal(scaled.astype(float), [[-2048, 2048]])
    np.testing.assert_array_equal(many.astype(float), [[-2, 2]])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_padding_may_be_nan_to_second_order(reduction):
    x, w, b, labels, _ = float64_problem()
    padded = np.where(labels[:, None] == -100, np.nan, x)

    def slope(w, x):
        loss = lambda w: jnp.sum(linear_cross_entropy(x, w, labels, b, ignore_index=-100, reduction=reduction))  # noqa: E731
        return jnp.sum(jnp.sin(jax.grad(loss)(w)))

    both = compiled(jax.value_and_grad(slope))
    (got, got_gradient), (want, want_gradient) = both(w, padded), both(w, x)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_allclose(got_gradient, want_gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_a_bias_of_minus_infinity_masks_a_class(soft_cap):
    x, w, b, labels, _ = float64_problem()
    labels, options = np.maximum(labels, 0) % 12, {"soft_cap": soft_cap, "z_loss": 0.1}

    @compiled
    def run(x, w, b):
        removed = lambda x, w: linear_cross_entropy(x, w, labels, b.at[12].set(-jnp.inf), **options)  # noqa: E731
        without = lambda x, w: unfused(x, w[:, :12], labels, b[:12], **options)  # noqa: E731
        return [jax.value_and_grad(loss, (0, 1))(x, w) for loss in (removed, without)]

    (value, gradients), (expected, wanted) = run(x, w, b)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)
    assert (gradients[1][:, 12] == 0).all()


def test_no_features_and_huge_logits():
    @compiled
    def run(nothing, huge):
        of_huge = linear_cross_entropy(huge, np.ones((1, 2), np.float32), np.zeros(1, int))
        return linear_cross_entropy(nothing, np.zeros((0, 7)), np.zeros(5, int)), of_huge

    of_nothing, of_huge = run(np.zeros((5, 0)), np.full((1, 1), 1e20, np.float32))
    np.testing.assert_allclose(of_nothing, np.log(7), rtol=1e-15)
    assert of_huge == np.float32(np.log(2))


def with_nan(array, *at):
    array = array.copy()
    array[at] = np.nan
    return array


def test_checked_names_the_first_nan():
    x, w, _, labels, _ = float64_problem()
    padded = np.where(labels[:, None] == -100, np.nan, x)
    call = checked(lambda x, w: linear_cross_entropy(x, w, labels, ignore_index=-100))
    call(padded, w)
    with pytest.raises(ValueError, match=r"features\[5, 2\] is nan: expected a number"):
        call(with_nan(padded, 5, 2), w)
    with pytest.raises(ValueError, match=r"kernel\[0, 3\] is nan: expected a number"):
        call(padded, with_nan(w, 0, 3))


def test_matmuls_run_in_the_dtype_of_the_inputs():
    x, w = np.ones((40, 8), jnp.bfloat16), np.ones((8, 5), jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda x, w: linear_cross_entropy(x, w, np.zeros(40, int)), (0, 1)))
    products = re.findall(r"stablehlo\.dot_general.* : \((.*)\) ->", gradient.lower(x, w).as_text())
    assert len(products) == 3
    assert all(operands.count("bf16") == 2 for operands in products)


def test_every_class_masked():
    """Targets of weight 0 add no loss, and there is no lse for the z-loss."""
    x, w, b, *_ = float64_problem()
    loss = lambda x, w, t, b: linear_cross_entropy(x, w, t, b, z_loss=0.1)  # noqa: E731
    fn = compiled(jax.value_and_grad(loss, (0, 1)))
    for array in jax.tree.leaves(fn(x, w, np.zeros((21, 13)), np.full_like(b, -np.inf))):
        assert (array == 0).all()


@pytest.mark.optimized
@pytest.mark.parametrize("positions", [4096, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1024, 16384))])
def test_temporaries_are_bounded_by_the_budget_and_the_gradients(positions):
    width, classes = 64, 32_000
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((positions, width), (width, classes))]
    labels = jax.ShapeDtypeStruct((positions,), jnp.int32)
    budget = 64 * 2**20

    def temporaries(loss):
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    fused = temporaries(lambda x, w, y: linear_cross_entropy(x, w, y, ignore_index=-100, memory_budget=budget))
    plan = plan_linear_cross_entropy(positions, width, classes, memory_budget=budget)
    assert plan.tile_bytes <= budget
    assert fused <= plan.tile_bytes + plan.gradient_bytes + 64 * (positions + classes)
    if positions == 4096:
        unfused = temporaries(lambda x, w, y: cross_entropy(jnp.dot(x, w), y))
        assert fused < 0.35 * unfused


@pytest.mark.optimized
def test_mapping_over_sequences_keeps_one_gradient_of_the_kernel():
    examples, positions, width, classes = 8, 32, 64, 8192
    x, y = np.ones((examples, positions, width), np.float32), np.zeros((examples, positions), np.int32)
    kernel, budget = np.ones((width, classes), np.float32), 2**20

    def loss(x, w, y):
        return linear_cross_entropy(x, w, y, memory_budget=budget)

    def mapped(x, w):
        return jnp.mean(jax.vmap(loss, (0, None, 0))(x, w, y))

    compiled = jax.jit(jax.grad(mapped, (0, 1))).lower(x, kernel).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= budget + 2 * kernel.nbytes + 4 * x.nbytes


def test_the_loop_ends_with_the_last_position_that_is_not_ignored():
    """The bound of the loop over tiles is a value of the program, not its length."""
    x, w, _b, labels, _ = float64_problem()
    fn = jax.jit(lambda y: linear_cross_entropy(x, w, y, ignore_index=-100, memory_budget=8 * 8 * 13))
    program = fn.lower(labels).as_text()
    assert "stablehlo.while" in program


def test_plan():
    plan = plan_linear_cross_entropy(1064, 24, 3001, memory_budget=8 * 3001 * 100)
    assert (plan.rows, plan.tiles) == (97, 11)  # as many tiles as 100 rows need, of equal size
    assert plan.flops == 2 * 1064 * 24 * 3001
    assert plan.training_flops == 3 * plan.flops
    assert plan.tile_bytes == 97 * 3001 * 8
    assert plan_linear_cross_entropy(1, 3, 2).rows == 1
    each = plan_linear_cross_entropy(10, 3, 7, "bfloat16", reduction="none", distributions=True)
    assert each.training_flops == 4 * each.flops
    assert each.gradient_bytes == 3 * (10 * 2 + 7 * 4)
    kept = [
        plan_linear_cross_entropy(4096, 4096, 32_000, "bfloat16", memory_budget=budget, platform="gpu").kept_bytes
        for budget in (66_000_000, 4096 * 32_000 * 2 + 256 * 32_000 * 8)
    ]
    assert kept == [0, 4096 * 32_000 * 2]  # within the budget or not at all


def test_the_plan_follows_the_kind_of_device_and_says_so():
    plan = functools.partial(plan_linear_cross_entropy, 4096, 4096, 128_256, "bfloat16")
    rows = {kind: plan(device_kind=kind).rows for kind in ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x")}
    assert rows == dict.fromkeys(rows, 4096)
    assert plan(device_kind="NVIDIA H100 80GB HBM3").rows == 512
    any_tpu = plan(platform="tpu")
    assert any_tpu[:-1] == plan(device_kind="TPU v6 lite")[:-1]
    once = "in one pass, where the kernel's gradient is written once"
    assert str(any_tpu).endswith(f"; for any TPU within a third of 16 GB, {once}")
    small = plan(device_kind="TPU7x", memory_budget=2**29)
    assert (small.groups, small.rows, small.tile_bytes <= 2**29, small.kept_bytes) == (2, 2048, True, 0)
    assert small.reason == "for TPU7x within the budget, in one pass, where the kernel's gradient is written 2 times"
    assert plan(device_kind="cpu").reason == "on a CPU"
    with pytest.raises(ValueError, match="device_kind: expected a kind of the platform 'gpu', got 'TPU7x'"):
        plan(platform="gpu", device_kind="TPU7x")
    with pytest.raises(TypeError, match="device_kind: expected a string, got 7"):
        plan(device_kind=7)
    for unknown in ("H100", "TPU of tomorrow"):
        known = "'TPU v5 lite', 'TPU v5', .*'NVIDIA B200'"
        with pytest.raises(ValueError, match=f"begins with one of {known}, got '{unknown}'; .* platform alone"):
            plan(device_kind=unknown)


def test_a_plan_for_a_platform_needs_no_device():
    """A process of a cluster has no devices before it has met the others."""
    program = (
        "from jaxsoft import plan_linear_cross_entropy as plan; from jax._src import xla_bridge; "
        "plan(8, 4, 9, platform='cpu'); assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(platform):
    x, w, b, labels, _ = float64_problem()
    fn = jax.jit(jax.grad(lambda x: linear_cross_entropy(x, w, labels, b, ignore_index=-100)))
    assert jax.export.export(fn, platforms=[platform])(x).platforms == (platform,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, w, b, y: linear_cross_entropy(x, w.T, y), ValueError, r"kernel: expected shape (4, classes) with at least one class, got (13, 4); for a kernel of shape (classes, features) pass kernel_axis=0"),
        (lambda x, w, b, y: linear_cross_entropy(x, w, y, b[:3]), ValueError, r"bias: expected shape (13,), one number per class, got (3,)"),
        (lambda x, w, b, y: linear_cross_entropy(x[0, 0], w, y), ValueError, r"features: expected at least one axis, the features, got a scalar"),
        (lambda x, w, b, y: linear_cross_entropy(x, w, y[:2]), ValueError, r"targets: expected integer labels of shape (21,)"),
        (lambda x, w, b, y: linear_cross_entropy(x, w, y, soft_cap=0), ValueError, r"soft_cap: expected a finite number above 0, got 0"),
        (lambda x, w, b, y: linear_cross_entropy(x, w, y, kernel_axis=0), ValueError, r"kernel: expected shape (classes, 4) with at least one class, got (4, 13); for a kernel of shape (features, classes) pass kernel_axis=-1"),
        (lambda x, w, b, y: linear_cross_entropy(x, w, y, kernel_axis=2), ValueError, r"kernel_axis: expected an integer in [-2, 2), got 2"),
        (lambda x, w, b, y: linear_cross_entropy(x, w, y, temperature=0), ValueError, r"temperature: expected a finite number above 0, got 0"),
        (lambda x, w, b, y: linear_cross_entropy(x, w, y, where=np.ones(4, bool)), ValueError, r"where: expected a shape that broadcasts to (13,), got (4,)"),
        (lambda x, w, b, y: linear_cross_entropy(x, w.astype(jnp.float8_e4m3fn), y), TypeError, r"kernel: expected at least 16 bits, got dtype float8_e4m3fn: convert to bfloat16 first"),
        (lambda x, w, b, y: linear_cross_entropy(x, w, y, memory_budget=100), ValueError, r"memory_budget: expected at least 208 bytes, one position's logits and gradient, got 100"),
        (lambda x, w, b, y: linear_cross_entropy(x, w, y, memory_budget=1e9), TypeError, r"memory_budget: expected an integer, got 1000000000.0"),
        (lambda x, w, b, y: linear_cross_entropy(x, w, y, reduction="average"), ValueError, r"reduction: expected 'none', 'sum' or 'mean', got 'average'"),
        (lambda x, w, b, y: linear_cross_entropy(x, w, y, axis_name="v"), ValueError, r"axis_name: expected a mesh axis of an enclosing jax.shard_map with check_vma=True, its default (linear_cross_entropy also takes an axis of a mesh set by jax.set_mesh), got 'v'"),
        (lambda x, w, b, y: linear_cross_entropy(x.astype(complex), w, y), TypeError, r"features: expected real numbers, got dtype complex128"),
        (lambda x, w, b, y: plan_linear_cross_entropy(4, 4, 13, "int32"), TypeError, r"dtype: expected a floating dtype, got int32"),
        (lambda x, w, b, y: plan_linear_cross_entropy(4, 4, 13, "bf16"), TypeError, r"dtype: expected a floating dtype, such as 'bfloat16', got 'bf16'"),
        (lambda x, w, b, y: plan_linear_cross_entropy(0, 4, 13), ValueError, r"positions: expected a positive integer, got 0"),
    ],
)  # fmt: skip
def test_errors_name_argument_expected_and_actual(call, error, message):
    x, w, b, labels, _ = float64_problem()
    with pytest.raises(error, match=re.escape(message)):
        call(x, w, b, labels)
