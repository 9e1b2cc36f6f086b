"""What programs do compilers make of this library and of others for a GPU or TPU that you do not have?

python -m experiments.compile --for h100

Every implementation of a case is compiled for one device, or sharded over four, and the compiled program is
added up: kernels, passes over the logits, bytes, FLOPs, temporary memory, collectives, and the least time
for these by the device's data sheet. Nothing runs and nothing is timed. What to install, and what the
columns mean: experiments/compile/README.md.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
import tyro
from tqdm import tqdm

from experiments._door import InputError, enter, make_folder
from experiments.benchmark.peers import missing as missing_peers
from experiments.compile.cases import PEERS, SUITES
from experiments.compile.measure import COLUMNS, measure
from experiments.compile.pictures import plot_excess
from experiments.compile.report import markdown
from experiments.compile.targets import TARGETS, devices_of, with_peak


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    device: Annotated[
        Literal["h100", "a100", "b200", "tpu-v5e", "tpu-v5p", "tpu-v6e", "tpu7x"], tyro.conf.arg(name="for")
    ] = "h100"
    """The device to compile for."""
    suite: Literal["small", "full"] = "full"
    """The cases: small takes half a minute."""
    only: str = ""
    """Compile the cases whose name, shape, dtype and mesh contain this: "softmax (8192, 1000) float32"."""
    peak: float | None = None
    """TFLOP/s of matmuls in bfloat16 to assume instead of the data sheet's; matmuls in float32 change in proportion."""
    out: Path | None = None
    """Folder for results.csv, results.md and the pictures; out/compile/DEVICE by default."""


def run(config: Config) -> pd.DataFrame:
    """Compile the chosen cases and write the table and the picture."""
    if config.peak is not None and not 0 < config.peak < float("inf"):
        raise InputError(f"--peak: expected a positive number of TFLOP/s, got {config.peak}")
    chosen = [placed for placed in SUITES[config.suite] if config.only in placed.label]
    if not chosen:
        names = sorted({placed.case.name for placed in SUITES[config.suite]})
        raise InputError(f"--only: expected part of one of {names} with shape, dtype and mesh, got {config.only!r}")
    out = make_folder(config.out or Path("out/compile") / config.device)
    target = with_peak(TARGETS[config.device], config.peak) if config.peak else TARGETS[config.device]
    devices = devices_of(target)
    rows, table = [], pd.DataFrame()
    with tqdm(chosen, unit="case", bar_format="{l_bar}{bar}| {elapsed}") as bar:
        for placed in bar:
            bar.set_description(placed.label)
            rows += measure(placed, target, devices)
            table = pd.DataFrame(rows, columns=COLUMNS)
            table.to_csv(out / "results.csv", index=False)
    given = {"for": config.device, "suite": config.suite, "only": config.only, "peak": config.peak}
    command = " ".join(
        ["python -m experiments.compile", *(f"--{k} {shlex.quote(str(v))}" for k, v in given.items() if v)]
    )
    text = markdown(table, target, command, {name: why for name, why in missing_peers().items() if name in PEERS})
    (out / "results.md").write_text(text)
    plot_excess(table, target, out / "excess.png")
    print(text)
    return table


if __name__ == "__main__":
    enter(Config, run, __doc__)
