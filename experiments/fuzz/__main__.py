"""Is any result wrong, without a word, in some corner of functions, options, dtypes, transformations and meshes?

python -m experiments.fuzz --minutes 60

Draws programs from a seed, compiles each, calls it on many sets of values, and compares values and derivatives with
float64 formulas written from the docstrings, whose tolerance is a running analysis of their own rounding. A configuration
is one program with one set of values. Each failure is printed with the line that repeats it.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from experiments._door import InputError, ScriptError, enter, make_folder, write_json
from experiments.fuzz.execution import execute
from experiments.fuzz.expectations import expect
from experiments.fuzz.judge import judge
from experiments.fuzz.programs import Program, draw_program
from experiments.fuzz.values import draw_values


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    seed: int = 0
    """Draws the programs and their values."""
    configurations: int = 200_000
    """How many to try."""
    minutes: float = 60.0
    """When to stop at the latest."""
    sets: int = 512
    """Sets of values a program, fewer where they are large or the transformation is slow."""
    program: int | None = None
    """Repeat this program alone."""
    case: int | None = None
    """Repeat this set of values of the program, and print what differs."""
    only: str = ""
    """A function; empty for all."""
    first: int = 0
    """The number of the first program."""
    failures: int = 40
    """Print no more than so many failed programs."""
    out: Path = Path("out/fuzz")
    """Folder for coverage.csv, failures.txt and summary.json."""


@dataclass
class Failure:
    """One program that was wrong or was refused."""

    program: Program
    line: str
    reason: str


@dataclass
class Report:
    """What was tried and found."""

    configurations: int = 0
    programs: int = 0
    numbers: int = 0
    wrong: int = 0
    seconds: float = 0.0
    coverage: Counter = field(default_factory=Counter)
    worst: dict = field(default_factory=lambda: defaultdict(float))
    failures: list[Failure] = field(default_factory=list)


def attempt(program: Program, report: Report) -> None:
    """Run one program and enter what came of it."""
    again = f"python -m experiments.fuzz --seed {program.seed} --program {program.index}"
    values = draw_values(program)
    expected = expect(program, values)
    report.programs += 1
    report.configurations += program.sets
    for trait in program.traits():
        report.coverage[trait] += program.sets
    for temper, count in Counter(values.tempers.tolist()).items():
        report.coverage["values", temper] += count
    try:
        found = execute(program, values)
    except Exception as error:
        first = str(error).strip().splitlines() or [""]
        report.failures.append(Failure(program, again, f"{type(error).__name__}: {first[0][:200]}"))
        report.wrong += program.sets
        return
    bad = np.zeros(program.sets, bool)
    reasons = []
    for name, dtype in result_dtypes(program, expected).items():
        verdict = judge(found[name], expected[name], dtype)
        key = program.function, program.dtypes[program.variables[0]]
        report.worst[key] = max(report.worst[key], verdict.worst)
        report.numbers += verdict.compared
        bad |= verdict.wrong
        if verdict.wrong.any():
            case = int(verdict.wrong.argmax())
            reasons.append(
                f"{name}: {int(verdict.wrong.sum())} sets, first {case}: {describe(found[name], expected[name], verdict, case)}"
            )
    report.wrong += int(bad.sum())
    if reasons:
        report.failures.append(Failure(program, f"{again} --case {int(bad.argmax())}", "; ".join(reasons)))


def result_dtypes(program: Program, expected: dict) -> dict[str, str]:
    """The dtype that each result has to have."""
    found = {}
    for name in expected:
        kind, _, variable = name.partition(" to ")
        if variable:
            found[name] = program.dtypes[variable]
        else:
            _, _, n = kind.partition(" ")
            found[name] = program.outputs[int(n or 0)][1]
    return found


def describe(found, expected, verdict, case: int) -> str:
    if found.shape != expected.number.value.shape:
        return f"shape {found.shape}, expected {expected.number.value.shape}"
    if not verdict.compared:
        return f"dtype {found.dtype}"
    index = tuple(np.argwhere(verdict.detail[case])[0]) if found.ndim > 1 else ()
    at = (case, *index)
    error = np.broadcast_to(expected.number.error, expected.number.value.shape)[at]
    place = "[" + ", ".join(map(str, index)) + "]"
    return (
        f"{place} is {float(found[at]):.9g}, expected {float(expected.number.value[at]):.9g} within {float(error):.2g}"
    )


def draw(config: Config) -> Iterator[Program]:
    index = config.first
    while True:
        program = draw_program(config.seed, index, config.sets)
        if config.only in ("", program.function):
            yield program
        index += 1


def run(config: Config) -> Report:
    if config.configurations < 1 or config.sets < 1:
        raise InputError("--configurations, --sets: expected positive numbers")
    jax.config.update("jax_num_cpu_devices", 8)
    report, began = Report(), time.monotonic()
    if config.program is not None:
        repeat(config, report)
        return report
    out = make_folder(config.out)
    programs = draw(config)
    with tqdm(total=config.configurations, unit=" configurations", unit_scale=True) as bar:
        while report.configurations < config.configurations and time.monotonic() - began < 60 * config.minutes:
            program = next(programs)
            failed = len(report.failures)
            attempt(program, report)
            bar.update(min(program.sets, bar.total - bar.n))
            bar.set_postfix(programs=report.programs, failed=len(report.failures))
            for failure in report.failures[failed:]:
                if len(report.failures) <= config.failures:
                    bar.write(
                        f"{failure.line}\n    {failure.program.function} {failure.program.wrap}, {failure.program.derivative}: {failure.reason}"
                    )
            if report.programs % 20 == 0:
                jax.clear_caches()
    report.seconds = time.monotonic() - began
    write(report, out)
    if report.failures:
        raise ScriptError(
            f"{len(report.failures)} of {report.programs} programs were wrong or refused, see {out / 'failures.txt'}"
        )
    return report


def write(report: Report, out: Path) -> None:
    """Print the table and keep it."""
    lines = ["kind,what,configurations"]
    kind = ""
    for (family, what), count in sorted(report.coverage.items()):
        if family != kind:
            print(f"\n{family}")
        kind = family
        print(f"    {what:32} {count:>9,}")
        lines.append(f"{family},{what},{count}")
    print("\nlargest error, as a share of the tolerance")
    for (function, dtype), worst in sorted(report.worst.items()):
        print(f"    {function:32} {dtype:10} {worst:.2f}")
    print(
        f"\n{report.configurations:,} configurations of {report.programs} programs, {report.numbers:,} numbers compared"
    )
    print(f"in {report.seconds / 60:.1f} minutes: {report.wrong:,} wrong")
    (out / "coverage.csv").write_text("\n".join(lines) + "\n")
    (out / "failures.txt").write_text("".join(f"{f.line}\n    {f.program}\n    {f.reason}\n" for f in report.failures))
    summary = {name: getattr(report, name) for name in ("configurations", "programs", "numbers", "wrong", "seconds")}
    write_json(out / "summary.json", summary)


def repeat(config: Config, report: Report) -> None:
    """One program again, and of one set of values everything that goes in and comes out."""
    assert config.program is not None
    program = draw_program(config.seed, config.program, config.sets)
    print(program)
    attempt(program, report)
    for failure in report.failures:
        print(failure.reason)
    if config.case is None:
        return
    values = draw_values(program)
    expected, found = expect(program, values), execute(program, values)
    np.set_printoptions(linewidth=150, threshold=200)
    for name, array in values.inputs.items():
        print(f"{name} =", repr(array[config.case]))
    for n, g in enumerate(values.cotangents):
        print(f"cotangent {n} =", repr(g[config.case]))
    for name, v in values.tangents.items():
        print(f"tangent {name} =", repr(v[config.case]))
    for name, dtype in result_dtypes(program, expected).items():
        verdict = judge(found[name], expected[name], dtype)
        print(f"{name}: {'WRONG' if verdict.wrong[config.case] else 'right'}")
        print("    found   ", repr(found[name][config.case]))
        print("    expected", repr(expected[name].number.value[config.case].astype(float)))


def main() -> None:
    enter(Config, run, __doc__)


if __name__ == "__main__":
    main()
