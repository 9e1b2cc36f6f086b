"""The README's table of speed, from the committed results: `python -m experiments.benchmark.headline` prints it."""

from pathlib import Path

import pandas as pd

from experiments.benchmark.places import KEPT
from experiments.benchmark.report import fastest_other, geometric_mean, ratios_by_kind, read_table, timed_others

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
MEANS = "others / jaxsoft, as they come", "others / jaxsoft, memory kept", "others / jaxsoft without kernels"


def headline() -> str:
    """A row per case: another library's time divided by jaxsoft's, for each version of JAX; last the mean of all."""
    tables = [read_table(RESULTS / f"cpu-jax{version}.csv") for version in VERSIONS]
    lines = [f"| {DTYPE} | shape | {' | '.join(PEERS)} | the fastest, memory kept |", "|---|---|---|---|---|"]
    for case, shape in ROWS.items():
        cells = [" / ".join(fastest(table, case, shape, names) for table in tables) for names in PEERS.values()]
        kept = (fastest_other(table, KEPT).loc[(case, shape, DTYPE), "ratio"] for table in tables)
        lines.append(f"| {case} | {shape} | {' | '.join(cells)} | {' / '.join(f'{ratio:.2f}' for ratio in kept)} |")
    kinds = [ratios_by_kind(table) for table in tables]
    plain, kept, pure = (" / ".join(f"{geometric_mean(of_table[kind]):.2f}" for of_table in kinds) for kind in MEANS)
    lines.append(f"| **geometric mean of all cases**, bfloat16 too, the fastest other library | | {plain} | | {kept} |")
    lines.append(f"| the same where our kernels were not built | | {pure} | | |")
    return "\n".join(lines)


def fastest(table: pd.DataFrame, case: str, shape: str, names: tuple[str, ...]) -> str:
    others = timed_others(table)
    of_case = (others["case"] == case) & (others["shape"] == shape) & (others["dtype"] == DTYPE)
    return f"{others.loc[of_case & others['implementation'].str.startswith(names), 'ratio'].min():.2f}"


if __name__ == "__main__":
    print(headline())
