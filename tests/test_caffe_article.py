"""The numbers of an article on softmax in Caffe, from the loss of one sample on.

IDs count its formulas (S3.1 to S3.39) and mistakes (E3.1 to E3.15) in order of appearance; the energies, S3.1 to S3.13,
are tested with `jaxsoft.energy`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import cross_entropy, softmax, softmax_vjp

X = np.array([1.0, 2.0, 3.0])
P = np.array([0.09003057, 0.24472847, 0.66524096])
TRUTH = np.array([0.09003057, 0.24472847, -0.33475904])


gradient = jax.jit(jax.grad(cross_entropy))


def close(actual, expected, digits=8):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=0.51 * 10.0**-digits)


def test_the_loss_sums_over_samples():
    """S3.14."""
    logits, labels = np.stack([X, X[::-1], 2 * X]), np.array([2, 1, 0])
    each, together = jax.jit(lambda z, y: (jax.vmap(cross_entropy)(z, y), cross_entropy(z, y, reduction="sum")))(
        logits, labels
    )
    close(together, np.sum(each), 14)


def test_probabilities_and_loss_of_one_sample():
    """S3.16, S3.17."""
    close(softmax(X), P)
    close(cross_entropy(X, np.array(2)), 0.40760596)


def test_gradient_of_one_sample():
    """S3.18."""
    close(gradient(X, np.array(2)), TRUTH)


def test_gradient_at_the_label_at_other_classes_and_if_ignored_and_as_printed():
    """S3.20, E3.8."""
    label, other, ignored = P[2] - 1, P[:2], 0.0
    close(gradient(X, np.array(2)), [*other, label])
    of_two = jax.jit(jax.grad(lambda z: cross_entropy(z, np.array([2, 255]), ignore_index=255)))(np.stack([X, X]))
    np.testing.assert_array_equal(of_two[1], ignored)
    printed = np.where(np.arange(3) == 2, P[2], P[2] - 1)
    close(printed, [-0.3348, -0.3348, 0.6652], 4)
    close(gradient(X, np.array(2)), [0.0900, 0.2447, -0.3348], 4)


def test_gradient_as_code_copy_then_subtract_one_at_the_label_then_zero_where_ignored():
    """S3.21."""
    logits, labels = np.random.default_rng(0).normal(size=(6, 3)), np.array([0, 1, 2, 255, 1, 255])
    bottom_diff = np.array(softmax(logits))
    for n, label in enumerate(labels):
        if label == 255:
            bottom_diff[n] = 0
        else:
            bottom_diff[n, label] -= 1
    found = jax.jit(jax.grad(lambda z: cross_entropy(z, labels, ignore_index=255, reduction="sum")))(logits)
    close(found, bottom_diff, 14)


def test_derivative_of_softmax_alone():
    """S3.22."""
    top_diff = np.array([0.5, -1.0, 2.0])
    close(np.asarray(softmax(X)) @ top_diff, 1.13076873)
    close(softmax_vjp(softmax(X), top_diff), [-0.056788, -0.521460, 0.578248], 6)
    close(jax.vjp(softmax, jnp.asarray(X))[1](jnp.asarray(top_diff))[0], [-0.056788, -0.521460, 0.578248], 6)


@pytest.mark.parametrize(("gap", "by_the_output"), [(90.0, -np.inf), (110.0, np.nan)])
def test_the_way_through_the_output_breaks_in_float32(gap, by_the_output):
    """E3.15."""
    z = np.array([gap, 0.0], np.float32)
    with np.errstate(all="ignore"):
        o = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        np.testing.assert_array_equal(-1 / o[1] * (o[1] * (1 - o[1])), by_the_output)
    assert gradient(z, np.array(1))[1] == -1


def test_an_image_is_150000_losses():
    """S3.28."""
    logits, labels = np.zeros((1, 21, 300, 500)), np.ones((1, 300, 500), int)
    losses, mean = jax.jit(lambda z, y: (cross_entropy(z, y, axis=1, reduction="none"), cross_entropy(z, y, axis=1)))(
        logits, labels
    )
    assert losses.size == 150_000
    close(np.sum(losses), 456_678.366, 3)
    close(mean, np.log(21), 12)
