"""Heads beside the loss: log-probabilities, statistics, top-k, sparse targets, divergences, each against full logits."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import reference
from jaxsoft import (
    SparseTargets,
    checked,
    cross_entropy,
    entropy,
    kl_divergence,
    linear_cross_entropy,
    linear_kl_divergence,
    linear_log_probs,
    linear_top_k,
)

SIZES = [(37, 9, 203), (130, 16, 2049), (1, 3, 2)]
TEACHER = 5  # its width
OUTSIDE = ["tail", "renormalise", "nothing"]
KINDS = ["forward", "reverse", "jensen-shannon"]


class Problem:
    """Arrays of a size, in float64; of the sparse targets one class is there twice, and a position has padding."""

    def __init__(self, positions, width, classes):
        rng = np.random.default_rng(positions)
        self.x, self.w = rng.normal(size=(positions, width)), rng.normal(size=(width, classes)) / width**0.5
        self.b = rng.normal(size=classes)
        self.labels = rng.integers(0, classes, positions)
        self.weights = rng.uniform(0.1, 2, positions) * (np.arange(positions) % 4 != 1)
        self.teacher = rng.normal(size=(positions, TEACHER)), rng.normal(size=(TEACHER, classes))
        self.k = min(6, classes)
        self.indices = np.stack([rng.permutation(classes)[: self.k] for _ in range(positions)])
        self.probs = rng.dirichlet(np.ones(self.k + 1), positions)[:, : self.k]
        if classes > 2:
            self.indices[:, 3] = self.indices[:, 1]
            self.indices[0, -1], self.probs[0, -1] = -1, 0


problem = functools.cache(Problem)


# ---- The same from all logits, as one would write it.


def naive_log_probs(z, p):
    log_p = reference.log_softmax(z)
    label = jnp.take_along_axis(log_p, p.labels[:, None], 1)[:, 0]
    return label, reference.logsumexp(z), -jnp.sum(jnp.exp(log_p) * log_p, 1)


def naive_top_k(z, p):
    return jax.lax.top_k(reference.log_softmax(z), p.k)[0], reference.logsumexp(z)


def one_hot_sums(p, q, classes):
    """q of the K classes as a distribution over all, and which classes are among the K."""
    hot = np.equal.outer(np.asarray(p.indices), np.arange(classes))
    return jnp.einsum("nk,nkv->nv", q, hot.astype(q.dtype)), hot.any(1)


def naive_sparse(z, q, p, outside):
    q = jnp.where(p.indices < 0, 0, q)
    spread, among = one_hot_sums(p, q, z.shape[1])
    probs = reference.softmax(z)
    if outside == "renormalise":
        probs, spread = (a / jnp.sum(a, 1, keepdims=True) for a in (jnp.where(among, probs, 0), spread))
    losses = -jnp.sum(jnp.where(among, spread * jnp.log(jnp.where(among, probs, 1)), 0), 1)
    if outside == "tail" and not among.all():
        losses -= (1 - jnp.sum(q, 1)) * jnp.log(jnp.sum(jnp.where(among, 0, probs), 1))
    return losses


def naive_divergence(z, of_teacher, kind, beta=0.3):
    s, t = reference.softmax(z), reference.softmax(of_teacher)

    def kl(p, q):
        left = p > 0
        return jnp.sum(jnp.where(left, p * (jnp.log(jnp.where(left, p, 1)) - jnp.log(jnp.where(left, q, 1))), 0), 1)

    m = beta * t + (1 - beta) * s
    return {"forward": kl(t, s), "reverse": kl(s, t), "jensen-shannon": beta * kl(t, m) + (1 - beta) * kl(s, m)}[kind]


def logits_of(x, w, b, *, soft_cap=None, temperature=1.0, where=None):
    z = x @ w + b
    z = z if soft_cap is None else soft_cap * jnp.tanh(z / soft_cap)
    z = z / temperature
    return z if where is None else jnp.where(where, z, -600)  # of which the derivative of a logarithm is finite


# ---- Each head as (ours, naive) of the variables (x, w, b, q), to a tuple of arrays a position.


def log_probs_head(p, **options):
    def ours(x, w, b, q):
        found = linear_log_probs(x, w, p.labels, b, entropy=True, **options)
        return found.label, found.logsumexp, found.entropy

    return ours, lambda z, q: naive_log_probs(z, p)


def plain_log_probs_head(p, **options):
    def ours(x, w, b, q):
        found = linear_log_probs(x, w, p.labels, b, **options)
        return found.label, found.logsumexp

    return ours, lambda z, q: naive_log_probs(z, p)[:2]


def top_k_head(p, **options):
    def ours(x, w, b, q):
        found = linear_top_k(x, w, p.k, b, **options)
        return found.log_probs, found.logsumexp

    return ours, lambda z, q: naive_top_k(z, p)


def sparse_head(outside, p, **options):
    def ours(x, w, b, q):
        targets = SparseTargets(p.indices, q, outside)
        return (linear_cross_entropy(x, w, targets, b, reduction="none", z_loss=0.01, **options),)

    return ours, lambda z, q: (naive_sparse(z, q, p, outside) + 0.01 * reference.logsumexp(z) ** 2,)


def divergence_head(kind, p, **options):
    teacher = [jnp.asarray(a, jnp.bfloat16).astype(float) for a in p.teacher]  # the same in every dtype

    def ours(x, w, b, q):
        of_teacher = (a.astype(x.dtype) for a in teacher)
        return (linear_kl_divergence(x, w, *of_teacher, b, kind=kind, beta=0.3, reduction="none", **options),)

    def naive(z, q):
        more = {name: options[name] for name in ("temperature", "where") if name in options}
        return (naive_divergence(z, logits_of(*teacher, 0.0, **more), kind),)

    return ours, naive


HEADS = {
    "log-probabilities": log_probs_head,
    "without entropy": plain_log_probs_head,
    "top-k": top_k_head,
    **{outside: functools.partial(sparse_head, outside) for outside in OUTSIDE},
    **{kind: functools.partial(divergence_head, kind) for kind in KINDS},
}


def options_of(name, p):
    classes = p.w.shape[1]
    where = np.ones(classes, bool)
    where[np.setdiff1d(np.arange(classes), [*p.labels, *p.indices.flat])[::2]] = False
    return {
        "plain": {},
        "tiles": {"memory_budget": 16 * classes * max(1, len(p.x) // 3)},
        "capped": {"soft_cap": 2.0, "temperature": 0.7},
        "masked": {"where": where},
    }[name]


def value_and_vjp(fn, variables, seed=0):
    """Under a random cotangent for each number."""
    values, pullback = jax.vjp(fn, *variables)
    rng = np.random.default_rng(seed)
    return values, pullback(jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape), v.dtype), values))


def close(actual, expected, *, values=2e-5, gradients=3e-5):
    for got, want in zip(actual[0], expected[0], strict=True):
        np.testing.assert_allclose(got, want, rtol=values, atol=values * min(1, np.abs(want).max()))
    for got, want in zip(actual[1], expected[1], strict=True):
        assert np.isfinite(want).all()
        np.testing.assert_allclose(got, want, rtol=0, atol=gradients * np.abs(want).max() + 1e-30)


def on_variables(p, dtype):
    return tuple(jnp.asarray(v, dtype) for v in (p.x, p.w, p.b, p.probs))


def from_logits(naive, options):
    kept = {key: value for key, value in options.items() if key not in ("memory_budget", "kernel_axis")}
    return lambda x, w, b, q: naive(logits_of(x, w, b, **kept), q)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(
    ("size", "option"),
    [(SIZES[0], option) for option in ("plain", "tiles", "capped", "masked")] + [(size, "plain") for size in SIZES[1:]],
    ids=str,
)
def test_equals_the_naive_formula(name, size, option):
    p = problem(*size)
    ours, naive = HEADS[name](p, **options_of(option, p))
    expected = jax.jit(functools.partial(value_and_vjp, from_logits(naive, options_of(option, p))))
    actual = jax.jit(functools.partial(value_and_vjp, ours))
    close(actual(on_variables(p, jnp.float32)), expected(on_variables(p, jnp.float64)))


@pytest.mark.parametrize("name", HEADS)
def test_derivatives_of_second_order(name):
    """Forward over reverse, and reverse over reverse, in float64."""
    p = problem(7, 4, 13)
    options = {"memory_budget": 16 * 13 * 3, "temperature": 1.3}
    ours, naive = HEADS[name](p, **options)
    variables = on_variables(p, jnp.float64)
    moved = 4 if name in OUTSIDE else 3
    tangents = tuple(
        jnp.asarray(np.random.default_rng(n).normal(size=v.shape)) for n, v in enumerate(variables[:moved])
    )

    def twice(fn):
        def gradients(*moving):
            return value_and_vjp(lambda *v: fn(*v, *variables[moved:]), moving)[1]

        forward = jax.jvp(gradients, variables[:moved], tangents)[1]
        reverse = jax.vjp(gradients, *variables[:moved])[1](tangents)
        return forward, reverse

    for got, want in zip(
        *(jax.tree.leaves(jax.jit(twice, static_argnums=0)(f)) for f in (ours, from_logits(naive, options))),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", HEADS)
def test_mapped_over_sequences(name):
    p = problem(12, 4, 13)
    ours, _ = HEADS[name](p)
    x, w, b, q = on_variables(p, jnp.float64)
    labels, indices, teacher = p.labels, p.indices, p.teacher[0]

    def of_rows(x, w, b, q, labels, indices, teacher):
        rows = Problem.__new__(Problem)
        rows.__dict__.update(p.__dict__, labels=labels, indices=indices, teacher=(teacher, p.teacher[1]))
        return HEADS[name](rows)[0](x, w, b, q)

    split = [jnp.asarray(a).reshape(3, 4, *a.shape[1:]) for a in (x, q, labels, indices, teacher)]
    mapped = jax.vmap(of_rows, (0, None, None, 0, 0, 0, 0))(split[0], w, b, *split[1:])
    for got, want in zip(mapped, ours(x, w, b, q), strict=True):
        np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", HEADS)
def test_half_precision(name):
    """Values and gradients of the float32 head at the same rounded inputs."""
    p = problem(130, 16, 2049)
    ours, _ = HEADS[name](p)
    q = jnp.asarray(p.probs, jnp.float32)  # of which half precision has another idea of what they leave
    half = on_variables(p, jnp.bfloat16)[:3]
    run = jax.jit(functools.partial(value_and_vjp, lambda *layer: ours(*layer, q)))
    actual, expected = run(half), run(tuple(v.astype(jnp.float32) for v in half))
    assert all(v.dtype == jnp.float32 for v in actual[0])
    assert all(g.dtype == jnp.bfloat16 for g in actual[1])
    close(actual, expected, values=2e-5, gradients=8e-3)


def test_kernels_of_tied_embeddings():
    p = problem(*SIZES[0])
    for name, head in HEADS.items():
        x, w, b, q = on_variables(p, jnp.float64)
        transposed = Problem.__new__(Problem)
        transposed.__dict__.update(p.__dict__, teacher=(p.teacher[0], p.teacher[1].T))
        for got, want in zip(head(transposed, kernel_axis=0)[0](x, w.T, b, q), head(p)[0](x, w, b, q), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, err_msg=name)


# ---- Digits that a subtraction would lose, in float32 against float64.


@pytest.mark.parametrize("margin", [-80, -40, -16, 0, 10, 20, 40, 80])
def test_log_probabilities_and_entropies_of_nearly_certain_rows(margin):
    z = np.array([[0.0, margin, -1.0, 0.5, -2.0]])
    variables = jnp.eye(1), jnp.asarray(z), jnp.array([1])
    with jax.enable_x64(True):
        exact = z.astype(np.longdouble) - z.max()
        e = np.exp(exact)
        others = np.delete(e, np.argmax(z), 1).sum()
        log_total = np.log1p(others)
        label, expected = exact[0, 1] - log_total, log_total - (e * exact).sum() / e.sum()
    features, kernel = (v.astype(jnp.float32) for v in variables[:2])
    found = linear_log_probs(features, kernel, variables[2], entropy=True)
    np.testing.assert_allclose(found.label[0], float(label), rtol=1e-5)
    np.testing.assert_allclose(found.entropy[0], float(expected), rtol=1e-5)
    assert found.label[0] <= 0
    assert int(found.argmax[0]) == z.argmax()
    np.testing.assert_allclose(entropy(jnp.asarray(z, jnp.float32)), found.entropy, rtol=1e-6)
    # Gradients to the logits, as those to a kernel of one feature.
    p = e / e.sum()
    of_label = -p[0]
    of_label[1] = np.delete(p[0], 1).sum()
    for of, name, want in (
        (True, "label", of_label),
        (False, "label", of_label),
        (True, "logsumexp", p[0]),
        (True, "entropy", -p[0] * (exact[0] - log_total + expected)),
    ):
        number = lambda w, of=of, name=name: getattr(linear_log_probs(features, w, variables[2], entropy=of), name)[0]  # noqa: E731
        np.testing.assert_allclose(jax.grad(number)(kernel)[0], np.asarray(want, float), rtol=2e-5, atol=1e-37)


def test_what_lies_outside_of_sparse_targets_has_its_digits():
    """1 − p is 0 in float32, whose logarithm is −inf."""
    z = jnp.array([[25.0, 22.0, 0.0, 1.0, -1.0]], jnp.float32)
    q = jnp.array([[0.9, 0.05]], jnp.float32)
    p = np.exp(np.float64(z[0]) - 25)
    total = p.sum()
    expected = -(0.9 * np.log(1 / total) + 0.05 * np.log(p[1] / total)) - (1 - 0.95) * np.log(p[2:].sum() / total)
    got = cross_entropy(z, SparseTargets(jnp.array([[0, 1]]), q))
    assert 1 - jax.nn.softmax(z)[0, :2].sum() <= 1.2e-7
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 30.0])
def test_divergences_keep_their_digits(kind, scale):
    rng = np.random.default_rng(3)
    z = rng.normal(size=(4, 50)).astype(np.float32)
    other = z + np.float32(scale) * rng.normal(size=(4, 50)).astype(np.float32)
    expected = naive_divergence(jnp.asarray(z, jnp.float64), jnp.asarray(other, jnp.float64), kind)
    got = kl_divergence(jnp.asarray(z), jnp.asarray(other), kind=kind, beta=0.3, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=2e-3 if scale == 1e-4 else 2e-5)
    if scale == 1e-4:
        assert (np.asarray(expected) < 2e-8).all()
    assert 0 <= kl_divergence(jnp.asarray(z), jnp.asarray(z) + 3, kind=kind) < 1e-10


# ---- Sparse targets beside the other two forms.


@pytest.mark.x32
@pytest.mark.parametrize("outside", ["tail", "nothing"])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1, "weights": np.linspace(0, 2, 37, dtype=np.float32)}], ids=str)
def test_one_certain_class_is_the_label_bit_for_bit(outside, options):
    p = problem(*SIZES[0])
    x, w, b, _ = on_variables(p, jnp.float32)
    sparse = SparseTargets(p.labels[:, None], np.ones((37, 1), np.float32), outside)
    for head in (
        lambda t: jax.value_and_grad(linear_cross_entropy, (0, 1, 3))(x, w, t, b, **options),
        lambda t: jax.value_and_grad(cross_entropy)(x @ w + b, t, **options),
    ):
        for got, want in zip(jax.tree.leaves(head(sparse)), jax.tree.leaves(head(p.labels)), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_all_classes_are_the_distribution(outside):
    p = problem(*SIZES[0])
    x, w, b, _ = on_variables(p, jnp.float32)
    rng = np.random.default_rng(1)
    q = rng.dirichlet(np.ones(203), 37).astype(np.float32)
    order = np.stack([rng.permutation(203) for _ in range(37)])
    sparse = SparseTargets(order, np.take_along_axis(q, order, 1), outside)
    got = jax.value_and_grad(linear_cross_entropy, (0, 1, 3))(x, w, sparse, b)
    want = jax.value_and_grad(linear_cross_entropy, (0, 1, 3))(x, w, jnp.asarray(q), b)
    for a, c in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, c, rtol=2e-5, atol=2e-5 * np.abs(c).max())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_sparse_targets_along_any_axis(axis):
    rng = np.random.default_rng(0)
    z, ids = rng.normal(size=(4, 5, 9)), np.argsort(rng.normal(size=(4, 5, 9)), -1)[..., :3]
    q = rng.dirichlet(np.ones(4), (4, 5))[..., :3]
    last = SparseTargets(jnp.asarray(ids), jnp.asarray(q))
    moved = SparseTargets(*(jnp.moveaxis(a, -1, axis) for a in (last.indices, last.probs)))
    got = cross_entropy(jnp.moveaxis(jnp.asarray(z), -1, axis), moved, axis, reduction="none")
    np.testing.assert_allclose(got, cross_entropy(jnp.asarray(z), last, reduction="none"), rtol=1e-12)


def test_only_the_tail_has_its_least_where_the_student_is_the_teacher():
    """What the other kinds of outside teach is not the teacher's distribution."""
    z = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))

    def slope(outside, z):
        return jax.grad(
            lambda z: cross_entropy(z, SparseTargets(jnp.array([[0, 1]]), jnp.array([[0.4, 0.3]]), outside))
        )(z)

    assert np.abs(slope("tail", z)).max() < 1e-12
    assert np.abs(slope("renormalise", z)).max() < 1e-12
    # It is as content with a student that has next to nothing outside of the two.
    drawn = jnp.log(jnp.array([[0.4, 0.3, 2e-9, 1e-9]]))
    assert np.abs(slope("renormalise", drawn)).max() < 1e-12
    assert np.abs(slope("tail", drawn)).max() > 0.1
    # To the two it gives what it can get.
    assert (slope("nothing", z)[0, :2] < -0.05).all()
    assert (slope("nothing", z)[0, 2:] > 0.05).all()


