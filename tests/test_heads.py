"""Heads other than the loss, against full logits: log-probabilities, statistics, top-k, sparse targets, divergences."""

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
    """Arrays of a size, in float64; of the sparse targets one class is there twice, and a position has padding.

    The layer is rounded to `dtype`, for one expected result to serve that dtype and wider ones.
    """

    def __init__(self, positions, width, classes, dtype=float):
        rng = np.random.default_rng(positions)
        self.x, self.w = rng.normal(size=(positions, width)), rng.normal(size=(width, classes)) / width**0.5
        self.b = rng.normal(size=classes)
        self.x, self.w, self.b = (a.astype(dtype).astype(float) for a in (self.x, self.w, self.b))
        self.labels = rng.integers(0, classes, positions)
        self.weights = rng.uniform(0.1, 2, positions) * (np.arange(positions) % 4 != 1)
        self.teacher = rng.normal(size=(positions, TEACHER)), rng.normal(size=(TEACHER, classes))
        self.k = min(6, classes)
        self.indices = np.stack([rng.permutation(classes)[: self.k] for _ in range(positions)])
        self.probs = rng.dirichlet(np.ones(self.k + 1), positions)[:, : self.k]
        if classes > 2:
            self.indices[:, 3] = self.indices[:, 1]
            self.indices[0, -1], self.probs[0, -1] = -1, 0

    def replace(self, **arrays):
        other = Problem.__new__(Problem)
        other.__dict__.update(self.__dict__, **arrays)
        return other


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
        return found.label_log_prob, found.logsumexp, found.entropy

    return ours, lambda z, q: naive_log_probs(z, p)


def plain_log_probs_head(p, **options):
    def ours(x, w, b, q):
        found = linear_log_probs(x, w, p.labels, b, **options)
        return found.label_log_prob, found.logsumexp

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
    teacher = [a.astype(jnp.bfloat16).astype(float) for a in p.teacher]  # the same in every dtype

    def ours(x, w, b, q):
        of_teacher = (jnp.asarray(a, x.dtype) for a in teacher)
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
# One head of each public function. The other heads differ only in the formula, not in the layer.
FUNCTIONS = ["log-probabilities", "top-k", "tail", "jensen-shannon"]
exhaustive = functools.partial(pytest.param, marks=pytest.mark.exhaustive)
ONE_OF_EACH = [name if name in FUNCTIONS else exhaustive(name) for name in HEADS]


