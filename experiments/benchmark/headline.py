"""The README's table of speed, from the committed results: `python -m experiments.benchmark.headline` prints it."""

from pathlib import Path

import pandas as pd

from experiments.benchmark.report import read_table, timed_peers

RESULTS = Path(__file__).with_name("results")
VERSIONS = ("0.10.2", "0.12.0.1")
PEERS = {"jax.nn, optax": ("jax.nn", "optax", "formula"), "PyTorch 2.13": ("PyTorch",)}
DTYPE = "float32"
ROWS = {
    case: shapes
    for cases, shapes in (
        (
            ("softmax", "softmax + VJP", "log_softmax", "cross-entropy", "cross-entropy + gradient"),
            ("(4096, 1000)", "(512, 32768)", "(512, 50257)", "(2048, 131072)"),
        ),
        (
            ("softmax, axis 1", "softmax + VJP, axis 1", "cross-entropy + gradient, axis 1, 5% ignored"),
            ("(1, 21, 300, 500)", "(8, 150, 64, 64)"),
        ),
        (("linear cross-entropy + gradient",), ("(1024, 256, 32768)", "(2048, 512, 32768)")),
    )
    for case in cases
}


def headline() -> str:
    """A row for each case and shape: the fastest of the peers over ours, for each version of JAX."""
    tables = [timed_peers(read_table(RESULTS / f"cpu-jax{version}.csv")) for version in VERSIONS]
    lines = [f"| {DTYPE} | shape | {' | '.join(PEERS)} |", "|---|---|---|---|"]
    for case, shapes in ROWS.items():
        for shape in shapes:
            cells = (" / ".join(fastest(table, case, shape, names) for table in tables) for names in PEERS.values())
            lines.append(f"| {case} | {shape} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fastest(table: pd.DataFrame, case: str, shape: str, names: tuple[str, ...]) -> str:
    of_case = (table["case"] == case) & (table["shape"] == shape) & (table["dtype"] == DTYPE)
    return f"{table.loc[of_case & table['implementation'].str.startswith(names), 'ratio'].min():.2f}"


if __name__ == "__main__":
    print(headline())
