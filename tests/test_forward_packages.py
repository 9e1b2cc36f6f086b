"""Packages that use forward mode, each with a typical example: jaxsoft's functions give the same as the ones they replace.

Equal to a relative 1e-8 in float64, but what an iteration or a sampler amplifies, whose tolerance stands with it.
"""

import functools
import importlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxsoft

rng = np.random.default_rng(0)
X = rng.normal(size=(12, 3))
LABELS = rng.integers(0, 4, 12)
KERNEL = 0.3 * rng.normal(size=(3, 4))
COUPLING = rng.normal(size=(4, 4))
START = np.array([0.1, 0.2, 0.3, 0.4])
TILED = {"memory_budget": 4 * 2 * 8 * 4}  # four positions a tile


class Functions(NamedTuple):
    softmax: Callable
    log_softmax: Callable
    cross_entropy: Callable  # of logits and labels, the mean
    linear_cross_entropy: Callable  # of features, kernel and labels


def on_full_logits(features, kernel, labels):
    return optax.softmax_cross_entropy_with_integer_labels(features @ kernel, labels).mean()


OURS = Functions(
    jaxsoft.softmax,
    jaxsoft.log_softmax,
    jaxsoft.cross_entropy,
    functools.partial(jaxsoft.linear_cross_entropy, **TILED),
)
THEIRS = Functions(
    jax.nn.softmax,
    jax.nn.log_softmax,
    lambda logits, labels: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(),
    on_full_logits,
)


def load(name):
    """A package of the extra `forward`, which may import what warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason="the optional extra 'forward' is not installed")


def compare(example, rtol=1e-8):
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")  # of packages that are older than this JAX
        found, expected = example(OURS), example(THEIRS)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.all(np.isfinite(b))
        assert np.any(b != 0)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.max(np.abs(b)))
    return found


def penalised(of, kernel):
    return of.linear_cross_entropy(X, kernel.reshape(KERNEL.shape), LABELS) + 0.05 * jnp.sum(kernel**2)


def misfit(of, kernel):
    """The difference of a kernel's probabilities from the wanted ones."""
    return (of.softmax(X @ kernel.reshape(KERNEL.shape)) - of_teacher()).reshape(-1)


def of_teacher():
    weights = np.exp(X @ (KERNEL + 0.5))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("solver", ["LevenbergMarquardt", "GaussNewton", "Dogleg"])
def test_optimistix_least_squares(solver):
    optx = load("optimistix")

    def example(of):
        # A constant added to a row of the kernel changes no probability: one column is held.
        def residuals(free, _):
            return misfit(of, jnp.concatenate([jnp.zeros((3, 1)), free], 1))

        search = getattr(optx, solver)(rtol=1e-10, atol=1e-10)
        return optx.least_squares(residuals, search, jnp.asarray(KERNEL[:, 1:])).value

    compare(example, rtol=1e-7)


@pytest.mark.exhaustive
@pytest.mark.parametrize("solver", ["Newton", "Chord"])
def test_optimistix_root_of_a_gradient(solver):
    optx = load("optimistix")

    def example(of):
        def gradient(kernel, _):
            return jax.grad(functools.partial(penalised, of))(kernel)

        search = getattr(optx, solver)(rtol=1e-10, atol=1e-10)
        return optx.root_find(gradient, search, jnp.asarray(KERNEL), max_steps=500).value

    compare(example, rtol=1e-7)


@pytest.mark.exhaustive
def test_optimistix_gradient_of_a_fixed_point():
    """By the implicit function theorem, in forward mode at the fixed point."""
    optx = load("optimistix")

    def example(of):
        def average(coupling):
            step = lambda p, a: of.softmax(0.5 * a @ p)  # noqa: E731
            search = optx.FixedPointIteration(rtol=1e-12, atol=1e-12)
            return jnp.dot(optx.fixed_point(step, search, jnp.asarray(START), coupling).value, START)

        return jax.value_and_grad(average)(jnp.asarray(COUPLING))

    compare(example)


@pytest.mark.exhaustive
@pytest.mark.parametrize("head", ["dense", "tiled"])
def test_lineax_newton_direction_by_conjugate_gradients(head):
    lx = load("lineax")

    def example(of):
        def loss(kernel):
            if head == "tiled":
                return penalised(of, kernel)
            return of.cross_entropy(X @ kernel, LABELS) + 0.05 * jnp.sum(kernel**2)

        kernel = jnp.asarray(KERNEL)
        gradient = jax.grad(loss)
        hessian = lx.JacobianLinearOperator(
            lambda w, _: gradient(w), kernel, tags=lx.positive_semidefinite_tag, jac="fwd"
        )
        return lx.linear_solve(hessian, gradient(kernel), lx.CG(rtol=1e-11, atol=1e-11)).value

    compare(example)