def options_of(name, p):
    classes = p.w.shape[1]
    where = np.ones(classes, bool)
    where[np.setdiff1d(np.arange(classes), [*p.labels, *p.indices.flat])[::2]] = False
    budget = 16 * classes * max(1, len(p.x) // 3)
    return {
        "plain": {},
        "tiles": {"memory_budget": budget},
        "capped": {"soft_cap": 2.0, "temperature": 0.7},
        "masked": {"where": where},
        "all": {"memory_budget": budget, "soft_cap": 2.0, "temperature": 0.7, "where": where},
    }[name]


def value_and_vjp(fn, variables, seed=0):
    """Under a random cotangent."""
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
    return tuple(v.astype(dtype) for v in (p.x, p.w, p.b, p.probs))


def from_logits(naive, options):
    kept = {key: value for key, value in options.items() if key not in ("memory_budget", "kernel_axis")}
    return lambda x, w, b, q: naive(logits_of(x, w, b, **kept), q)


def of_formula(name, p, fn, options):
    """The results of `fn` for the naive formula of a head."""
    naive = from_logits(HEADS[name](p, **options)[1], options)
    return jax.tree.map(np.asarray, jax.jit(lambda *v: fn(naive, v))(*on_variables(p, np.float64)))


ROUNDED = Problem(*SIZES[1], jnp.bfloat16)


def sized(size):
    return ROUNDED if size == SIZES[1] else problem(*size)


@functools.cache
def expected(name, size, option):
    return of_formula(name, sized(size), value_and_vjp, options_of(option, sized(size)))


def equalities():
    """Each head with all options at once, one of each function at each size."""
    for name in HEADS:
        yield name, SIZES[0], "all"
        for option in ("plain", "tiles", "capped", "masked"):
            yield exhaustive(name, SIZES[0], option)
        for size in SIZES[1:]:
            yield (name, size, "plain") if name in FUNCTIONS else exhaustive(name, size, "plain")


@pytest.mark.parametrize(("name", "size", "option"), list(equalities()), ids=str)
def test_equals_the_naive_formula(name, size, option):
    p = sized(size)
    actual = jax.jit(functools.partial(value_and_vjp, HEADS[name](p, **options_of(option, p))[0]))
    close(actual(on_variables(p, np.float32)), expected(name, size, option))


SMALL = Problem(7, 4, 13)
IN_TILES = {"memory_budget": 16 * 13 * 3, "temperature": 1.3}


def forward_over_reverse(gradients, variables, tangents):
    return jax.jvp(gradients, variables, tangents)[1]


def reverse_over_reverse(gradients, variables, tangents):
    return jax.vjp(gradients, *variables)[1](tangents)


def twice(moved, modes, fn, variables):
    """The derivatives along a direction of the gradients to the first variables."""
    tangents = tuple(np.random.default_rng(n).normal(size=v.shape) for n, v in enumerate(variables[:moved]))

    def gradients(*moving):
        return value_and_vjp(lambda *v: fn(*v, *variables[moved:]), moving)[1]

    return [mode(gradients, variables[:moved], tangents) for mode in modes]


@pytest.mark.parametrize(
    ("name", "modes"),
    [
        *((name, [forward_over_reverse, reverse_over_reverse]) for name in FUNCTIONS),
        *((name, [forward_over_reverse]) for name in ("renormalise", "forward")),  # whose formulas differ most
        *(exhaustive(name, [forward_over_reverse]) for name in ("without entropy", "nothing", "reverse")),
        *(exhaustive(name, [reverse_over_reverse]) for name in HEADS if name not in FUNCTIONS),
    ],
)
def test_derivatives_of_second_order(name, modes):
    """In float64. The second derivative is symmetric, so both modes must give the same."""
    moved = 4 if name in OUTSIDE else 3
    (expected,) = of_formula(name, SMALL, functools.partial(twice, moved, [forward_over_reverse]), IN_TILES)
    for found in jax.jit(functools.partial(twice, moved, modes, HEADS[name](SMALL, **IN_TILES)[0]))(
        on_variables(SMALL, np.float64)
    ):
        for got, want in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_mapped_over_sequences_and_with_kernels_of_tied_embeddings(name):
    p = problem(12, 4, 13)
    head = HEADS[name]
    x, w, b, q = on_variables(p, np.float64)
    tied = p.replace(teacher=(p.teacher[0], p.teacher[1].T))

    def of_rows(x, w, b, q, labels, indices, teacher):
        return head(p.replace(labels=labels, indices=indices, teacher=(teacher, p.teacher[1])))[0](x, w, b, q)

    @jax.jit
    def run(x, w, b, q, *of_positions):
        split = [jnp.reshape(a, (3, 4, *a.shape[1:])) for a in (x, q, *of_positions)]
        mapped = jax.vmap(of_rows, (0, None, None, 0, 0, 0, 0))(split[0], w, b, *split[1:])
        return head(p)[0](x, w, b, q), mapped, head(tied, kernel_axis=0)[0](x, w.T, b, q)

    for want, mapped, tied in zip(*run(x, w, b, q, p.labels, p.indices, p.teacher[0]), strict=True):
        np.testing.assert_allclose(mapped.reshape(want.shape), want, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(tied, want, rtol=1e-12)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_half_precision(name):
    """The values and gradients of the naive formula at the same rounded inputs."""
    ours, _ = HEADS[name](ROUNDED)
    q = ROUNDED.probs.astype(np.float32)  # half precision would change the total of the other classes
    actual = jax.jit(functools.partial(value_and_vjp, lambda *layer: ours(*layer, q)))
    values, gradients = actual(on_variables(ROUNDED, jnp.bfloat16)[:3])
    assert all(v.dtype == jnp.float32 for v in values)
    assert all(g.dtype == jnp.bfloat16 for g in gradients)
    wanted = expected(name, SIZES[1], "plain")
    close((values, gradients), (wanted[0], wanted[1][:3]), values=2e-5, gradients=8e-3)


# ---- Accuracy that a subtraction would lose, in float32 against float64.


def test_log_probabilities_and_entropies_of_nearly_certain_rows():
    z = np.tile([0, 0, -1, 0.5, -2], (8, 1))
    z[:, 1] = [-80, -40, -16, 0, 10, 20, 40, 80]
    exact = z.astype(np.longdouble) - z.max(1, keepdims=True)
    e = np.exp(exact)
    log_total = np.log1p(np.sort(e, 1)[:, :-1].sum(1))
    label, of_entropy = exact[:, 1] - log_total, log_total - (e * exact).sum(1) / e.sum(1)

    @jax.jit
    def run(logits):
        def numbers(kernel, **more):  # gradients to the logits are those to a kernel of one feature a row
            found = linear_log_probs(np.eye(8, dtype=np.float32), kernel, np.ones(8, int), **more)
            return (found.label_log_prob, found.logsumexp, found.entropy), found

        _, pullback, of = jax.vjp(functools.partial(numbers, entropy=True), logits, has_aux=True)
        slopes = [pullback(tuple(np.full(8, n == m, np.float32) for m in range(3)))[0] for n in range(3)]
        slopes.append(jax.grad(lambda z: jnp.sum(numbers(z)[1].label_log_prob))(logits))
        return of, entropy(logits), slopes

    found, dense, slopes = jax.tree.map(np.asarray, run(z.astype(np.float32)))
    np.testing.assert_allclose(found.label_log_prob, label.astype(float), rtol=1e-5)
    np.testing.assert_allclose(found.entropy, of_entropy.astype(float), rtol=1e-5)
    assert (found.label_log_prob <= 0).all()
    np.testing.assert_array_equal(found.argmax, z.argmax(1))
    np.testing.assert_allclose(dense, found.entropy, rtol=1e-6)
    p = e / e.sum(1, keepdims=True)
    of_label = -p
    of_label[:, 1] = np.delete(p, 1, 1).sum(1)
    to_entropy = -p * (exact - log_total[:, None] + of_entropy[:, None])
    for slope, want in zip(slopes, (of_label, p, to_entropy, of_label), strict=True):
        np.testing.assert_allclose(slope, want.astype(float), rtol=2e-5, atol=1e-37)


def test_the_classes_outside_of_sparse_targets_stay_accurate():
    """1 − p is 0 in float32, whose logarithm is −inf."""
    z, q = np.array([[25, 22, 0, 1, -1]], np.float32), np.array([[0.9, 0.05]], np.float32)
    p = np.exp(np.float64(z[0]) - 25)
    total = p.sum()
    expected = -(0.9 * np.log(1 / total) + 0.05 * np.log(p[1] / total)) - (1 - 0.95) * np.log(p[2:].sum() / total)
    softmax, got = jax.jit(lambda z: (jax.nn.softmax(z), cross_entropy(z, SparseTargets(np.array([[0, 1]]), q))))(z)
    assert 1 - np.asarray(softmax)[0, :2].sum() <= 1.2e-7
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_divergences_stay_accurate():
    rng = np.random.default_rng(3)
    z = np.tile(rng.normal(size=(4, 50)).astype(np.float32), (4, 1, 1))
    scales = np.float32([1e-4, 1e-2, 1, 30])[:, None, None]
    other = z + scales * rng.normal(size=(4, 4, 50)).astype(np.float32)

    @jax.jit
    def run(z, other):
        exact = [a.reshape(16, 50).astype(float) for a in (z, other)]
        return {
            kind: (
                kl_divergence(z, other, kind=kind, beta=0.3, reduction="none"),
                naive_divergence(*exact, kind).reshape(4, 4),
                kl_divergence(z, z + 3, kind=kind),
            )
            for kind in KINDS
        }

    for kind, (got, expected, of_a_shift) in jax.tree.map(np.asarray, run(z, other)).items():
        np.testing.assert_allclose(got[0], expected[0], rtol=2e-3, err_msg=kind)
        np.testing.assert_allclose(got[1:], expected[1:], rtol=2e-5, err_msg=kind)
        assert (expected[0] < 2e-8).all()
        assert 0 <= of_a_shift < 1e-10


# ---- Sparse targets compared with labels and distributions.


@pytest.mark.x32
@pytest.mark.parametrize("outside", ["tail", "nothing"])
def test_one_class_of_probability_one_equals_the_label(outside):
    p = problem(*SIZES[0])
    x, w, b, _ = on_variables(p, np.float32)
    options = {"z_loss": 0.1, "weights": np.linspace(0, 2, 37, dtype=np.float32)}

    @jax.jit
    def run(x, w, b):
        sparse = SparseTargets(p.labels[:, None], np.ones((37, 1), np.float32), outside)
        return [
            (
                jax.value_and_grad(linear_cross_entropy, (0, 1, 3))(x, w, targets, b),
                jax.value_and_grad(cross_entropy)(x @ w + b, targets, **options),
            )
            for targets in (sparse, p.labels)
        ]

    for got, want in zip(*map(jax.tree.leaves, run(x, w, b)), strict=True):
        np.testing.assert_allclose(got, want, rtol=4e-7, atol=4e-7 * np.abs(want).max())


def far_apart(margin, outside):
    """Loss and gradient in extended precision if classes 0 and 1 of five have a margin over the others."""
    z = np.array([margin, margin - 1.5, 0.25, -1, 0.5], np.float32)
    q, wide = np.array([0.5, 0.2], np.float32), z.astype(np.longdouble)

    def softmax(z):
        e = np.exp(z - z.max())
        return e / e.sum(), z.max() + np.log(e.sum())

    (among, lse), (others, lse_others) = softmax(wide[:2]), softmax(wide[2:])
    odds = lse - lse_others
    p, not_p = 1 / (1 + np.exp(-odds)), 1 / (1 + np.exp(odds))
    of_p, of_not_p = np.logaddexp(0, -odds), np.logaddexp(0, odds)
    within = lse - wide[:2]
    if outside == "renormalise":
        q = q / q.sum()
        return z, np.sum(q * within), np.append(among * q.sum() - q, np.zeros(3))
    rest = np.longdouble(1 - q.sum()) if outside == "tail" else 0
    to_odds = rest * p - q.sum() * not_p
    gradient = np.append(among * q.sum() - q + to_odds * among, -to_odds * others)
    return z, np.sum(q * (within + of_p)) + rest * of_not_p, gradient


@pytest.mark.x32
@pytest.mark.parametrize("outside", [*OUTSIDE[:2], exhaustive(OUTSIDE[2])])
def test_sparse_targets_far_from_all_other_classes(outside):
    """Either group may have a margin whose exponential float32 cannot hold."""
    margins = np.float32([-200, -100, -88, -30, -17, 0, 17, 30, 88, 100, 200])
    z, losses, slopes = map(np.stack, zip(*(far_apart(margin, outside) for margin in margins), strict=True))
    probs = np.tile(np.float32([0.2, 0.5]), (len(z), 1))
    targets = SparseTargets(np.tile([1, 0], (len(z), 1)), probs, outside)
    mesh = jax.make_mesh((5,), ("classes",), axis_types=(AxisType.Auto,))

    @jax.jit
    def run(z):
        def linear(z):  # a row's logits are the kernel's, one feature a row; three tiles
            return linear_cross_entropy(jnp.eye(len(margins)), z, targets, reduction="none", memory_budget=16 * 5 * 4)

        def hot(z):
            x = jnp.eye(len(margins))
            return linear_cross_entropy(x, z / 64, targets, reduction="none", temperature=1 / 64)

        def first(z):
            moved = SparseTargets(targets.indices.T, probs.T, outside)
            return cross_entropy(z.T, moved, 0, reduction="none")

        def each(z):
            return jax.vmap(lambda z, i, q: cross_entropy(z, SparseTargets(i, q, outside)))(z, targets.indices, probs)

        def sharded(z):
            loss = functools.partial(cross_entropy, targets=targets, reduction="none", axis_name="classes")
            return jax.shard_map(loss, mesh=mesh, in_specs=P(None, "classes"), out_specs=P())(z)

        dense = functools.partial(cross_entropy, targets=targets, reduction="none")

        def value_and_gradient(fn):
            value, pullback = jax.vjp(fn, z)
            return value, pullback(jnp.ones_like(value))[0]

        return list(map(value_and_gradient, (dense, linear, hot, first, each, sharded)))

    for found, slope in run(z):
        np.testing.assert_allclose(found, losses.astype(float), rtol=2e-5)
        np.testing.assert_allclose(slope, slopes.astype(float), rtol=5e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float64])
def test_sparse_targets_far_from_all_other_classes_in_other_dtypes(dtype):
    z = np.array([88, 0, -1] if dtype == jnp.bfloat16 else [760, 0, -1], dtype)
    value, slope = jax.jit(jax.value_and_grad(lambda z: cross_entropy(z, SparseTargets([0], np.array([0.5], dtype)))))(
        z
    )
    np.testing.assert_allclose(value, (float(z[0]) - np.log(1 + np.exp(-1))) / 2, rtol=1e-6)
    others = np.exp([0, -1]) / np.exp([0, -1]).sum() / 2
    np.testing.assert_allclose(slope.astype(float), [0.5, *-others], rtol=4e-3 if dtype == jnp.bfloat16 else 1e-14)


def test_as_many_indices_as_classes_may_leave_out_some_classes():
    """If some are padding, or occur twice."""
    z, given = np.array([0.0, 1, 2]), {"plain": ([0, 1], [0.5, 0.2]), "padded": ([0, 1, -1], [0.5, 0.2, 0.0])}
    given["twice"] = [0, 1, 1], [0.5, 0.1, 0.1]
    run = jax.jit(
        lambda z: {k: cross_entropy(z, SparseTargets(np.array(i), np.array(q))) for k, (i, q) in given.items()}
    )
    log_p = z - np.log(np.exp(z).sum())
    expected = -0.5 * log_p[0] - 0.2 * log_p[1] - 0.3 * log_p[2]
    for name, loss in run(z).items():
        np.testing.assert_allclose(loss, expected, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_probability_of_zero_has_a_gradient(outside):
    z, q, direction = np.array([0.0, 1, 2]), np.array([0.5, 0.0]), np.array([0.0, 1.0])

    @jax.jit
    def run(q):
        loss = jax.value_and_grad(lambda q: cross_entropy(z, SparseTargets(np.array([0, 1]), q, outside)))
        (_, gradient), (moved, _) = jax.jvp(loss, (q,), (direction,))
        return gradient, moved

    gradient, moved = run(q)
    assert abs(gradient[1]) > 0.1
    np.testing.assert_allclose(moved, gradient[1], rtol=1e-12)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_only_an_index_out_of_range_has_a_nan_gradient(outside):
    z, targets = np.array([0.0, 1, 2]), SparseTargets(np.array([5]), np.array([1.0]), outside)
    losses = [functools.partial(cross_entropy, targets=targets, **options) for options in ({}, {"z_loss": 1.0})]
    for value, gradient in jax.jit(lambda z: [jax.value_and_grad(loss)(z) for loss in losses])(z):
        assert np.isnan(value)
        assert np.isnan(gradient).all()


def test_sparse_targets_of_all_classes_equal_the_distribution():
    p = problem(*SIZES[0])
    x, w, b, _ = on_variables(p, np.float32)
    rng = np.random.default_rng(1)
    q = rng.dirichlet(np.ones(203), 37).astype(np.float32)
    order = np.stack([rng.permutation(203) for _ in range(37)])
    chosen = np.take_along_axis(q, order, 1)

    @jax.jit
    def run(x, w, b):
        fn = jax.value_and_grad(linear_cross_entropy, (0, 1, 3))
        return [fn(x, w, t, b) for t in (q, *(SparseTargets(order, chosen, outside) for outside in OUTSIDE))]

    want, *found = (list(map(np.asarray, jax.tree.leaves(of))) for of in run(x, w, b))
    for got, outside in zip(found, OUTSIDE, strict=True):
        for a, c in zip(got, want, strict=True):
            np.testing.assert_allclose(a, c, rtol=2e-5, atol=2e-5 * np.abs(c).max(), err_msg=outside)


def test_sparse_targets_along_any_axis():
    rng = np.random.default_rng(0)
    z, ids = rng.normal(size=(4, 5, 9)), np.argsort(rng.normal(size=(4, 5, 9)), -1)[..., :3]
    q = rng.dirichlet(np.ones(4), (4, 5))[..., :3]

    @jax.jit
    def run(*arrays):
        def along(axis):
            logits, *sparse = (jnp.moveaxis(a, -1, axis) for a in arrays)
            return cross_entropy(logits, SparseTargets(*sparse), axis, reduction="none")

        return [along(axis) for axis in (-1, 0, 1, 2)]

    last, *found = run(z, ids, q)
    for got in found:
        np.testing.assert_allclose(got, last, rtol=1e-12)


def test_only_the_tail_is_minimal_if_the_student_equals_the_teacher():
    """With the other values of `outside`, the optimal student is not the teacher."""

    @jax.jit
    def slopes(z):
        def loss(z, outside):
            return cross_entropy(z, SparseTargets(np.array([[0, 1]]), np.array([[0.4, 0.3]]), outside))

        return {outside: jax.grad(loss)(z, outside) for outside in OUTSIDE}

    of_teacher, drawn = (
        jax.tree.map(np.asarray, slopes(np.log([probs]))) for probs in ([0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 2e-9, 1e-9])
    )
    assert np.abs(of_teacher["tail"]).max() < 1e-12
    assert np.abs(of_teacher["renormalise"]).max() < 1e-12
    # A student with almost no probability outside of the two classes has the same loss.
    assert np.abs(drawn["renormalise"]).max() < 1e-12
    assert np.abs(drawn["tail"]).max() > 0.1
    # The two classes get nearly all probability.
    assert (of_teacher["nothing"][0, :2] < -0.05).all()
    assert (of_teacher["nothing"][0, 2:] > 0.05).all()


# ---- Edges.


def test_ignored_positions():
    p = problem(*SIZES[0])
    x, w, b, _ = on_variables(p, np.float64)
    ignored = np.arange(37) % 3 == 0
    labels = np.where(ignored, -100, p.labels)
    padded = np.where(ignored[:, None], np.nan, x)  # padding may be anything

    @jax.jit
    def run(padded, w):
        def ours(x, w):
            found = linear_log_probs(x, w, labels, b, ignore_index=-100, entropy=True)
            return (found.label_log_prob, found.logsumexp, found.entropy), found

        _, pullback, found = jax.vjp(ours, padded, w, has_aux=True)
        rng = np.random.default_rng(0)
        gradients = pullback(tuple(rng.normal(size=37) for _ in range(3)))
        return found, gradients, linear_log_probs(x[~ignored], w, p.labels[~ignored], b, entropy=True)

    found, (to_x, to_w), left = jax.tree.map(np.asarray, run(padded, w))
    for got, want in zip(found, left, strict=True):
        np.testing.assert_allclose(got[~ignored], want, rtol=1e-13)
    assert (found.argmax[ignored] == -1).all()
    for value in (found.label_log_prob, found.logsumexp, found.entropy):
        assert (value[ignored] == 0).all()
    assert (to_x[ignored] == 0).all()
    assert np.isfinite(to_w).all()


def test_weights_of_zero_ignore_a_position():
    p = problem(*SIZES[0])
    x, w, b, q = on_variables(p, np.float64)
    taking, weights = p.weights[:, None] != 0, p.weights
    features, kernel = p.teacher
    padded, hidden = (np.where(taking, a, np.nan) for a in (x, features))

    @jax.jit
    def run(x, t):
        targets = [SparseTargets(p.indices, q, outside) for outside in OUTSIDE]
        mean = [linear_cross_entropy(x, w, of, b, weights=weights) for of in targets]
        each = [naive_sparse(logits_of(x, w, b), q, p, outside) for outside in OUTSIDE]
        loss = functools.partial(linear_kl_divergence, bias=b, weights=weights)
        return mean, each, [jax.value_and_grad(loss)(x, w, t, kernel, kind=kind) for kind in KINDS]

    mean, _, of_kinds = run(padded, hidden)
    _, each, wanted = jax.tree.map(np.asarray, run(x, features))
    for got, of_each in zip(mean, each, strict=True):
        np.testing.assert_allclose(got, np.sum(weights * of_each) / np.sum(weights), rtol=1e-12)
    for (value, slope), (want, of_whole) in zip(of_kinds, wanted, strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-12)
        np.testing.assert_allclose(slope, np.where(taking, of_whole, 0), rtol=1e-10, atol=1e-15)


def test_only_a_label_out_of_range_gives_nan():
    p = problem(*SIZES[0])
    x, w, b, q = on_variables(p, np.float64)
    labels, indices = p.labels.copy(), p.indices.copy()
    labels[3], indices[5, 0] = 203, 999

    @jax.jit
    def run(x):
        return (
            linear_log_probs(x, w, labels, b, entropy=True),
            linear_cross_entropy(x, w, labels, b, reduction="none", with_statistics=True)[1].label_log_prob,
            jax.grad(lambda x: linear_log_probs(x, w, labels, b).label_log_prob.sum())(x),
            [linear_cross_entropy(x, w, SparseTargets(indices, q, o), b, reduction="none") for o in OUTSIDE],
        )

    found, beside, slope, losses = run(x)
    for label in (found.label_log_prob, beside):
        assert np.isnan(label).nonzero()[0].tolist() == [3]
    assert np.isfinite(found.entropy).all()
    assert np.isnan(slope).any(1).nonzero()[0].tolist() == [3]
    with pytest.raises(ValueError, match=r"labels\[3\] is 203: expected a label in \[0, 203\)"):
        checked(jax.jit(lambda: linear_log_probs(x, w, labels, b)))()
    for of_outside in losses:
        assert np.isnan(of_outside).nonzero()[0].tolist() == [5]
    with pytest.raises(ValueError, match=r"targets\.indices\[5, 0\] is 999: expected a class in \[0, 203\)"):
        checked(jax.jit(lambda: linear_cross_entropy(x, w, SparseTargets(indices, q), b)))()


def test_masked_classes():
    """Every class masked, a masked label, fewer classes than k."""
    x, w, labels = np.ones((2, 1)), np.array([[1.0, 2.0, 3.0]]), np.array([0, 2])

    @jax.jit
    def run(w, *cotangents):
        top = functools.partial(linear_top_k, x, k=3, where=np.array([True, False, True]))
        _, pullback = jax.vjp(lambda w: top(w).log_probs, w)
        return (
            linear_log_probs(x, w, labels, where=np.array([True, True, False]), entropy=True),
            linear_log_probs(x, w, labels, where=np.zeros(3, bool), entropy=True),
            top(w),
            [pullback(c)[0] for c in cotangents],
        )

    of_removed = [np.array([[1.0, 2.0, last]] * 2) for last in (np.nan, 0)]
    found, none, top, slopes = jax.tree.map(np.asarray, run(w, *of_removed))
    np.testing.assert_array_equal(found.label_log_prob[1], -np.inf)
    np.testing.assert_array_equal(found.argmax, [1, 1])
    np.testing.assert_array_equal(none.logsumexp, -np.inf)
    np.testing.assert_array_equal(none.entropy, 0)
    np.testing.assert_array_equal(none.argmax, -1)
    np.testing.assert_array_equal(top.log_probs[:, 2], -np.inf)
    np.testing.assert_array_equal(top.indices[:, :2], [[2, 0]] * 2)
    np.testing.assert_array_equal(*slopes)  # the cotangent of a masked class is dropped
    assert np.isfinite(slopes[0]).all()
    assert slopes[0][0, 1] == 0


def test_a_masked_class_adds_nothing_to_an_entropy():
    value, slope = jax.jit(jax.value_and_grad(entropy))(np.array([1, 2, -np.inf]))
    left, of_left = jax.jit(jax.value_and_grad(entropy))(np.array([1.0, 2]))
    np.testing.assert_allclose(value, left, rtol=1e-14)
    np.testing.assert_allclose(slope, [*of_left, 0], rtol=1e-14)


def test_masked_classes_of_a_divergence():
    @jax.jit
    def of_kinds(student, teacher):
        fn = jax.value_and_grad(functools.partial(kl_divergence, beta=0.3))
        # One class less, or a logit with which the naive formula stays finite.
        finite = [jnp.where(jnp.isneginf(z), -600, z) for z in (student, teacher)]
        left = [kl_divergence(student[:, :2], teacher[:, :2], kind=kind, beta=0.3) for kind in KINDS]
        naive = {
            kind: jax.value_and_grad(lambda z, t, kind=kind: naive_divergence(z, t, kind)[0])(*finite) for kind in KINDS
        }
        return {kind: fn(student, teacher, kind=kind) for kind in KINDS}, dict(zip(KINDS, left, strict=True)), naive

    run = lambda *logits: jax.tree.map(np.asarray, of_kinds(*logits))  # noqa: E731
    found, left, _ = run(np.array([[1, 2, -np.inf]]), np.array([[0, 1.5, -np.inf]]))
    for kind, (value, slope) in found.items():
        np.testing.assert_allclose(value, left[kind], rtol=1e-12)
        assert slope[0, 2] == 0
    # A class masked in only one of both: infinite from the other one, or as with a very small finite logit.
    lacking, whole = np.array([[1, 2, -np.inf]]), np.array([[0.5, 0, 1.0]])
    of_lacking, _, naive_lacking = run(lacking, whole)
    of_whole, _, naive_whole = run(whole, lacking)
    assert of_lacking["forward"][0] == of_whole["reverse"][0] == np.inf
    np.testing.assert_allclose(of_whole["forward"][0], naive_whole["forward"][0])
    np.testing.assert_allclose(of_lacking["reverse"][0], naive_lacking["reverse"][0])
    for found, naive in ((of_lacking, naive_lacking), (of_whole, naive_whole)):
        (value, slope), (want, of_naive) = found["jensen-shannon"], naive["jensen-shannon"]
        np.testing.assert_allclose(value, want, rtol=1e-12)
        np.testing.assert_allclose(slope, of_naive, rtol=1e-10, atol=1e-15)
    for value, slope in run(whole, np.full((1, 3), -np.inf))[0].values():
        assert value == 0
        assert (slope == 0).all()


def test_equal_logits_are_ordered_by_their_index():
    x, five, three = np.ones((1, 1)), np.array([[1.0, 3.0, 3.0, 3.0, 1.0]]), np.array([[1.0, 3.0, 3.0]])
    top, found = jax.jit(lambda x: (linear_top_k(x, five, 3), linear_log_probs(x, three, np.array([0]))))(x)
    np.testing.assert_array_equal(top.indices, [[1, 2, 3]])
    assert found.argmax == 1


def test_indices_of_narrow_dtypes():
    """uint8 cannot hold 256, the number of classes to compare with."""
    x, w, q = np.ones((2, 3)), np.random.default_rng(0).normal(size=(3, 256)), np.full((2, 2), 0.3)
    indices = np.array([[200, 3], [5, 255]])
    run = jax.jit(lambda indices: linear_cross_entropy(x, w, SparseTargets(indices, q)))
    np.testing.assert_array_equal(run(indices.astype(np.uint8)), run(indices))


def test_targets_from_log_probabilities():
    rng = np.random.default_rng(0)
    x, w, y = rng.normal(size=(4, 3)), rng.normal(size=(3, 7)), rng.normal(size=(4, 7))

    @jax.jit
    def run(x):
        top = linear_top_k(x, w, 3)
        given = [top.as_targets(), SparseTargets.from_log_probs(top.indices, top.log_probs)]
        given.append(SparseTargets(top.indices, jnp.exp(top.log_probs)))
        others = [top.as_targets("renormalise"), SparseTargets(top.indices, jnp.exp(top.log_probs), "renormalize")]
        return [[cross_entropy(y, targets) for targets in some] for some in (given, others)]

    for first, *equal in run(x):
        assert all(loss == first for loss in equal)
    padded = SparseTargets.from_log_probs(np.array([[0, -1]]), np.array([[np.log(0.5), -np.inf]]))
    np.testing.assert_allclose(cross_entropy(np.zeros((1, 3)), padded), 0.5 * np.log(3) + 0.5 * np.log(1.5))


@pytest.mark.parametrize("loss", [cross_entropy, lambda z, t: linear_cross_entropy(z, np.eye(7), t)])
@pytest.mark.parametrize(
    ("indices", "probs", "outside", "message"),
    [
        ([0, 3], [0.8, 0.5], "tail", r"sum of targets.probs\[1\] is 1.3: expected at most 1, unless outside='nothing'"),
        ([0, 3], [0.8, 0.5], "renormalise", r"sum of targets.probs\[1\] is 1.3: expected at most 1"),
        ([0, 3], [0.8, 0.5], "nothing", None),
        ([2, 2], [0.3, 0.2], "tail", r"targets.indices\[1, 1\] is 2: expected another class than before"),
        ([2, 2], [0.3, 0.2], "nothing", r"targets.indices\[1, 1\] is 2: expected another class than before"),
        ([2, 2], [0.3, 0.0], "tail", None),
        ([-1, -1], [0.0, 0.0], "tail", None),
    ],
)
def test_checked_sees_sums_above_one_and_a_class_that_comes_twice(loss, indices, probs, outside, message):
    targets = SparseTargets(np.array([[1, 4], indices]), np.array([[0.5, 0.5], probs]), outside)
    run = functools.partial(checked(loss), np.zeros((2, 7)), targets)
    if message is None:
        run()
    else:
        with pytest.raises(ValueError, match=message):
            run()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
def test_rounding_many_probabilities_is_no_sum_above_one(dtype):
    probs = np.full((1, 63), 1 / 63, dtype)
    checked(cross_entropy)(np.zeros((1, 70)), SparseTargets(np.arange(63)[None], probs))


@pytest.mark.parametrize("jit", [jax.jit, lambda fn: fn])
def test_log_probabilities_are_refused_as_probabilities(jit):
    targets = SparseTargets(np.array([[1, 4]]), np.log(np.array([[0.5, 0.25]])))
    message = r"targets.probs: expected probabilities of at least 0, got -1.38629; .*SparseTargets.from_log_probs"
    with pytest.raises(ValueError, match=message):
        jit(lambda: cross_entropy(np.zeros((1, 7)), targets))()


def test_rounding_probs_in_half_precision_leaves_no_remainder():
    z, indices, probs = np.array([[0, 1, -np.inf]]), np.array([[0, 1]]), np.array([[0.9, 0.1]], jnp.bfloat16)
    rounded, exact = jax.jit(
        lambda z: (
            cross_entropy(z, SparseTargets(indices, probs)),
            cross_entropy(z, SparseTargets(indices, probs.astype(float), "nothing")),
        )
    )(z)
    np.testing.assert_allclose(rounded, exact)


@pytest.mark.parametrize("outside", ["tail", *map(exhaustive, OUTSIDE[1:])])
def test_padding_of_probs_has_no_gradient(outside):
    p = problem(*SIZES[0])
    x, w, b, q = on_variables(p, np.float64)
    taking, indices = p.weights != 0, p.indices.copy()
    indices[:, 3], q = -1, q * (np.arange(p.k) != 3)  # no class comes twice

    def slope(q):
        def loss(q):
            return linear_cross_entropy(x, w, SparseTargets(indices, q, outside), b, weights=p.weights)

        return jax.grad(loss)(q)

    got = checked(jax.jit(slope))(np.where(taking[:, None], q, np.nan))
    np.testing.assert_allclose(got, jax.jit(slope)(q), rtol=1e-12, atol=1e-15)
    assert (got[~taking] == 0).all()


@pytest.mark.parametrize(
    ("kind", "student", "teacher"),
    [
        ("forward", np.float32, np.float64),
        ("reverse", np.float64, np.float32),
        ("jensen-shannon", jnp.bfloat16, np.float64),
        *(exhaustive(kind, np.float32, np.float64) for kind in ("reverse", "jensen-shannon")),
        *(exhaustive(kind, np.float64, np.float32) for kind in ("forward", "jensen-shannon")),
        *(exhaustive(kind, jnp.bfloat16, np.float64) for kind in ("forward", "reverse")),
    ],
)
def test_a_teacher_of_another_dtype(kind, student, teacher):
    p = problem(*SIZES[0])

    @jax.jit
    def run(x, w, b, *other):
        of_layer = linear_kl_divergence(x, w, *other, b, kind=kind)
        return of_layer, kl_divergence(x[:, :3], other[0][:, :3], kind=kind)

    mixed = *on_variables(p, student)[:3], *(a.astype(teacher) for a in p.teacher)
    np.testing.assert_allclose(run(*mixed), run(*(a.astype(np.float64) for a in mixed)), rtol=2e-5)


def test_checked_sees_the_teacher():
    x, w = np.ones((2, 3)), np.ones((3, 4))

    def spoilt(array, *at):
        array = array.copy()
        array[at] = np.nan
        return array

    with pytest.raises(ValueError, match=r"teacher_features\[1, 0\] is nan: expected a number"):
        checked(jax.jit(linear_kl_divergence))(x, w, spoilt(x, 1, 0), w)
    with pytest.raises(ValueError, match=r"teacher_kernel\[2, 3\] is nan: expected a number"):
        checked(jax.jit(linear_kl_divergence))(x, w, x, spoilt(w, 2, 3))
    with pytest.raises(ValueError, match=r"teacher_logits\[0, 1\] is nan: expected a number"):
        checked(jax.jit(kl_divergence))(w, spoilt(w, 0, 1))


def test_no_positions():
    w = np.ones((2, 5))
    assert linear_log_probs(np.ones((0, 2)), w, np.zeros(0, int)).label_log_prob.shape == (0,)
    assert linear_top_k(np.ones((3, 0, 2)), w, 2).log_probs.shape == (3, 0, 2)
    assert linear_kl_divergence(np.ones((0, 2)), w, np.ones((0, 2)), w) == 0


@pytest.mark.parametrize(
    "several", [({"label_smoothing": 0.1, "z_loss": 0.1}, {"reduction": "none"}), exhaustive(({},))], ids=str
)
def test_statistics_in_addition_to_the_loss(several):
    p = problem(*SIZES[0])
    x, w, b, q = on_variables(p, np.float64)
    labels = np.where(np.arange(37) % 5 == 0, -100, p.labels)
    loss = functools.partial(linear_cross_entropy, x, bias=b)

    def alone(w, **more):
        loss_of = loss(w, labels, ignore_index=-100, **more)
        return jnp.sum(loss_of), loss_of

    def beside(w, **more):
        loss_of, found = loss(w, labels, ignore_index=-100, with_statistics=True, **more)
        return jnp.sum(loss_of) + jnp.sum(found.entropy) + jnp.sum(found.label_log_prob), (loss_of, found)

    @jax.jit
    def run(w):
        of_options = [[jax.grad(fn, has_aux=True)(w, **options) for fn in (beside, alone)] for options in several]
        of_targets = [
            (loss(w, targets, with_statistics=True), loss(w, targets))
            for targets in (SparseTargets(p.indices, q), np.eye(203)[p.labels])
        ]
        want = linear_log_probs(x, w, labels, b, ignore_index=-100, entropy=True)
        return of_options, of_targets, want, entropy(x @ w + b)

    of_options, of_targets, want, of_logits = run(w)
    for (slope, (got, found)), (slope_alone, wanted) in of_options:
        np.testing.assert_allclose(got, wanted, rtol=1e-12)
        for statistic, of in zip(found, want, strict=True):
            np.testing.assert_allclose(statistic, of, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(slope, slope_alone, rtol=1e-9, atol=1e-14)  # the statistics are constants
        np.testing.assert_array_equal(found.argmax, want.argmax)
    for (got, found), wanted in of_targets:
        np.testing.assert_allclose(got, wanted, rtol=1e-12)
        assert found.label_log_prob is None
        np.testing.assert_allclose(found.entropy, of_logits, rtol=1e-10)


def products(fn, *variables):
    """The matmuls in the program, with those of a loop's body counted once."""
    return len(re.findall(r"stablehlo\.dot_general", jax.jit(fn).lower(*variables).as_text()))


def test_no_more_matmuls_than_needed():
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


MESHES = [
    pytest.param(
        name,
        kind,
        layout,
        # Each layout with one head after the other, on meshes of one kind and the other.
        marks=[] if (n % 2 == (kind == AxisType.Auto)) and n % 4 == FUNCTIONS.index(name) else pytest.mark.exhaustive,
    )
    for n, layout in enumerate(LAYOUTS)
    for kind in (AxisType.Explicit, AxisType.Auto)
    for name in FUNCTIONS
]


@functools.cache
def on_one_device(name):
    run = jax.jit(functools.partial(value_and_vjp, HEADS[name](WIDE)[0]))
    return jax.tree.map(np.asarray, run(on_variables(WIDE, np.float32)))


@pytest.mark.x32
@pytest.mark.parametrize(("name", "kind", "layout"), MESHES)
def test_on_a_mesh(name, kind, layout):
    shape, of_rows, of_kernel = LAYOUTS[layout]
    names = ("data", "model")[: len(shape)]
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(names))
    classes = of_kernel[1] if len(of_kernel) == 2 else None
    options = {}
    if kind == AxisType.Auto:
        options = {"batch_axes": of_rows[0] if len(of_rows) else None, "axis_name": classes}
    specs = of_rows, of_kernel, P(), of_rows
    with jax.set_mesh(mesh):
        placed = (
            jax.device_put(v, NamedSharding(mesh, s))
            for v, s in zip(on_variables(WIDE, np.float32), specs, strict=True)
        )

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
    close(jax.tree.map(np.asarray, actual), on_one_device(name), gradients=2e-5)


@pytest.mark.x32
@pytest.mark.parametrize(
    "name",
    [
        *("without entropy", "top-k", "tail", "renormalise", "jensen-shannon"),
        *map(exhaustive, ("nothing", "forward", "reverse")),
    ],
)
def test_inside_a_shard_map(name):
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))
    blocks = P(None, "classes")

    def run(x, w, b, q, kernel):
        head = HEADS[name](WIDE.replace(teacher=(WIDE.teacher[0], kernel)), axis_name="classes")[0]
        return value_and_vjp(head, (x, w, b, q))

    specs = (P(), blocks, P("classes"), P())
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(*specs, blocks), out_specs=(P(), specs)))
    actual = sharded(*on_variables(WIDE, np.float32), WIDE.teacher[1].astype(np.float32))
    close(jax.tree.map(np.asarray, actual), on_one_device(name))


