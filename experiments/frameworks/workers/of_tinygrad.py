"""tinygrad."""

from importlib.metadata import version

import numpy as np
from exchange import work
from tinygrad import Tensor


def differentiated(case, loss):
    z = Tensor(case.logits)
    value = loss(z)
    scalar = (value * Tensor(case.cotangent)).sum() if value.ndim else value
    (gradient,) = scalar.gradient(z)
    return value.numpy(), gradient.numpy()


def sparse(case):
    options = {} if case.ignore_index is None else {"ignore_index": case.ignore_index}
    labels = Tensor(case.labels.astype(np.int32))
    return differentiated(
        case,
        lambda z: z.sparse_categorical_crossentropy(
            labels, label_smoothing=case.smoothing or 0.0, reduction=case.reduction, **options
        ),
    )


def dense(case):
    targets = Tensor(case.labels.astype(np.int32) if case.probs is None else case.probs)
    smoothing = case.smoothing or 0.0
    return differentiated(case, lambda z: z.cross_entropy(targets, reduction=case.reduction, label_smoothing=smoothing))


def nll(case):
    options = {} if case.ignore_index is None else {"ignore_index": case.ignore_index}
    weight = None if case.class_weights is None else Tensor(case.class_weights)
    labels = Tensor(case.labels.astype(np.int32))
    return differentiated(
        case, lambda z: z.log_softmax().nll_loss(labels, weight=weight, reduction=case.reduction, **options)
    )


CALLS = {
    "sparse_categorical_crossentropy": sparse,
    "sparse_categorical_crossentropy, rows of -1": sparse,
    "cross_entropy": dense,
    "nll_loss of log_softmax": nll,
}
work(CALLS, "tinygrad " + version("tinygrad"))
