"""Softmax, cross-entropy and their derivatives as pure functions for JAX, accurate for confident predictions."""

from importlib.metadata import version

from jaxsoft import caffe, energy
from jaxsoft._arrays.checks import checked
from jaxsoft._cross_entropy import cross_entropy
from jaxsoft._divergences import kl_divergence, linear_kl_divergence
from jaxsoft._doctor.diagnosis import Diagnosis, diagnose_gradient
from jaxsoft._doctor.loss import diagnose_loss
from jaxsoft._entropy import entropy
from jaxsoft._formula.sparse import SparseTargets
from jaxsoft._linear.plan import Plan, plan_linear_cross_entropy
from jaxsoft._linear_cross_entropy import linear_cross_entropy
from jaxsoft._linear_log_probs import LogProbs, linear_log_probs
from jaxsoft._linear_top_k import TopK, linear_top_k
from jaxsoft._mlp import apply_mlp, init_mlp
from jaxsoft._platform.cpu import NativeKernels, native_kernels
from jaxsoft._softmax import log_softmax, logsumexp, softmax, softmax_jacobian, softmax_vjp

__version__ = version("jaxsoft")

__all__ = [
    "Diagnosis",
    "LogProbs",
    "NativeKernels",
    "Plan",
    "SparseTargets",
    "TopK",
    "apply_mlp",
    "caffe",
    "checked",
    "cross_entropy",
    "diagnose_gradient",
    "diagnose_loss",
    "energy",
    "entropy",
    "init_mlp",
    "kl_divergence",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "linear_log_probs",
    "linear_top_k",
    "log_softmax",
    "logsumexp",
    "native_kernels",
    "plan_linear_cross_entropy",
    "softmax",
    "softmax_jacobian",
    "softmax_vjp",
]
