"""Numbers that a script states: recomputed and tabulated; the script fails if one does not match."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, SupportsFloat

import numpy as np
from jaxtyping import ArrayLike

from experiments._door import ScriptError, write_json


class Number(NamedTuple):
    """A stated number, with all its digits or as a bound with < or >, and the computed number."""

    quantity: str
    stated: str
    computed: SupportsFloat

    @property
    def holds(self) -> bool:
        """Whether both match, within half a unit of the last stated digit (plus 2 % of it for rounding)."""
        value = float(self.computed)
        if self.stated[0] in "<>":
            bound = float(self.stated[1:])
            return value < bound if self.stated[0] == "<" else value > bound
        stated, decimals = float(self.stated), len(self.stated.partition(".")[2])
        if not math.isfinite(stated):
            return value == stated or (math.isnan(value) and math.isnan(stated))
        return abs(value - stated) <= 0.51 * 10**-decimals


def each(quantity: str, stated: Sequence[float], computed: ArrayLike, digits: int) -> list[Number]:
    """The entries of a vector, stated with this many decimals."""
    pairs = zip(stated, np.asarray(computed), strict=True)
    return [Number(f"{quantity}[{n}]", f"{s:.{digits}f}", c) for n, (s, c) in enumerate(pairs)]


def report(numbers: Sequence[Number], out: Path) -> dict[str, float]:
    """Save and print the table; fail if a stated number does not match."""
    summary = {number.quantity: float(number.computed) for number in numbers}
    write_json(out / "summary.json", summary)
    width = max(len(number.quantity) for number in numbers)
    print(f"{'':{width}} {'stated':>13} {'computed':>16}")
    for number in numbers:
        verdict = "" if number.holds else "  differs"
        print(f"{number.quantity:{width}} {number.stated:>13} {float(number.computed):>16.10g}{verdict}")
    failed = [number.quantity for number in numbers if not number.holds]
    if failed:
        raise ScriptError(f"{len(failed)} of {len(numbers)} stated numbers do not match: {'; '.join(failed)}")
    return summary