# ---- Edges.


def test_ignored_positions():
    p = problem(*SIZES[0])
    x, w, b, _ = on_variables(p, jnp.float64)
    ignored = np.arange(37) % 3 == 0
    labels = np.where(ignored, -100, p.labels)
    x = x.at[ignored].set(jnp.nan)  # padding may be anything

    def ours(x, w):
        return linear_log_probs(x, w, labels, b, ignore_index=-100, entropy=True)

    found = ours(x, w)
    left = linear_log_probs(x[~ignored], w, p.labels[~ignored], b, entropy=True)
    for got, want in zip(found, left, strict=True):
        np.testing.assert_allclose(got[~ignored], want, rtol=1e-13)
    assert (found.argmax[ignored] == -1).all()
    for value in (found.label, found.logsumexp, found.entropy):
        assert (value[ignored] == 0).all()
    moving = lambda x, w: (lambda f: (f.label, f.logsumexp, f.entropy))(ours(x, w))  # noqa: E731
    to_x, to_w = value_and_vjp(moving, (x, w))[1]
    assert (to_x[ignored] == 0).all()
    assert np.isfinite(to_w).all()


def test_weights_of_zero_leave_a_position_out():
    p = problem(*SIZES[0])
    x, w, b, q = on_variables(p, jnp.float64)
    taking, weights = p.weights != 0, jnp.asarray(p.weights)
    padded = x.at[~taking].set(jnp.nan)
    for outside in OUTSIDE:
        all_in = linear_cross_entropy(padded, w, SparseTargets(p.indices, q, outside), b, weights=weights)
        each = linear_cross_entropy(x, w, SparseTargets(p.indices, q, outside), b, reduction="none")
        np.testing.assert_allclose(all_in, jnp.sum(weights * each) / jnp.sum(weights), rtol=1e-12)
    features, kernel = p.teacher
    hidden = jnp.where(taking[:, None], features, jnp.nan)
    for kind in KINDS:
        fn = lambda x, t, kind=kind: linear_kl_divergence(x, w, t, kernel, b, kind=kind, weights=weights)  # noqa: E731
        value, slope = jax.value_and_grad(fn)(padded, hidden)
        want, of_whole = jax.value_and_grad(fn)(x, features)
        np.testing.assert_allclose(value, want, rtol=1e-12)
        np.testing.assert_allclose(slope, jnp.where(taking[:, None], of_whole, 0), rtol=1e-10, atol=1e-15)


