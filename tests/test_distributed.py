"""Training over several processes: real ones on this machine, some of them killed."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pandas as pd
import pytest
from test_vocabulary import cache, in_bytes, parameters, write_corpus

from experiments._door import InputError, ScriptError
from experiments.distributed import Config, run, start
from experiments.vocabulary.__main__ import Config as AloneConfig
from experiments.vocabulary.__main__ import run as run_alone

pytestmark = pytest.mark.x32

STEPS = 50
PATIENCE = 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def config(corpus, out, kind=Config, **options):
    chosen = {"vocabulary": 32, "context": 3, "features": 16, "steps": STEPS, "batch_size": 32, "learning_rate": 0.01}
    return kind(**chosen | {"corpus": str(corpus), "checkpoint_every": 10, "out": out} | options)


def popen(configuration, **environment):
    """The command with these options, its output in one pipe."""
    arguments = []
    for name, value in dataclasses.asdict(configuration).items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, tuple) else [value]
        arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.distributed", *arguments],
        env=os.environ | cache() | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output(process):
    try:
        return process.communicate(timeout=PATIENCE)[0]
    finally:
        process.kill()


def wait_for_rows(out, count):
    """Until so many steps are taken, or an end is overdue."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if (out / "metrics.csv").exists() and (out / "metrics.csv").read_text().count("\n") > count:
            return
        time.sleep(0.002)
    raise TimeoutError(out)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def losses(out):
    return pd.read_csv(out / "metrics.csv")["loss"].to_numpy()


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """One process on one device, with no mesh."""
    out = tmp_path_factory.mktemp("alone")
    return run_alone(config(corpus, out, AloneConfig, compare_sizes=())), out


@pytest.fixture(scope="module")
def pair(corpus, tmp_path_factory):
    """Two processes that were left alone."""
    out = tmp_path_factory.mktemp("pair")
    process = popen(config(corpus, out, processes=2))
    said = output(process)
    assert process.returncode == 0, said
    return out


def assert_same_training(out, alone):
    summary = json.loads((out / "summary.json").read_text())
    assert summary["loss"] == pytest.approx(alone[0]["loss"], rel=1e-5)
    np.testing.assert_allclose(losses(out), losses(alone[1]), rtol=1e-5)
    for found, expected in zip(
        *map(jax.tree.leaves, (parameters(out, STEPS), parameters(alone[1], STEPS))), strict=True
    ):
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=1e-3)
    return summary


def assert_same_bytes(out, pair):
    assert (out / "metrics.csv").read_bytes() == (pair / "metrics.csv").read_bytes()
    assert in_bytes(parameters(out, STEPS)) == in_bytes(parameters(pair, STEPS))


# As one.


@pytest.mark.parametrize("mesh", [(1, 8), (4, 2)])
def test_eight_devices_of_one_process_train_as_one(corpus, alone, tmp_path, mesh):
    run(config(corpus, tmp_path, mesh=mesh))
    assert assert_same_training(tmp_path, alone)["mesh"] == list(mesh)


def test_two_processes_train_as_one(pair, alone):
    summary = assert_same_training(pair, alone)
    assert summary["processes"] == 2
    assert summary["mesh"] == [1, 2]
    assert {path.name for path in pair.glob("*.*")} == {"metrics.csv", "summary.json", "loss.png", "process-1.log"}


def test_four_processes_train_as_one(corpus, alone, tmp_path):
    process = popen(config(corpus, tmp_path, processes=4, mesh=(2, 2)))
    said = output(process)
    assert process.returncode == 0, said
    assert assert_same_training(tmp_path, alone)["processes"] == 4


