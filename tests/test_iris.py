"""The Iris experiment."""

import json
import runpy
import subprocess
import sys

import jax
import numpy as np
import pandas as pd
import pytest
from tqdm import tqdm

from experiments import __main__ as listing
from experiments import iris
from experiments._door import InputError
from experiments.iris import FOLDS, Config, read_folds, read_iris, read_split, run

pytestmark = pytest.mark.x32
ROWS = Config().data.read_text().splitlines()


def write(path, rows):
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Outside its loop the script compiles one program per function."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("measure", "logits_of"):
            patch.setattr(iris, name, jax.jit(getattr(iris, name)))
        yield


@pytest.fixture
def without_pictures(monkeypatch):
    for name in ("plot_loss", "plot_confusion", "plot_regions"):
        monkeypatch.setattr(iris, name, lambda *_: None)


def test_learns_iris_over_five_seeds(tmp_path, without_pictures):
    accuracies = []
    for seed in (42, 0, 7, 11, 23):
        out = tmp_path / str(seed)
        summary = run(Config(seed=seed, out=out))
        metrics = pd.read_csv(out / "metrics.csv")
        assert list(metrics) == ["step", "loss", "test_loss", "train_accuracy", "test_accuracy"]
        assert metrics["step"].tolist() == list(range(Config().steps + 1))
        assert metrics["loss"].iloc[-1] < 0.3 * metrics["loss"].iloc[0]
        assert json.loads((out / "summary.json").read_text()) == summary
        assert set(summary) == {
            "train_loss", "test_loss", "train_accuracy", "test_accuracy", "steps", "seconds", "seed"
        }  # fmt: skip
        assert summary["train_loss"] == pytest.approx(metrics["loss"].iloc[-1])
        assert metrics["test_loss"].iloc[-1] < 1.05 * metrics["test_loss"].min()  # no overfitting
        accuracies.append(summary["test_accuracy"])
    assert np.mean(accuracies) >= 0.96
    assert accuracies[0] >= 0.97  # the default seed, as the documentation says


def test_every_flower_is_held_out_once():
    folds = read_folds(Config().data, 3)
    assert [np.bincount(split.test_y).tolist() for split in folds] == [[10, 10, 10]] * FOLDS
    assert [np.bincount(split.train_y).tolist() for split in folds] == [[40, 40, 40]] * FOLDS
    rows = np.concatenate([np.asarray(split.test_x) * split.scale + split.mean for split in folds])
    everything, _ = read_iris(Config().data)
    np.testing.assert_allclose(np.sort(rows, axis=0), np.sort(everything, axis=0), atol=1e-5)


