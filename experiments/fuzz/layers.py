"""The expected results of Caffe's loss layers, of `softmax_vjp` and of `softmax_jacobian`."""

import math
from typing import Any

import numpy as np

from experiments.fuzz.formulas import EXACT, FREE, Expected, Rows, some
from experiments.fuzz.measured import Measured, Unit, log, where
from experiments.fuzz.normalisers import Softmax


def at_most(number: Measured, bound: float) -> Measured:
    return where(number.value < bound, number, Measured(np.full_like(number.value, bound), number.error, number.unit))


class CaffeLoss:
    """Clamped losses for labels or for rows of a matrix, and the probabilities."""

    def __init__(
        self, z: Measured, label: np.ndarray, ignored: np.ndarray, gains: np.ndarray | None, scale: Any, dtype
    ):
        nothing = np.zeros(z.value.shape, bool)
        self.rows, self.softmax, self.dtype = Rows(z, nothing), Softmax(z, nothing, dtype), dtype
        classes = z.value.shape[-1]
        self.part = ~ignored
        self.outside = self.part & ~((label >= 0) & (label < classes))  # NaN is not a class either
        self.onehot = (label[..., None] == np.arange(classes)) & self.part[..., None]
        self.gains = None
        if gains is not None:
            self.gains = np.take_along_axis(gains, np.where(self.outside | ignored, 0, label).astype(int)[..., None], 1)
        self.scale = self.rows.p.exact(scale)  # (S,): the loss weight divided by the normaliser
        self.broken = self.part & self.rows.bad

    def value(self) -> tuple[Expected, Expected]:
        if self.gains is None:
            each = at_most(self.rows.label_surprise(self.onehot), 126 * math.log(2))
        else:
            each = at_most(self.rows.surprise, -math.log(1e-20)) * self.gains
        each = where((self.part & ~self.broken)[..., None], each, 0.0)
        each = where(self.outside[..., None], np.nan, each)
        judged = np.where(some(self.outside), EXACT, np.where(some(self.broken), FREE, EXACT))
        return Expected(each.sum((-1, -2)) * self.scale, judged), self.softmax.value()  # one sum of all terms

    def edges(self, of_loss: Measured, of_probs: Expected, *, first: bool) -> Expected:
        of_loss = where(self.part[..., None] & ~self.broken[..., None], of_loss, 0.0).rounded(self.dtype)
        gradient = where(self.outside[..., None], np.nan, of_loss + of_probs.number)
        free = np.where(self.broken[..., None] | (self.outside[..., None] & (not first)), FREE, of_probs.judged)
        unsaid = self.rows.empty & self.part
        return Expected(gradient, np.where(unsaid[..., None], FREE, free))

    def pull(self, g: np.ndarray, g_probs: np.ndarray) -> Expected:
        share = (self.scale * g)[:, None, None]
        if self.gains is None:
            of_loss = self.rows.label_gradient(self.onehot) * share
        else:
            gains = self.rows.p.exact(self.gains)
            of_loss = (self.rows.p * gains.sum(keepdims=True) - gains) * share
        return self.edges(of_loss, self.softmax.pull(g_probs), first=True)

    def push(self, v: np.ndarray) -> tuple[Expected, Expected]:
        one = np.ones(len(v))
        slope = self.pull(one, np.zeros_like(v))
        # At a logit of −inf the loss is clamped, and its derivative along that logit is not specified.
        clamped = self.onehot if self.gains is None else self.gains != 0
        infinite = some(np.isinf(self.rows.surprise.value) & clamped & self.part[..., None])
        free = some(some(slope.everywhere == FREE) | self.outside | infinite)
        along = where(free[:, None, None], 0.0, slope.number) * v
        return Expected(along.sum((-1, -2)), np.where(free, FREE, EXACT)), self.softmax.push(v)

    def bend(self, g: np.ndarray, g_probs: np.ndarray, v: np.ndarray) -> Expected:
        mass = 1.0 if self.gains is None else self.rows.p.exact(self.gains).sum(keepdims=True)
        onehot = self.onehot if self.gains is None else None
        of_loss = self.rows.derivative(v, self.dtype, onehot) * mass * (self.scale * g)[:, None, None]
        return self.edges(of_loss, self.softmax.bend(g_probs, v), first=False)


class MultinomialLogistic:
    """1/N Σ −log max(p_label, 1e-20), with the same bound in the gradient."""

    def __init__(self, p: np.ndarray, label: np.ndarray, unit: Unit):
        classes = p.shape[-1]
        self.outside = ~((label >= 0) & (label < classes))
        self.onehot = label[..., None] == np.arange(classes)
        at_label = np.where(self.onehot, p, 0).sum(-1)
        self.bounded = Measured(np.where(self.outside, 1, np.maximum(at_label, 1e-20)), 0, unit)
        self.count = max(p.shape[1], 1)

    def value(self) -> Expected:
        each = where(self.outside, np.nan, -log(self.bounded))
        return Expected(each.sum() / self.count)

    def pull(self, g: np.ndarray) -> Expected:
        each = -(self.bounded.exact(g[:, None]) / (self.bounded * self.count))
        gradient = where(self.onehot, each[..., None], 0.0)
        return Expected(gradient, np.where(self.outside[..., None] | ~np.isfinite(gradient.value), FREE, EXACT))


class SoftmaxProduct:
    """s * (g − s·g), also differentiated with respect to s."""

    def __init__(self, s: np.ndarray, g: np.ndarray, unit: Unit):
        self.s, self.g = Measured(s, 0, unit), Measured(g, 0, unit)

    def value(self) -> Expected:
        return Expected(self.s * (self.g - (self.s * self.g).sum(keepdims=True)))

    def pull(self, u: np.ndarray) -> tuple[Expected, Expected]:
        """The gradients to s and to g."""
        u_dot, g_dot = (self.s * u).sum(keepdims=True), (self.s * self.g).sum(keepdims=True)
        to_s = (self.g - g_dot) * u - self.g * u_dot
        return Expected(to_s), Expected(self.s * (-u_dot + u))


class Jacobian:
    """diag(s) − s sᵀ."""

    def __init__(self, s: np.ndarray, unit: Unit):
        self.s = Measured(s, 0, unit)

    def value(self) -> Expected:
        s = self.s
        eye = np.eye(s.value.shape[-1], dtype=bool)
        columns = s.map(lambda a: a[..., None, :])
        return Expected(s.map(lambda a: a[..., :, None]) * (-columns + eye.astype(float)))

    def pull(self, u: np.ndarray) -> Expected:
        s, given = self.s, self.s.exact(u)
        eye = np.eye(s.value.shape[-1])
        of_rows = given * (-s.map(lambda a: a[..., None, :]) + eye)
        return Expected(of_rows.sum(-1) - (given * s.map(lambda a: a[..., :, None])).sum(-2))