def test_a_label_out_of_range_is_nan_and_nothing_else():
    p = problem(*SIZES[0])
    x, w, b, q = on_variables(p, jnp.float64)
    labels = p.labels.copy()
    labels[3] = 203
    found = linear_log_probs(x, w, labels, b, entropy=True)
    assert np.isnan(found.label).nonzero()[0].tolist() == [3]
    assert np.isfinite(found.entropy).all()
    slope = jax.grad(lambda x: linear_log_probs(x, w, labels, b).label.sum())(x)
    assert np.isnan(slope).any(1).nonzero()[0].tolist() == [3]
    with pytest.raises(ValueError, match=r"targets\[3\] is 203: expected a label in \[0, 203\)"):
        checked(lambda: linear_log_probs(x, w, labels, b))()
    indices = p.indices.copy()
    indices[5, 0] = 999
    for outside in OUTSIDE:
        losses = linear_cross_entropy(x, w, SparseTargets(indices, q, outside), b, reduction="none")
        assert np.isnan(losses).nonzero()[0].tolist() == [5]
    with pytest.raises(ValueError, match=r"targets\.indices\[5, 0\] is 999: expected a class in \[0, 203\)"):
        checked(lambda: linear_cross_entropy(x, w, SparseTargets(indices, q), b))()