def test_the_split_is_stratified_standardised_and_complete():
    split = read_split(Config().data, 3)
    assert np.bincount(split.train_y).tolist() == [35, 35, 35]
    assert np.bincount(split.test_y).tolist() == [15, 15, 15]
    np.testing.assert_allclose(np.mean(split.train_x, axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(np.std(split.train_x, axis=0), 1, atol=1e-6)
    rows = np.concatenate([split.train_x, split.test_x]) * split.scale + split.mean
    everything, _ = read_iris(Config().data)
    np.testing.assert_allclose(np.sort(rows, axis=0), np.sort(everything, axis=0), atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_other_optimizers_learn(tmp_path, request, optimizer):
    if optimizer == "momentum":  # one set of pictures will do
        request.getfixturevalue("without_pictures")
    summary = run(Config(optimizer=optimizer, learning_rate=0.1, steps=100, out=tmp_path))
    assert summary["train_loss"] < 0.5
    assert len(pd.read_csv(tmp_path / "metrics.csv")) == 101
    pictures = {"loss.png", "confusion.png", "regions.png"} if optimizer == "sgd" else set()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv", "summary.json"} | pictures


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS[:70], ROWS[70].replace("versicolor", "veriscolor"), *ROWS[71:]],
         "line 71: Species is 'veriscolor', expected one of setosa, versicolor, virginica"),
        ([*ROWS[:5], ROWS[5].replace("3.6", "wide"), *ROWS[6:]], "line 6: SepalWidth is 'wide', expected a positive number"),
        ([*ROWS[:5], ROWS[5].replace("3.6", ""), *ROWS[6:]], "line 6: SepalWidth is '', expected a positive number"),
        ([*ROWS[:5], ROWS[5].replace("3.6", "inf"), *ROWS[6:]], "line 6: SepalWidth is 'inf', expected a positive number"),
        ([*ROWS[:5], ROWS[5].replace("3.6", "-3.6"), *ROWS[6:]], "line 6: SepalWidth is '-3.6', expected a positive number"),
        ([*ROWS[:5], ROWS[5].replace("3.6", "0"), *ROWS[6:]], "line 6: SepalWidth is '0', expected a positive number"),
        ([row.rsplit(",", 2)[0] + "," + row.rsplit(",", 1)[1] for row in ROWS], "expected column 'PetalWidth', got columns"),
        ([ROWS[0], *[",".join([r.split(",")[0], "5", *r.split(",")[2:]]) for r in ROWS[1:]]],
         "expected SepalLength to vary, got one value for all training flowers"),
        (ROWS[:1], "expected at least one flower, got only a header"),
        (ROWS[:101], "expected at least 5 flowers of each species, got 50 setosa, 50 versicolor, 0 virginica"),
        ([*ROWS[:5], ROWS[5] + ",1,2", *ROWS[6:]], "expected comma-separated text: Error tokenizing data"),
        ([ROWS[0], *[row + "," for row in ROWS[1:]]], "expected rows of 6 values, as in the header, got more in some"),
        ([*ROWS[:2], "", *ROWS[2:]], "line 3: SepalLength is '', expected a positive number"),
        ([], "expected a table with a header, got an empty file"),
    ],
)  # fmt: skip
def test_bad_data_is_one_line_naming_file_row_and_value(tmp_path, rows, message):
    path = write(tmp_path / "flowers.csv", rows)
    with pytest.raises(InputError) as caught:
        run(Config(data=path, out=tmp_path / "out"))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps: expected at least 1, got 0"),
        ({"steps": -3}, "--steps: expected at least 1, got -3"),
        ({"learning_rate": -1.0}, "--learning-rate: expected a positive number, got -1.0"),
        ({"seed": -1}, "--seed: expected an integer in [0, 2**32), got -1"),
        (
            {"optimizer": "sgd", "learning_rate": 1e38, "steps": 20},
            "--learning-rate 1e+38: expected a finite loss, got none from step 1 on",
        ),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(InputError) as caught:
        run(Config(out=tmp_path, **options))
    assert message in str(caught.value)


def test_a_loss_that_has_grown_gives_a_warning(tmp_path, capsys, without_pictures):
    # So large that every step overshoots, and far too small for a product of two layers' weights to overflow.
    summary = run(Config(learning_rate=1e6, out=tmp_path))
    assert 10 < summary["train_loss"] < float("inf")
    assert ("warning: --learning-rate 1e+06: expected the loss to fall, got 1.1") in capsys.readouterr().err


def test_the_bar_counts_the_steps_and_not_the_compilation(tmp_path, monkeypatch, without_pictures):
    """Its steps per second exclude compilation and average over all steps."""
    bars, compiled = [], []

    class Bar(tqdm):
        def __init__(self, **options):
            super().__init__(**options)
            bars.append(self)

    def listen(event, *_, **__):
        if bars and not bars[-1].disable and event.startswith("/jax/core/compile/"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    monkeypatch.setattr(iris, "tqdm", Bar)
    run(Config(steps=103, optimizer="momentum", learning_rate=0.03, out=tmp_path))  # which no other test has compiled
    assert bars[0].n == FOLDS * 103
    assert bars[0].smoothing == 0
    assert compiled == []


def test_the_command_ends_with_one_line_and_no_traceback(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["iris", f"--data={tmp_path}/flowers.csv", f"--out={tmp_path}/out"])
    monkeypatch.delitem(sys.modules, "experiments.iris")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("experiments.iris", run_name="__main__", alter_sys=True)
    assert ended.value.code == 1
    assert capfd.readouterr() == ("", f"error: {tmp_path}/flowers.csv: No such file or directory\n")


@pytest.mark.exhaustive
def test_the_command_does_so_in_a_separate_process(tmp_path):
    command = [sys.executable, "-m", "experiments.iris", f"--data={tmp_path}/flowers.csv", f"--out={tmp_path}/out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1
    assert (done.stdout, done.stderr) == ("", f"error: {tmp_path}/flowers.csv: No such file or directory\n")


def test_the_listing_names_every_script_with_its_question_and_command():
    for name, question, command in listing.scripts():
        assert question.endswith("?"), name
        assert command.startswith(f"python -m experiments.{name}"), name
    assert "iris" in {name for name, *_ in listing.scripts()}
