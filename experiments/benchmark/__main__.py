"""How fast is this library beside its peers on this machine?

python -m experiments.benchmark

Every implementation of a case runs in one process, in a new random order every round, after its result
was compared with ours. The time is that of a call whose result is ready; ratios above one mean that
ours is faster.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from tqdm import tqdm

from experiments._door import InputError, enter, make_folder
from experiments.benchmark.cases import CASES, Case


@dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    rounds: int = 41
    """Timed rounds of each case; cases that take microseconds get ten times as many."""
    only: str = ""
    """Run the cases whose name contains this."""
    seed: int = 0
    """Draws the inputs and the order of the implementations."""
    out: Path = Path("out/benchmark")
    """Folder for results.csv and results.md."""


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def check(case: Case, name: str, result: Any, ours: Any) -> str:
    """Empty where the result agrees with ours, else what differs: a wrong peer is not timed as fast."""
    for theirs, expected in zip(jax.tree.leaves(result), jax.tree.leaves(ours), strict=True):
        theirs, expected = np.asarray(theirs, float), np.asarray(expected, float)
        error = np.abs(theirs - expected).max() / np.abs(expected).max()
        if not error < case.tolerance:
            return f"{name} differs by {error:.1e}"
    return ""


def measure(case: Case, config: Config, progress: tqdm) -> list[dict[str, Any]]:
    rng = np.random.default_rng(config.seed)
    calls = case.build(rng)
    results = {name: jax.block_until_ready(call()) for name, call in calls.items()}
    wrong = {name: check(case, name, result, results["jaxsoft"]) for name, result in results.items()}
    del results
    names = [name for name in calls if not wrong[name]]
    rounds = config.rounds * (10 if timed(calls["jaxsoft"]) < 1e-3 else 1)
    seconds = {name: np.empty(rounds) for name in names}
    for n in range(rounds):
        for name in rng.permutation(names):
            seconds[name][n] = timed(calls[name])
        progress.update(1 / rounds)
    rows = []
    for name in calls:
        row = {"case": case.name, "shape": case.shape, "implementation": name, "wrong": wrong[name]}
        if name in seconds:
            ratio = seconds[name] / seconds["jaxsoft"]
            row |= {
                "median_ms": 1e3 * np.median(seconds[name]),
                "least_ms": 1e3 * seconds[name].min(),
                "ratio": np.median(seconds[name]) / np.median(seconds["jaxsoft"]),
                "ratio_low": np.quantile(ratio, 0.25),
                "ratio_high": np.quantile(ratio, 0.75),
            }
        rows.append(row)
    return rows


def run(config: Config) -> pd.DataFrame:
    """Time the chosen cases and write the table."""
    if config.rounds < 3:
        raise InputError(f"--rounds: expected at least 3, got {config.rounds}")
    chosen = [case for case in CASES if config.only in case.name]
    if not chosen:
        raise InputError(f"--only: expected part of one of {sorted({c.name for c in CASES})}, got {config.only!r}")
    out = make_folder(config.out)
    rows = []
    with tqdm(total=len(chosen), unit="case", bar_format="{l_bar}{bar}| {elapsed}") as progress:
        for case in chosen:
            progress.set_description(f"{case.name} {case.shape}")
            rows += measure(case, config, progress)
    table = pd.DataFrame(rows)
    table.to_csv(out / "results.csv", index=False)
    (out / "results.md").write_text(markdown(table))
    print(markdown(table))
    return table


def markdown(table: pd.DataFrame) -> str:
    lines = [
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {jax.local_device_count()} device(s)\n",
        "| case | shape | implementation | median ms | least ms | ratio to ours | middle half |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table.to_dict("records"):
        start = f"| {row['case']} | {row['shape']} | {row['implementation']} | "
        if row["wrong"]:
            lines.append(start + f"{row['wrong']}: not timed | | | |")
            continue
        lines.append(
            start + f"{row['median_ms']:.3g} | {row['least_ms']:.3g} | {row['ratio']:.2f} | "
            f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    enter(Config, run, __doc__)