def test_removed_classes():
    """No class left, a removed label, fewer classes than k."""
    x, w = jnp.ones((2, 1)), jnp.array([[1.0, 2.0, 3.0]])
    found = linear_log_probs(x, w, jnp.array([0, 2]), where=jnp.array([True, True, False]), entropy=True)
    np.testing.assert_array_equal(found.label[1], -np.inf)
    np.testing.assert_array_equal(found.argmax, [1, 1])
    none = linear_log_probs(x, w, jnp.array([0, 2]), where=jnp.zeros(3, bool), entropy=True)
    np.testing.assert_array_equal(none.logsumexp, -np.inf)
    np.testing.assert_array_equal(none.entropy, 0)
    np.testing.assert_array_equal(none.argmax, -1)
    top = linear_top_k(x, w, 3, where=jnp.array([True, False, True]))
    np.testing.assert_array_equal(top.log_probs[:, 2], -np.inf)
    np.testing.assert_array_equal(top.indices[:, :2], [[2, 0]] * 2)
    _, pullback = jax.vjp(lambda w: linear_top_k(x, w, 3, where=jnp.array([True, False, True])).log_probs, w)
    (slope,) = pullback(jnp.array([[1.0, 2.0, jnp.nan]] * 2))  # what is given to a removed class is dropped
    np.testing.assert_array_equal(slope, pullback(jnp.array([[1.0, 2.0, 0.0]] * 2))[0])
    assert np.isfinite(slope).all()
    assert slope[0, 1] == 0
    for kind in KINDS:
        both = [jnp.array([[1.0, 2.0, -jnp.inf]]), jnp.array([[0.0, 1.5, -jnp.inf]])]
        value, slope = jax.value_and_grad(kl_divergence)(*both, kind=kind)
        np.testing.assert_allclose(value, kl_divergence(*(z[:, :2] for z in both), kind=kind), rtol=1e-12)
        assert slope[0, 2] == 0
    # One of both has a class which the other has not: infinite from the one that has it, and what a finite logit gives.
    lacking, whole = jnp.array([[1.0, 2.0, -jnp.inf]]), jnp.array([[0.5, 0.0, 1.0]])
    nearly = lacking.at[0, 2].set(-600)
    assert kl_divergence(lacking, whole) == kl_divergence(whole, lacking, kind="reverse") == np.inf
    for kind, student, teacher in (("forward", whole, lacking), ("reverse", lacking, whole)):
        np.testing.assert_allclose(
            kl_divergence(student, teacher, kind=kind), naive_divergence(student, teacher, kind)[0]
        )
    for student, teacher in ((whole, lacking), (lacking, whole)):
        fn = lambda z, t: kl_divergence(z, t, kind="jensen-shannon", beta=0.3)  # noqa: E731
        value, slope = jax.value_and_grad(fn)(student, teacher)
        finite = [jnp.where(z == lacking, nearly, z) for z in (student, teacher)]
        naive = lambda z, t: naive_divergence(z, t, "jensen-shannon")[0]  # noqa: E731
        of_naive = jax.value_and_grad(naive)(*finite)
        np.testing.assert_allclose(value, of_naive[0], rtol=1e-12)
        np.testing.assert_allclose(slope, of_naive[1], rtol=1e-10, atol=1e-15)
    for kind in KINDS:
        value, slope = jax.value_and_grad(kl_divergence)(whole, jnp.full((1, 3), -jnp.inf), kind=kind)
        assert value == 0
        assert (slope == 0).all()


