"""Liger, whose kernels Triton's interpreter runs on a CPU."""

import os
from importlib.metadata import version

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
import numpy as np
import torch
import triton.language as tl
from exchange import work
from liger_kernel.ops import cross_entropy as kernels
from liger_kernel.transformers import LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss
from triton.runtime import interpreter

convert = interpreter._implicit_cvt


def array(numbers, kind):
    return tl.tensor(interpreter.TensorHandle(numbers, kind.scalar), kind)


def converted(argument):
    """Numbers as in compiled kernels: the interpreter leaves them Python floats, which have no method `to`."""
    return array(np.float32([argument]), tl.float32) if isinstance(argument, float) else convert(argument)


interpreter._implicit_cvt = converted
kernels.tanh = lambda x: array(np.tanh(x.handle.data), x.type)  # CUDA's library function cannot be interpreted


def tensor(values):
    return None if values is None else torch.tensor(values)


def differentiated(case, loss):
    z = torch.tensor(case.logits, requires_grad=True)
    value = loss(z * 1)  # the gradient is written over the logits
    (value * torch.tensor(case.cotangent)).sum().backward() if value.ndim else value.backward()
    return value.detach(), z.grad


def options(case):
    return {
        "label_smoothing": case.smoothing or 0.0,
        "reduction": case.reduction,
        "lse_square_scale": case.z_loss or 0.0,
        "softcap": case.soft_cap,
    }


def dense(case):
    loss = LigerCrossEntropyLoss(weight=tensor(case.class_weights), **options(case))
    return differentiated(case, lambda z: loss(z, tensor(case.labels)))


def linear(case):
    """The features are passed in place of the logits."""
    loss = LigerFusedLinearCrossEntropyLoss(ce_weight=tensor(case.class_weights), **options(case))
    return differentiated(case, lambda x: loss(tensor(case.kernel), x, tensor(case.labels), tensor(case.bias)))


CALLS = {"LigerCrossEntropyLoss": dense, "LigerFusedLinearCrossEntropyLoss": linear}
work(CALLS, "liger-kernel {}, torch {}".format(version("liger-kernel"), torch.__version__))
