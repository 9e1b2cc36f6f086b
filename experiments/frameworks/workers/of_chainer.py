"""Chainer."""

import chainer
import chainer.functions as F
import numpy as np
from exchange import work


def call(case):
    z = chainer.Variable(np.ascontiguousarray(case.classes_first))
    options = {"class_weight": case.class_weights}
    if case.probs is None:
        t = case.labels.astype(np.int32)
        if case.ignore_index is not None:
            options["ignore_label"] = case.ignore_index
    else:
        t = np.ascontiguousarray(np.moveaxis(case.probs, -1, 1))
    options["reduce"] = "no" if case.reduction == "none" else "mean"
    options["normalize"] = case.reduction == "mean"  # "sum" stands for a sum over the batch size
    value = F.softmax_cross_entropy(z, t, **options)
    if value.ndim:
        value.grad = case.cotangent.astype(case.logits.dtype)
    value.backward()
    return value.array, np.moveaxis(z.grad, 1, -1)


CALLS = dict.fromkeys(("labels", "labels, normalize=False", "soft targets", "soft targets, class_weight"), call)
work(CALLS, "chainer " + chainer.__version__)