def test_equal_logits_come_by_their_index():
    top = linear_top_k(jnp.ones((1, 1)), jnp.array([[1.0, 3.0, 3.0, 3.0, 1.0]]), 3)
    np.testing.assert_array_equal(top.indices, [[1, 2, 3]])
    assert linear_log_probs(jnp.ones((1, 1)), jnp.array([[1.0, 3.0, 3.0]]), jnp.array([0])).argmax == 1


def test_indices_of_narrow_dtypes():
    """uint8 cannot hold 256, the number of classes to compare with."""
    x, w = jnp.ones((2, 3)), jnp.asarray(np.random.default_rng(0).normal(size=(3, 256)))
    q = jnp.full((2, 2), 0.3)
    indices = np.array([[200, 3], [5, 255]])
    wide = linear_cross_entropy(x, w, SparseTargets(indices, q))
    np.testing.assert_array_equal(linear_cross_entropy(x, w, SparseTargets(indices.astype(np.uint8), q)), wide)


def test_probs_of_half_precision_leave_no_mass_by_rounding():
    z = jnp.array([[0.0, 1.0, -jnp.inf]])
    probs = jnp.array([[0.9, 0.1]], jnp.bfloat16)
    rounded = cross_entropy(z, SparseTargets(jnp.array([[0, 1]]), probs))
    np.testing.assert_allclose(
        rounded, cross_entropy(z, SparseTargets(jnp.array([[0, 1]]), probs.astype(float), "nothing"))
    )


def test_padding_of_probs_has_no_gradient():
    p = problem(*SIZES[0])
    x, w, b, q = on_variables(p, jnp.float64)
    padded = q.at[~(p.weights != 0)].set(jnp.nan)
    for outside in OUTSIDE:
        fn = lambda q, o=outside: linear_cross_entropy(x, w, SparseTargets(p.indices, q, o), b, weights=p.weights)  # noqa: E731
        np.testing.assert_allclose(checked(jax.grad(fn))(padded), jax.grad(fn)(q), rtol=1e-12, atol=1e-15)


