"""What the README says of the scripts is what the scripts say of themselves."""

import math
from pathlib import Path

import jax.numpy as jnp
import pytest

from experiments import __main__ as listing
from experiments.benchmark.headline import RESULTS, VERSIONS, headline
from experiments.benchmark.report import read_table
from jaxsoft import cross_entropy

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_experiments_table_is_the_listing():
    rows = dict(
        line.strip("| ").split(" | ") for line in README.splitlines() if line.startswith("| `python -m experiments.")
    )
    expected = {name: question for name, question, _ in listing.scripts()}
    assert {command.strip("`").split(".")[1].split()[0]: question for command, question in rows.items()} == expected


@pytest.mark.x32
def test_the_usage_example_trains():
    names = {}
    exec(README.split("```python\n")[1].split("```")[0], names)
    params, features, labels = names["params"], jnp.eye(4), jnp.array([0, 1, 2, 255])
    moments = names["optimizer"].init(params)
    before = names["loss"](params, features, labels)
    for _ in range(20):
        params, moments = names["step"](params, moments, features, labels)
    assert names["loss"](params, features, labels) < 0.9 * before


@pytest.mark.x32
def test_the_table_of_margins_is_what_comes_out():
    rows = [
        line.strip("| ").split(" | ")
        for line in README.splitlines()
        if line.startswith(("| 10 |", "| 16 |", "| 20 |", "| 40 |", "| 80 |"))
    ]
    assert len(rows) == 5
    for margin, true, ours, _ in rows:
        assert f"{math.log1p(2 * math.exp(-float(margin))):.4e}" == true
        assert f"{float(cross_entropy(jnp.array([float(margin), 0, 0]), jnp.array(0))):.4e}" == ours


def test_the_figures_of_speed_are_those_of_the_committed_results():
    assert headline() in README
    tables = [read_table(RESULTS / f"cpu-jax{version}.csv") for version in VERSIONS]
    loops = " / ".join(f"{table.loc[table['implementation'] == 'NumPy', 'ratio'].item():.1f}" for table in tables)
    assert f"Iris loop makes {loops} times the steps per second of the NumPy loop" in README


def test_every_picture_exists():
    for line in README.splitlines():
        if "](experiments/" in line and "![" in line:
            assert (Path(__file__).parents[1] / line.split("](")[1].rstrip(")")).is_file(), line