@pytest.mark.exhaustive
@pytest.mark.parametrize("solver", ["Kvaerno3", "Kvaerno5", "ImplicitEuler"])
def test_diffrax_implicit_solver(solver):
    """Mean-field dynamics, stiff; each step solves for the stages by Newton's method."""
    diffrax, optx = load("diffrax"), load("optimistix")

    def example(of):
        term = diffrax.ODETerm(lambda t, p, a: 20 * (of.softmax(a @ p) - p))
        root = {"root_finder": optx.Newton(rtol=1e-10, atol=1e-10)} if solver == "ImplicitEuler" else {}
        steps = diffrax.ConstantStepSize() if root else diffrax.PIDController(rtol=1e-6, atol=1e-8)
        solution = diffrax.diffeqsolve(
            term,
            getattr(diffrax, solver)(**root),
            0.0,
            1.0,
            0.05,
            jnp.asarray(START),
            jnp.asarray(COUPLING),
            stepsize_controller=steps,
        )
        return solution.ys

    compare(example, rtol=1e-6)


@pytest.mark.exhaustive
def test_diffrax_forward_mode_of_a_solution():
    diffrax = load("diffrax")

    def example(of):
        def end(coupling):
            term = diffrax.ODETerm(lambda t, p, a: of.softmax(a @ p) - p)
            solution = diffrax.diffeqsolve(
                term, diffrax.Tsit5(), 0.0, 1.0, 0.1, jnp.asarray(START), coupling, adjoint=diffrax.ForwardMode()
            )
            return solution.ys

        return jax.jacfwd(end)(jnp.asarray(COUPLING))

    compare(example)


@pytest.mark.exhaustive
def test_numpyro_nuts_by_forward_differentiation():
    """Few samples: each one depends on all roundings before it."""
    numpyro, dist, infer = load("numpyro"), load("numpyro.distributions"), load("numpyro.infer")

    def example(of):
        def model():
            kernel = numpyro.sample("kernel", dist.Normal(0.0, 1.0).expand(KERNEL.shape).to_event(2))
            numpyro.factor("labels", -len(X) * of.cross_entropy(X @ kernel, LABELS))

        kernel = infer.NUTS(model, forward_mode_differentiation=True)
        sampler = infer.MCMC(kernel, num_warmup=5, num_samples=5, progress_bar=False)
        sampler.run(jax.random.key(0))
        return sampler.get_samples()["kernel"]

    samples = compare(example, rtol=1e-5)
    assert len(np.unique(samples[:, 0, 0])) > 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("solver", ["GaussNewton", "LevenbergMarquardt"])
def test_jaxopt_least_squares(solver):
    jaxopt = load("jaxopt")

    def example(of):
        def residuals(free):
            held = jnp.concatenate([jnp.zeros((3, 1)), free.reshape(3, 3)], 1)
            return misfit(of, held)

        search = getattr(jaxopt, solver)(residuals, tol=1e-9, maxiter=20)
        return search.run(jnp.asarray(KERNEL[:, 1:].reshape(-1))).params

    compare(example, rtol=1e-6)


@pytest.mark.exhaustive
def test_laplax_gauss_newton_product_of_a_network_with_a_softmax_inside():
    """The product goes in forward mode through attention in the network and through the loss."""
    load("laplax")
    ggn = load("laplax.curv.ggn")
    enums = importlib.import_module("laplax.enums")

    def example(of):
        def network(input, params):
            scores = of.softmax(params["query"] @ input)
            return scores @ params["value"]

        params = {"query": jnp.asarray(rng_like(5, 3)), "value": jnp.asarray(rng_like(5, 4))}
        data = {"input": jnp.asarray(X), "target": jnp.asarray(LABELS)}
        product = ggn.create_ggn_mv(network, params, data, loss_fn=enums.LossFn.CROSS_ENTROPY)
        return product(jax.tree.map(jnp.cos, params))

    compare(example)


@pytest.mark.exhaustive
def test_laplax_gauss_newton_product_with_the_hessian_of_a_jaxsoft_loss():
    """With the loss as a function, whose Hessian laplax takes by `jvp` of `grad`."""
    load("laplax")
    ggn = load("laplax.curv.ggn")

    def example(of):
        params = jnp.asarray(KERNEL)
        data = {"input": jnp.asarray(X), "target": jnp.asarray(LABELS)}
        product = ggn.create_ggn_mv(lambda input, params: input @ params, params, data, loss_fn=of.cross_entropy)
        return product(jnp.cos(params))

    compare(example)


def rng_like(*shape):
    return np.random.default_rng(5).normal(size=shape)


