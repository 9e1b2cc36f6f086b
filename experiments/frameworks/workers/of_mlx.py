"""MLX."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from exchange import work

mx.set_default_device(mx.cpu)


def call(case):
    targets = mx.array(case.labels if case.probs is None else case.probs)
    weights = None if case.weights is None else mx.array(case.weights)
    cotangent = mx.array(case.cotangent)

    def loss(z):
        return nn.losses.cross_entropy(
            z, targets, weights=weights, label_smoothing=case.smoothing or 0.0, reduction=case.reduction
        )

    def scalar(z):
        value = loss(z)
        return (value * cotangent).sum() if value.ndim else value

    z = mx.array(case.logits)
    return np.array(loss(z)), np.array(mx.grad(scalar)(z))


CALLS = dict.fromkeys(("labels", "probabilities", "probabilities, Σt ≠ 1"), call)
work(CALLS, "mlx " + mx.__version__)
