"""The command line that all scripts share: its usage, and the one line in which each ends."""

import dataclasses
import errno
import os
import re
import runpy
import signal
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import __main__ as listing
from experiments import _door
from experiments._door import InputError, end_of, say_growth, write_json
from experiments.iris import Config as Iris

pytestmark = pytest.mark.x32

SCRIPTS = [name for name, *_ in listing.scripts()]
TRAININGS = ["iris", "segmentation", "vocabulary", "distributed", "distillation"]
RESUMED = [*TRAININGS[1:], "benchmark"]
# The options that a script needs before it looks at its folder of results.
NEEDED = {
    "vocabulary": ["--corpus={corpus}", "--vocabulary=3", "--compare-sizes"],
    "distributed": ["--corpus={corpus}", "--vocabulary=3", "--processes=1"],
    "distillation": ["--corpus={corpus}", "--vocabulary=3", "--k=1"],
}


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The options of a script without any."""


@pytest.fixture
def ended(tmp_path, monkeypatch, capsys):
    """Run a script as `python -m` does; returns its exit status and what it wrote to stdout and stderr."""
    for name in "abc":
        (tmp_path / "corpus").mkdir(exist_ok=True)
        (tmp_path / "corpus" / name).write_text("one two three")

    def run(script, *arguments):
        needed = [argument.format(corpus=tmp_path / "corpus") for argument in NEEDED.get(script, ())]
        monkeypatch.setattr(sys, "argv", [script, *needed, *map(str, arguments)])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'experiments.*' found in sys.modules", RuntimeWarning)
            with pytest.raises(SystemExit) as end:
                runpy.run_module(f"experiments.{script}", run_name="__main__", alter_sys=True)
        return end.value.code, *capsys.readouterr()

    return run


def test_a_reader_that_has_seen_enough_ends_the_script_quietly(monkeypatch, capsys):
    """As in `python -m experiments.delta | head -2`; another broken pipe is an error."""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "argv", ["script"])
    with open(write, "w") as unread, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", unread)
        with pytest.raises(SystemExit) as end:
            _door.enter(NoOptions, lambda _: print("a table"), "A question.")
    assert (end.value.code, capsys.readouterr().err) == (128 + signal.SIGPIPE, "")

    def lose(_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(SystemExit) as end:
        _door.enter(NoOptions, lose, "A question.")
    assert (end.value.code, capsys.readouterr().err) == (1, "error: system: Broken pipe\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_usage_is_the_command(ended, script):
    status, usage, _ = ended(script, "--help")
    assert status == 0
    assert usage.startswith(f"usage: python -m experiments.{script} [-h]")


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "diagnose"])
def test_a_file_in_place_of_the_results_folder_is_one_line(ended, tmp_path, script):
    (tmp_path / "file").write_text("kept")
    status, _, said = ended(script, f"--out={tmp_path}/file")
    assert status == 1
    assert said.splitlines()[-1] == f"error: --out: expected a folder, got the file {tmp_path}/file"
    assert "Traceback" not in said
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "diagnose"])
def test_ctrl_c_is_one_line_that_names_resume_where_there_is_one(ended, tmp_path, script, monkeypatch):
    monkeypatch.setattr(_door, "make_folder", lambda out: signal.raise_signal(signal.SIGINT))
    status, _, said = ended(script, f"--out={tmp_path}/out")
    assert status == 130
    before = "before the first checkpoint, of step [0-9]+; --resume begins again"
    resumes = "; --resume continues" if script == "benchmark" else f" {before}" if script in RESUMED else ""
    assert re.fullmatch(f"interrupted{resumes}", said.splitlines()[-1])
    assert "Traceback" not in said


def test_an_error_after_a_progress_bar_has_a_line_of_its_own(ended, tmp_path):
    status, _, said = ended("vocabulary", "--vocabulary=9", f"--out={tmp_path}/out")
    assert status == 1
    assert "reading: 100%" in said
    assert said.split("\n")[-2].startswith("error: --vocabulary: expected at most 4, the distinct tokens of")


@pytest.mark.parametrize("script", TRAININGS[1:])
def test_a_finished_run_is_kept_unless_it_is_to_be_replaced(ended, tmp_path, script, monkeypatch):
    write_json(tmp_path / "summary.json", {"loss": 0.5})
    before = (tmp_path / "summary.json").read_bytes()
    status, _, said = ended(script, f"--out={tmp_path}")
    assert (status, said) == (
        1,
        f"error: {tmp_path}: holds a finished run: replace it with --overwrite, or choose another --out\n",
    )
    assert (tmp_path / "summary.json").read_bytes() == before
    monkeypatch.setattr(_door, "make_folder", lambda out: signal.raise_signal(signal.SIGINT))
    assert ended(script, f"--out={tmp_path}", "--overwrite")[0] == 130  # it got as far as that


def test_the_demonstration_replaces_its_last_run_unless_told_otherwise(ended, tmp_path, monkeypatch):
    write_json(tmp_path / "summary.json", {"loss": 0.5})
    status, _, said = ended("iris", f"--out={tmp_path}", "--no-overwrite")
    assert status == 1
    assert said.startswith(f"error: {tmp_path}: holds a finished run")
    monkeypatch.setattr(_door, "make_folder", lambda out: signal.raise_signal(signal.SIGINT))
    assert ended("iris", f"--out={tmp_path}")[0] == 130  # it got as far as that


@pytest.mark.parametrize("script", TRAININGS[1:])
def test_overwrite_and_resume_together_are_refused(ended, tmp_path, script):
    status, _, said = ended(script, f"--out={tmp_path}", "--overwrite", "--resume")
    assert (status, said) == (
        1,
        "error: --overwrite: expected without --resume, which continues the existing run\n",
    )


def test_too_little_memory_is_one_line():
    with pytest.raises(MemoryError) as in_numpy:
        np.empty(2**59)
    with pytest.raises(jax.errors.JaxRuntimeError) as in_jax:
        jax.jit(lambda: jnp.zeros(2**50))()
    for caught in (in_numpy, in_jax):
        line, status = end_of(caught.value, None)
        assert status == 1
        assert line.startswith("error: not enough memory: ")
        assert "\n" not in line


def test_a_bug_in_a_script_keeps_its_traceback():
    assert end_of(ValueError("a fault"), None) is None
    assert end_of(jax.errors.JaxRuntimeError("INTERNAL: a fault"), None) is None
    assert end_of(InputError("a slip"), None) == ("error: a slip", 1)
    assert end_of(FileNotFoundError(2, "No such file", "x"), None) == ("error: x: No such file", 1)


def test_a_loss_that_has_grown_gives_a_warning(capsys):
    say_growth(Iris(learning_rate=7, steps=3), 1.0, 1.0)
    assert capsys.readouterr() == ("", "")
    say_growth(Iris(learning_rate=7, steps=3), 1.0, 1.25)
    assert capsys.readouterr() == (
        "",
        "warning: --learning-rate 7: expected the loss to fall, got 1 at first and 1.25 after 3 steps\n",
    )