def test_equinox_filter_jvp():
    def example(of):
        network = eqx.nn.MLP(3, 4, 5, 2, key=jax.random.key(0))

        def loss(network):
            log_probs = jax.vmap(lambda x: of.log_softmax(network(x)))(jnp.asarray(X))
            return of.cross_entropy(log_probs, LABELS)

        tangent = jax.tree.map(lambda leaf: jnp.cos(leaf) if eqx.is_inexact_array(leaf) else None, network)
        return eqx.filter_jvp(loss, (network,), (tangent,))

    compare(example)


@pytest.mark.exhaustive
def test_equinox_hessian_product():
    def example(of):
        network = eqx.nn.MLP(3, 4, 5, 2, key=jax.random.key(0))
        params, static = eqx.partition(network, eqx.is_inexact_array)

        def loss(params):
            features = jax.vmap(eqx.combine(params, static))(jnp.asarray(X))
            return of.linear_cross_entropy(features, jnp.asarray(COUPLING), LABELS)

        return eqx.filter_jvp(eqx.filter_grad(loss), (params,), (jax.tree.map(jnp.cos, params),))[1]

    compare(example)


@pytest.mark.exhaustive
def test_flax_lifted_jvp():
    def example(of):
        class Attention(nn.Module):
            @nn.compact
            def __call__(self, x):
                scores = nn.Dense(5, param_dtype=float)(x)
                return nn.Dense(4, param_dtype=float)(of.softmax(scores))

        class Forward(nn.Module):
            @nn.compact
            def __call__(self, x):
                network = Attention()
                moved = {"params": jax.tree.map(jnp.cos, network.variables.get("params", {}))}
                run = lambda module, x: of.cross_entropy(module(x), LABELS)  # noqa: E731
                if self.is_initializing():
                    return network(x)
                return nn.jvp(run, network, (x,), (jnp.sin(x),), variable_tangents=moved)

        variables = Forward().init(jax.random.key(0), jnp.asarray(X))
        return Forward().apply(variables, jnp.asarray(X))

    compare(example)


@pytest.mark.exhaustive
def test_empirical_neural_tangent_kernel():
    """J Jᵀ by Jacobians, and without them by pushing forward what was pulled back."""

    def example(of):
        params = {"in": jnp.asarray(KERNEL), "out": jnp.asarray(COUPLING)}

        def network(params, x):
            return of.log_softmax(of.softmax(x @ params["in"]) @ params["out"])

        def by_jacobians(x, y):
            pairs = zip(*(jax.tree.leaves(jax.jacfwd(network)(params, p)) for p in (x, y)), strict=True)
            return sum(jnp.tensordot(a, b, ((1, 2), (1, 2))) for a, b in pairs)

        def by_products(x, y):
            _, pull = jax.vjp(lambda params: network(params, y), params)
            return jax.vmap(lambda e: jax.jvp(lambda p: network(p, x), (params,), pull(e))[1], out_axes=1)(jnp.eye(4))

        def gram(kernel):
            return jax.vmap(lambda x: jax.vmap(lambda y: kernel(x, y))(jnp.asarray(X[:5])))(jnp.asarray(X[:5]))

        return jax.jit(gram, static_argnums=0)(by_jacobians), jax.jit(gram, static_argnums=0)(by_products)

    jacobians, products = compare(example)
    np.testing.assert_allclose(products, jacobians, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loop", ["while", pytest.param("scan", marks=pytest.mark.exhaustive)])
def test_meta_learning_through_an_inner_loop(loop):
    """MAML: forward mode through steps of gradient descent, whose number a `while_loop` need not know."""

    def example(of):
        def adapt(kernel, rate):
            def step(w):
                return w - rate * jax.grad(of.linear_cross_entropy, 1)(X[:6], w, LABELS[:6])

            if loop == "scan":
                return lax.scan(lambda w, _: (step(w), None), kernel, length=3)[0]
            moves = lambda state: state[0] < 3  # noqa: E731
            return lax.while_loop(moves, lambda state: (state[0] + 1, step(state[1])), (0, kernel))[1]

        def after(kernel, rate):
            return of.cross_entropy(X[6:] @ adapt(kernel, rate), LABELS[6:])

        point, direction = (jnp.asarray(KERNEL), jnp.float64(0.5)), (jnp.cos(KERNEL), jnp.float64(1.0))
        found = jax.jvp(after, point, direction)
        return (found, jax.grad(after, (0, 1))(*point)) if loop == "scan" else found

    compare(example)


PAGE = Path(__file__).parents[1] / "docs" / "second-order.md"
PRINTED = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text() if PAGE.exists() else "", re.DOTALL | re.MULTILINE)


@pytest.mark.x32
@pytest.mark.exhaustive
@pytest.mark.parametrize("package", ["lineax", "optimistix", "laplax"])
def test_what_the_page_prints_runs(package):
    load(package)
    (program,) = (text for text in PRINTED if f"import {package}" in text or f"from {package}" in text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(program, {})
