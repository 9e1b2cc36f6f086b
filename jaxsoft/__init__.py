"""Softmax, cross-entropy and their derivatives as pure functions for JAX: exact, explained and fast."""

from importlib.metadata import version

from jaxsoft import caffe, energy
from jaxsoft._checks import checked
from jaxsoft._cpu import NativeKernels, native_kernels
from jaxsoft._cross_entropy import cross_entropy
from jaxsoft._diagnosis import Diagnosis, diagnose_gradient
from jaxsoft._linear_cross_entropy import linear_cross_entropy
from jaxsoft._mlp import apply_mlp, init_mlp
from jaxsoft._plan import Plan, plan_linear_cross_entropy
from jaxsoft._softmax import log_softmax, logsumexp, softmax, softmax_jacobian, softmax_vjp

__version__ = version("jaxsoft")

__all__ = [
    "Diagnosis",
    "NativeKernels",
    "Plan",
    "apply_mlp",
    "caffe",
    "checked",
    "cross_entropy",
    "diagnose_gradient",
    "energy",
    "init_mlp",
    "linear_cross_entropy",
    "log_softmax",
    "logsumexp",
    "native_kernels",
    "plan_linear_cross_entropy",
    "softmax",
    "softmax_jacobian",
    "softmax_vjp",
]
