"""init_mlp and apply_mlp."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import apply_mlp, init_mlp


def test_apply_is_tanh_layers_and_a_linear_one():
    params = init_mlp(jax.random.key(0), (4, 5, 4, 3), bias_init=jax.nn.initializers.normal())
    batch = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    (k0, b0), (k1, b1), (k2, b2) = [(np.asarray(p["kernel"], float), np.asarray(p["bias"], float)) for p in params]
    expected = np.tanh(np.tanh(batch @ k0 + b0) @ k1 + b1) @ k2 + b2
    logits = jax.jit(jax.vmap(apply_mlp, in_axes=(None, 0)))(params, jnp.asarray(batch))
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    assert logits.dtype == jnp.float32


def test_activation_is_an_option():
    params = init_mlp(jax.random.key(1), (2, 3, 1), dtype=jnp.float64)
    x = jnp.array([1.0, -2.0])
    expected = jax.nn.relu(x @ params[0]["kernel"]) @ params[1]["kernel"]
    np.testing.assert_allclose(apply_mlp(params, x, activation=jax.nn.relu), expected, rtol=1e-14)


def test_integer_features_take_the_dtype_of_the_parameters():
    params = init_mlp(jax.random.key(1), (2, 3), dtype=jnp.float32)
    logits = apply_mlp(params, np.array([1, -2]))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, np.array([1.0, -2.0]) @ np.asarray(params[0]["kernel"], float), rtol=1e-6)


def test_kernels_have_variance_one_over_fan_in_and_biases_are_zero():
    params = init_mlp(jax.random.key(2), (1000, 500, 10), dtype=jnp.float64)
    assert np.std(params[0]["kernel"]) == pytest.approx(1000**-0.5, rel=0.01)
    assert np.std(params[1]["kernel"]) == pytest.approx(500**-0.5, rel=0.05)
    assert all(not layer["bias"].any() for layer in params)


def test_layers_are_drawn_independently_and_repeatably():
    first, second = init_mlp(jax.random.key(3), (4, 4, 4)), init_mlp(jax.random.key(3), (4, 4, 4))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert not np.array_equal(first[0]["kernel"], first[1]["kernel"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: init_mlp(jax.random.key(0), (4,)), ValueError, "sizes: expected at least two positive layer sizes, got (4,)"),
        (lambda: init_mlp(jax.random.key(0), (4, 0)), ValueError, "sizes: expected at least two positive layer sizes, got (4, 0)"),
        (lambda: init_mlp(jax.random.key(0), (4, 2.5)), TypeError, "sizes[1]: expected an integer, got 2.5"),
        (lambda: apply_mlp((), jnp.ones(4)), ValueError, "params: expected at least one layer, got none"),
        (lambda: apply_mlp(init_mlp(jax.random.key(0), (4, 3)), jnp.ones((7, 4))), ValueError, "features: expected one example of shape (4,), got (7, 4); map batches with jax.vmap"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
