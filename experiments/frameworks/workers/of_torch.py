"""PyTorch."""

import torch
import torch.nn.functional as F
from exchange import work


def tensor(array):
    return None if array is None else torch.tensor(array)


def differentiated(case, loss):
    """Value and gradient of a loss of logits with the classes on axis 1."""
    z = torch.tensor(case.classes_first, requires_grad=True)
    value = loss(z)
    (value * torch.tensor(case.cotangent)).sum().backward() if value.ndim else value.backward()
    return value.detach(), z.grad.movedim(1, -1)


def options(case):
    found = {"weight": tensor(case.class_weights), "reduction": case.reduction}
    if case.ignore_index is not None:
        found["ignore_index"] = case.ignore_index
    return found


def labels(case):
    smoothing = case.smoothing or 0.0
    return differentiated(
        case, lambda z: F.cross_entropy(z, tensor(case.labels), label_smoothing=smoothing, **options(case))
    )


def probabilities(case):
    t, smoothing = tensor(case.probs).movedim(-1, 1), case.smoothing or 0.0
    return differentiated(case, lambda z: F.cross_entropy(z, t, label_smoothing=smoothing, **options(case)))


def nll(case):
    return differentiated(case, lambda z: F.nll_loss(F.log_softmax(z, 1), tensor(case.labels), **options(case)))


def divergence(case):
    t = tensor(case.probs).movedim(-1, 1)
    return differentiated(case, lambda z: F.kl_div(F.log_softmax(z, 1), t, reduction="batchmean"))


def linear(in_chunks):
    """The loss of a linear layer; the features are passed in place of the logits."""
    chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=5) if in_chunks else None

    def call(case):
        smoothing = {} if in_chunks else {"label_smoothing": case.smoothing or 0.0}  # PyTorch does not use chunks then
        layer = {"linear_bias": tensor(case.bias), "options": chunks, **smoothing, **options(case)}
        return differentiated(
            case, lambda x: F.linear_cross_entropy(x, tensor(case.kernel), tensor(case.labels), **layer)
        )

    return call


CALLS = {
    "F.cross_entropy, labels": labels,
    "F.cross_entropy, probabilities": probabilities,
    "F.nll_loss of F.log_softmax": nll,
    "F.kl_div, batchmean": divergence,
    "F.linear_cross_entropy": linear(in_chunks=False),
    "F.linear_cross_entropy in chunks": linear(in_chunks=True),
}
work(CALLS, "torch " + torch.__version__)
