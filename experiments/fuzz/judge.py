"""Compare results with expectations."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from experiments.fuzz.formulas import EXACT, FREE, NOT_FINITE, Expected
from experiments.fuzz.measured import Unit

# The allowed multiple of the bound of the running error analysis, which assumes that every function rounds correctly.
# XLA's exponential and logarithm are off by up to two units in the last place, and a sum of n terms is sometimes off by
# more than √n roundings.
SLACK = 4.0


@dataclass(frozen=True)
class Verdict:
    """For one result: the wrong sets, how near the others came to the bound, and how many numbers were compared."""

    wrong: np.ndarray
    worst: float
    compared: int
    detail: np.ndarray  # which entries are wrong


def judge(found: np.ndarray, expected: Expected, dtype: str) -> Verdict:
    number, judged = expected.number, expected.everywhere
    if found.dtype != jnp.dtype(dtype) or found.shape != number.value.shape:
        everything = np.ones(found.shape, bool)
        return Verdict(np.ones(len(found), bool), np.inf, 0, everything)
    unit, limit = Unit.of(dtype), float(jnp.finfo(jnp.dtype(dtype)).max)
    with np.errstate(all="ignore"):
        got = found.astype(number.value.dtype)
        want = number.value
        stored = unit.roundoff * np.abs(want) * 1.01 + unit.tiny  # rounded to the result's dtype
        tolerance = SLACK * number.error + stored
        distance = np.abs(got - want)
        close = (distance <= tolerance) & np.isfinite(got)
        overflows = np.isfinite(want) & (np.abs(want) + tolerance > limit)
        close |= overflows & np.isinf(got) & (np.sign(got) == np.sign(want))
        same = np.where(np.isnan(want), np.isnan(got), np.where(np.isinf(want), got == want, close))
        right = np.where(judged == FREE, True, np.where(judged == NOT_FINITE, ~np.isfinite(got), same))
        measured = (
            (judged == EXACT) & np.isfinite(want) & np.isfinite(got) & (number.error > 0) & np.isfinite(tolerance)
        )
        ratio = np.where(measured, (distance - stored) / (SLACK * number.error), 0)
    axes = tuple(range(1, right.ndim))
    worst = float(ratio[right].max(initial=0))
    return Verdict(np.asarray(np.any(~right, axes)), worst, int((judged != FREE).sum()), ~right)