@pytest.mark.x32
def test_blocks_masked_with_the_lowest_number():
    mesh = jax.make_mesh((4,), ("classes",), axis_types=(AxisType.Auto,))
    z = np.arange(16, dtype=np.float32).reshape(2, 8)
    z[:, 6:] = np.finfo(np.float32).min

    def total(z, **more):
        return jax.value_and_grad(lambda z: jnp.sum(entropy(z, **more)))(z)

    spec = P(None, "classes")
    run = jax.shard_map(functools.partial(total, axis_name="classes"), mesh=mesh, in_specs=spec, out_specs=(P(), spec))
    (value, slope), (want, to_logits) = jax.jit(run)(z), jax.jit(total)(z)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(slope, to_logits, rtol=1e-5, atol=1e-7)


@pytest.mark.x32
def test_k_larger_than_a_block():
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))
    x, w, b, _ = on_variables(WIDE, np.float32)
    top = functools.partial(linear_top_k, k=20)
    expected = jax.jit(lambda *a: top(*a[:2], bias=a[2]))(x, w, b)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda *a: top(*a[:2], bias=a[2], axis_name="classes"))(x, w, b)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=2e-6)


def dense(positions):
    rng = np.random.default_rng(0)
    z, other = (rng.normal(size=(positions, 40)).astype(np.float32) for _ in range(2))
    return z, other, WIDE.indices[:positions] % 40, WIDE.probs[:positions].astype(np.float32)


