"""Does the cross-entropy of every framework equal a call of jaxsoft, in value and gradient, and where not, why?

python -m experiments.frameworks

Every installed framework computes random cases of each call's options in a separate process; jaxsoft's call
computes them in float64. --install NAME first installs a framework into a separate environment in the cache
folder. What the columns mean, and the results: experiments/frameworks/README.md.
"""

import sys
from collections import Counter
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
    refused = install_all([FRAMEWORKS[name] for name in wanted], config.cache)
    rows, missing, table = [], {}, merged(out / "results.csv", [])
    with tqdm(chosen, bar_format="{l_bar}{bar}| {elapsed}{postfix}", mininterval=1, miniters=0) as bar:
        for framework in bar:
            bar.set_description(framework.name)
            try:
                rows += run_one(framework, config, bar)
            except ScriptError as error:
                missing[framework.name] = refused.get(framework.home, str(error))
                if framework.home not in refused:
                    tqdm.write(f"{framework.name}: {error}", file=sys.stderr)
            table = merged(out / "results.csv", rows)
            table.to_csv(out / "results.part", index=False)
            (out / "results.part").replace(out / "results.csv")  # an interrupted run leaves a complete table
    command = f"python -m experiments.frameworks --cases {config.cases} --seed {config.seed}"
    there = {name: why for name, why in missing.items() if name not in set(table["framework"])}
    text = markdown(table, command, there)
    (out / "results.md").write_text(text)
    if len(table):
        plot_differences(table, out / "differences.png")
    print(text)
    return table


def install_all(frameworks: list[Framework], cache: Path) -> dict[str, str]:
    """Install one after another; returns one line for each that could not be installed."""
    refused: dict[str, str] = {}
    homes = {framework.home: FRAMEWORKS[framework.home] for framework in frameworks}
    with tqdm(homes.values(), disable=not homes) as bar:
        for framework in bar:
            bar.set_description(f"installing {framework.name}")
            try:
                install(framework, cache)
            except NotInstalled as error:
                refused[framework.name] = str(error)
                tqdm.write(f"{framework.name}: {error}", file=sys.stderr)
    return refused


def check_names(option: str, names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in (*FRAMEWORKS, "all"):
            raise InputError(f"--{option}: expected some of {', '.join(FRAMEWORKS)}, got {name!r}")
    return tuple(name for name in names if name != "all")


def run_one(framework: Framework, config: Config, bar: tqdm) -> list[dict[str, object]]:
    """The rows of one framework; the progress bar counts its cases, and then jaxsoft's."""
    python, done = python_of(framework, config.cache), Counter[str]()

    def progress(what: str) -> None:
        done[what] += 1
        bar.set_postfix_str(f"{done[what]} cases {what}", refresh=False)
        bar.update(0)  # the bar writes once a second

    return measure(framework, python, config.cases, config.seed, progress)


if __name__ == "__main__":
    enter(Config, run, __doc__)
