"""The expected losses of `SparseTargets`: over the chosen classes, and over these against all others."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from experiments.fuzz.formulas import EXACT, FREE, Expected, Rows, finite, some
from experiments.fuzz.losses import PositionLoss
from experiments.fuzz.measured import Measured, Unit, exp, log1p, where


@dataclass
class Chosen:
    """Some classes and their probabilities; S sets of values, N positions, K of C classes."""

    indices: np.ndarray  # (S, N, K), any integer
    probs: np.ndarray  # (S, N, K), at least 0, but anything where the position is ignored
    outside: str
    rounding: float  # of the probabilities' dtype: a remainder that is not larger counts as 0
    largest: float  # the largest number that sums and gradients can hold
    weights: np.ndarray  # (S, N)
    z_loss: np.ndarray  # (S, 1, 1)


def surprise(log_odds: Measured) -> Measured:
    """−log P, where the odds are P/(1 − P)."""
    ahead = log_odds.value >= 0
    return log1p(exp(where(ahead, -log_odds, log_odds))) + where(ahead, 0.0, -log_odds)


def probability(log_odds: Measured) -> Measured:
    """P, accurate however small it is."""
    ahead = log_odds.value >= 0
    smaller = exp(where(ahead, -log_odds, log_odds))
    return where(ahead, 1.0, smaller) / (smaller + 1)


class SparseLoss(PositionLoss):
    """−Σ_k q_k log p_k − R log(1 − Σ_k p_k), where R is the probability that remains for the other classes.

    With "renormalise" q and p are conditioned on the chosen classes, and with "nothing" R is 0. The chosen classes and
    the others have separate softmaxes, each relative to its largest logit; the total probability of either is a
    function of the log-odds, the difference of their log-sum-exps.
    """

    def __init__(self, z: Measured, removed: np.ndarray, chosen: Chosen, reduction: str, unit: Unit, dtype: Any):
        super().__init__(Rows(z, removed), chosen.weights, chosen.z_loss, reduction, unit, dtype)
        classes, self.largest = removed.shape[-1], chosen.largest
        probs = np.where(self.part[..., None], chosen.probs, 0)
        self.inside = (chosen.indices >= 0) & (chosen.indices < classes)
        self.outside = self.part & some(~self.inside & (probs != 0))
        self.at = np.where(self.inside, chosen.indices, classes)
        times = self.dense(np.ones_like(probs)).value
        self.taken = times > 0
        q = self.dense(probs)
        q.error = np.where(times > 1, unit.roundoff * np.abs(q.value), 0)
        self.mass = q.sum(keepdims=True)
        self.renormalised = chosen.outside == "renormalise"
        self.q = q / self.whole if self.renormalised else q
        self.rest = self.measured(np.zeros(self.mass.value.shape))
        # The derivative to the probabilities is not specified if all are 0 or their remainder may be rounding error.
        self.doubtful = (self.mass.value == 0) & self.renormalised
        if chosen.outside == "tail":
            self.leave(max(chosen.rounding, 16 * unit.roundoff))
        self.group, self.others = Rows(z, removed | ~self.taken), Rows(z, removed | self.taken)
        logits = np.where(removed | ~self.taken | np.isnan(z.value), -np.inf, z.value)
        self.gone = self.taken & (logits == -np.inf)  # chosen, but without probability
        self.leads = (np.arange(classes) == logits.argmax(-1)[..., None]) & self.taken & ~self.group.empty[..., None]
        odds = self.measured(self.group.shift) - self.others.shift + (self.group.log_total - self.others.log_total)
        odds = where(self.group.empty[..., None], -np.inf, odds)
        self.odds = where(self.others.empty[..., None], np.inf, odds)
        # If all chosen classes are masked, the others have all probability, whatever their logits.
        has_rest = (self.rest.value[..., 0] != 0) & ~self.group.empty
        self.has_mass = some(self.q.value != 0) | has_rest | (chosen.z_loss[..., 0] != 0)
        # Target probability without a class gives a loss of +inf, even if another logit is NaN.
        self.rows.has_nan = self.rows.has_nan & ~self.group.empty & ~self.nowhere[..., 0]
        self.unsaid |= self.part & (self.doubtful & self.nowhere)[..., 0]  # no target probability, or hardly any
        if self.renormalised:  # the other classes' logits affect only its lse
            self.unsaid |= self.broken & ~self.group.bad & (chosen.z_loss[..., 0] == 0)

    def dense(self, array: np.ndarray) -> Measured:
        """From the chosen classes to all: 0 at others, a sum where a class is chosen twice."""
        sets, count, classes = self.rows.removed.shape
        found = np.zeros((sets, count, classes + 1), array.dtype)
        np.add.at(found, (*np.ogrid[:sets, :count, :1][:2], self.at), array)
        return self.measured(found[..., :-1])

    def gathered(self, array: np.ndarray) -> np.ndarray:
        """From all classes to the chosen ones: 0 where the index is no class."""
        padded = np.concatenate([array, np.zeros_like(array[..., :1])], -1)
        return np.take_along_axis(padded, self.at, -1)

    def leave(self, rounding: float) -> None:
        """The probability of the other classes, if there are any and it is more than rounding error."""
        rest = 1 - self.mass
        is_left = (rest.value > rounding / 2) & ~self.taken.all(-1, keepdims=True)
        self.doubtful = is_left & (rest.value < 2 * rounding)
        rest.error = np.where(self.doubtful, np.abs(rest.value), rest.error)
        self.rest = where(is_left, rest, 0.0)

    @property
    def whole(self) -> Measured:
        """The divisor that makes the probabilities sum to one."""
        return where(self.mass.value == 0, 1.0, self.mass)

    @property
    def nowhere(self) -> np.ndarray:
        """Where probability remains but no class is left for it."""
        return self.others.empty[..., None] & (self.rest.value != 0)

    @cached_property
    def costs(self) -> Measured:
        """−log of each class's probability within its group, accurate at the class with the largest logit."""
        return where(self.leads, self.group.label_surprise(self.leads), self.group.surprise)

    @cached_property
    def parts(self) -> tuple[Measured, Measured]:
        """The target of the chosen class with the largest logit, and the sum of the other targets."""
        return self.split(self.q)

    def split(self, q: Measured) -> tuple[Measured, Measured]:
        return where(self.leads, q, 0.0).sum(keepdims=True), where(self.leads, 0.0, q).sum(keepdims=True)

    @cached_property
    def to_odds(self) -> Measured:
        """The derivative of the loss to the log-odds."""
        if self.renormalised:
            return self.measured(np.zeros(self.mass.value.shape))
        of_lead, beside = self.parts
        return self.rest * probability(self.odds) - (of_lead + beside) * probability(-self.odds)

    def each(self) -> Measured:
        costs = self.costs if self.renormalised else self.costs + surprise(self.odds)
        of_others = where(self.rest.value == 0, 0.0, self.rest * surprise(-self.odds))
        return where(self.q.value == 0, 0.0, self.q * costs).sum() + of_others[..., 0]

    def slope(self) -> Measured:
        of_lead, beside = self.parts
        to_group = self.group.label_gradient(self.leads) * of_lead - where(self.leads, 0.0, self.q)
        to_group = to_group + self.group.p * (beside + self.to_odds)
        return where(self.taken, to_group, -(self.others.p * self.to_odds))

    def along_odds(self, v: Measured) -> Measured:
        return self.group.dot(v) - self.others.dot(v)

    def change(self, targets: np.ndarray) -> Measured:
        """A tangent of the given probabilities as a tangent over all classes."""
        return self.dense(np.where(self.part[..., None], targets, 0))

    def change_of_q(self, targets: np.ndarray) -> Measured:
        change = self.change(targets)
        return (change - self.q * change.sum(keepdims=True)) / self.whole if self.renormalised else change

    def turn(self, v: Measured, targets: np.ndarray | None) -> Measured:
        group, others, dtype, (of_lead, beside) = self.group, self.others, self.dtype, self.parts
        to_group = group.derivative(v, dtype, self.leads) * of_lead
        to_group = to_group + group.derivative(v, dtype) * (beside + self.to_odds)
        together, alone = probability(self.odds), probability(-self.odds)
        bend = together * alone * self.along_odds(v) * (of_lead + beside + self.rest)  # of `to_odds`
        if targets is not None:
            change = self.change_of_q(targets)
            to_lead, to_beside = self.split(change)
            to_group = to_group + group.label_gradient(self.leads) * to_lead + group.p * to_beside
            to_group = to_group - where(self.leads, 0.0, change)
            # The other classes lose what the chosen ones gain, if the others have any probability.
            bend = bend - (to_lead + to_beside) * where(self.rest.value == 0, alone, 1.0)
        if self.renormalised:
            bend = self.measured(np.zeros_like(bend.value))
        to_group = to_group + (group.p * bend).rounded(dtype)
        to_others = others.derivative(v, dtype) * self.to_odds + (others.p * bend).rounded(dtype)
        return where(self.taken, to_group, -to_others)

    def to_probs(self) -> tuple[Measured, np.ndarray]:
        """The derivative of the loss to the probability of each class, and where it is not specified."""
        costs = where(self.rows.removed, 0.0, self.costs)
        if self.renormalised:
            mean = where(self.q.value == 0, 0.0, self.q * costs).sum(keepdims=True)
            found = (costs - mean) / self.whole
            # The second derivative divides by the cube of the total: terms may be too large for the dtype.
            size = np.where(self.taken, np.abs(costs.value) + 1, 1).max(-1, keepdims=True) / self.whole.value**3
            vague = self.doubtful | ~(size < 1e-3 * self.largest)
        else:
            of_odds = where(self.rest.value == 0, surprise(self.odds), -self.odds)
            found, vague = where(self.rows.removed, 0.0, costs + of_odds), self.doubtful
        return found, self.taken & (vague | ~np.isfinite(found.value))

    def along(self, targets: np.ndarray) -> tuple[Measured, np.ndarray]:
        slopes, unsaid = self.to_probs()
        moved = where(self.taken & ~unsaid, slopes * self.change(targets), 0.0).sum()
        return moved, some(unsaid | self.gone)

    def of_probs(self, gradient: Measured, unsaid: np.ndarray, *, first: bool) -> Expected:
        """A gradient to all classes as a gradient to the probabilities, with its edge cases."""
        out, part = self.outside[..., None], self.part[..., None]
        free = self.gathered(unsaid | self.broken[..., None])
        free = free | (out & (self.gathered(self.rows.removed) | ~self.inside | (not first)))
        gradient = where(part & self.inside, gradient.map(self.gathered), 0.0)
        gradient = where(out & self.inside, np.nan, gradient)
        return Expected(gradient, np.where(free & part, FREE, EXACT))

    def pull_targets(self, g: np.ndarray, *, linear: bool = False) -> Expected:
        (for_loss, _), (slopes, unsaid) = self.shares(g), self.to_probs()
        return self.of_probs(where(for_loss.value == 0, 0.0, for_loss * slopes), unsaid, first=True)

    def bend_targets(self, g: np.ndarray, v: np.ndarray | Measured, targets: np.ndarray | None) -> Expected:
        (for_loss, _), (slopes, unsaid), v = self.shares(g), self.to_probs(), self.left(v)
        moved = where(self.rows.removed, 0.0, self.group.dot(v) - v)
        if self.renormalised:
            assert targets is not None
            by_change = where(self.taken & ~unsaid, self.change_of_q(targets) * self.costs, 0.0)
            of_mean = where(self.taken, self.q * moved, 0.0).sum(keepdims=True) + by_change.sum(keepdims=True)
            bend = (moved - of_mean - slopes * self.change(targets).sum(keepdims=True)) / self.whole
            return self.of_probs(bend * for_loss, unsaid | some(self.gone, keepdims=True), first=False)
        to_odds = where(self.rest.value == 0, probability(-self.odds), 1.0)
        bend = where(self.rows.removed, 0.0, moved - to_odds * self.along_odds(v))
        return self.of_probs(bend * for_loss, unsaid | self.gone, first=False)

    def of_logits(self, gradient: Measured, *, first: bool) -> Expected:
        """The gradient of a group whose classes are all masked must only be finite."""
        vague = np.where(self.taken, self.group.empty[..., None], self.nowhere)
        found = super().of_logits(finite(gradient, vague), first=first)
        if not first:
            found.judged = self.freed(found, vague)
        return found

    def bend(self, g: np.ndarray, v: np.ndarray | Measured, targets: np.ndarray | None) -> Expected:
        """Where a class of probability 0 has a target, the second derivative of the loss is not specified."""
        found = super().bend(g, v, targets)
        # In reverse over reverse the largest class's cotangent is added to the cotangents of the chosen classes.
        size = np.where(np.isfinite(found.number.value), np.abs(found.number.value), 0).max(-1, keepdims=True)
        found.number.error = found.number.error + self.unit.roundoff * size
        if targets is not None:
            found.judged = self.freed(found, self.doubtful | self.nowhere | some(self.gone, keepdims=True))
        return found

    def freed(self, found: Expected, unsaid: np.ndarray) -> np.ndarray:
        return np.where(unsaid & self.part[..., None] & ~self.rows.removed, FREE, found.judged)