@pytest.mark.x32
@pytest.mark.parametrize("axis", [0, exhaustive(1)])
def test_dense_functions_over_shards(axis):
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))
    z, other, *sparse = (a if axis else a.T for a in dense(12))
    spec = P(None, "classes") if axis else P("classes")

    def run(z, other, **more):
        def values(z):
            return (
                entropy(z, axis, **more),
                kl_divergence(z, other, axis, reduction="none", **more),
                cross_entropy(z, SparseTargets(*sparse), axis, reduction="none", **more),
            )

        return value_and_vjp(values, (z,))

    sharded = jax.shard_map(
        functools.partial(run, axis_name="classes"), mesh=mesh, in_specs=(spec, spec), out_specs=(P(), (spec,))
    )
    close(jax.block_until_ready(jax.jit(sharded)(z, other)), jax.jit(run)(z, other))


@pytest.mark.x32
def test_dense_functions_on_an_explicit_mesh():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    z, other, *sparse = dense(16)

    @jax.jit
    @jax.value_and_grad
    def losses(z, other):
        return jnp.sum(entropy(z)) + kl_divergence(z, other) + cross_entropy(z, SparseTargets(*sparse))

    expected = losses(z, other)
    for spec in (P("data"), P(None, "data")):
        with jax.set_mesh(mesh):
            value, slope = losses(*(jax.device_put(a, NamedSharding(mesh, spec)) for a in (z, other)))
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
        (lambda x, w, p: cross_entropy(x, SparseTargets(p.indices[:, :0], p.probs[:, :0])), ValueError, "targets.indices: expected at least one class per position, got shape (37, 0)"),
        (lambda x, w, p: linear_log_probs(x, w, SparseTargets(p.indices, p.probs)), TypeError, "labels: expected integers, got SparseTargets"),
        (lambda x, w, p: linear_cross_entropy(x, w, linear_top_k(x, w, 2)), TypeError, "targets: expected an array or SparseTargets, got TopK: pass targets.as_targets()"),
        (lambda x, w, p: kl_divergence(x, x, kind="jensen-shannon", beta=0), ValueError, "got 0; libraries that accept it mean kind='forward'"),
        (lambda x, w, p: kl_divergence(x, x, kind="jensen-shannon", beta=1.0), ValueError, "got 1.0; libraries that accept it mean kind='reverse'"),
        (lambda x, w, p: checked(linear_log_probs)(x, w, p.labels + 203), ValueError, "labels[0] is "),
        (lambda x, w, p: linear_cross_entropy(x[:0], w, p.labels[:3]), ValueError, "targets: expected integer labels of shape (0,)"),
        (lambda x, w, p: entropy(jnp.float32(1)), ValueError, "axis: expected an array with at least one axis, the classes, got a scalar"),
    ],
)  # fmt: skip
def test_errors_name_argument_expected_and_actual(call, error, message):
    p = problem(*SIZES[0])
    with pytest.raises(error, match=re.escape(message)):
        call(jnp.asarray(p.x), jnp.asarray(p.w), p)
