"""The table of results, and its comparison with an older table."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from experiments._door import InputError
from experiments.benchmark.measure import COLUMNS, KEY, Ceilings
from experiments.benchmark.peers import CLASS_LAST
from experiments.benchmark.places import HUGE, KEPT, PURE

FALL = 0.1
"""A ratio that has fallen by more than this share is flagged."""
SETTINGS = {"as they come": "", "with huge pages": HUGE, "memory kept": KEPT}
"""The places in which other libraries and jaxsoft are compared, each with itself."""


def markdown(table: pd.DataFrame, about: dict[str, Any], left_out: dict[str, str], fallen: pd.DataFrame | None) -> str:
    ceilings = Ceilings(**about["ceilings"])
    products = ", ".join(f"{speed / 1e12:.3g} TFLOP/s in {dtype}" for dtype, speed in ceilings.gemm.items())
    lines = [
        f"# {about['device']}, jax {about['versions']['jax']}",
        "",
        f"{about['date']}, by `{about['command']}`.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in about['versions'].items())}.",
        f"Ceilings in this run: copy {ceilings.copy / 1e9:.3g} GB/s, matrix product {products}.",
        f"jaxsoft with {about['kernels']}.",
        f"Load average of the minute before: {about['load']:.2f}.",
        "",
        *summary(table),
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


def summary(table: pd.DataFrame) -> list[str]:
    """The fastest other library's time divided by jaxsoft's over all cases, and the cases in which it is below 1."""
    lines = ["| ratio | geometric mean | cases | below 1 | below 0.9 | least | where | most |", "|" + "---|" * 8]
    for kind, ratios in ratios_by_kind(table).items():
        if len(ratios):
            counts = f"{len(ratios)} | {sum(ratios < 1)} | {sum(ratios < 0.9)}"
            mean, where = geometric_mean(ratios), " ".join(cast(tuple[str, ...], ratios.idxmin()))
            lines.append(f"| {kind} | {mean:.2f} | {counts} | {ratios.min():.2f} | {where} | {ratios.max():.2f} |")
    fastest = pd.concat({name: fastest_other(table, place) for name, place in SETTINGS.items()}, axis=1)
    below = fastest.loc[(fastest.xs("ratio", axis=1, level=1) < 1).any(axis=1)]
    if len(below):
        lines += ["", "Below 1:", "", f"| case | shape | dtype | {' | '.join(SETTINGS)} |", "|" + "---|" * 6]
    for case, row in below.iterrows():
        cells = [f"{cell(row[name, 'ratio'])} {cell(row[name, 'implementation'])}".strip() for name in SETTINGS]
        lines.append(f"| {' | '.join([*cast(tuple[str, ...], case), *cells])} |")
    return [*lines, ""]


def ratios_by_kind(table: pd.DataFrame) -> dict[str, pd.Series]:
    """Ratios of times for each case that has both, by their names."""
    pure = ratios_of(table, f"jaxsoft{PURE}")
    kinds: dict[str, Any] = {
        f"others / jaxsoft, {name}": fastest_other(table, place)["ratio"] for name, place in SETTINGS.items()
    }
    kinds |= {
        "others / jaxsoft without kernels": fastest_other(table)["ratio"] / pure,
        "jaxsoft without kernels / jaxsoft": pure,
        "compiling, others / jaxsoft": timed_others(table).groupby(KEY[:3], sort=False)["compile ratio"].min(),
    }
    return {kind: ratios.dropna() for kind, ratios in kinds.items()}


def geometric_mean(ratios: pd.Series) -> float:
    return float(np.exp(np.log(ratios.to_numpy(float)).mean()))


def fastest_other(table: pd.DataFrame, place: str = "") -> pd.DataFrame:
    """The fastest other library of a place in each case, and its time divided by jaxsoft's in the same place."""
    others = timed_others(table, place)
    others = others.loc[others["implementation"] != f"NumPy{place}"].set_index(KEY[:3])
    others = others.assign(
        implementation=others["implementation"].str.removesuffix(place),
        ratio=others["ratio"] / ratios_of(table, f"jaxsoft{place}").reindex(others.index),
    )[["ratio", "implementation"]]
    return others.sort_values("ratio").groupby(level=KEY[:3], sort=False).first().reindex(others.index.unique())


def ratios_of(table: pd.DataFrame, implementation: str) -> pd.Series:
    return table.loc[table["implementation"] == implementation].set_index(KEY[:3])["ratio"]


def timed_others(table: pd.DataFrame, place: str = "") -> pd.DataFrame:
    """The rows of the other libraries of a place that were timed on data laid out as the case has them."""
    names = table["implementation"]
    of_place = names.str.endswith(place) & ~names.str.endswith(tuple({HUGE, KEPT} - {place}))
    laid_out = ~names.str.removesuffix(place).str.endswith(CLASS_LAST)
    return table.loc[~names.str.startswith("jaxsoft") & of_place & laid_out & table["ratio"].notna()]


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
    """The rows whose ratio, another library's time divided by jaxsoft's, has fallen by more than a tenth."""
    both = table.merge(old, on=KEY, suffixes=("", " before"))
    return both.loc[both["ratio"] < (1 - FALL) * both["ratio before"]]