def test_a_teacher_of_another_dtype():
    p = problem(*SIZES[0])
    for student, teacher in ((jnp.float32, jnp.float64), (jnp.float64, jnp.float32), (jnp.bfloat16, jnp.float64)):
        x, w, b, _ = on_variables(p, student)
        other = [jnp.asarray(a, teacher) for a in p.teacher]
        for kind in KINDS:
            got = linear_kl_divergence(x, w, *other, b, kind=kind)
            want = linear_kl_divergence(*(a.astype(float) for a in (x, w, *other, b)), kind=kind)
            np.testing.assert_allclose(got, want, rtol=2e-5)
            z, t = x[:, :3], other[0][:, :3]
            got = kl_divergence(z, t, kind=kind)
            np.testing.assert_allclose(got, kl_divergence(z.astype(float), t.astype(float), kind=kind), rtol=2e-5)


def test_checked_sees_the_teacher():
    x, w = jnp.ones((2, 3)), jnp.ones((3, 4))
    with pytest.raises(ValueError, match=r"teacher_features\[1, 0\] is nan: expected a number"):
        checked(linear_kl_divergence)(x, w, x.at[1, 0].set(jnp.nan), w)
    with pytest.raises(ValueError, match=r"teacher_kernel\[2, 3\] is nan: expected a number"):
        checked(linear_kl_divergence)(x, w, x, w.at[2, 3].set(jnp.nan))
    with pytest.raises(ValueError, match=r"teacher_logits\[0, 1\] is nan: expected a number"):
        checked(kl_divergence)(w, w.at[0, 1].set(jnp.nan))


def test_no_positions():
    w = jnp.ones((2, 5))
    assert linear_log_probs(jnp.ones((0, 2)), w, jnp.zeros(0, int)).label.shape == (0,)
    assert linear_top_k(jnp.ones((3, 0, 2)), w, 2).log_probs.shape == (3, 0, 2)
    assert linear_kl_divergence(jnp.ones((0, 2)), w, jnp.ones((0, 2)), w) == 0


def test_statistics_beside_the_loss():
    p = problem(*SIZES[0])
    x, w, b, q = on_variables(p, jnp.float64)
    labels = np.where(np.arange(37) % 5 == 0, -100, p.labels)
    want = linear_log_probs(x, w, labels, b, ignore_index=-100, entropy=True)
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"reduction": "none"}):
        more = {"ignore_index": -100, **options}
        with_statistics = functools.partial(linear_cross_entropy, with_statistics=True, **more)
        loss, found = with_statistics(x, w, labels, b)
        np.testing.assert_allclose(loss, linear_cross_entropy(x, w, labels, b, **more), rtol=1e-12)
        for got, of in zip(found, want, strict=True):
            np.testing.assert_allclose(got, of, rtol=1e-12, atol=1e-15)

        def total(w, fn=with_statistics):
            loss, found = fn(x, w, labels, b)
            return jnp.sum(loss) + jnp.sum(found.entropy) + jnp.sum(found.label), found

        slope, beside = jax.grad(total, has_aux=True)(w)
        alone = jax.grad(lambda w, more=more: jnp.sum(linear_cross_entropy(x, w, labels, b, **more)))(w)
        np.testing.assert_allclose(slope, alone, rtol=1e-9, atol=1e-14)  # what is beside it is constant
        np.testing.assert_array_equal(beside.argmax, want.argmax)
    for targets in (SparseTargets(p.indices, q), jnp.asarray(np.eye(203)[p.labels])):
        loss, found = linear_cross_entropy(x, w, targets, b, with_statistics=True)
        np.testing.assert_allclose(loss, linear_cross_entropy(x, w, targets, b), rtol=1e-12)
        assert found.label is None
        np.testing.assert_allclose(found.entropy, entropy(x @ w + b), rtol=1e-10)


def products(fn, *variables):
    """The matrix products in the program, those of a loop's body counted once."""
    return len(re.findall(r"stablehlo\.dot_general", jax.jit(fn).lower(*variables).as_text()))


def test_no_more_products_than_there_must_be():
    p = problem(*SIZES[0])
    x, w, b, q = on_variables(p, jnp.float32)
    loss = functools.partial(linear_cross_entropy, bias=b)
    assert products(jax.grad(loss, (0, 1)), x, w, p.labels) == 3
    assert products(jax.grad(functools.partial(loss, with_statistics=True), (0, 1), has_aux=True), x, w, p.labels) == 3
    assert products(jax.grad(lambda x, w: loss(x, w, SparseTargets(p.indices, q)), (0, 1)), x, w) == 3
    teacher = [jnp.asarray(a, jnp.float32) for a in p.teacher]
    assert products(jax.grad(lambda x, w: linear_kl_divergence(x, w, *teacher), (0, 1)), x, w) == 4
    assert products(lambda x, w: linear_log_probs(x, w, p.labels, entropy=True), x, w) == 1
    assert products(lambda x, w: linear_top_k(x, w, 3), x, w) == 1


@pytest.mark.x32
@pytest.mark.optimized
@pytest.mark.parametrize("name", ["log-probabilities", "top-k", "tail", "forward"])
def test_temporaries_are_bounded_by_the_budget_and_the_gradients(name):
    positions, width, classes, budget = 4096, 64, 32_000, 64 * 2**20
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((positions, width), (width, classes))]
    p = Problem(8, width, classes)
    p.labels = np.zeros(positions, np.int32)
    p.indices, p.teacher = np.tile(p.indices, (512, 1)), (np.zeros((positions, 4)), p.teacher[1][:4])
    q = jnp.asarray(np.tile(p.probs, (512, 1)), jnp.float32)
    ours, _ = HEADS[name](p, memory_budget=budget)

    def slopes(x, w):
        return jax.grad(lambda x, w: sum(map(jnp.sum, ours(x, w, jnp.zeros(classes, jnp.float32), q))), (0, 1))(x, w)

    compiled = jax.jit(slopes).lower(*shapes).compile()
    gradients = 4 * width * (positions + classes)
    assert (
        compiled.memory_analysis().temp_size_in_bytes <= budget + gradients + 64 * (positions + classes) + 2 * q.nbytes
    )


