"""The table of results, and its comparison with an older table."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from experiments._door import InputError
from experiments.benchmark.measure import COLUMNS, KEY, Ceilings
from experiments.benchmark.peers import CLASS_LAST
from experiments.benchmark.places import HUGE, PURE

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
        f"Ours with {about['kernels']}.",
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
    """The fastest peer's time over ours in all cases, and the cases in which it is less."""
    lines = [
        "| the fastest peer's time over ours | geometric mean | cases | below 1 | below 0.9 | least | where | most |"
    ]
    lines += ["|" + "---|" * 8]
    for kind, best in ratios_by_kind(table).items():
        if len(best):
            counts = f"{len(best)} | {sum(best < 1)} | {sum(best < 0.9)}"
            mean, where = geometric_mean(best), " ".join(cast(tuple[str, ...], best.idxmin()))
            lines.append(f"| {kind} | {mean:.2f} | {counts} | {best.min():.2f} | {where} | {best.max():.2f} |")
    plain, huge = fastest_peers(table), fastest_peers(table, HUGE)
    both = plain.join(huge.add_suffix(HUGE), how="outer")
    below = both.loc[(both["ratio"] < 1) | (both[f"ratio{HUGE}"] < 1)].sort_values("ratio")
    if len(below):
        lines += [
            "",
            "Below 1:",
            "",
            "| case | shape | dtype | peers | peers with huge pages |",
            "|---|---|---|---|---|",
        ]
    for row in below.reset_index().to_dict("records"):
        cells = [f"{cell(row[f'ratio{end}'])} {cell(row[f'implementation{end}'])}".strip() for end in ("", HUGE)]
        lines.append(f"| {' | '.join([row[name] for name in KEY[:3]] + cells)} |")
    return [*lines, ""]


def ratios_by_kind(table: pd.DataFrame) -> dict[str, pd.Series]:
    """Ratios of times for each case that has both, by their names."""
    plain, huge = fastest_peers(table)["ratio"], fastest_peers(table, HUGE)["ratio"]
    kinds = {
        "peers over ours": plain,
        "peers with huge pages over ours": huge,
        "both with huge pages": huge / ratios_of(table, f"jaxsoft{HUGE}"),
        "peers over ours without kernels": plain / ratios_of(table, f"jaxsoft{PURE}"),
        "ours without kernels over ours": ratios_of(table, f"jaxsoft{PURE}"),
        "compiling, peers over ours": timed_peers(table).groupby(KEY[:3])["compile ratio"].min(),
    }
    return {kind: ratios.dropna() for kind, ratios in kinds.items()}


def geometric_mean(ratios: pd.Series) -> float:
    return float(np.exp(np.log(ratios.to_numpy(float)).mean()))


def fastest_peers(table: pd.DataFrame, place: str = "") -> pd.DataFrame:
    """The fastest peer of a place in each case, and its time divided by ours with default settings."""
    peers = timed_peers(table, place)
    peers = peers.assign(implementation=peers["implementation"].str.removesuffix(HUGE))
    peers = peers.loc[peers["implementation"] != "NumPy"]
    return peers.loc[peers.groupby(KEY[:3])["ratio"].idxmin()].set_index(KEY[:3])[["ratio", "implementation"]]


def ratios_of(table: pd.DataFrame, implementation: str) -> pd.Series:
    return table.loc[table["implementation"] == implementation].set_index(KEY[:3])["ratio"]


def timed_peers(table: pd.DataFrame, place: str = "") -> pd.DataFrame:
    """The rows of the peers of a place that were timed on data laid out as the case has them."""
    names = table["implementation"]
    of_place = names.str.endswith(HUGE) == (place == HUGE)
    laid_out = ~names.str.removesuffix(HUGE).str.endswith(CLASS_LAST)
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
    """The rows whose ratio, the peer's time over ours, has fallen by more than a tenth: ours has become slower."""
    both = table.merge(old, on=KEY, suffixes=("", " before"))
    return both.loc[both["ratio"] < (1 - FALL) * both["ratio before"]]
