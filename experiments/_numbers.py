"""Numbers that a script states: computed again, tabulated, and the end of the script where one does not come out."""

import sys
from pathlib import Path
from typing import NamedTuple, SupportsFloat

import pandas as pd

from experiments._door import write_json


class Number(NamedTuple):
    """One line of the table."""

    quantity: str
    stated: str
    computed: float
    holds: bool


def equals(quantity: str, stated: float, computed: SupportsFloat, digits: int) -> Number:
    """A number stated to so many decimals: right within half a unit of the last, and a little for rounding."""
    value = float(computed)
    return Number(quantity, f"{stated:.{digits}f}", value, abs(value - stated) <= 0.51 * 10**-digits)


def below(quantity: str, bound: float, computed: SupportsFloat) -> Number:
    """A number stated to be less than a bound, such as an error."""
    return Number(quantity, f"< {bound:g}", float(computed), float(computed) < bound)


def above(quantity: str, bound: float, computed: SupportsFloat) -> Number:
    """A number stated to be more than a bound, such as a difference that must show."""
    return Number(quantity, f"> {bound:g}", float(computed), float(computed) > bound)


def report(numbers: list[Number], out: Path) -> dict[str, float]:
    """Print and save the table; exit where a stated number did not come out."""
    table = pd.DataFrame(numbers)
    table.to_csv(out / "numbers.csv", index=False)
    print(table.to_string(index=False, float_format=lambda x: f"{x:.10g}"))
    summary = {number.quantity: number.computed for number in numbers}
    write_json(out / "summary.json", summary)
    failed = [number.quantity for number in numbers if not number.holds]
    if failed:
        sys.exit(f"error: not as stated: {'; '.join(failed)}")
    return summary
