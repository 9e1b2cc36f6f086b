"""The numbers of a question and its answers on back-propagation through softmax and cross-entropy.

IDs count its formulas (S2.1 to S2.25) and mistakes (E2.1 to E2.10) in order of appearance.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import cross_entropy, log_softmax, softmax, softmax_jacobian

INPUTS = np.array([0.5, -1.0, 2.0])
WEIGHTS = np.array([[0.1, -0.2, 0.3], [0.4, 0.3, -0.1], [-0.5, 0.2, 0.6]])
BIASES = np.array([0.01, -0.02, 0.03])
Z = np.array([-1.34, -0.02, 1.48])
OUTPUTS = np.array([0.046467814, 0.173948608, 0.779583577])
CASES = {
    "one-hot": ([0.0, 1.0, 0.0], 1.0, 1.748995377, [0.046467814, -0.826051392, 0.779583577]),
    "distribution": ([0.2, 0.5, 0.3], 1.0, 1.562995377, [-0.153532186, -0.326051392, 0.479583577]),
    "unnormalised": ([0.5, 1.0, 0.25], 1.75, 3.345741910, [-0.418681325, -0.695589935, 1.114271261]),
}
HIDDEN = np.array([0.5, -1.0, 2.0])
TO_OUTPUTS = np.array([[0.1, -0.2], [0.4, 0.3], [-0.5, 0.2]])


gradient_to_logits = jax.jit(jax.grad(cross_entropy))


def close(actual, expected, digits=9):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=0.51 * 10.0**-digits)


def test_logits_and_outputs_of_the_three_class_layer():
    """S2.3, S2.2."""
    close(INPUTS @ WEIGHTS + BIASES, Z, 12)
    close(softmax(Z), OUTPUTS)


@pytest.mark.parametrize(("t", "tau", "loss", "gradient"), CASES.values(), ids=CASES)
class TestThreeClasses:
    def test_loss(self, t, tau, loss, gradient):
        """S2.1."""
        close(jax.jit(cross_entropy)(Z, np.array(t)), loss)

    def test_gradient_to_the_logits(self, t, tau, loss, gradient):
        """S2.14."""
        assert sum(t) == tau
        close(gradient_to_logits(Z, np.array(t)), gradient)
        close(tau * np.asarray(softmax(Z)) - t, gradient)

    def test_gradient_to_the_weights(self, t, tau, loss, gradient):
        """S2.15."""
        to_weights = jax.grad(lambda w: cross_entropy(INPUTS @ w + BIASES, np.array(t)))(WEIGHTS)
        close(to_weights, np.outer(INPUTS, gradient), 8)

    def test_gradient_to_the_biases(self, t, tau, loss, gradient):
        """S2.16."""
        close(jax.grad(lambda b: cross_entropy(INPUTS @ WEIGHTS + b, np.array(t)))(BIASES), gradient)

    def test_gradient_to_the_weights_is_the_full_double_sum(self, t, tau, loss, gradient):
        """S2.17."""
        total = np.zeros((3, 3))
        for p, q, i, k in np.ndindex(3, 3, 3, 3):
            do_dz = OUTPUTS[i] * ((i == k) - OUTPUTS[k])
            total[p, q] += -t[i] / OUTPUTS[i] * do_dz * (k == q) * INPUTS[p]
        close(jax.grad(lambda w: cross_entropy(INPUTS @ w + BIASES, np.array(t)))(WEIGHTS), total, 8)

    def test_the_matrix_form_is_the_transpose(self, t, tau, loss, gradient):
        """S2.22."""
        to_weights = jax.grad(lambda w: cross_entropy(w @ INPUTS + BIASES, np.array(t)))(WEIGHTS.T)
        close(to_weights, tau * np.outer(OUTPUTS, INPUTS) - np.outer(t, INPUTS), 8)


def test_derivatives_of_log_softmax_and_softmax():
    """S2.13."""
    of_log, of_softmax = jax.jit(lambda z: (jax.jacrev(log_softmax)(z), jax.jacrev(softmax)(z)))(Z)
    close(of_log, np.eye(3) - OUTPUTS)
    close(of_softmax, OUTPUTS[:, None] * (np.eye(3) - OUTPUTS))
    close(softmax_jacobian(softmax(Z)), np.diag(OUTPUTS) - np.outer(OUTPUTS, OUTPUTS))


def test_gradient_with_two_outputs_and_with_the_exponential_of_the_other():
    """S2.18, E2.5."""
    z, t = np.array([0.3, -0.8]), np.array([0.7, 0.6])
    o = np.exp(z) / np.exp(z).sum()
    close(gradient_to_logits(z, t)[0], -t[0] + o[0] * (t[0] + t[1]), 12)
    close(gradient_to_logits(z, t)[0], 0.275338, 6)
    close(-t[0] + t[0] * o[0] + t[1] * o[1], -0.024974, 6)


@pytest.mark.parametrize(
    ("t", "loss", "paths"),
    [([1.0, 0.0], 1.580508571, (0.794129628, 0.0)), ([0.0, 1.0], 0.230508571, (0.0, -0.205870372))],
)
def test_the_toy_network_has_two_paths_to_w21(t, loss, paths):
    """S2.20."""
    z = HIDDEN @ TO_OUTPUTS
    close(z, [-1.35, 0.0], 12)
    o = np.asarray(softmax(z))
    close(o, [0.205870372, 0.794129628])
    close(jax.jit(cross_entropy)(z, np.array(t)), loss)
    by_output = -np.array(t) / o * np.asarray(softmax_jacobian(o))[:, 0] * HIDDEN[1]
    close(by_output, paths)
    to_weights = jax.jit(jax.grad(lambda w: cross_entropy(HIDDEN @ w, np.array(t))))(TO_OUTPUTS)
    close(to_weights[1, 0], sum(paths))
    close(to_weights[1, 0], HIDDEN[1] * (o[0] - t[0]), 12)


def test_the_attempt_misses_the_other_outputs_and_is_the_gradient_of_no_function():
    """S2.8, E2.1."""
    t = np.array([0.0, 1.0, 0.0])
    attempt = -t * (1 - OUTPUTS)
    close(attempt, [0, -0.826, 0], 3)
    truth = np.asarray(gradient_to_logits(Z, jnp.asarray(t)))
    close(truth, [0.046, -0.826, 0.780], 3)
    assert abs(truth.sum()) < 1e-15
    assert abs(attempt.sum()) > 0.8
    # The gradient of no function: its Jacobian is not symmetric.
    t = np.array([0.2, 0.5, 0.3])
    matrix = np.asarray(jax.jit(jax.jacrev(lambda z: -t * (1 - softmax(z))))(Z))
    assert np.abs(matrix - matrix.T).max() > 0.01


def test_an_output_without_target_is_updated_too():
    """S2.9."""
    gradient = gradient_to_logits(Z, np.array([0.0, 1.0, 0.0]))
    assert (np.abs(np.asarray(gradient)[[0, 2]]) > 0.04).all()


def test_the_sign_of_the_sum_over_the_other_classes():
    """E2.6."""
    t = np.array([0.2, 0.5, 0.3])
    own, others = -t[0] * (1 - OUTPUTS[0]), OUTPUTS[0] * (t[1] + t[2])
    close(own + others, -0.153532, 6)
    close(own - others, -0.227881, 6)
    close(gradient_to_logits(Z, jnp.asarray(t))[0], own + others)


def test_targets_that_do_not_sum_to_one_need_tau():
    """E2.10."""
    t = np.array([0.5, 1.0, 0.25])
    close(OUTPUTS - t, [-0.4535, -0.8261, 0.5296], 4)
    close(gradient_to_logits(Z, jnp.asarray(t)), [-0.4187, -0.6956, 1.1143], 4)
