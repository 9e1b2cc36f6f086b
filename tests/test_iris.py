"""The Iris experiment."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from experiments import __main__ as listing
from experiments._door import InputError
from experiments.iris import Config, read_iris, read_split, run

pytestmark = pytest.mark.x32
ROWS = Config().data.read_text().splitlines()


def write(path, rows):
    path.write_text("\n".join(rows) + "\n")
    return path


def test_learns_iris_over_five_seeds(tmp_path):
    accuracies = []
    for seed in (0, 7, 11, 23, 42):
        out = tmp_path / str(seed)
        summary = run(Config(seed=seed, out=out))
        metrics = pd.read_csv(out / "metrics.csv")
        assert list(metrics) == ["step", "loss", "train_accuracy", "test_accuracy"]
        assert metrics["step"].tolist() == list(range(Config().steps + 1))
        assert metrics["loss"].iloc[-1] < 0.3 * metrics["loss"].iloc[0]
        assert json.loads((out / "summary.json").read_text()) == summary
        assert set(summary) == {"train_loss", "train_accuracy", "test_accuracy", "steps", "seconds", "seed"}
        assert summary["train_loss"] == pytest.approx(metrics["loss"].iloc[-1])
        accuracies.append(summary["test_accuracy"])
    assert {path.suffix for path in out.iterdir()} == {".csv", ".json", ".png"}
    assert np.mean(accuracies) >= 0.95


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
def test_other_optimizers_learn(tmp_path, optimizer):
    summary = run(Config(optimizer=optimizer, learning_rate=0.1, steps=103, out=tmp_path))
    assert summary["train_loss"] < 0.5
    assert len(pd.read_csv(tmp_path / "metrics.csv")) == 104


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS[:70], ROWS[70].replace("versicolor", "veriscolor"), *ROWS[71:]],
         "line 71: Species is 'veriscolor', expected one of setosa, versicolor, virginica"),
        ([*ROWS[:5], ROWS[5].replace("3.6", "wide"), *ROWS[6:]], "line 6: SepalWidth is 'wide', expected a number"),
        ([*ROWS[:5], ROWS[5].replace("3.6", ""), *ROWS[6:]], "line 6: SepalWidth is '', expected a number"),
        ([*ROWS[:5], ROWS[5].replace("3.6", "inf"), *ROWS[6:]], "line 6: SepalWidth is 'inf', expected a number"),
        ([row.rsplit(",", 2)[0] + "," + row.rsplit(",", 1)[1] for row in ROWS], "expected column 'PetalWidth', got columns"),
        ([ROWS[0], *[",".join([r.split(",")[0], "5", *r.split(",")[2:]]) for r in ROWS[1:]]],
         "expected SepalLength to vary, got one value for all training flowers"),
        (ROWS[:1], "expected at least one flower, got a header alone"),
        (ROWS[:101], "expected at least 4 flowers of each species, got 50 setosa, 50 versicolor, 0 virginica"),
        ([*ROWS[:5], ROWS[5] + ",1,2", *ROWS[6:]], "expected comma-separated text: Error tokenizing data"),
        ([ROWS[0], *[row + "," for row in ROWS[1:]]], "expected rows of 6 values, as the header has, got more in some"),
        ([*ROWS[:2], "", *ROWS[2:]], "line 3: SepalLength is '', expected a number"),
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
        ({"learning_rate": -1.0}, "--learning-rate: expected a positive number, got -1.0"),
        ({"seed": -1}, "--seed: expected an integer in [0, 2**32), got -1"),
        ({"optimizer": "sgd", "learning_rate": 1e38, "steps": 20}, "--learning-rate 1e+38: expected a finite loss"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(InputError) as caught:
        run(Config(out=tmp_path, **options))
    assert message in str(caught.value)


def start(*arguments):
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("content", [None, ""])
def test_the_command_ends_with_one_line_and_no_traceback(tmp_path, content):
    path = tmp_path / "flowers.csv"
    if content is not None:
        path.write_text(content)
    done = start("experiments.iris", "--data", str(path), "--out", str(tmp_path / "out"))
    assert done.returncode != 0
    expected = "No such file or directory" if content is None else "expected a table with a header, got an empty file"
    assert done.stderr == f"error: {path}: {expected}\n"


def test_the_listing_names_every_script_with_its_question_and_command():
    for name, question, command in listing.scripts():
        assert question.endswith("?"), name
        assert command.startswith(f"python -m experiments.{name}"), name
    assert "iris" in {name for name, *_ in listing.scripts()}
