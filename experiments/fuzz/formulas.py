"""Softmax and the losses as their docstrings state them, for rows of classes, without a look at the code.

Arrays are of shape (sets of values, positions, classes). Where the documentation promises nothing for an entry,
or only that it is finite, `Expected` says so.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.fuzz.measured import Measured, exp, log, log1p, where

EXACT, NOT_FINITE, FREE = 0, 1, 2  # an entry must equal value ± error, must not be finite, may be anything


@dataclass
class Expected:
    """What one result must be."""

    number: Measured
    judged: np.ndarray | int = EXACT

    @property
    def everywhere(self) -> np.ndarray:
        """How each entry is judged."""
        return np.broadcast_to(self.judged, self.number.value.shape)


def some(mask: Any, axis: int = -1, *, keepdims: bool = False) -> np.ndarray:
    """Whether any entry along an axis is true."""
    return np.asarray(np.any(mask, axis, keepdims=keepdims))


def finite(number: Measured, mask: np.ndarray) -> Measured:
    """Expect of the masked entries only that they are finite."""
    return Measured(
        np.where(mask, 0, number.value), np.where(mask, np.inf, np.broadcast_to(number.error, number.value.shape)),
        number.unit,
    )  # fmt: skip


class Rows:
    """Logits z, some of whose classes are masked, and their softmax."""

    def __init__(self, z: Measured, removed: np.ndarray):
        value = np.where(removed, -np.inf, z.value)
        self.removed = removed
        self.has_nan = some(np.isnan(value))
        self.has_inf = some(value == np.inf)
        self.bad = self.has_nan | self.has_inf
        self.max = np.max(np.where(np.isnan(value), -np.inf, value), -1, keepdims=True, initial=-np.inf)
        self.empty = (self.max[..., 0] == -np.inf) & ~self.has_nan
        shift = np.where(np.isfinite(self.max), self.max, 0)
        usable = where(self.bad[..., None], 0.0, where(removed, -np.inf, z))
        self.z, self.shift = usable, shift
        self.below = usable - shift  # never above 0
        self.e = exp(self.below)
        self.total = self.e.sum(keepdims=True)
        self.total.value[self.empty] = 1
        self.p = self.e / self.total
        self.log_total = log(self.total)
        self.lse = where(self.empty[..., None], -np.inf, self.log_total + shift)

    @property
    def surprise(self) -> Measured:
        """−log p_j, never from 1 − p_j."""
        return self.log_total - self.below

    def label_surprise(self, onehot: np.ndarray) -> Measured:
        """−log p_label: from the sum over the other classes where the label has the largest logit."""
        others = where(onehot, 0.0, self.e).sum(keepdims=True)
        at_label = where(onehot, self.e, 0.0).sum(keepdims=True)
        below = where(onehot, self.below, 0.0).sum(keepdims=True)
        leads = below.value == 0
        safe = where(leads, at_label, 1.0)
        return where(leads, log1p(others / safe), self.log_total - below)

    def label_gradient(self, onehot: np.ndarray) -> Measured:
        """p − onehot; the label's entry comes from the sum over the other classes."""
        others = where(onehot, 0.0, self.e).sum(keepdims=True)
        return where(onehot, -(others / self.total), self.p)

    def exact(self, v: Any) -> Measured:
        return self.p.exact(v)

    def dot(self, v: Any) -> Measured:
        return (self.p * v).sum(keepdims=True)

    def derivative(self, v: Any, dtype: Any, onehot: np.ndarray | None = None) -> Measured:
        """The derivative of p in the direction v: p_j v_j − p_j Σ_k p_k v_k.

        In reverse mode the two terms reach the logits as separate cotangents in the logits' dtype. The label's entry is
        the derivative of −Σ_{j≠label} p_j, whose terms are small where the label has the largest logit.
        """
        moved, dot = self.p * v, self.dot(v)
        found = moved.rounded(dtype) - (self.p * dot).rounded(dtype)
        if onehot is None:
            return found
        others = where(onehot, 0.0, self.e).sum(keepdims=True) / self.total
        at_label = (others * dot).rounded(dtype) - where(onehot, 0.0, moved).sum(keepdims=True).rounded(dtype)
        # In other entries the label's v cancels: p_j v_label − p_j v_label Σ_{k≠label} p_k − p_j v_label p_label.
        of_label = where(onehot, self.exact(v), 0.0).sum(keepdims=True)
        found.error = found.error + self.p.unit.roundoff * np.abs(self.p.value * of_label.value)
        return where(onehot, at_label, found)
