"""Numbers that carry a bound of the error that computing them in a narrower dtype would make.

Every operation adds one unit roundoff of its result to the bounds of its operands (running error analysis:
J. H. Wilkinson (1965); N. J. Higham, "Accuracy and Stability of Numerical Algorithms" (2002), 3.3). So a plain formula
computes its own tolerance: relative where it loses nothing, absolute where it subtracts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Unit:
    """The unit roundoff of a dtype, and the absolute error of a result too small for it."""

    roundoff: float
    tiny: float

    @staticmethod
    def of(dtype: Any) -> "Unit":
        limits = jnp.finfo(dtype)
        # XLA's CPU code flushes subnormal numbers to zero; float16 is converted from float32, which can hold them.
        tiny = limits.smallest_subnormal if jnp.dtype(dtype) == np.float16 else limits.tiny
        return Unit(float(limits.eps) / 2, float(tiny))


class Measured:
    """An array and the bound of its error, both in a wider dtype than the results that are judged."""

    __array_ufunc__ = None  # an array on the left leaves the operation to this class

    def __init__(self, value: np.ndarray, error: np.ndarray | float, unit: Unit):
        self.value, self.unit = value, unit
        self.error = np.where(np.isfinite(value), error, 0)

    def exact(self, other: Any) -> "Measured":
        return other if isinstance(other, Measured) else Measured(np.asarray(other), 0, self.unit)

    def computed(self, value: np.ndarray, error: np.ndarray) -> "Measured":
        return Measured(value, error + self.unit.roundoff * np.abs(value) + self.unit.tiny, self.unit)

    def __add__(self, other: Any) -> "Measured":
        other = self.exact(other)
        value = self.value + other.value
        return Measured(value, self.error + other.error + self.unit.roundoff * np.abs(value), self.unit)

    def __mul__(self, other: Any) -> "Measured":
        other = self.exact(other)
        error = np.abs(self.value) * other.error + np.abs(other.value) * self.error
        return self.computed(self.value * other.value, error)

    def __truediv__(self, other: Any) -> "Measured":
        other = self.exact(other)
        value = self.value / other.value
        return self.computed(value, (self.error + np.abs(value) * other.error) / np.abs(other.value))

    def __neg__(self) -> "Measured":
        return Measured(-self.value, self.error, self.unit)

    def __sub__(self, other: Any) -> "Measured":
        return self + -self.exact(other)

    def __rsub__(self, other: Any) -> "Measured":
        return -self + other

    __radd__, __rmul__ = __add__, __mul__

    def __getitem__(self, index: Any) -> "Measured":
        return Measured(self.value[index], self.error[index], self.unit)

    def apply(self, function: Callable, slope: Callable) -> "Measured":
        """A smooth function with a known derivative."""
        return self.computed(function(self.value), np.abs(slope(self.value)) * self.error)

    def sum(self, axis: int | tuple[int, ...] = -1, keepdims: bool = False) -> "Measured":
        """A sum whose rounding errors add up like a random walk: √n of them for n terms."""
        axes = (axis,) if isinstance(axis, int) else axis
        terms = np.prod([self.value.shape[a] for a in axes])
        walk = self.unit.roundoff * np.sqrt(terms) * np.abs(self.value).sum(axes, keepdims=keepdims)
        return Measured(
            self.value.sum(axes, keepdims=keepdims), self.error.sum(axes, keepdims=keepdims) + walk, self.unit
        )

    def __matmul__(self, other: Any) -> "Measured":
        other = self.exact(other)
        size, other_size = np.abs(self.value), np.abs(other.value)
        walk = self.unit.roundoff * np.sqrt(max(self.value.shape[-1], 1))
        error = size @ (other.error + walk * other_size) + self.error @ other_size
        return Measured(self.value @ other.value, error + self.unit.tiny, self.unit)

    @property
    def transposed(self) -> "Measured":
        return Measured(self.value.swapaxes(-1, -2), self.error.swapaxes(-1, -2), self.unit)

    def rounded(self, dtype: Any) -> "Measured":
        """The number after it was stored in a dtype."""
        unit = Unit.of(dtype)
        if unit.roundoff <= self.unit.roundoff:
            return self
        return Measured(self.value, self.error + unit.roundoff * np.abs(self.value) + unit.tiny, self.unit)

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "Measured":
        """Rearranged without rounding: reshaped, transposed, broadcast."""
        return Measured(function(self.value), function(np.asarray(self.error)), self.unit)


def where(mask: np.ndarray, left: Measured | float, right: Measured | float) -> Measured:
    known = left if isinstance(left, Measured) else right
    assert isinstance(known, Measured)
    left, right = known.exact(left), known.exact(right)
    return Measured(np.where(mask, left.value, right.value), np.where(mask, left.error, right.error), known.unit)


def exp(x: Measured) -> Measured:
    return x.apply(np.exp, np.exp)


def log(x: Measured) -> Measured:
    return x.apply(np.log, np.reciprocal)


def log1p(x: Measured) -> Measured:
    return x.apply(np.log1p, lambda v: 1 / (1 + v))


def tanh(x: Measured) -> Measured:
    return x.apply(np.tanh, lambda v: np.cosh(v) ** -2)


def tanh_slope(x: Measured) -> Measured:
    return x.apply(lambda v: np.cosh(v) ** -2, lambda v: 2 * np.tanh(v) * np.cosh(v) ** -2)
