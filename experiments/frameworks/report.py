"""The table of frameworks and calls, in CSV and Markdown."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from experiments.frameworks.frameworks import FRAMEWORKS, NOT_RUN
from experiments.frameworks.measure import COLUMNS


def merged(path: Path, rows: list[dict[str, object]]) -> pd.DataFrame:
    """The table with these rows replacing older rows of the same frameworks; rows of other frameworks stay."""
    table = pd.DataFrame(rows, columns=COLUMNS)
    if path.exists():
        older = pd.read_csv(
            path,
            dtype={"version": str},
            keep_default_na=False,
            na_values={"value": ["nan", ""], "gradient": ["nan", ""]},
        )
        older = older[~older["framework"].isin(table["framework"])]
        table = pd.concat([older, table]) if len(table) else older
    places = [list(FRAMEWORKS).index(name) for name in table["framework"]]
    return table.iloc[sorted(range(len(places)), key=places.__getitem__)].reset_index(drop=True)


def markdown(table: pd.DataFrame, command: str, missing: Mapping[str, str]) -> str:
    """The table, the frameworks that could not be run, and the command."""
    count = table["framework"].nunique()
    lines = [
        f"# {count} frameworks, {sum(map(int, table['cases']))} cases",
        "",
        f"Written by `{command}`. Differences are of the larger of 1 and what is compared; where value and gradient "
        "cannot both be equal, the last column says why.",
        "",
        "| framework | call | cases | value | gradient | precision | equal | why not |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for version, rows in table.groupby("version", sort=False):
        for n, row in enumerate(rows.to_dict("records")):
            why = "; ".join(filter(None, (str(row["differs"]), str(row["failed"]) and f"failed {row['failed']}")))
            cells = (
                version if n == 0 else "", f"`{row['call']}`", row["cases"], _number(row["value"]),
                _number(row["gradient"]), row["precision"], "yes" if str(row["equal"]) == "True" else "no", why,
            )  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)).replace("`", "`") + " |")
    lines += ["", "Not run:", "", *(f"- {name}: {why}" for name, why in {**missing, **NOT_RUN}.items())]
    return "\n".join(lines) + "\n"


def _number(value: object) -> str:
    number = float(str(value))
    return "–" if number != number else f"{number:.1e}"
