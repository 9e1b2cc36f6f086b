"""Keras, on the backend that KERAS_BACKEND names."""

import os

import keras
import numpy as np
from exchange import work
from keras import losses, ops

BACKEND = os.environ["KERAS_BACKEND"]
if BACKEND == "tensorflow":
    from tape import differentiated
else:
    import jax

    def differentiated(case, loss):
        def scalar(z):
            value = loss(z)
            return (value * case.cotangent).sum() if value.ndim else value

        z = jax.numpy.asarray(case.logits)
        return np.asarray(loss(z)), jax.grad(scalar)(z)


REDUCTIONS = {"mean": "sum_over_batch_size", "sum": "sum", "none": None}


def sparse(reduction, ignores=True, of=None):
    def call(case):
        name = reduction or REDUCTIONS[case.reduction]
        loss = losses.SparseCategoricalCrossentropy(
            from_logits=of is None, ignore_class=case.ignore_index if ignores else None, reduction=name
        )
        labels = ops.convert_to_tensor(case.labels)
        return differentiated(case, lambda z: loss(labels, of(z) if of else z, sample_weight=case.weights))

    return call


def dense(reduction, of=None):
    def call(case):
        t = case.probs
        if t is None:
            t = np.eye(case.logits.shape[-1], dtype=case.logits.dtype)[case.labels]
        loss = losses.CategoricalCrossentropy(
            from_logits=of is None,
            label_smoothing=case.smoothing or 0.0,
            reduction=reduction or REDUCTIONS[case.reduction],
        )
        targets = ops.convert_to_tensor(t)
        return differentiated(case, lambda z: loss(targets, of(z) if of else z, sample_weight=case.weights))

    return call


CALLS = {
    "SparseCategoricalCrossentropy": sparse(None),
    "SparseCategoricalCrossentropy, mean_with_sample_weight": sparse("mean_with_sample_weight"),
    "CategoricalCrossentropy": dense(None),
    "CategoricalCrossentropy, mean_with_sample_weight": dense("mean_with_sample_weight"),
    "CategoricalCrossentropy, Σt ≠ 1": dense(None),
    "SparseCategoricalCrossentropy of probabilities": sparse(None, of=ops.softmax),
    "CategoricalCrossentropy of probabilities": dense(None, of=ops.softmax),
    "SparseCategoricalCrossentropy, a label that is no class": sparse(None, ignores=False),
}
work(CALLS, "keras " + keras.__version__ + " on " + BACKEND)
