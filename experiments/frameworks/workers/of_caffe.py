"""Caffe: its layers, as build_caffe.py has compiled them."""

import ctypes
import os
import sys

import numpy as np
from exchange import work

LIBRARY = ctypes.CDLL(os.path.join(sys.prefix, "lib", "libcaffe_layer.so"))
DOUBLES = ctypes.POINTER(ctypes.c_double)


def layer(kind, inputs, result, cotangent, options=""):
    """A layer's output, and the VJP of a cotangent with respect to its first input."""
    inputs = [np.array(array, np.float64, order="C") for array in inputs]
    result, gradient = np.zeros(result), np.zeros(inputs[0].shape)
    cotangent = np.array(np.broadcast_to(cotangent, result.shape), np.float64, order="C")
    lengths = [n for array in inputs for n in array.shape]
    LIBRARY.run(
        f'type: "{kind}" {options}'.encode(),
        len(inputs),
        (ctypes.c_int * len(inputs))(*(array.ndim for array in inputs)),
        (ctypes.c_int * len(lengths))(*lengths),
        (DOUBLES * len(inputs))(*map(pointer, inputs)),
        *map(pointer, (cotangent, result, gradient)),
    )
    return result, gradient


def pointer(array):
    return array.ctypes.data_as(DOUBLES)


def with_loss(normalization):
    def call(case):
        ignored = "" if case.ignore_index is None else f"ignore_label: {case.ignore_index}"
        options = f"loss_param {{ normalization: {normalization} {ignored} }}"
        value, gradient = layer("SoftmaxWithLoss", [case.classes_first, case.labels], (), 1, options)
        return value, np.moveaxis(gradient, 1, -1)

    return call


def of_probabilities(case):
    """MultinomialLogisticLoss of Softmax."""
    p, _ = layer("Softmax", [case.logits], case.logits.shape, 0)
    value, to_probabilities = layer("MultinomialLogisticLoss", [p, case.labels], (), 1)
    return value, layer("Softmax", [case.logits], p.shape, to_probabilities)[1]


CALLS = {
    "SoftmaxWithLoss, VALID": with_loss("VALID"),
    "SoftmaxWithLoss, FULL": with_loss("FULL"),
    "SoftmaxWithLoss, BATCH_SIZE": with_loss("BATCH_SIZE"),
    "SoftmaxWithLoss, NONE": with_loss("NONE"),
    "SoftmaxWithLoss, logits 100 apart": with_loss("VALID"),
    "MultinomialLogisticLoss of Softmax": of_probabilities,
}
work(CALLS, "caffe 1.0.0, brocolli-caffe 9.0.2")
