"""Does the cross-entropy of every framework equal a call of ours, in value and gradient, and where not, why?

python -m experiments.frameworks

Every installed framework computes random cases of each call's options in a separate process; jaxsoft's call
computes them in float64. --install NAME first installs a framework into a separate environment in the cache
folder. What the columns mean, and the results: experiments/frameworks/README.md.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from experiments._door import InputError, ScriptError, check_counts, check_seed, enter, make_folder
from experiments.frameworks.environments import CACHE, NotInstalled, install, python_of
from experiments.frameworks.frameworks import FRAMEWORKS, Framework
from experiments.frameworks.measure import measure
from experiments.frameworks.pictures import plot_differences
from experiments.frameworks.report import markdown, merged


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    only: tuple[str, ...] = ()
    """Names of the frameworks to run; all by default."""
    install: tuple[str, ...] = ()
    """Names of the frameworks to install first, each in a separate environment: "all" for every one."""
    cases: int = 200
    """Cases per framework, shared by its calls."""
    seed: int = 0
    """Seed of the cases."""
    cache: Path = CACHE
    """Folder of the environments."""
    out: Path = Path("out/frameworks")
    """Folder for results.csv, results.md and the picture; the rows of other frameworks in it are kept."""


def run(config: Config) -> pd.DataFrame:
    """Install the requested frameworks, run the installed ones, and write the table and the picture."""
    check_counts(config, "cases")
    check_seed(config.seed)
    chosen = [FRAMEWORKS[name] for name in check_names("only", config.only) or FRAMEWORKS]
    wanted = FRAMEWORKS if "all" in config.install else check_names("install", config.install)
    out = make_folder(config.out)
    install_all([FRAMEWORKS[name] for name in wanted], config.cache)
    rows, missing, table = [], {}, merged(out / "results.csv", [])
    with tqdm(chosen, unit="framework", bar_format="{l_bar}{bar}| {elapsed}{postfix}") as bar:
        for framework in bar:
            bar.set_description(framework.name)
            try:
                rows += run_one(framework, config, bar)
            except ScriptError as error:
                missing[framework.name] = str(error)
                tqdm.write(f"{framework.name}: {error}", file=sys.stderr)
            table = merged(out / "results.csv", rows)
            table.to_csv(out / "results.csv", index=False)
    command = f"python -m experiments.frameworks --cases {config.cases} --seed {config.seed}"
    there = {name: why for name, why in missing.items() if name not in set(table["framework"])}
    text = markdown(table, command, there)
    (out / "results.md").write_text(text)
    if len(table):
        plot_differences(table, out / "differences.png")
    print(text)
    return table


def install_all(frameworks: list[Framework], cache: Path) -> None:
    """Install one after another; what cannot be installed is one line."""
    homes = {framework.home: FRAMEWORKS[framework.home] for framework in frameworks}
    for framework in tqdm(homes.values(), desc="installing", disable=not homes):
        try:
            install(framework, cache)
        except NotInstalled as error:
            tqdm.write(f"{framework.name}: {error}", file=sys.stderr)


def check_names(option: str, names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in (*FRAMEWORKS, "all"):
            raise InputError(f"--{option}: expected some of {', '.join(FRAMEWORKS)}, got {name!r}")
    return tuple(name for name in names if name != "all")


def run_one(framework: Framework, config: Config, bar: tqdm) -> list[dict[str, object]]:
    """The rows of one framework; the progress bar counts its cases."""
    python, done = python_of(framework, config.cache), [0]

    def progress() -> None:
        done[0] += 1
        bar.set_postfix_str(f"case {done[0]}")

    return measure(framework, python, config.cases, config.seed, progress)


if __name__ == "__main__":
    enter(Config, run, __doc__)
