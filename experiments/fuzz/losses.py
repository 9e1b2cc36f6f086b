"""The expected results of `cross_entropy` and `linear_cross_entropy`: value, gradients, and the derivatives of both."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.fuzz.formulas import EXACT, FREE, NOT_FINITE, Expected, Rows, finite, some
from experiments.fuzz.measured import Measured, Unit, tanh, tanh_slope, where


@dataclass
class Targets:
    """The targets as changed by the options; S sets of values, N positions, C classes."""

    label: np.ndarray | None  # (S, N), any integer
    distribution: np.ndarray | None  # (S, N, C)
    weights: np.ndarray  # (S, N), 0 where ignored
    class_weights: np.ndarray | None  # (S, C)
    smoothing: np.ndarray  # (S, 1, 1)
    z_loss: np.ndarray  # (S, 1, 1)
    left: np.ndarray  # (S, N, C): classes that smoothing shares among


class PositionLoss:
    """A loss of every position plus ζ·lse², weighted and reduced; subclasses define the loss."""

    has_mass: np.ndarray  # (S, N): where a NaN logit must make the loss NaN

    def __init__(self, rows: Rows, weights: np.ndarray, z_loss: np.ndarray, reduction: str, unit: Unit, dtype: Any):
        self.rows, self.reduction, self.unit, self.dtype = rows, reduction, unit, dtype
        self.part, self.z_loss = weights != 0, z_loss
        self.outside = np.zeros_like(self.part)  # positions with a target out of range
        self.unknown = False  # whether such a position leaves the other positions' shares of a mean unspecified
        self.counted = self.measured(weights)
        self.loss_share, self.square_share = self.counted, self.counted
        if reduction == "mean":
            self.loss_share = self.square_share = self.counted / self.one(weights.sum(-1, keepdims=True))
        self.broken = self.part & rows.bad
        self.unsaid = np.zeros_like(self.broken)  # positions whose loss is not specified

    def each(self) -> Measured:
        """The loss of each position."""
        raise NotImplementedError

    def slope(self) -> Measured:
        """The derivative of each loss to the logits."""
        raise NotImplementedError

    def turn(self, v: Measured, targets: np.ndarray | None) -> Measured:
        """The derivative of `slope` along a tangent of the logits and one of the targets."""
        raise NotImplementedError

    def along(self, targets: np.ndarray) -> tuple[Measured, np.ndarray]:
        """The derivative of the loss along a tangent of the targets, and where it is not specified."""
        raise NotImplementedError

    def pull_targets(self, g: np.ndarray, *, linear: bool = False) -> Expected:
        """The gradient to the targets."""
        raise NotImplementedError

    def bend_targets(self, g: np.ndarray, v: np.ndarray | Measured, targets: np.ndarray | None) -> Expected:
        """The derivative of the gradient to the targets."""
        raise NotImplementedError

    def measured(self, array: Any) -> Measured:
        return Measured(np.asarray(array), 0, self.unit)

    def one(self, count: np.ndarray) -> Measured:
        return self.measured(np.where(count == 0, 1, count))

    def left(self, v: np.ndarray | Measured) -> Measured:
        """A tangent of the logits, with 0 at masked classes."""
        return where(self.rows.removed, 0.0, self.counted.exact(v))

    def reduced(self, each: Measured, judged: np.ndarray, needed: np.ndarray) -> Expected:
        """Reduce `each` position's term; where `needed`, NaN is expected."""
        needed, judged = needed & ~self.unsaid, np.where(self.unsaid, FREE, judged)
        each = where(needed, np.nan, each)
        if self.reduction == "none":
            return Expected(each, np.where(needed, EXACT, judged))
        return Expected(each.sum(), np.where(some(needed), EXACT, judged.max(-1, initial=EXACT)))

    def value(self) -> Expected:
        rows = self.rows
        lse = where(rows.empty, 0.0, rows.lse[..., 0])
        each = self.each() * self.loss_share + lse * lse * self.z_loss[..., 0] * self.square_share
        each = where(self.part & ~rows.bad, each, 0.0)
        needed = self.outside | (self.part & rows.has_nan & self.has_mass)
        judged = np.where(self.broken, np.where(self.has_mass, NOT_FINITE, FREE), EXACT)
        unsaid = self.part & rows.empty & (self.z_loss[..., 0] != 0) & np.isfinite(each.value)
        return self.reduced(each, np.where(unsaid, FREE, judged), needed)

    def shares(self, g: np.ndarray) -> tuple[Measured, Measured]:
        """A cotangent times the weight of a position's loss and squared lse in the result; 0 at ignored positions."""
        each = np.where(self.part, g if self.reduction == "none" else g[:, None], 0)
        return (self.loss_share * each)[..., None], (self.square_share * each)[..., None]

    def square_slope(self) -> Measured:
        """The derivative of ζ·lse² to the logits."""
        lse = where(self.rows.empty[..., None], 0.0, self.rows.lse)
        return self.rows.p * lse * (2 * self.z_loss)

    def of_logits(self, gradient: Measured, *, first: bool) -> Expected:
        """A gradient to the logits with its edge cases."""
        rows, out = self.rows, self.outside[..., None]
        gradient = where(self.part[..., None] & ~self.rows.removed, gradient, 0.0)
        left = ~rows.removed
        if self.unknown:
            others = some(self.outside)[:, None, None] & ~out
            gradient = finite(gradient, others & self.part[..., None] & left)
        gradient = finite(gradient, (rows.empty & self.part)[..., None] & left)
        gradient = where(out, np.nan, gradient)
        free = (self.broken[..., None] & left) | (out & rows.removed)
        free |= False if first else out
        return Expected(gradient, np.where(free, FREE, EXACT))

    def pull(self, g: np.ndarray) -> Expected:
        for_loss, for_square = self.shares(g)
        return self.of_logits(self.slope() * for_loss + self.square_slope() * for_square, first=True)

    def push(self, v: np.ndarray | Measured, targets: np.ndarray | None) -> Expected:
        rows, v = self.rows, self.left(v)
        along = (self.slope() * v).sum()
        judged = np.where(self.part & (rows.bad | rows.empty | self.outside), FREE, EXACT)
        if targets is not None:
            of_targets, unsaid = self.along(targets)
            along = along + of_targets
            judged = np.where(self.part & unsaid, FREE, judged)
        if self.unknown:
            judged = np.where(some(self.outside)[:, None], FREE, judged)
        each = along * self.loss_share + (self.square_slope() * v).sum() * self.square_share
        return self.reduced(where(self.part & (judged != FREE), each, 0.0), judged, np.zeros_like(self.part))

    def bend(self, g: np.ndarray, v: np.ndarray | Measured, targets: np.ndarray | None) -> Expected:
        """The derivative of `pull` along v and along a tangent of the targets."""
        rows, (for_loss, for_square), v = self.rows, self.shares(g), self.left(v)
        lse = where(rows.empty[..., None], 0.0, rows.lse)
        turn = (rows.p * rows.dot(v)).rounded(self.dtype) + rows.derivative(v, self.dtype) * lse
        of_square = turn * (2 * self.z_loss)
        return self.of_logits(self.turn(v, targets) * for_loss + of_square * for_square, first=False)


