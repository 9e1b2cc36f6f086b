"""experiments.frameworks: installed frameworks equal jaxsoft's calls, and missing or failing ones give one line."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from experiments._door import InputError
from experiments.frameworks import __main__ as script
from experiments.frameworks import environments, measure, ours
from experiments.frameworks.__main__ import Config, run
from experiments.frameworks.cases import Case, draw
from experiments.frameworks.frameworks import FRAMEWORKS, NOT_RUN, Framework, Variant
from experiments.frameworks.measure import WORKERS, difference
from experiments.frameworks.report import markdown, merged

RESULTS = WORKERS.parent / "results" / "results.csv"
BY_DEFAULT = [name for name in ("optax", "pytorch") if importlib.util.find_spec(FRAMEWORKS[name].module)]


def missing(name):
    try:
        environments.python_of(FRAMEWORKS[name], environments.CACHE)
    except environments.NotInstalled:
        return True
    return False


@pytest.mark.scripts
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in BY_DEFAULT else pytest.mark.exhaustive) for n in FRAMEWORKS]
)
def test_installed_frameworks_equal_jaxsoft_s_calls(name, tmp_path, monkeypatch, capsys):
    if missing(name):
        pytest.skip(f"{name} is not installed")
    framework, cases = FRAMEWORKS[name], 5
    if name in BY_DEFAULT:  # two calls, one case each
        framework, cases = framework._replace(variants=framework.variants[:2]), 1
    monkeypatch.setitem(FRAMEWORKS, name, framework)
    count = len(framework.variants)
    table = run(Config(only=(name,), cases=cases * count, out=tmp_path))
    assert list(table["failed"]) == [""] * count
    assert (table["equal"] | (table["differs"] != "")).all(), table.to_string()
    assert (tmp_path / "differences.png").exists()
    assert (tmp_path / "results.md").read_text() in capsys.readouterr().out


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_every_worker_exists_and_has_every_call(name):
    framework = FRAMEWORKS[name]
    text = (WORKERS / framework.worker).read_text()
    compile(text, framework.worker, "exec")
    for variant in framework.variants:
        assert variant.name in text or f'"{variant.name.split(", ")[0]}' in text or "get_grad" in variant.name
    assert framework.home in FRAMEWORKS


WORKER = """
from exchange import work

def right(case):
    return case.logits.sum(-1), None

def fails(case):
    raise ValueError("no such option\\nand more")

def dies(case):
    import os
    os._exit(3)