# ---- Eight devices.

WIDE = Problem(32, 8, 48)
LAYOUTS = {
    "positions": ((8,), P("data"), P()),
    "fsdp": ((8,), P("data"), P("data", None)),
    "vocabulary": ((8,), P(), P(None, "data")),
    "both": ((2, 4), P("data"), P(None, "model")),
    "fsdp and vocabulary": ((2, 4), P("data"), P("data", "model")),
}


@pytest.mark.x32
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
@pytest.mark.parametrize("name", ["log-probabilities", "top-k", "tail", "jensen-shannon"])
def test_on_a_mesh(name, kind, layout):
    shape, of_rows, of_kernel = LAYOUTS[layout]
    names = ("data", "model")[: len(shape)]
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(names))
    classes = of_kernel[1] if len(of_kernel) == 2 else None
    options = {}
    if kind == AxisType.Auto:
        options = {"batch_axes": of_rows[0] if len(of_rows) else None, "axis_name": classes}
    variables = on_variables(WIDE, jnp.float32)
    expected = jax.jit(functools.partial(value_and_vjp, HEADS[name](WIDE)[0]))(variables)
    specs = of_rows, of_kernel, P(), of_rows
    with jax.set_mesh(mesh):
        placed = tuple(jax.device_put(v, NamedSharding(mesh, s)) for v, s in zip(variables, specs, strict=True))

        def run(*placed):
            values, pullback = jax.vjp(HEADS[name](WIDE, **options)[0], *placed)
            rng = np.random.default_rng(0)
            cotangents = [jnp.asarray(rng.normal(size=v.shape), v.dtype) for v in values]
            if kind == AxisType.Explicit:
                cotangents = [
                    jax.sharding.reshard(c, jax.typeof(v).sharding) for c, v in zip(cotangents, values, strict=True)
                ]
            return values, pullback(tuple(cotangents))

        actual = jax.block_until_ready(jax.jit(run)(*placed))
    close(jax.tree.map(np.asarray, actual), jax.tree.map(np.asarray, expected), gradients=2e-5)


@pytest.mark.x32
@pytest.mark.parametrize("name", ["without entropy", "top-k", *OUTSIDE, *KINDS])
def test_inside_a_shard_map(name):
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))
    variables = on_variables(WIDE, jnp.float32)
    expected = jax.jit(functools.partial(value_and_vjp, HEADS[name](WIDE)[0]))(variables)
    blocks = P(None, "classes")

    def run(x, w, b, q, kernel):
        rows = Problem.__new__(Problem)
        rows.__dict__.update(WIDE.__dict__, teacher=(WIDE.teacher[0], kernel))
        head = HEADS[name](rows, axis_name="classes")[0]
        return value_and_vjp(head, (x, w, b, q))

    kernel = jnp.asarray(WIDE.teacher[1], jnp.float32)
    specs = (P(), blocks, P("classes"), P())
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(*specs, blocks), out_specs=(P(), specs)))
    close(jax.block_until_ready(sharded(*variables, kernel)), expected)


@pytest.mark.x32
def test_blocks_that_are_masked_as_low_as_a_number_can_be():
    mesh = jax.make_mesh((4,), ("classes",), axis_types=(AxisType.Auto,))
    z = jnp.arange(16, dtype=jnp.float32).reshape(2, 8).at[:, 6:].set(jnp.finfo(jnp.float32).min)
    run = jax.shard_map(
        lambda z: jax.value_and_grad(lambda z: jnp.sum(entropy(z, axis_name="classes")))(z),
        mesh=mesh,
        in_specs=P(None, "classes"),
        out_specs=(P(), P(None, "classes")),
    )
    value, slope = jax.jit(run)(z)
    np.testing.assert_allclose(value, jnp.sum(entropy(z)), rtol=1e-6)
    np.testing.assert_allclose(slope, jax.grad(lambda z: jnp.sum(entropy(z)))(z), rtol=1e-5, atol=1e-7)


@pytest.mark.x32
def test_more_of_the_largest_than_a_block_has():
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))
    x, w, b, _ = on_variables(WIDE, jnp.float32)
    expected = linear_top_k(x, w, 20, b)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda *a: linear_top_k(*a[:2], 20, a[2], axis_name="classes"))(x, w, b)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=2e-6)


@pytest.mark.x32
@pytest.mark.parametrize("axis", [0, 1])
def test_dense_functions_over_shards(axis):
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    z, other = (jnp.asarray(rng.normal(size=(12, 40)), jnp.float32) for _ in range(2))
    sparse = SparseTargets(jnp.asarray(WIDE.indices[:12] % 40), jnp.asarray(WIDE.probs[:12], jnp.float32))
    spec = P(None, "classes")
    if axis == 0:
        z, other, spec = z.T, other.T, P("classes")
        sparse = SparseTargets(sparse.indices.T, sparse.probs.T)

    def values(z, other, **more):
        return (
            entropy(z, axis, **more),
            kl_divergence(z, other, axis, reduction="none", **more),
            cross_entropy(z, sparse, axis, reduction="none", **more),
        )

    def run(z, other, **more):
        return value_and_vjp(lambda z: values(z, other, **more), (z,))

    sharded = jax.shard_map(
        lambda *a: run(*a, axis_name="classes"), mesh=mesh, in_specs=(spec, spec), out_specs=(P(), (spec,))
    )
    close(jax.block_until_ready(jax.jit(sharded)(z, other)), run(z, other))