class Loss(PositionLoss):
    """τ·lse − Σ_j q_j z_j."""

    def __init__(self, rows: Rows, targets: Targets, reduction: str, unit: Unit, dtype: Any):
        super().__init__(rows, targets.weights, targets.z_loss, reduction, unit, dtype)
        classes = rows.removed.shape[-1]
        given = targets.class_weights
        self.by_class = np.ones((1, 1, classes)) if given is None else given[:, None, :]
        self.by_target = self.measured(1 - targets.smoothing) * self.by_class  # ∂q_j/∂t_j
        counts = np.maximum(targets.left.sum(-1, keepdims=True), 1)
        shared = self.measured(np.where(targets.left, self.by_class, 0)) / counts
        self.spread = shared * targets.smoothing
        if targets.distribution is not None:
            self.onehot = np.zeros(rows.removed.shape, bool)
            self.spread = self.spread + self.by_target * targets.distribution
            self.hot = self.measured(np.zeros((*self.part.shape, 1)))
        else:
            label = targets.label
            assert label is not None
            self.outside = self.part & ((label < 0) | (label >= classes))
            self.onehot = label[..., None] == np.arange(classes)
            self.hot = where(self.onehot, self.by_target, 0.0).sum(keepdims=True)
        if reduction == "mean" and given is not None and targets.label is not None:
            by_label = np.where(self.onehot, self.by_class, 0).sum(-1)
            for_loss = self.one(np.where(self.part, targets.weights * by_label, 0).sum(-1, keepdims=True))
            self.loss_share = self.counted / for_loss
        # A label out of range has no class weight, so the mean's denominator is not specified.
        self.unknown = reduction == "mean" and given is not None
        has_targets = (self.hot.value[..., 0] != 0) | some(self.spread.value != 0)
        self.has_mass = has_targets | (targets.z_loss[..., 0] != 0)

    def each(self) -> Measured:
        rows = self.rows
        at_label = where(self.hot.value == 0, 0.0, self.hot * rows.label_surprise(self.onehot))[..., 0]
        return at_label + where(self.spread.value == 0, 0.0, self.spread * rows.surprise).sum()

    def slope(self) -> Measured:
        of_label = self.rows.label_gradient(self.onehot) * self.hot
        return of_label + (self.rows.p * self.spread.sum(keepdims=True) - self.spread)

    def turn(self, v: Measured, targets: np.ndarray | None) -> Measured:
        rows = self.rows
        turn = rows.derivative(v, self.dtype, self.onehot) * self.hot
        turn = turn + rows.derivative(v, self.dtype) * self.spread.sum(keepdims=True)
        if targets is not None:
            change = where(rows.removed, 0.0, self.by_target * targets)
            turn = turn + (rows.p * change.sum(keepdims=True)).rounded(self.dtype) - change.rounded(self.dtype)
        return turn

    def along(self, targets: np.ndarray) -> tuple[Measured, np.ndarray]:
        rows, fixed = self.rows, (self.by_target.value == 0) | self.rows.removed
        moved = where(fixed, 0.0, self.by_target * rows.surprise * targets).sum()
        return moved, some(np.isinf(rows.surprise.value) & ~fixed)

    def pull_targets(self, g: np.ndarray, *, linear: bool = False) -> Expected:
        """The gradient to a distribution: −c_j (1 − ε) log p_j."""
        for_loss, _ = self.shares(g)
        gradient = for_loss * self.by_target * self.rows.surprise
        constant = (for_loss.value == 0) | (self.by_target.value == 0) | self.rows.removed
        gradient = where(constant, 0.0, gradient)
        infinite = np.isinf(self.rows.surprise.value) & ~self.rows.removed & linear
        return Expected(gradient, np.where((self.broken[..., None] & ~self.rows.removed) | infinite, FREE, EXACT))

    def bend_targets(self, g: np.ndarray, v: np.ndarray | Measured, targets: np.ndarray | None) -> Expected:
        (for_loss, _), v = self.shares(g), self.left(v)
        gradient = for_loss * self.by_target * (self.rows.dot(v) - v)
        gradient = where(self.rows.removed, 0.0, gradient)
        unsaid = self.broken[..., None] | np.isinf(self.rows.surprise.value)
        return Expected(gradient, np.where(unsaid & ~self.rows.removed, FREE, EXACT))


