"""What comes out: the table, and its comparison with an older one."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments._door import InputError
from experiments.benchmark.measure import COLUMNS, KEY, Ceilings
from experiments.benchmark.peers import CLASS_LAST

FALL = 0.1
"""A ratio that has fallen by more than this share is flagged."""


def markdown(table: pd.DataFrame, about: dict[str, Any], left_out: dict[str, str], fallen: pd.DataFrame | None) -> str:
    ceilings = Ceilings(**about["ceilings"])
    products = ", ".join(f"{speed / 1e12:.3g} TFLOP/s in {dtype}" for dtype, speed in ceilings.gemm.items())
    lines = [
        f"# {about['device']}, jax {about['versions']['jax']}",
        "",
        f"{about['date']}, by `{about['command']}`.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in about['versions'].items())}.",
        f"Ceilings in this run: copy {ceilings.copy / 1e9:.3g} GB/s, matrix product {products}.",
        "",
    ]
    peers = timed_peers(table)
    fastest = peers.loc[peers["implementation"] != "NumPy"].groupby(KEY[:3]).agg({"ratio": "min"})
    best = fastest["ratio"].to_numpy(float)
    if len(best):
        mean, slower = np.exp(np.log(best).mean()), f"below 1 in {sum(best < 1)}, below 0.9 in {sum(best < 0.9)}"
        lines += [
            f"The fastest peer's time over ours: {mean:.2f} in the geometric mean of {len(best)} cases, "
            f"from {best.min():.2f} to {best.max():.2f}; {slower}.",
            "",
        ]
    if fallen is not None:
        lines += [f"Against the older table, {len(fallen)} ratios have fallen by more than {FALL:.0%}.", ""]
        lines += [f"- {' '.join(row[name] for name in KEY)}: **{row['ratio before']:.2f} to {row['ratio']:.2f}**"
                  for row in fallen.to_dict("records")] + [""] * bool(len(fallen))  # fmt: skip
    lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(cell(row[name]) for name in COLUMNS)} |" for row in table.to_dict("records")]
    if left_out:
        lines += ["", "Left out:", "", *(f"- {name}: {reason}" for name, reason in left_out.items())]
    return "\n".join(lines) + "\n"


def cell(value: float | str) -> str:
    return value if isinstance(value, str) else "" if pd.isna(value) else f"{value:.3g}"


def timed_peers(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the peers that were timed on data laid out as the case has them."""
    names = table["implementation"]
    return table.loc[(names != "jaxsoft") & ~names.str.endswith(CLASS_LAST) & table["ratio"].notna()]


def read_table(path: Path) -> pd.DataFrame:
    """A results.csv of an earlier run."""
    try:
        table = pd.read_csv(path)
    except ValueError as error:
        raise InputError(f"{path}: expected a results.csv of this benchmark, got {str(error).strip()}") from error
    if absent := [name for name in (*KEY, "ratio") if name not in table]:
        raise InputError(f"{path}: expected a results.csv of this benchmark, got one without column {absent[0]!r}")
    return table


def fallen_ratios(table: pd.DataFrame, old: pd.DataFrame) -> pd.DataFrame:
    """The rows whose ratio, theirs over ours, has fallen by more than a tenth: ours has become slower."""
    both = table.merge(old, on=KEY, suffixes=("", " before"))
    return both.loc[both["ratio"] < (1 - FALL) * both["ratio before"]]
