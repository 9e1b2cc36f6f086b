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


def close(actual, expected, digits=8):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=0.51 * 10.0**-digits)


def test_s3_14_the_loss_sums_over_samples():
    logits, labels = np.stack([X, X[::-1], 2 * X]), np.array([2, 1, 0])
    each = [cross_entropy(z, np.array(y)) for z, y in zip(logits, labels, strict=True)]
    close(cross_entropy(logits, labels, reduction="sum"), sum(map(float, each)), 14)


def test_s3_16_probabilities_and_s3_17_loss_of_one_sample():
    close(softmax(X), P)
    close(cross_entropy(X, np.array(2)), 0.40760596)


def test_s3_18_its_gradient():
    close(jax.grad(cross_entropy)(X, np.array(2)), TRUTH)


def test_s3_20_three_cases_and_e3_8_as_printed():
    label, other, ignored = P[2] - 1, P[:2], 0.0
    close(jax.grad(cross_entropy)(X, np.array(2)), [*other, label])
    gradient = jax.grad(lambda z: cross_entropy(z, np.array([2, 255]), ignore_index=255))(np.stack([X, X]))
    np.testing.assert_array_equal(gradient[1], ignored)
    printed = np.where(np.arange(3) == 2, P[2], P[2] - 1)
    close(printed, [-0.3348, -0.3348, 0.6652], 4)
    close(jax.grad(cross_entropy)(X, np.array(2)), [0.0900, 0.2447, -0.3348], 4)


def test_s3_21_as_code_copy_then_subtract_one_at_the_label_then_zero_where_ignored():
    logits, labels = np.random.default_rng(0).normal(size=(6, 3)), np.array([0, 1, 2, 255, 1, 255])
    bottom_diff = np.array(softmax(logits))
    for n, label in enumerate(labels):
        if label == 255:
            bottom_diff[n] = 0
        else:
            bottom_diff[n, label] -= 1
    close(jax.grad(lambda z: cross_entropy(z, labels, ignore_index=255, reduction="sum"))(logits), bottom_diff, 14)


def test_s3_22_softmax_alone():
    top_diff = np.array([0.5, -1.0, 2.0])
    close(np.asarray(softmax(X)) @ top_diff, 1.13076873)
    close(softmax_vjp(softmax(X), top_diff), [-0.056788, -0.521460, 0.578248], 6)
    close(jax.vjp(softmax, jnp.asarray(X))[1](jnp.asarray(top_diff))[0], [-0.056788, -0.521460, 0.578248], 6)


@pytest.mark.parametrize(("gap", "by_the_output"), [(90.0, -np.inf), (110.0, np.nan)])
def test_e3_15_the_way_through_the_output_breaks_in_float32(gap, by_the_output):
    z = np.array([gap, 0.0], np.float32)
    with np.errstate(all="ignore"):
        o = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        np.testing.assert_array_equal(-1 / o[1] * (o[1] * (1 - o[1])), by_the_output)
    assert jax.grad(cross_entropy)(jnp.asarray(z), jnp.array(1))[1] == -1


def test_s3_28_an_image_is_150000_losses():
    logits, labels = jnp.zeros((1, 21, 300, 500)), jnp.ones((1, 300, 500), int)
    losses = cross_entropy(logits, labels, axis=1, reduction="none")
    assert losses.size == 150_000
    close(jnp.sum(losses), 456_678.366, 3)
    close(cross_entropy(logits, labels, axis=1), np.log(21), 12)