class Layer:
    """z = cap·tanh((x·W + b)/cap)/temperature, with the gradients of a loss of z taken back through it."""

    def __init__(
        self, x: np.ndarray, w: np.ndarray, b: np.ndarray | None, cap: Any, temperature: Any, product: Any, unit: Unit
    ):
        self.spoiled = some(~np.isfinite(x))  # the positions whose features are NaN or infinite
        x = np.where(self.spoiled[..., None], 0, x)
        self.x, self.w, self.unit = Measured(x, 0, unit), Measured(w, 0, unit), unit
        self.b, self.product = b, product
        self.inverse = Measured(np.ones_like(temperature), 0, unit) / temperature
        a = self.x @ self.w
        if b is not None:  # −inf masks a class
            a = a + np.where(np.isneginf(b), 0, b)[:, None, :]
        self.cap = cap
        if cap is None:
            self.z, self.slope, self.curvature = a * self.inverse, self.inverse, None
        else:
            ratio = a / cap
            self.z = tanh(ratio) * cap * self.inverse
            self.slope = tanh_slope(ratio) * self.inverse
            self.curvature = tanh(ratio) * self.slope * (-2 / cap)
        self.z = where(self.spoiled[..., None], np.nan, self.z)

    def along(self, x: np.ndarray, w: np.ndarray, b: np.ndarray | None) -> Measured:
        """The tangent of x·W + b; in reverse mode its two matmuls give cotangents in the matmuls' dtype."""
        to_x, to_w = (self.x.exact(v).rounded(self.product) for v in (x, w))
        change = (to_x @ self.w).rounded(self.product) + (self.x @ to_w).rounded(self.product)
        if self.b is not None and b is not None:
            change = change + np.where(np.isneginf(self.b), 0, b)[:, None, :]
        return change.rounded(self.product)

    def pull(self, gradient: Expected) -> dict[str, Expected]:
        return self.products(gradient.number * self.slope, gradient)

    def bend(
        self, gradient: Expected, change: Expected, along: Measured, x: np.ndarray, w: np.ndarray
    ) -> dict[str, Expected]:
        inner = change.number * self.slope
        if self.curvature is not None:
            inner = inner + gradient.number * self.curvature * along
        # In reverse over reverse the largest class's cotangent is added to the cotangents of the other classes.
        size = np.where(np.isfinite(inner.value), np.abs(inner.value), 0).max(-1, keepdims=True)
        inner.error = inner.error + self.unit.roundoff * size
        return self.products(inner, gradient, change, beside=(gradient.number * self.slope, x, w))

    def products(
        self, inner: Measured, *judges: Expected, beside: tuple[Measured, np.ndarray, np.ndarray] | None = None
    ) -> dict[str, Expected]:
        """Pull a gradient to x·W + b back to x, W and b; `beside` is another one, with the tangents of x and W."""
        judged = np.max(np.broadcast_arrays(*(j.judged for j in judges)), 0)
        needed: np.ndarray = np.isnan(judges[0].number.value) & (judged == EXACT)
        vague: np.ndarray = np.max([np.isinf(j.number.error) for j in judges], 0)
        usable = (judged == EXACT) & ~needed & ~vague

        def taken(number: Measured, x: Measured, w: Measured) -> tuple[Measured, Measured, Measured]:
            stored = where(usable, number, 0.0).rounded(self.product)
            pair = stored @ w.transposed, x.transposed @ stored
            # XLA's CPU multiplies float16 as such: terms round to its subnormal numbers.
            if jnp.dtype(self.product) == jnp.float16:
                for product, terms in zip(pair, stored.value.shape[:-3:-1], strict=True):
                    product.error = product.error + Unit.of(self.product).tiny / 4 * np.sqrt(terms)
            return *pair, stored.transposed.sum()

        features, kernel, bias = taken(inner, self.x, self.w)
        lost = {"features": False, "kernel": False}
        if beside is not None:
            other, x, w = beside
            to_x, to_w, _ = taken(other, self.x.exact(x), self.x.exact(w))
            # Terms that nearly cancel may each be too large for half precision; a mean is divided by its count last.
            limit = float(jnp.finfo(jnp.dtype(self.product)).max) / (4 * max(self.x.value.shape[-2], 1))
            terms = {"features": (features, to_x), "kernel": (kernel, to_w)}
            lost = {name: np.maximum(*(np.abs(term.value) for term in pair)) > limit for name, pair in terms.items()}
            large = np.maximum(np.abs(inner.value), np.abs(other.value)) > limit
            lost["features"] |= some(large, keepdims=True)
            lost["kernel"] |= some(large, -2, keepdims=True)
            features, kernel = features + to_x, kernel + to_w

        def judge(number: Measured, over: Callable[[np.ndarray], np.ndarray], spoiled: np.ndarray) -> Expected:
            number = finite(number, np.broadcast_to(over(vague), number.value.shape))
            number = where(over(needed), np.nan, number)
            return Expected(number, np.where((over(judged == FREE) | spoiled) & ~over(needed), FREE, EXACT))

        spoiled = some(self.spoiled)
        return {
            "features": judge(features, lambda m: some(m, keepdims=True), self.spoiled[..., None] | lost["features"]),
            "kernel": judge(kernel, lambda m: some(m, -2, keepdims=True), spoiled[:, None, None] | lost["kernel"]),
            "bias": judge(bias, lambda m: some(m, -2), spoiled[:, None]),
        }