work({"right": right, "wrong": right, "fails": fails, "dies": dies}, "fake 1.0")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A framework whose calls are right, wrong, fail, and end the process."""
    (tmp_path / "exchange.py").write_text((WORKERS / "exchange.py").read_text())
    (tmp_path / "of_fake.py").write_text(WORKER)
    monkeypatch.setattr(measure, "WORKERS", tmp_path)
    total, twice = (lambda case, z: z.sum(-1)), (lambda case, z: 2 * z.sum(-1))
    variants = [Variant(name, (), twice if name == "wrong" else total) for name in ("dies", "right", "wrong", "fails")]
    return Framework("fake", "numpy", ("numpy",), "of_fake.py", "float64", tuple(variants))


def test_a_case_that_fails_does_not_stop_the_others(fake):
    told = []
    rows = measure.measure(fake, sys.executable, 8, 0, told.append)
    assert [row["call"] for row in rows] == ["dies", "right", "wrong", "fails"]
    assert [row["equal"] for row in rows] == [False, True, False, False]
    assert [row["cases"] for row in rows] == [0, 2, 2, 0]
    assert [row["failed"] for row in rows] == ["2: the process ended", "", "", "2: ValueError: no such option"]
    assert rows[0]["version"] == "fake 1.0"
    assert (told.count("run"), told.count("compared")) == (8, 4)
    assert np.isnan(rows[1]["gradient"])


def test_a_framework_that_cannot_be_imported_or_is_missing_is_one_line(fake, tmp_path, monkeypatch, capsys):
    (tmp_path / "of_fake.py").write_text("import no_such_framework")
    gone = fake._replace(name="gone", module="no_such_framework", worker="of_gone.py")
    monkeypatch.setattr(script, "FRAMEWORKS", {"fake": fake, "gone": gone})
    out = tmp_path / "out"
    table = run(Config(out=out, cache=tmp_path / "cache"))
    assert table.empty
    said = capsys.readouterr().err
    assert "fake: does not run: ModuleNotFoundError: No module named 'no_such_framework'" in said
    assert "gone: not installed: --install gone" in said
    assert "- gone: not installed" in (out / "results.md").read_text()
    cannot = fake._replace(name="cannot", module="no_such_framework", python="2.0")
    monkeypatch.setattr(script, "FRAMEWORKS", {"cannot": cannot})
    run(Config(out=tmp_path / "again", cache=tmp_path / "cache", install=("cannot",)))
    reason = "cannot: needs Python 2.0, which was not found\n"
    assert capsys.readouterr().err.count(reason) == 1
    assert f"- {reason}" in (tmp_path / "again" / "results.md").read_text()


def test_a_later_run_keeps_the_rows_of_other_frameworks(tmp_path):
    row = dict.fromkeys(measure.COLUMNS, "") | {"cases": 1, "value": 0.5, "gradient": np.nan, "equal": True}
    older = [row | {"framework": name, "version": "1"} for name in ("pytorch", "optax")]
    pd.DataFrame(older).to_csv(tmp_path / "results.csv", index=False)
    table = merged(tmp_path / "results.csv", [row | {"framework": "optax", "version": "2"}])
    assert list(zip(table["framework"], table["version"], strict=True)) == [("pytorch", "1"), ("optax", "2")]
    assert "| 5.0e-01 | – |" in markdown(table, "command", {})


def test_an_installation_that_fails_says_why(tmp_path, monkeypatch):
    bad = FRAMEWORKS["mxnet"]._replace(python="2.0")
    with pytest.raises(environments.NotInstalled, match=r"needs Python 2\.0, which was not found"):
        environments.install(bad, tmp_path)


def test_a_complete_environment_is_kept_and_an_unfinished_one_is_made_again(tmp_path, monkeypatch):
    commands, answers = [], [""]

    def made(command, **_):
        commands.append(command[1:3])
        if "venv" in command:
            (tmp_path / "caffe" / "bin").mkdir(parents=True)
            (tmp_path / "caffe" / "bin" / "python").touch()
        said = "" if "venv" in command else answers[0]
        return subprocess.CompletedProcess(command, bool(said), "", said)

    monkeypatch.setattr(environments.subprocess, "run", made)
    caffe = FRAMEWORKS["caffe"]
    answers[0] = "ERROR: no space\na hint\n"
    with pytest.raises(environments.NotInstalled, match=r"^cannot be installed: ERROR: no space$"):
        environments.install(caffe, tmp_path)
    with pytest.raises(environments.NotInstalled, match=r"^not installed: --install caffe$"):
        environments.python_of(caffe, tmp_path)
    answers[0] = ""
    for _ in range(2):
        environments.install(caffe, tmp_path)
    build = [str(WORKERS / "build_caffe.py")]
    assert commands == [["-m", "venv"], ["-m", "pip"], ["-m", "venv"], ["-m", "pip"], build]
    assert environments.python_of(caffe, tmp_path) == tmp_path / "caffe" / "bin" / "python"
    environments.install(caffe._replace(packages=("numpy<2",)), tmp_path)
    assert len(commands) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ("torch",)}, "--only: expected some of pytorch, .*, got 'torch'"),
        ({"install": ("theano",)}, "--install: expected some of"),
        ({"cases": 0}, "--cases: expected at least 1, got 0"),
        ({"seed": -1}, "--seed: expected an integer"),
    ],
)
def test_options_out_of_range_are_refused(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run(Config(out=tmp_path, **options))


def test_cases_have_the_requested_options_and_can_be_stored():
    rng = np.random.default_rng(0)
    case = draw(rng, "call", ("images!", "mark!", "weights!", "smoothing!", "sum"), "float32")
    assert case.z.shape == (3, 2, 3, 5)
    assert case.options["ignore_index"] == 255
    assert (case.y == 255).any()
    assert case.options["reduction"] == "sum"
    assert case.arrays["weights"].dtype == np.float32
    json.dumps(case.options)


def test_differences_are_relative_to_the_larger_number_and_detect_nan():
    assert difference(np.array([100.0]), np.array([101.0])) == pytest.approx(1 / 101)
    assert difference(np.array([np.nan]), np.array([1.0])) == np.inf
    assert difference(np.array([np.nan, 1.0]), np.array([np.nan, 1.5])) == pytest.approx(0.5 / 1.5)
    assert difference(np.zeros((3, 1)), np.zeros(3)) == 0


def test_jaxsoft_s_calls_equal_the_table_of_conventions():
    """The page's example: the divisor of a mean over [2, −100, 1], and smoothing over the other classes."""
    z = np.array([[1.0, 2, 3], [0, 0, 0], [3, 1, 2]])
    case = Case("", {"logits": z, "labels": np.array([2, -100, 1])}, {"ignore_index": -100, "reduction": "mean"})
    assert ours.negative_ignored(case, z) == pytest.approx(0.9384, abs=5e-5)
    assert ours.as_pytorch(case, z) == pytest.approx(1.4076, abs=5e-5)


def test_the_committed_results_cover_every_framework_that_runs():
    table = pd.read_csv(RESULTS, keep_default_na=False)
    assert set(table["framework"]) <= set(FRAMEWORKS)
    assert table["framework"].nunique() >= 15
    assert (table.groupby("framework")["cases"].sum() >= 200).all()
    assert set(table["failed"]) == {""}
    assert (table["equal"].astype(str).eq("True") | table["differs"].ne("")).all()
    assert not set(NOT_RUN) & set(FRAMEWORKS)
