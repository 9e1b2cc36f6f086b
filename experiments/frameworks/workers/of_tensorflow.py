"""TensorFlow."""

import numpy as np
import tensorflow as tf
from exchange import work
from tape import differentiated

v1 = tf.compat.v1


def sparse(case):
    return differentiated(case, lambda z: tf.nn.sparse_softmax_cross_entropy_with_logits(labels=case.labels, logits=z))


def dense(case):
    return differentiated(case, lambda z: tf.nn.softmax_cross_entropy_with_logits(labels=case.probs, logits=z))


REDUCTIONS = {"mean": v1.losses.Reduction.SUM_BY_NONZERO_WEIGHTS, "sum": v1.losses.Reduction.SUM}


def old_sparse(case):
    weights = 1.0 if case.weights is None else case.weights
    return differentiated(
        case,
        lambda z: v1.losses.sparse_softmax_cross_entropy(
            case.labels, z, weights=weights, reduction=REDUCTIONS[case.reduction]
        ),
    )


def old_mean(case):
    return differentiated(
        case,
        lambda z: v1.losses.sparse_softmax_cross_entropy(
            case.labels, z, weights=case.weights, reduction=v1.losses.Reduction.MEAN
        ),
    )


def old_smoothed(case):
    t = np.eye(case.logits.shape[-1], dtype=case.logits.dtype)[case.labels]
    return differentiated(case, lambda z: v1.losses.softmax_cross_entropy(t, z, label_smoothing=case.smoothing or 0))


CALLS = {
    "tf.nn.sparse_softmax_cross_entropy_with_logits": sparse,
    "tf.nn.softmax_cross_entropy_with_logits": dense,
    "tf.nn.softmax_cross_entropy_with_logits, Σt ≠ 1": dense,
    "v1.losses.sparse_softmax_cross_entropy": old_sparse,
    "v1.losses.sparse_softmax_cross_entropy, MEAN": old_mean,
    "v1.losses.softmax_cross_entropy": old_smoothed,
}
work(CALLS, "tensorflow " + tf.__version__)
