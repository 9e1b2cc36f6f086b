"""The table in Markdown, with an explanation above it."""

import platform
from importlib.metadata import PackageNotFoundError, version

import pandas as pd

from experiments.compile.measure import COLUMNS
from experiments.compile.targets import Target

NAMED = "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "optax", "jax-cce", "tokamax"
"""Packages whose versions the table states."""
COUNTED = "launches", "MB", "GFLOP", "roofline ms", "over least"
"""Columns that are known for every program whose loops are known."""


def markdown(table: pd.DataFrame, target: Target, command: str, left_out: dict[str, str]) -> str:
    table = said(table)
    shown = [name for name in COLUMNS if not name.startswith("least") and any(map(cell, table[name]))]
    lines = [
        f"# {target.kind}, compiled for and not run on",
        "",
        f"By `{command}`. Versions: {', '.join(f'{name} {found}' for name, found in versions().items())}.",
        f"Roofline: {target.bandwidth / 1e12:.3g} TB/s, {target.half / 1e12:.4g} TFLOP/s for bfloat16 matmuls, "
        f"{target.single / 1e12:.4g} for float32 matmuls ({target.source}).",
        "Sums over the compiled programs; nothing was run or timed.",
        "",
        f"| {' | '.join(shown)} |",
        "|" + "---|" * len(shown),
        *(f"| {' | '.join(cell(row[name]) for name in shown)} |" for row in table.to_dict("records")),
    ]
    if left_out:
        lines += ["", "Left out:", "", *(f"- {name}: {reason}" for name, reason in left_out.items())]
    return "\n".join(lines) + "\n"


def said(table: pd.DataFrame) -> pd.DataFrame:
    """The table, with "unknown" if a program has a loop whose number of iterations is unknown."""
    unknown = table["kernels"].notna() & table["launches"].isna()
    return table.assign(**{name: table[name].astype(object).mask(unknown, "unknown") for name in COUNTED})


def cell(value: float | str) -> str:
    """Three digits, or all of an integer; empty if there is no value."""
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return ""
    return f"{value:,.0f}" if value >= 1000 or value == round(value) else f"{value:.3g}"


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in NAMED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
