"""MXNet."""

import numpy as np

np.bool = bool  # mxnet 1.9.1 uses names that NumPy 1.24 removed
import mxnet as mx
from exchange import work
from mxnet import autograd, gluon, nd


def array(values):
    return nd.array(values, dtype=values.dtype)


def differentiated(z, loss, cotangent=None):
    z = array(z)
    z.attach_grad()
    with autograd.record():
        value = loss(z)
    value.backward(None if cotangent is None else array(cotangent))
    return value.asnumpy(), z.grad.asnumpy()


def gluon_labels(case):
    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    weights = None if case.weights is None else array(case.weights[..., None])
    cotangent = np.resize(case.cotangent, len(case.logits)).astype(case.logits.dtype)
    return differentiated(
        case.logits, lambda z: loss(z, array(case.labels.astype(case.logits.dtype)), weights), cotangent
    )


def gluon_probabilities(case):
    loss = gluon.loss.SoftmaxCrossEntropyLoss(sparse_label=False)
    cotangent = np.resize(case.cotangent, len(case.logits)).astype(case.logits.dtype)
    return differentiated(case.logits, lambda z: loss(z, array(case.probs)), cotangent)


def output(normalization, **more):
    def call(case):
        options = dict(more, normalization=normalization, smooth_alpha=case.smoothing or 0.0)
        if case.ignore_index is not None:
            options.update(use_ignore=True, ignore_label=case.ignore_index)
        images = case.labels.ndim > 1
        z = case.classes_first if images else case.logits
        labels = array(case.labels.astype(case.logits.dtype))
        _, gradient = differentiated(z, lambda z: nd.SoftmaxOutput(z, labels, multi_output=images, **options))
        return None, np.moveaxis(gradient, 1, -1) if images else gradient

    return call


CALLS = {
    "gluon.loss.SoftmaxCELoss": gluon_labels,
    "gluon.loss.SoftmaxCELoss, sparse_label=False": gluon_probabilities,
    "SoftmaxOutput, null": output("null"),
    "SoftmaxOutput, batch": output("batch"),
    "SoftmaxOutput, valid": output("valid"),
    "SoftmaxOutput, multi_output, null": output("null"),
    "SoftmaxOutput, out_grad=True": output("null", out_grad=True),
}
work(CALLS, "mxnet " + mx.__version__)
