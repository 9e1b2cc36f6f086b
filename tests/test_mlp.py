"""init_mlp and apply_mlp."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import apply_mlp, init_mlp


def test_apply_is_tanh_layers_and_a_linear_one():
    bias_init = jax.nn.initializers.normal()
    params = jax.jit(lambda key: init_mlp(key, (4, 5, 4, 3), bias_init=bias_init))(jax.random.key(0))
    batch = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    (k0, b0), (k1, b1), (k2, b2) = [(np.asarray(p["kernel"], float), np.asarray(p["bias"], float)) for p in params]
    expected = np.tanh(np.tanh(batch @ k0 + b0) @ k1 + b1) @ k2 + b2
    logits = jax.jit(jax.vmap(apply_mlp, in_axes=(None, 0)))(params, batch)
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    assert logits.dtype == jnp.float32


def test_activation_is_an_option():
    rng = np.random.default_rng(1)
    first, last, x = rng.normal(size=(2, 3)), rng.normal(size=(3, 1)), np.array([1.0, -2.0])
    params = [{"kernel": first, "bias": np.zeros(3)}, {"kernel": last, "bias": np.zeros(1)}]
    logits = jax.jit(lambda params, x: apply_mlp(params, x, activation=jax.nn.relu))(params, x)
    np.testing.assert_allclose(logits, np.maximum(x @ first, 0) @ last, rtol=1e-14)


def test_integer_features_take_the_dtype_of_the_parameters():
    kernel = np.random.default_rng(1).normal(size=(2, 3)).astype(np.float32)
    logits = jax.jit(apply_mlp)([{"kernel": kernel, "bias": np.zeros(3, np.float32)}], np.array([1, -2]))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, np.array([1.0, -2.0]) @ kernel.astype(float), rtol=1e-6)


def test_kernels_have_variance_one_over_fan_in_and_biases_are_zero():
    params = jax.jit(lambda key: init_mlp(key, (1000, 500, 10), dtype=jnp.float64))(jax.random.key(2))
    assert all(array.dtype == jnp.float64 for array in jax.tree.leaves(params))
    assert np.std(params[0]["kernel"]) == pytest.approx(1000**-0.5, rel=0.01)
    assert np.std(params[1]["kernel"]) == pytest.approx(500**-0.5, rel=0.05)
    assert not any(np.any(layer["bias"]) for layer in params)


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
        (lambda: init_mlp(0, (4, 3)), TypeError, "key: expected a random key, such as jax.random.key(0), got 0"),
        (lambda: apply_mlp((), np.ones(4)), ValueError, "params: expected at least one layer, got none"),
        (lambda: apply_mlp([{"kernel": np.ones((4, 3)), "bias": np.zeros(3)}], np.ones((7, 4))), ValueError, "features: expected one example of shape (4,), got (7, 4); map batches with jax.vmap"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
