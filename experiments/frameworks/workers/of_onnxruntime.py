"""ONNX Runtime, and ONNX's own reference: one operator, whose gradient is not in the packages that pip installs."""

import numpy as np
import onnx
import onnxruntime
from exchange import work
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator


def model(case, parts):
    kind = TensorProto.FLOAT if case.logits.dtype == np.float32 else TensorProto.DOUBLE
    names = ["z", "y"] + (["w"] if case.class_weights is not None else [])
    options = {} if case.ignore_index is None else {"ignore_index": case.ignore_index}
    options["reduction"] = case.reduction
    if parts:
        log_probs = helper.make_node("LogSoftmax", ["z"], ["p"], axis=1)
        nodes = [log_probs, helper.make_node("NegativeLogLikelihoodLoss", ["p", *names[1:]], ["loss"], **options)]
    else:
        nodes = [helper.make_node("SoftmaxCrossEntropyLoss", names, ["loss"], **options)]
    given = [helper.make_tensor_value_info(name, TensorProto.INT64 if name == "y" else kind, None) for name in names]
    graph = helper.make_graph(nodes, "loss", given, [helper.make_tensor_value_info("loss", kind, None)])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    made.ir_version = 8
    return made


def feed(case):
    arrays = {"z": np.ascontiguousarray(case.classes_first), "y": case.labels}
    return arrays if case.class_weights is None else dict(arrays, w=case.class_weights)


def runtime(case, parts=False):
    made = model(case, parts).SerializeToString()
    session = onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"])
    return session.run(None, feed(case))[0], None


def reference(case, parts=False):
    return ReferenceEvaluator(model(case, parts)).run(None, feed(case))[0], None


CALLS = {
    "SoftmaxCrossEntropyLoss": runtime,
    "SoftmaxCrossEntropyLoss, onnx's reference": reference,
    "NegativeLogLikelihoodLoss of LogSoftmax": lambda case: runtime(case, parts=True),
    "NegativeLogLikelihoodLoss of LogSoftmax, onnx's reference": lambda case: reference(case, parts=True),
}
work(CALLS, "onnxruntime " + onnxruntime.__version__ + ", onnx " + onnx.__version__)
