"""The expected results of softmax, log_softmax and logsumexp."""

import numpy as np

from experiments.fuzz.formulas import EXACT, FREE, Expected, Rows, finite
from experiments.fuzz.measured import Measured, where


class Normaliser:
    """The part that all three share."""

    def __init__(self, z: Measured, removed: np.ndarray, dtype):
        self.rows, self.dtype = Rows(z, removed), dtype
        self.open = ~removed & self.rows.bad[..., None]

    def value(self) -> Expected:
        raise NotImplementedError

    def pull(self, g: np.ndarray) -> Expected:
        """The gradient for a cotangent g."""
        raise NotImplementedError

    def push(self, v: np.ndarray) -> Expected:
        """The derivative along v."""
        raise NotImplementedError

    def bend(self, g: np.ndarray, v: np.ndarray) -> Expected:
        """The derivative of the gradient along v."""
        raise NotImplementedError

    def clean(self, g: np.ndarray) -> np.ndarray:
        """A cotangent or tangent with 0 at masked classes."""
        return np.where(self.rows.removed, 0, g)

    def of_logits(self, gradient: Measured) -> Expected:
        gradient = where(self.rows.removed, 0.0, gradient)
        gradient = finite(gradient, self.rows.empty[..., None] & ~self.rows.removed)
        return Expected(gradient, np.where(self.open, FREE, EXACT))


class Softmax(Normaliser):
    def value(self) -> Expected:
        number = where(self.rows.bad[..., None], np.nan, self.rows.p)
        return Expected(where(self.rows.removed, 0.0, number))

    @property
    def p(self) -> Measured:
        return self.rows.p.rounded(self.dtype)  # the only array that the rule saves

    def product(self, g: np.ndarray) -> Measured:
        return self.p * (-(self.p * g).sum(keepdims=True) + g)

    def pull(self, g: np.ndarray) -> Expected:
        gradient = self.product(self.clean(g))
        gradient = where(self.rows.empty[..., None], 0.0, gradient)
        return Expected(where(self.rows.removed, 0.0, gradient), np.where(self.open, FREE, EXACT))

    def push(self, v: np.ndarray) -> Expected:
        return self.pull(v)  # the Jacobian is symmetric

    def bend(self, g: np.ndarray, v: np.ndarray) -> Expected:
        g, v = self.clean(g), self.clean(v)
        along = self.product(v).rounded(self.dtype)
        bend = along * (-(self.p * g).sum(keepdims=True) + g) - self.p * (along * g).sum(keepdims=True)
        return self.of_logits(bend)


class LogSoftmax(Normaliser):
    def value(self) -> Expected:
        number = where(self.rows.has_nan[..., None], np.nan, -self.rows.surprise)
        number = where(self.rows.removed | self.rows.empty[..., None], -np.inf, number)
        unsaid = ~self.rows.removed & self.rows.has_inf[..., None] & ~self.rows.has_nan[..., None]
        return Expected(number, np.where(unsaid, FREE, EXACT))

    def pull(self, g: np.ndarray) -> Expected:
        g = self.clean(g)
        # g_j (1 − p_j) − p_j Σ_{k≠j} g_k, with 1 − p_j from the other classes where j has the largest logit.
        p, leads = self.rows.p, self.rows.below.value == 0
        others = self.rows.label_gradient(leads & (leads.cumsum(-1) == 1))
        one = where(leads & (leads.cumsum(-1) == 1), -others, 1 - p)
        total = Measured(g, 0, p.unit).sum(keepdims=True)
        rest = total - g
        rest.error = rest.error + p.unit.roundoff * np.abs(g).sum(-1, keepdims=True)
        return self.of_logits(one * g - p * rest)

    def push(self, v: np.ndarray) -> Expected:
        v = self.clean(v)
        return self.of_logits(-self.rows.dot(v) + v)

    def bend(self, g: np.ndarray, v: np.ndarray) -> Expected:
        g, v = self.clean(g), self.clean(v)
        return self.of_logits(
            -(self.rows.derivative(v, self.dtype) * Measured(g, 0, self.rows.p.unit).sum(keepdims=True))
        )


class LogSumExp(Normaliser):
    def value(self) -> Expected:
        rows = self.rows
        number = where(rows.has_nan, np.nan, where(rows.has_inf, np.inf, rows.lse[..., 0]))
        return Expected(number, np.where(rows.has_nan & rows.has_inf, FREE, EXACT))

    def pull(self, g: np.ndarray) -> Expected:
        gradient = where(self.rows.empty[..., None], 0.0, self.rows.p * g[..., None])
        return Expected(where(self.rows.removed, 0.0, gradient), np.where(self.open, FREE, EXACT))

    def push(self, v: np.ndarray) -> Expected:
        number = where(self.rows.empty, 0.0, self.rows.dot(self.clean(v))[..., 0])
        return Expected(number, np.where(self.rows.bad, FREE, EXACT))

    def bend(self, g: np.ndarray, v: np.ndarray) -> Expected:
        return self.of_logits(self.rows.derivative(self.clean(v), self.dtype) * g[..., None])