@pytest.mark.parametrize(
    "scheduler",
    [
        {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2", "SLURM_PROCID": "{n}", "SLURM_LOCALID": "{n}"},
        {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "{n}", "OMPI_COMM_WORLD_LOCAL_RANK": "{n}"},
    ],
    ids=["SLURM", "Open MPI"],
)  # fmt: skip
def test_a_schedulers_processes_find_each_other(corpus, alone, tmp_path, scheduler):
    port = {"JAX_COORDINATOR_PORT": str(free_port())}
    processes = [
        popen(config(corpus, tmp_path), **port, **{name: value.format(n=n) for name, value in scheduler.items()})
        for n in range(2)
    ]
    said = [output(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert assert_same_training(tmp_path, alone)["processes"] == 2


# Killed.


@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_process_ends_the_others_and_resume_goes_on(corpus, pair, tmp_path, monkeypatch, victim):
    for name, value in cache().items():
        monkeypatch.setenv(name, value)
    options = config(corpus, tmp_path, processes=2)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        watching = pool.submit(start, options)
        wait_for_rows(tmp_path, 24)
        children = sorted(multiprocessing.active_children(), key=lambda child: child.pid)
        os.kill(children[victim].pid, signal.SIGKILL)
        error = watching.exception(timeout=PATIENCE)
    assert isinstance(error, ScriptError)
    assert str(error) == (
        f"process {victim} of 2 was ended by SIGKILL, and the others with it; --resume goes on from the last checkpoint"
    )
    assert not [child for child in children if child.is_alive()]
    assert len(losses(tmp_path)) < STEPS
    start(dataclasses.replace(options, resume=True))
    assert_same_bytes(tmp_path, pair)


def test_killing_the_command_ends_its_processes_and_resume_goes_on(corpus, pair, tmp_path):
    options = config(corpus, tmp_path, processes=2)
    process = popen(options)
    wait_for_rows(tmp_path, 14)
    process.send_signal(signal.SIGKILL)
    output(process)  # ends when the processes have closed it, too
    assert len(losses(tmp_path)) < STEPS
    process = popen(dataclasses.replace(options, resume=True))
    said = output(process)
    assert process.returncode == 0, said
    assert_same_bytes(tmp_path, pair)


@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_process_of_a_cluster_ends_the_other_with_an_error(corpus, tmp_path, victim):
    options = config(corpus, tmp_path, processes=2, coordinator=f"127.0.0.1:{free_port()}", steps=5000)
    processes = [popen(dataclasses.replace(options, process_id=n)) for n in range(2)]
    wait_for_rows(tmp_path, 3)
    processes[victim].send_signal(signal.SIGKILL)
    said = output(processes[1 - victim])
    output(processes[victim])
    assert processes[1 - victim].returncode != 0
    if victim == 1:
        assert "error: another process has ended, or the runtime failed (UNKNOWN: Gloo all-" in said
        assert "stack trace" not in said
    else:  # which is the coordinator, whose end JAX answers with an abort of its own
        assert "another process has ended" in said or "another task died" in said


def test_a_run_goes_on_with_another_number_of_processes(corpus, alone, tmp_path, pair):
    shutil.copytree(pair, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / str(STEPS))
    run(config(corpus, tmp_path / "half", resume=True, mesh=(2, 4)))
    assert_same_training(tmp_path / "half", alone)


# Refused.


def test_processes_of_different_options_all_end_with_an_error(corpus, tmp_path):
    options = config(corpus, tmp_path, processes=2, coordinator=f"127.0.0.1:{free_port()}")
    processes = [popen(dataclasses.replace(options, process_id=n, seed=n)) for n in range(2)]
    said = "".join(output(process) for process in processes)
    assert f"error: expected every process to have the same options and corpus, here {corpus}, 2408 words" in said
    assert all(process.returncode for process in processes)


def test_the_error_of_a_started_process_is_that_of_the_command(corpus, pair):
    process = popen(config(corpus, pair, processes=2, resume=True, seed=1))
    said = output(process).splitlines()
    assert process.returncode == 1
    expected = f"error: --seed: {pair}/checkpoints was written with 0, got 1: resume takes the same options"
    assert [line for line in said if "error" in line] == [expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0}, "--processes: expected at least 1, got 0"),
        ({"process_id": 1}, "--process-id 1: expected --coordinator and --processes with it"),
        ({"coordinator": "host"}, "--coordinator: expected ADDRESS:PORT, got 'host'"),
        ({"coordinator": "host:1"}, "--coordinator: expected --processes and --process-id with it"),
        ({"coordinator": "host:1", "processes": 2, "process_id": 2}, "--process-id: expected 0 to 1, below --processes, got 2"),
        ({"processes": 4, "mesh": (3, 1)}, "--mesh: expected two numbers whose product is the devices' 4, got 3 1"),
        ({"processes": 1, "mesh": (-1, -1)}, "--mesh: expected two numbers whose product is the devices' 1, got -1 -1"),
        ({"processes": 3}, "--vocabulary: expected a multiple of 3, the devices along it, got 32"),
        ({"processes": 3, "mesh": (3, 1)}, "--batch-size: expected a multiple of 3, the devices along it, got 32"),
        ({"processes": 2, "context": 0}, "--context: expected at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(corpus, tmp_path, options, message):
    with pytest.raises(InputError) as caught:
        start(config(corpus, tmp_path / "out", **options))
    assert str(caught.value) == message
    assert not (tmp_path / "out").exists()
