"""MindSpore."""

import mindspore as ms
import numpy as np
from exchange import work
from mindspore import nn, ops

ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")


def tensor(array):
    return None if array is None else ms.Tensor(array)


def differentiated(case, loss):
    cotangent = ms.Tensor(case.cotangent)

    def scalar(z):
        value = loss(z)
        return (value * cotangent).sum() if value.ndim else value

    z = ms.Tensor(case.logits)
    return loss(z).asnumpy(), ms.grad(scalar)(z).asnumpy()


def call(case):
    options = {} if case.ignore_index is None else {"ignore_index": case.ignore_index}
    targets = tensor(case.labels.astype(np.int32) if case.probs is None else case.probs)
    return differentiated(
        case,
        lambda z: ops.cross_entropy(
            z,
            targets,
            weight=tensor(case.class_weights),
            reduction=case.reduction,
            label_smoothing=case.smoothing or 0.0,
            **options,
        ),
    )


def layer(case):
    loss = nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction=case.reduction)
    return differentiated(case, lambda z: loss(z, tensor(case.labels.astype(np.int32))))


CALLS = {
    "ops.cross_entropy, labels": call,
    "ops.cross_entropy, probabilities": call,
    "nn.SoftmaxCrossEntropyWithLogits": layer,
}
work(CALLS, "mindspore " + ms.__version__)
