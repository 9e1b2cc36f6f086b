"""The README's table of speed, from the committed results: `python -m experiments.benchmark.headline` prints it."""

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.benchmark.places import HUGE, PURE
from experiments.benchmark.report import fastest_peers, ratios_of, read_table, timed_peers

RESULTS = Path(__file__).with_name("results")
VERSIONS = ("0.10.2", "0.12.0.1")
PEERS = {"jax.nn, optax": ("jax.nn", "optax", "formula"), "PyTorch 2.13": ("PyTorch",)}
DTYPE = "float32"
ROWS = {
    "softmax": "(512, 32768)",
    "softmax + VJP": "(4096, 1000)",
    "cross-entropy + gradient": "(512, 50257)",
    "cross-entropy + gradient, axis 1, 5% ignored": "(1, 21, 300, 500)",
    "linear cross-entropy + gradient": "(1024, 256, 32768)",
}


def headline() -> str:
    """A row for each case: the fastest of the peers over ours, for each version of JAX; last the mean of all cases."""
    tables = [read_table(RESULTS / f"cpu-jax{version}.csv") for version in VERSIONS]
    lines = [f"| {DTYPE} | shape | {' | '.join(PEERS)} | the faster, with huge pages |", "|---|---|---|---|---|"]
    for case, shape in ROWS.items():
        cells = [" / ".join(fastest(table, case, shape, names) for table in tables) for names in PEERS.values()]
        cells.append(" / ".join(fastest(table, case, shape, sum(PEERS.values(), ()), HUGE) for table in tables))
        lines.append(f"| {case} | {shape} | {' | '.join(cells)} |")
    plain, huge, pure = (" / ".join(f"{mean(table, place):.2f}" for table in tables) for place in ("", HUGE, PURE))
    lines.append(f"| **geometric mean of all cases**, bfloat16 too, the fastest peer | | {plain} | | {huge} |")
    lines.append(f"| the same where our kernels were not built | | {pure} | | |")
    return "\n".join(lines)


def fastest(table: pd.DataFrame, case: str, shape: str, names: tuple[str, ...], place: str = "") -> str:
    peers = timed_peers(table, place)
    of_case = (peers["case"] == case) & (peers["shape"] == shape) & (peers["dtype"] == DTYPE)
    return f"{peers.loc[of_case & peers['implementation'].str.startswith(names), 'ratio'].min():.2f}"


def mean(table: pd.DataFrame, place: str) -> float:
    """Of the fastest peer's time over ours, which at `PURE` is that of ours without kernels."""
    ratios = fastest_peers(table, HUGE if place == HUGE else "")["ratio"]
    if place == PURE:
        ratios = (ratios / ratios_of(table, f"jaxsoft{PURE}")).dropna()
    return float(np.exp(np.log(ratios.to_numpy(float)).mean()))


if __name__ == "__main__":
    print(headline())