@pytest.mark.x32
@pytest.mark.parametrize("spec", [P("data"), P(None, "data")], ids=["positions", "classes"])
def test_dense_functions_on_an_explicit_mesh(spec):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    rng = np.random.default_rng(0)
    z, other = (jnp.asarray(rng.normal(size=(16, 40)), jnp.float32) for _ in range(2))
    sparse = SparseTargets(jnp.asarray(WIDE.indices[:16] % 40), jnp.asarray(WIDE.probs[:16], jnp.float32))

    def losses(z, other):
        return jnp.sum(entropy(z)) + kl_divergence(z, other) + cross_entropy(z, sparse)

    expected = jax.value_and_grad(losses)(z, other)
    with jax.set_mesh(mesh):
        placed = (jax.device_put(a, NamedSharding(mesh, spec)) for a in (z, other))
        value, slope = jax.jit(jax.value_and_grad(losses))(*placed)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(slope, expected[1], rtol=2e-5, atol=1e-7)


# ---- Errors.


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, w, p: linear_log_probs(x, w, p.labels[:2]), ValueError, "labels: expected shape (37,), got (2,)"),
        (lambda x, w, p: linear_log_probs(x, w, p.x[:, 0]), TypeError, "labels: expected integers, got dtype float64"),
        (lambda x, w, p: linear_top_k(x, w, 0), ValueError, "k: expected an integer from 1 to the 203 classes, got 0"),
        (lambda x, w, p: linear_top_k(x, w, 204), ValueError, "k: expected an integer from 1 to the 203 classes, got 204"),
        (lambda x, w, p: linear_top_k(x, w, 2.0), TypeError, "k: expected an integer, got 2.0"),
        (lambda x, w, p: SparseTargets(p.indices, p.probs, "rest"), ValueError, "outside: expected 'tail', 'renormalise' or 'nothing', got 'rest'"),
        (lambda x, w, p: linear_cross_entropy(x, w, SparseTargets(p.indices, p.probs[:, :2])), ValueError, "targets.probs: expected the indices' shape (37, 6), got (37, 2)"),
        (lambda x, w, p: linear_cross_entropy(x, w, SparseTargets(p.indices[:3], p.probs[:3])), ValueError, "targets.indices: expected shape (37, K), got (3, 6)"),
        (lambda x, w, p: linear_cross_entropy(x, w, SparseTargets(p.probs, p.probs)), TypeError, "targets.indices: expected integers, got dtype float64"),
        (lambda x, w, p: linear_cross_entropy(x, w, SparseTargets(p.indices, p.indices)), TypeError, "targets.probs: expected floating probabilities, got dtype int64"),
        (lambda x, w, p: linear_cross_entropy(x, w, SparseTargets(p.indices, p.probs), ignore_index=0), ValueError, "ignore_index: expected none with SparseTargets; use weights"),
        (lambda x, w, p: linear_cross_entropy(x, w, SparseTargets(p.indices, p.probs), label_smoothing=0.1), ValueError, "label_smoothing: expected none with SparseTargets"),
        (lambda x, w, p: linear_kl_divergence(x, w, x[:3], w), ValueError, "teacher_features: expected the positions of features (37,) and a width, got (3, 9)"),
        (lambda x, w, p: linear_kl_divergence(x, w, x, w[:, :7]), ValueError, "teacher_kernel: expected the kernel's 203 classes, got 7"),
        (lambda x, w, p: linear_kl_divergence(x, w, x, w.T), ValueError, "teacher_kernel: expected shape (9, classes) with at least one class, got (203, 9)"),
        (lambda x, w, p: linear_kl_divergence(x, w, x, w, kind="total"), ValueError, "kind: expected 'forward', 'reverse' or 'jensen-shannon', got 'total'"),
        (lambda x, w, p: kl_divergence(x, x[:3]), ValueError, "teacher_logits: expected the logits' shape (37, 9), got (3, 9)"),
        (lambda x, w, p: kl_divergence(x, x, kind="jensen-shannon", beta=1), ValueError, "beta: expected a number between 0 and 1, got 1"),
        (lambda x, w, p: kl_divergence(x[:, :0], x[:, :0]), ValueError, "logits: expected at least one class along axis 1, got shape (37, 0)"),
        (lambda x, w, p: entropy(x[:, :0]), ValueError, "logits: expected at least one class along axis 1, got shape (37, 0)"),
        (lambda x, w, p: cross_entropy(x, SparseTargets(p.indices[:, :0], p.probs[:, :0])), ValueError, "targets.indices: expected at least one class a position, got shape (37, 0)"),
        (lambda x, w, p: linear_log_probs(x, w, SparseTargets(p.indices, p.probs)), TypeError, "labels: expected integers, got SparseTargets"),
        (lambda x, w, p: linear_cross_entropy(x[:0], w, p.labels[:3]), ValueError, "targets: expected integer labels of shape (0,)"),
        (lambda x, w, p: entropy(jnp.float32(1)), ValueError, "axis: expected an array with at least one axis, the classes, got a scalar"),
    ],
)  # fmt: skip
def test_errors_name_argument_expected_and_actual(call, error, message):
    p = problem(*SIZES[0])
    with pytest.raises(error, match=re.escape(message)):
        call(jnp.asarray(p.x), jnp.asarray(p.w), p)
