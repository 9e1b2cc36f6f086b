"""nnabla."""

import nnabla as nn
import nnabla.functions as F
import numpy as np
from exchange import work


def differentiated(case, loss):
    z = nn.Variable.from_numpy_array(case.logits)
    z.need_grad = True
    z.grad.zero()
    value = loss(z)
    value.forward()
    value.backward(grad=case.cotangent.reshape(value.shape))
    return np.reshape(value.d, case.cotangent.shape).copy(), z.g.copy()


def labels(case):
    y = nn.Variable.from_numpy_array(case.labels[..., None])
    return differentiated(case, lambda z: F.softmax_cross_entropy(z, y, axis=z.ndim - 1))


def labels_of_probabilities(case):
    y = nn.Variable.from_numpy_array(case.labels[..., None])
    return differentiated(case, lambda z: F.categorical_cross_entropy(F.softmax(z, z.ndim - 1), y, z.ndim - 1))


def probabilities(case):
    t = nn.Variable.from_numpy_array(case.probs)
    return differentiated(case, lambda z: F.sum(-t * F.log_softmax(z, axis=z.ndim - 1), axis=z.ndim - 1))


CALLS = {
    "softmax_cross_entropy": labels,
    "softmax_cross_entropy, labels below 0": labels,
    "log_softmax": probabilities,
    "categorical_cross_entropy of softmax": labels_of_probabilities,
}
work(CALLS, "nnabla " + nn.__version__)
