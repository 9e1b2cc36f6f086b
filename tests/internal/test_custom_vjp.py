"""The rule with both modes. The functions' backward rules are not their derivatives, so results show which was used."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxsoft import _custom_vjp
from jaxsoft._custom_vjp import custom_vjp

rng = np.random.default_rng(0)
X, U, V = rng.normal(size=(3, 4))


@custom_vjp
def rounded(x):
    """With the derivative of 3x, which only this rule gives."""
    return jnp.round(x)


rounded.defvjp(lambda x: (rounded(x), None), lambda _, g: (3 * g,))


class Layer(NamedTuple):
    w: jax.Array
    b: jax.Array | None
    extra: tuple


def make_affine(calls, symbolic_zeros=False, forward=None):
    """x·w + b and an integer, with arguments that are not differentiated between the others."""

    def affine(scale, layer, offset, x):
        return {"value": scale * jnp.sum(layer.w * x) + layer.b + offset, "count": jnp.int32(x.size)}

    rule = custom_vjp(affine, nondiff_argnums=(0, 2))

    def fwd(scale, layer, offset, x):
        if symbolic_zeros:
            calls.append(
                [leaf.perturbed for leaf in jax.tree.leaves((layer, x), is_leaf=lambda p: hasattr(p, "perturbed"))]
            )
            layer, x = jax.tree.map(lambda p: p.value, (layer, x), is_leaf=lambda p: hasattr(p, "perturbed"))
        return affine(scale, layer, offset, x), (layer.w, x)

    def bwd(scale, offset, residuals, cotangents):
        (w, x), g = residuals, scale * cotangents["value"]
        assert not isinstance(cotangents["count"], jax.Array)
        return Layer(g * x, cotangents["value"], None), g * w

    rule.defvjp(fwd, bwd, symbolic_zeros, forward=forward)
    return rule


def test_it_is_a_custom_vjp():
    assert isinstance(rounded, jax.custom_vjp)
    assert rounded.__name__ == "rounded"


def test_both_modes_come_from_the_backward_rule():
    np.testing.assert_allclose(jax.grad(lambda x: jnp.vdot(rounded(x), V))(X), 3 * V)
    value, tangent = jax.jvp(rounded, (X,), (U,))
    np.testing.assert_array_equal(value, np.round(X))
    np.testing.assert_allclose(tangent, 3 * U)
    np.testing.assert_allclose(jax.jacfwd(rounded)(X), 3 * np.eye(4))
    np.testing.assert_allclose(jax.linearize(rounded, X)[1](U), 3 * U)
    np.testing.assert_allclose(jax.jit(jax.vmap(lambda u: jax.jvp(rounded, (X,), (u,))[1]))(np.eye(4)), 3 * np.eye(4))
    np.testing.assert_allclose(jax.vmap(jax.grad(rounded))(X), 3 * np.ones(4))


def test_a_tangent_is_differentiated_again_in_both_modes():
    """The derivatives of the tangent 3u·x² with respect to x and u."""
    cubed = lambda x, u: jax.jvp(lambda x: rounded(x) * x**2, (x,), (u,))[1]  # noqa: E731
    for mode in (jax.grad, jax.jacfwd):
        np.testing.assert_allclose(mode(cubed, 1)(1.2, 2.0), 3 * 1.2**2 + 1 * 2 * 1.2, rtol=1e-12)
        np.testing.assert_allclose(mode(cubed)(1.2, 2.0), 2.0 * (3 * 2 * 1.2 + 2 * 1 + 2 * 3 * 1.2), rtol=1e-12)


@pytest.mark.parametrize("symbolic_zeros", [False, True])
def test_pytrees_static_arguments_integers_and_zeros(symbolic_zeros):
    seen = []
    affine = make_affine(seen, symbolic_zeros)
    layer = Layer(X, jnp.float64(0.5), (jnp.ones(2),))

    def value(layer, x):
        return affine(2.0, layer, 1.0, x)["value"]

    moved = Layer(U, np.float64(0.25), (np.ones(2),))
    found = jax.jvp(value, (layer, V), (moved, X))[1]
    np.testing.assert_allclose(found, 2 * (U @ V + X @ X) + 0.25, rtol=1e-12)
    result, tangents = jax.jvp(lambda x: affine(2.0, layer, 1.0, x), (V,), (U,))
    assert result["count"] == 4
    assert tangents["count"].dtype == jax.dtypes.float0
    np.testing.assert_allclose(tangents["value"], 2 * X @ U, rtol=1e-12)
    gradients = jax.grad(value)(layer, V)
    np.testing.assert_allclose(gradients.w, 2 * V)
    np.testing.assert_array_equal(gradients.extra[0], 0)  # JAX's None, for the whole tuple
    np.testing.assert_allclose(jax.vmap(jax.grad(value, 1), (None, 0))(layer, np.stack([U, V])), 2 * np.stack([X, X]))
    if symbolic_zeros:
        assert seen[0] == [True] * 4
        assert seen[1] == [False, False, False, True]


def test_a_custom_forward_rule_gets_none_for_constant_arguments():
    seen = []

    def forward(scale, offset, residuals, tangents):
        layer, of_x = tangents
        seen.append((layer.w is None, of_x is None))
        return {"value": jnp.sum(of_x) * 7, "count": jnp.int32(0)}

    affine = make_affine([], forward=forward)
    layer = Layer(X, jnp.float64(0.5), ())
    found = jax.jvp(lambda x: affine(2.0, layer, 1.0, x)["value"], (V,), (U,))[1]
    np.testing.assert_allclose(found, 7 * U.sum())
    assert seen[-1] == (True, False)
    np.testing.assert_allclose(jax.grad(lambda x: affine(2.0, layer, 1.0, x)["value"])(V), 2 * X)


def test_under_two_vmaps_and_in_loops():
    table = rng.normal(size=(2, 3, 4))
    directions = rng.normal(size=(3, 2))  # mapped along another axis, and not along every one

    def moved(x, u):
        return jax.jvp(rounded, (x,), (jnp.full(4, u),))[1]

    found = jax.vmap(jax.vmap(moved), (0, 1))(table, directions)
    np.testing.assert_allclose(found, 3 * directions.T[..., None] * np.ones(4))
    looped = lambda x: lax.fori_loop(0, jnp.int32(3), lambda _, c: rounded(c) + c, x)  # noqa: E731
    np.testing.assert_allclose(jax.jvp(looped, (X,), (U,))[1], 64 * U)
    scanned = lambda x: lax.scan(lambda c, _: (rounded(c) + c, None), x, length=3)[0]  # noqa: E731
    np.testing.assert_allclose(jax.grad(lambda x: scanned(x) @ V)(X), 64 * V)
    np.testing.assert_allclose(jax.jvp(jax.checkpoint(scanned), (X,), (U,))[1], 64 * U)
    either = lambda x: lax.cond(x[0] > 9, jnp.sin, rounded, x)  # noqa: E731
    np.testing.assert_allclose(jax.jvp(either, (X,), (U,))[1], 3 * U)


def test_without_primitives_reverse_mode_stays(monkeypatch):
    monkeypatch.setattr(_custom_vjp, "primitives_fail", lambda: "gone")
    np.testing.assert_allclose(jax.grad(rounded)(0.3), 3)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(rounded, (0.3,), (1.0,))


def test_without_rules_it_raises_an_error():
    with pytest.raises(AttributeError, match="defvjp"):
        custom_vjp(jnp.sin)(0.3)
