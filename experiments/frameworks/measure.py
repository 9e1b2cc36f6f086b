"""Run a framework's worker on random cases, and compare its results with jaxsoft's call."""

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments._door import ScriptError
from experiments.frameworks import ours
from experiments.frameworks.cases import Case, draw
from experiments.frameworks.environments import WORKERS
from experiments.frameworks.frameworks import Framework, Variant
from jaxsoft import softmax

COLUMNS = (
    "framework", "version", "call", "cases", "value", "gradient", "precision", "equal", "failed", "differs",
)  # fmt: skip
# Relative to the larger of 1 and the compared numbers: sums of logits up to 30, in the framework's precision.
TOLERANCES = {"float64": 1e-10, "float32": 2e-5}
Progress = Callable[[str], object]  # called after each case with "run" or "compared"
STALLED = 120  # seconds allowed per case; the first one includes imports and compilation


def measure(framework: Framework, python: Path, count: int, seed: int, progress: Progress) -> list[dict[str, Any]]:
    """A row for each call of the framework: the largest differences of value and gradient from jaxsoft's."""
    rng = np.random.default_rng([seed, *framework.name.encode()])
    share = -(-count // len(framework.variants))
    with jax.enable_x64(True):
        cases = [_drawn(rng, variant, framework.dtype) for variant in framework.variants for _ in range(share)]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            version = run_worker(framework, python, folder, cases, progress)
            rows = []
            for n, variant in enumerate(framework.variants):
                numbers = range(n * share, (n + 1) * share)
                precision = variant.precision or framework.dtype
                rows.append({"framework": framework.name, "version": version, "precision": precision})
                chosen = {k: cases[k] for k in numbers}
                rows[-1] |= compared(variant, chosen, folder, TOLERANCES[precision], progress)
    return rows


def _drawn(rng: np.random.Generator, variant: Variant, dtype: str) -> Case:
    case = draw(rng, variant.name, variant.takes, dtype)
    if variant.ours is ours.nothing_left:  # the framework trains with jaxsoft's gradient
        case.arrays["gradient"] = ours.value_and_gradient(ours.weighted_sum, case)[1].astype(dtype)
        case.arrays["probabilities"] = np.asarray(softmax(case.z.astype(np.float64))).astype(dtype)
    return case


def run_worker(framework: Framework, python: Path, folder: Path, cases: list[Case], progress: Progress) -> str:
    """Let the framework compute every case, in a separate process; returns its version."""
    described = [{"variant": case.variant, "options": case.options} for case in cases]
    (folder / "cases.json").write_text(json.dumps(described))
    for n, case in enumerate(cases):
        np.savez(folder / f"{n}.npz", **case.arrays)  # pyright: ignore[reportArgumentType]
    for _ in cases:  # a case that ends the process is skipped
        status = _run_once(framework, python, folder, progress)
        waiting = (
            n for n in range(len(cases)) if not any((folder / f"{n}.out{end}").exists() for end in (".npz", ".txt"))
        )
        killer = next(waiting, None)
        if status == 0 or killer is None:
            break
        if not (folder / "version.txt").exists():
            said = (folder / "errors.txt").read_text().strip().splitlines() or [f"exit status {status}"]
            raise ScriptError(f"does not run: {said[-1][:200]}")
        (folder / f"{killer}.out.txt").write_text("the process ended")
        progress("run")
    return (folder / "version.txt").read_text()


def _run_once(framework: Framework, python: Path, folder: Path, progress: Progress) -> int:
    command = [str(python), str(WORKERS / framework.worker), str(folder)]
    environment = os.environ | dict(framework.environment)
    with (
        (folder / "errors.txt").open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        for line in watched(process):
            if line.strip().isdecimal():  # some frameworks print, too
                progress("run")
        return process.wait()


def watched(process: subprocess.Popen[str]) -> Iterator[str]:
    """The lines of a process, which is killed if it writes nothing for too long."""
    assert process.stdout is not None
    while True:
        timer = threading.Timer(STALLED, process.kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if not line:
            return
        yield line


def compared(
    variant: Variant, cases: dict[int, Case], folder: Path, tolerance: float, progress: Progress
) -> dict[str, Any]:
    """The largest differences of a call's results from jaxsoft's, and what failed."""
    far: dict[str, list[float]] = {"value": [], "gradient": []}
    failed = []
    for n, case in cases.items():
        results = folder / f"{n}.out.npz"
        if not results.exists():
            why = folder / f"{n}.out.txt"
            failed.append(why.read_text() if why.exists() else "the process ended")
            continue
        progress("compared")
        right = dict(zip(far, ours.value_and_gradient(variant.ours, case), strict=True))
        with np.load(results) as theirs:
            for name in theirs.files:
                far[name].append(difference(theirs[name], right[name]))
    largest = {name: max(numbers, default=np.nan) for name, numbers in far.items()}
    seen = [number for number in largest.values() if not np.isnan(number)]
    return {
        "call": variant.name,
        "cases": len(cases) - len(failed),
        **largest,
        "equal": bool(seen) and max(seen) <= tolerance,
        "failed": f"{len(failed)}: {failed[0]}" if failed else "",
        "differs": variant.differs,
    }


def difference(theirs: np.ndarray, right: np.ndarray) -> float:
    """The largest difference, relative to the larger of 1 and the largest number; inf where only one is finite."""
    if theirs.shape != right.shape:
        theirs = theirs.reshape(right.shape) if theirs.size == right.size else np.full(right.shape, np.inf)
    theirs = theirs.astype(np.float64)
    if (np.isfinite(theirs) != np.isfinite(right)).any():
        return np.inf
    both = np.isfinite(right)
    return float(
        np.max(np.abs(theirs - right), where=both, initial=0) / max(1, np.max(np.abs(right), where=both, initial=0))
    )
