"""PaddlePaddle."""

import paddle
import paddle.nn.functional as F
from exchange import work


def tensor(array):
    return None if array is None else paddle.to_tensor(array)


def differentiated(case, loss):
    z = paddle.to_tensor(case.logits, stop_gradient=False)
    value = loss(z)
    if value.ndim:
        value = value.reshape(case.cotangent.shape)
    (value * paddle.to_tensor(case.cotangent)).sum().backward() if value.ndim else value.backward()
    return value.numpy(), z.grad.numpy()


def labels(case):
    options = {} if case.ignore_index is None else {"ignore_index": case.ignore_index}
    return differentiated(
        case,
        lambda z: F.cross_entropy(
            z,
            paddle.to_tensor(case.labels),
            weight=tensor(case.class_weights),
            reduction=case.reduction,
            label_smoothing=case.smoothing or 0.0,
            **options,
        ),
    )


def probabilities(case):
    return differentiated(
        case,
        lambda z: F.cross_entropy(
            z, tensor(case.probs), weight=tensor(case.class_weights), soft_label=True, reduction=case.reduction
        ),
    )


def nll(case):
    options = {} if case.ignore_index is None else {"ignore_index": case.ignore_index}
    return differentiated(
        case,
        lambda z: F.nll_loss(
            F.log_softmax(z, -1),
            tensor(case.labels),
            weight=tensor(case.class_weights),
            reduction=case.reduction,
            **options,
        ),
    )


CALLS = {
    "F.cross_entropy": labels,
    "F.cross_entropy, ignore_index=-100": labels,
    "F.cross_entropy, smoothing and an ignore_index that is a class": labels,
    "F.cross_entropy, soft_label": probabilities,
    "F.cross_entropy, soft_label, Σt ≠ 1": probabilities,
    "F.nll_loss of F.log_softmax": nll,
    "F.cross_entropy, logits 100 apart": labels,
}
work(CALLS, "paddlepaddle " + paddle.__version__)
