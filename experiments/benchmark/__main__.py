"""How fast is this library compared with others on this machine?

python -m experiments.benchmark

The result of every implementation of a case is compared with jaxsoft's, then all are timed in a new random order in
each round. On a CPU, if available, separate processes repeat this with huge pages and with an allocator that keeps its
memory, and time jaxsoft without its kernels. A time is a call's until its result is ready; ratios above one mean that
jaxsoft is faster. How to read the table, and how to run on a GPU: experiments/benchmark/README.md.
"""

import contextlib
import datetime
import json
import os
import platform
import re
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pandas as pd
from tqdm import tqdm

from experiments._door import InputError, enter, make_folder, write_json
from experiments.benchmark.cases import SUITES
from experiments.benchmark.measure import COLUMNS, Ceilings, measure, measure_ceilings, obstacle
from experiments.benchmark.peers import missing
from experiments.benchmark.pictures import plot_ratios, plot_roofline
from experiments.benchmark.places import ENVIRONMENTS, open_places, unused
from experiments.benchmark.report import fallen_ratios, markdown, read_table
from experiments.benchmark.sweep import sweep
from jaxsoft import native_kernels

NAMED = ["jaxsoft", "jax", "jaxlib", "numpy", "optax", "torch", "jax-cce", "tokamax", "liger-kernel", "quack-kernels"]
"""Packages whose versions the table states."""
OPTIONS = "suite", "sweep", "only", "seconds", "seed"
"""The settings on which the results depend."""
BUSY = 0.5
"""The load average of the last minute above which a run warns."""
WAITING = "OMP_WAIT_POLICY"
"""The behaviour of PyTorch's threads between two loops."""


@dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    suite: Literal["quick", "full"] = "quick"
    """The cases: quick takes some minutes on two cores."""
    sweep: int = 0
    """Instead of the suite, time this many random cases, after the worst known ones, against jax.nn and optax."""
    only: str = ""
    """Run the cases whose name, shape and dtype, as the table writes them, contain this: "softmax (150, 3) float32"."""
    seconds: float = 1.0
    """Time each case for about this long, in at least 5 and at most 401 rounds."""
    seed: int = 0
    """Seed for the inputs, the order of the implementations, and the cases of a sweep."""
    compare: Path | None = None
    """A results.csv of an earlier run: rows whose ratio has fallen by more than a tenth are flagged."""
    resume: bool = False
    """Skip the cases that results.csv in the folder of results already has."""
    out: Path = Path("out/benchmark")
    """Folder for results.csv, results.md, about.json and the pictures."""


def run(config: Config) -> pd.DataFrame:
    """Time the chosen cases and write the table and the pictures."""
    # A GPU's memory is shared with PyTorch in this process. JAX reads this when it first looks for devices.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # PyTorch's threads would spin for milliseconds after each call, on the cores of the next implementation.
    os.environ.setdefault(WAITING, "passive")
    if not 0 < config.seconds < float("inf"):
        raise InputError(f"--seconds: expected a positive number, got {config.seconds}")
    if not 0 <= config.seed < 2**32:
        raise InputError(f"--seed: expected an integer in [0, 2**32), got {config.seed}")
    if config.sweep < 0:
        raise InputError(f"--sweep: expected a number of cases, got {config.sweep}")
    suite = sweep(config.sweep, config.seed) if config.sweep else SUITES[config.suite]
    chosen = [case for case in suite if config.only in case.label]
    if not chosen:
        names = sorted({case.name for case in suite})
        raise InputError(f"--only: expected part of one of {names} with shape and dtype, got {config.only!r}")
    old = read_table(config.compare) if config.compare else None
    out = make_folder(config.out)
    about, rows = begin(config, {case.dtype: None for case in chosen})
    ceilings = Ceilings(**about["ceilings"])
    idle = unused()
    left_out = missing() | {f"implementations{suffix}": reason for suffix, reason in idle.items()}
    done = {(row["case"], row["shape"], row["dtype"]) for row in rows}
    with (
        open_places(suffix for suffix in ENVIRONMENTS if suffix not in idle) as places,
        tqdm(total=len(chosen), unit="case", bar_format="{l_bar}{bar}| {elapsed}") as bar,
    ):
        for n, case in enumerate(chosen):
            bar.set_description(case.label)
            if reason := obstacle(case, ceilings, len(places)):
                left_out[case.label] = reason
            elif (case.name, str(case.shape), case.dtype) not in done:
                # A generator for each case, so that it draws the same numbers whichever cases were timed before it.
                rows += measure(case, ceilings, config.seconds, np.random.default_rng([config.seed, n]), places)
                pd.DataFrame(rows, columns=COLUMNS).to_csv(out / "unfinished.csv", index=False)
                (out / "unfinished.csv").replace(out / "results.csv")
            bar.update()
    table = pd.DataFrame(rows, columns=COLUMNS)
    text = markdown(table, about, left_out, None if old is None else fallen_ratios(table, old))
    (out / "results.md").write_text(text)
    plot_ratios(table, out / "ratios.png")
    plot_roofline(table, ceilings, out / "roofline.png")
    print(text)
    return table


def begin(config: Config, dtypes: Iterable[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A description of the run, with its ceilings, and the rows to continue from."""
    given = {name: value for name, value in asdict(config).items() if value != getattr(Config(), name)}
    given = [f"--{name} {shlex.quote(str(given[name]))}" for name in OPTIONS if name in given]
    about: dict[str, Any] = {
        "command": " ".join([f"{WAITING}={os.environ[WAITING]} python -m experiments.benchmark", *given]),
        "device": device(),
        "kernels": str(native_kernels()),
        "versions": {"Python": platform.python_version()} | installed(),
    }
    path, results = config.out / "about.json", config.out / "results.csv"
    if config.resume and path.exists():
        earlier = json.loads(path.read_text())
        for name, value in about.items():
            if earlier[name] != value:
                raise InputError(f"--resume: {path}: expected {name} {value} as here, got {earlier[name]}")
        return earlier, list(read_table(results).to_dict("records")) if results.exists() else []  # pyright: ignore
    path.unlink(missing_ok=True)
    results.unlink(missing_ok=True)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    if load > BUSY:
        print(f"Warning: the load average is {load:.2f}. Other programs are running, and change times and ratios.")
    about |= {"date": f"{datetime.date.today()}", "load": load, "ceilings": asdict(measure_ceilings(dtypes))}
    write_json(path, about)
    return about, []


def installed() -> dict[str, str]:
    found = {}
    for name in NAMED:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def device() -> str:
    """JAX's name of the device; for a CPU its model, if the system states it."""
    kind = jax.devices()[0].device_kind
    if kind != "cpu":
        return f"{jax.device_count()} × {kind}"
    information = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", information.read_text()) if information.exists() else []
    return f"{os.cpu_count()} cores of {models[0] if models else platform.processor() or 'a CPU'}"


if __name__ == "__main__":
    enter(Config, run, __doc__)
