"""Is any result silently wrong for some combination of functions, options, dtypes, transformations and meshes?

python -m experiments.fuzz --minutes 60

Draws programs from a seed, compiles each, calls it on many sets of values, and compares values and derivatives with
float64 formulas written from the docstrings. The formulas compute their tolerance by a running error analysis. A
configuration is one program with one set of values. Each failure is printed with the command that repeats it.
"""

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from experiments._door import InputError, ScriptError, enter, make_folder
from experiments.fuzz.programs import FUNCTIONS, draw_program
from experiments.fuzz.report import Report
from experiments.fuzz.trial import attempt

DEVICES = 8  # simulated devices, for the meshes


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    seed: int = 0
    """Seed for the programs and their values."""
    configurations: int = 200_000
    """How many configurations to try."""
    minutes: float = 60.0
    """Stop after this many minutes at the latest."""
    sets: int = 256
    """Sets of values per program; fewer if they are large or the transformation is slow."""
    only: str = ""
    """Try only this function."""
    program: int | None = None
    """Repeat only this program."""
    case: int | None = None
    """Print this set of values of the program given by --program, and its results."""
    shown: int = 40
    """Print at most this many failed programs; failures.txt has all."""
    out: Path = Path("out/fuzz")
    """Folder for coverage.csv, failures.txt and summary.json."""


def check(config: Config) -> None:
    if config.configurations < 1 or config.sets < 1:
        raise InputError("--configurations, --sets: expected positive numbers")
    if config.only and config.only not in FUNCTIONS:
        raise InputError(f"--only: expected one of {', '.join(sorted(set(FUNCTIONS)))}, got {config.only}")
    if config.case is not None and config.program is None:
        raise InputError("--case: expected with --program, whose sets of values it counts")


def run(config: Config) -> Report:
    check(config)
    if jax.config.jax_num_cpu_devices != DEVICES:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_num_cpu_devices", DEVICES)
    report = Report()
    if config.program is not None:
        repeat(config, report)
    else:
        search(config, report)
    if report.failures:
        raise ScriptError(f"{len(report.failures)} of {report.programs} programs gave wrong results or errors")
    return report


def again(config: Config, index: int) -> str:
    return f"python -m experiments.fuzz --seed {config.seed} --sets {config.sets} --program {index}"


def search(config: Config, report: Report) -> None:
    out, began = make_folder(config.out), time.monotonic()
    numbers = itertools.count()
    with tqdm(total=config.configurations, unit=" configurations", unit_scale=True) as bar:
        while report.configurations < config.configurations and time.monotonic() - began < 60 * config.minutes:
            index = next(numbers)
            if config.only not in ("", FUNCTIONS[index % len(FUNCTIONS)]):
                continue
            said = report.add(attempt(draw_program(config.seed, index, config.sets)), again(config, index))
            if said and len(report.failures) <= config.shown:
                bar.write(said)
            bar.update(min(report.configurations, config.configurations) - bar.n)
            bar.set_postfix(programs=report.programs, failed=len(report.failures))
            if report.programs % 50 == 0:
                jax.clear_caches()  # no program is drawn twice
    report.seconds = time.monotonic() - began
    report.write(out)
    print(report)


def repeat(config: Config, report: Report) -> None:
    """Run one program again; for one set of values, print all inputs and results."""
    assert config.program is not None
    trial = attempt(draw_program(config.seed, config.program, config.sets))
    print(report.add(trial, again(config, config.program)) or "nothing wrong", trial.program, sep="\n")
    if config.case is None:
        return
    if not 0 <= config.case < trial.program.sets:
        raise InputError(f"--case: expected a number in [0, {trial.program.sets}), got {config.case}")
    np.set_printoptions(linewidth=120, threshold=200)
    values = trial.values
    cotangents = {f"cotangent {n}": g for n, g in enumerate(values.cotangents)}
    tangents = {f"tangent of {name}": v for name, v in values.tangents.items()}
    for name, array in (values.inputs | cotangents | tangents).items():
        print(name, "=", repr(array[config.case]))
    for name, verdict in trial.verdicts.items():
        print(name, "is wrong" if verdict.wrong[config.case] else "is right")
        print("    found   ", repr(trial.found[name][config.case]))
        print("    expected", repr(trial.expected[name].number.value[config.case].astype(float)))


def main() -> None:
    enter(Config, run, __doc__)


if __name__ == "__main__":
    main()
