"""Forward mode of every function: against finite differences, and as the transpose of reverse mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_laws import DISTRIBUTION, EACH, FUNCTIONS, LABELS, B, W, X, Z

import jaxsoft
from jaxsoft import SparseTargets, caffe, cross_entropy, energy, linear_cross_entropy, log_softmax, logsumexp, softmax

rng = np.random.default_rng(1)
TEACHER = rng.normal(size=Z.shape)
SPARSE = SparseTargets(np.argsort(Z, 1)[:, ::3], np.array([0.5, 0.2]) * np.ones((6, 1)))
MASK = rng.random(Z.shape) < 0.7
TILED = {"memory_budget": EACH["memory_budget"]}
CALLS = FUNCTIONS | {
    "softmax where": (lambda z: softmax(z, 0, MASK), (Z,)),
    "two axes": (lambda z: log_softmax(z, (0, 1)), (Z,)),
    "where": (lambda z: cross_entropy(z, np.argmax(MASK, 1), where=MASK, weights=np.arange(6.0)), (Z,)),
    "distribution mean": (
        lambda z, t: cross_entropy(z, t, label_smoothing=0.1, class_weights=np.arange(5.0)),
        (Z, DISTRIBUTION),
    ),
    "sparse": (lambda z: cross_entropy(z, SPARSE, reduction="none"), (Z,)),
    "entropy": (jaxsoft.entropy, (Z,)),
    "reverse divergence": (lambda z: jaxsoft.kl_divergence(z, TEACHER, kind="reverse"), (Z,)),
    "linear sum": (
        lambda x, w, b: linear_cross_entropy(x, w, LABELS, b, soft_cap=3.0, reduction="sum", ignore_index=1, **TILED),
        (X, W, B),
    ),
    "linear kernel alone": (lambda w: linear_cross_entropy(X, w, LABELS, z_loss=0.1, **TILED), (W,)),
    "linear sparse": (lambda x, w: linear_cross_entropy(x, w, SPARSE, **TILED), (X, W)),
    "log probs": (lambda x, w: jaxsoft.linear_log_probs(x, w, LABELS, entropy=True, **TILED)[:2], (X, W)),
    "top k": (lambda x, w: jaxsoft.linear_top_k(x, w, 2, **TILED).log_probs, (X, W)),
    "linear divergence": (lambda x, w: jaxsoft.linear_kl_divergence(x, w, X, W[:, ::-1], **TILED), (X, W)),
    "examples": (
        lambda x, w: jax.vmap(linear_cross_entropy, (0, None, 0))(x.reshape(2, 3, 3), w, LABELS.reshape(2, 3)),
        (X, W),
    ),
    "multinomial": (lambda z: caffe.multinomial_logistic_loss(softmax(z), LABELS), (Z,)),
    "gibbs": (lambda z: energy.gibbs_distribution(z, beta=0.5), (Z,)),
}
EACH_KIND = ["softmax", "log_softmax", "distributions", "mean", "linear distributions", "linear mean"]


def by_default(*names):
    return [name if name in names else pytest.param(name, marks=pytest.mark.exhaustive) for name in CALLS]


def directions(name, seed):
    generator = np.random.default_rng(seed)
    return tuple(generator.normal(size=v.shape) for v in CALLS[name][1])


def along(fn, variables, tangents):
    return jax.jvp(fn, variables, tangents)[1]


compiled = jax.jit(along, static_argnums=0)


def inner(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def close(found, expected, rtol=1e-9):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.max(np.abs(b), initial=1e-2))


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_the_transpose_of_reverse_mode_and_the_limit_of_differences(name):
    fn, variables = CALLS[name]
    step = 1e-5

    @jax.jit
    def results(variables, u):
        tangent = along(fn, variables, u)
        g = jax.tree.map(lambda t: jnp.cos(jnp.arange(t.size, dtype=t.dtype)).reshape(t.shape), tangent)
        return tangent, inner(g, tangent), inner(u, jax.vjp(fn, *variables)[1](g))

    u = directions(name, 3)
    tangent, forward, reverse = results(variables, u)
    value = jax.jit(fn)
    ahead, behind = (value(*(v + s * d for v, d in zip(variables, u, strict=True))) for s in (step, -step))
    close(tangent, jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind), rtol=1e-7)
    close(forward, reverse)


@pytest.mark.parametrize("name", by_default(*EACH_KIND))
def test_forward_mode_under_every_transformation(name):
    fn, variables = CALLS[name]
    first, second = directions(name, 3), directions(name, 4)
    both = tuple(map(np.stack, zip(first, second, strict=True)))

    def repeated(*variables):  # three turns of a loop that only forward mode can differentiate
        start = jax.tree.map(jnp.zeros_like, jax.eval_shape(fn, *variables))
        turn = lambda n, total: jax.tree.map(jnp.add, total, fn(*variables))  # noqa: E731
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, turn(*c)), (jnp.int32(0), start))[1]

    def scanned(*variables):
        return lax.scan(lambda carry, _: (carry, fn(*variables)), 0.0, None, length=2)[1]

    @jax.jit
    def results(variables):
        tangents = along(fn, variables, first), along(fn, variables, second)
        twice = jax.tree.map(lambda *both: jnp.stack(both), *tangents)
        thrice = jax.tree.map(lambda t: 3 * t, tangents[0])
        shared = lambda *moving: along(fn, variables, moving)  # noqa: E731
        stacked = tuple(jnp.stack([v, v]) for v in variables)
        linear = jax.linearize(fn, *variables)[1]
        again = jax.tree.map(lambda t: jnp.stack([t, t]), tangents[0])
        return {
            "vmap of tangents": (jax.vmap(shared)(*both), twice),
            "vmap of both": (jax.vmap(functools.partial(along, fn))(stacked, both), twice),
            "vmap in the function": (along(jax.vmap(fn), stacked, both), twice),
            "linearize": (linear(*second), tangents[1]),
            "transpose": (jax.linear_transpose(linear, *first)(tangents[0]), jax.vjp(fn, *variables)[1](tangents[0])),
            "jit": (along(jax.jit(fn), variables, first), tangents[0]),
            "checkpoint": (along(jax.checkpoint(fn), variables, first), tangents[0]),
            "while": (along(repeated, variables, first), thrice),
            "scan": (along(scanned, variables, first), again),
            "scan in reverse": (jax.vjp(scanned, *variables)[1](again), jax.vjp(scanned_plainly, *variables)[1](again)),
        }

    def scanned_plainly(*variables):
        value = fn(*variables)
        return jax.tree.map(lambda v: jnp.stack([v, v]), value)

    for mode, (found, expected) in results(variables).items():
        jax.tree.map(
            lambda a, b, mode=mode: np.testing.assert_allclose(a, b, 1e-9, 1e-11, err_msg=mode), found, expected
        )


@pytest.mark.parametrize("name", by_default("softmax", "mean", "linear mean"))
def test_second_and_third_derivatives_in_every_order_of_modes(name):
    """Each result equals the result of reverse mode alone."""
    fn, variables = CALLS[name]
    u = directions(name, 3)

    def number(*variables):
        return sum(jnp.sum(jnp.sin(v)) for v in jax.tree.leaves(fn(*variables)))

    def reverse(f):
        return lambda *v: inner(jax.grad(f, tuple(range(len(v))))(*v), u)

    def forward(f):
        return lambda *v: along(f, v, u)

    @jax.jit
    def results(variables):
        orders = {a.__name__ + b.__name__: b(a(number)) for a in (reverse, forward) for b in (reverse, forward)}
        third = {"third " + first: forward(orders[first]) for first in ("reverseforward", "forwardforward")}
        third["third"] = reverse(orders["reversereverse"])
        return {order: f(*variables) for order, f in (orders | third).items()}

    found = results(variables)
    for order, value in found.items():
        expected = found["third" if order.startswith("third") else "reversereverse"]
        np.testing.assert_allclose(value, expected, rtol=1e-8, atol=1e-10, err_msg=order)


@pytest.mark.x32
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_tangent_has_the_dtype_of_its_result_and_is_right_to_it(dtype):
    losses = (lambda z, t=t: cross_entropy(z, t) for t in (LABELS, DISTRIBUTION))
    functions = [softmax, log_softmax, logsumexp, *losses]

    def results(z, tangent):
        return [jax.jvp(fn, (z,), (tangent,)) for fn in functions]

    z, tangent = (jnp.asarray(a, dtype) for a in (Z, rng.normal(size=Z.shape)))
    with jax.enable_x64(True):
        expected = results(np.asarray(z, float), np.asarray(tangent, float))
    for (value, found), (_, right) in zip(jax.jit(results)(z, tangent), expected, strict=True):
        assert found.dtype == value.dtype
        tolerance = 8 * float(jnp.finfo(dtype).eps) * np.abs(right).max()
        np.testing.assert_allclose(np.asarray(found, float), right, atol=tolerance)


OVER_SHARDS = {
    "softmax": lambda z, axis_name: softmax(z, axis_name=axis_name),
    "log_softmax": lambda z, axis_name: log_softmax(z, axis_name=axis_name),
    "logsumexp": lambda z, axis_name: logsumexp(z, axis_name=axis_name),
    "labels": lambda z, axis_name: cross_entropy(z, LABELS % 4, axis_name=axis_name),
    "entropy": lambda z, axis_name: jaxsoft.entropy(z, axis_name=axis_name),
    "linear": lambda w, axis_name: linear_cross_entropy(X, w, LABELS % 4, axis_name=axis_name, **TILED),
    "each": lambda w, axis_name: linear_cross_entropy(X, w, LABELS % 4, axis_name=axis_name, **EACH),
}


@pytest.mark.parametrize("name", OVER_SHARDS)
def test_classes_sharded_inside_shard_map(name):
    fn, (point, direction) = OVER_SHARDS[name], rng.normal(size=(2, 3 if name in ("linear", "each") else 6, 8))
    mesh = jax.make_mesh((4,), ("classes",), axis_types=(AxisType.Auto,))
    blocks = P(None, "classes")
    result = blocks if "softmax" in name else P()

    def sharded(z, t):
        return along(functools.partial(fn, axis_name="classes"), (z,), (t,))

    inside = jax.shard_map(sharded, mesh=mesh, in_specs=(blocks, blocks), out_specs=result)
    outside = jax.shard_map(functools.partial(fn, axis_name="classes"), mesh=mesh, in_specs=blocks, out_specs=result)
    expected = compiled(functools.partial(fn, axis_name=None), (point,), (direction,))
    close(jax.jit(inside)(point, direction), expected)
    close(compiled(outside, (point,), (direction,)), expected)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
def test_arrays_sharded_over_a_mesh(kind):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
    z, u = rng.normal(size=(2, 8, 6))
    x, of_x = rng.normal(size=(2, 8, 4))
    w, of_w = rng.normal(size=(2, 4, 6))
    y = np.arange(8) % 6
    by_axes = {"batch_axes": "data", "axis_name": "model"} if kind == AxisType.Auto else {}
    rows, dense, kernel = P("data"), P("data", "model"), P(None, "model")
    calls = {
        "softmax": (softmax, (z,), (u,), (dense,)),
        "loss": (lambda z: cross_entropy(z, y), (z,), (u,), (dense,)),
        "mean": (lambda x, w: linear_cross_entropy(x, w, y, **by_axes), (x, w), (of_x, of_w), (rows, kernel)),
        "each": (
            lambda x, w: linear_cross_entropy(x, w, y, reduction="none", **by_axes),
            (x, w),
            (of_x, of_w),
            (rows, kernel),
        ),
    }
    for name, (fn, variables, tangents, specs) in calls.items():
        expected = compiled(fn if "softmax" in name or name == "loss" else unsharded(fn, y, name), variables, tangents)
        with jax.set_mesh(mesh):
            placed = [
                tuple(jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True))
                for arrays in (variables, tangents)
            ]
            close(compiled(fn, *placed), expected)


def unsharded(fn, y, name):
    return lambda x, w: linear_cross_entropy(x, w, y, reduction="none" if name == "each" else "mean")


@pytest.mark.x32
@pytest.mark.optimized
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_jvp_of_a_tiled_head_keeps_to_its_memory_budget(reduction):
    positions, width, classes, budget = 1024, 64, 8192, 4 << 20
    x, w = jnp.zeros((positions, width)), jnp.zeros((width, classes))
    y = jnp.zeros(positions, int)

    def loss(x, w):
        return linear_cross_entropy(x, w, y, reduction=reduction, memory_budget=budget)

    program = jax.jit(functools.partial(along, loss)).lower((x, w), (x, w)).compile()
    # Logits and their tangents of a tile, where all of them would take 64 MiB; and the kernel's layouts.
    assert program.memory_analysis().temp_size_in_bytes <= 2 * budget + 2 * w.nbytes


def test_an_exported_program_has_forward_mode_inside_and_reverse_mode_of_its_own():
    z, u = Z, directions("mean", 3)[0]
    exported = jax.export.export(jax.jit(lambda z: along(lambda z: cross_entropy(z, LABELS), (z,), (u,))))(z)
    second = jax.grad(lambda z: along(lambda z: cross_entropy(z, LABELS), (z,), (u,)))
    np.testing.assert_allclose(exported.call(z), compiled(lambda z: cross_entropy(z, LABELS), (z,), (u,)), rtol=1e-12)
    np.testing.assert_allclose(exported.vjp().call(z, np.ones(()))[0], jax.jit(second)(z), rtol=1e-9, atol=1e-12)


def test_donated_logits():
    donating = jax.jit(lambda z, u: along(softmax, (z,), (u,)), donate_argnums=0)
    found = donating(jnp.asarray(Z), jnp.asarray(TEACHER))
    np.testing.assert_allclose(found, compiled(softmax, (Z,), (TEACHER,)), rtol=1e-12)


def test_an_ignored_position_has_no_tangent_whatever_its_logits_and_their_tangents():
    z, u = Z.copy(), TEACHER.copy()
    z[2], u[2] = np.nan, np.nan
    labels = np.where(np.arange(6) == 2, -1, LABELS)
    for reduction in ("none", "mean"):
        loss = functools.partial(cross_entropy, targets=labels, ignore_index=-1, reduction=reduction)
        clean = compiled(loss, (Z,), (TEACHER,))
        np.testing.assert_allclose(compiled(loss, (z,), (u,)), clean, rtol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_weight_of_a_masked_class_has_an_infinite_derivative_but_adds_no_loss(reduction):
    z = np.array([[0.3, -np.inf, 1.0], [0.1, 0.2, 0.3]])
    q = np.array([[0.5, 0.0, 0.5], [0.2, 0.3, 0.5]])
    loss = functools.partial(cross_entropy, reduction=reduction)
    of_weights = functools.partial(compiled, functools.partial(loss, z), (q,))
    stays, grows = np.array([[1.0, 0.0, -1.0], [1.0, 2.0, 0.0]]), np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    finite = np.where(np.isfinite(z), z, -1e3)  # whose weight stays, too: what it is does not matter
    close(of_weights((stays,)), compiled(functools.partial(loss, finite), (q,), (stays,)))
    for sign in (1, -1):
        found = np.atleast_1d(of_weights((sign * grows,)))
        assert found[0] == sign * np.inf
        assert np.isfinite(found[1:]).all()
    both = compiled(loss, (z, q), (np.where(np.isfinite(z), 1.0, 0.0), stays))
    close(both, compiled(loss, (finite, q), (np.where(np.isfinite(z), 1.0, 0.0), stays)))
