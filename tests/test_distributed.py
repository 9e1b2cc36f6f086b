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

import numpy as np
import pandas as pd
import pytest
from test_vocabulary import cache, in_bytes, parameters, write_corpus

from experiments._door import InputError, ScriptError
from experiments.distributed import Config, run, start
from experiments.vocabulary.__main__ import Config as AloneConfig
from experiments.vocabulary.__main__ import run as run_alone

pytestmark = [pytest.mark.scripts, pytest.mark.x32, pytest.mark.optimized, pytest.mark.xdist_group("distributed")]

STEPS = 50
PATIENCE = 120


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def config(corpus, out, kind=Config, **options):
    chosen = {"vocabulary": 32, "context": 3, "features": 16, "steps": STEPS, "batch_size": 32, "learning_rate": 0.01}
    return kind(**chosen | {"corpus": str(corpus), "checkpoint_every": 10, "out": out} | options)


def popen(configuration, **environment):
    """The command with these options."""
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
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # for Ctrl-C, which reaches a command with all its processes
    )


def output(process):
    """What it wrote to stdout and to stderr, once all that could write to them have ended."""
    try:
        return process.communicate(timeout=PATIENCE)
    finally:
        process.kill()


def wait_for_rows(out, count):
    """Until so many steps are taken, or an end is overdue."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if rows(out) >= count:
            return
        time.sleep(0.002)
    raise TimeoutError(out)


def rows(out):
    return (out / "metrics.csv").read_text().count("\n") - 1 if (out / "metrics.csv").exists() else 0


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
    """Two processes that were left alone, and what they wrote to stdout."""
    out = tmp_path_factory.mktemp("pair")
    process = popen(config(corpus, out, processes=2))
    said, told = output(process)
    assert process.returncode == 0, told
    return out, said


def assert_same_training(out, alone):
    summary = json.loads((out / "summary.json").read_text())
    assert summary["loss"] == pytest.approx(alone[0]["loss"], rel=1e-5)
    np.testing.assert_allclose(losses(out), losses(alone[1]), rtol=1e-5)
    found, expected = parameters(out, STEPS), parameters(alone[1], STEPS)
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].shape == expected[name].shape
        np.testing.assert_allclose(found[name], expected[name], atol=1e-3)
    return summary


def assert_same_bytes(out, expected):
    assert (out / "metrics.csv").read_bytes() == (expected / "metrics.csv").read_bytes()
    assert in_bytes(parameters(out, STEPS)) == in_bytes(parameters(expected, STEPS))


# As one.


@pytest.mark.parametrize("mesh", [(1, 8), (4, 2)])
def test_eight_devices_of_one_process_train_as_one(corpus, alone, tmp_path, mesh):
    run(config(corpus, tmp_path, mesh=mesh))
    assert assert_same_training(tmp_path, alone)["mesh"] == list(mesh)


def test_two_processes_train_as_one(pair, alone):
    out, _ = pair
    summary = assert_same_training(out, alone)
    assert summary["processes"] == 2
    assert summary["mesh"] == [1, 2]
    assert {path.name for path in out.glob("*.*")} == {"metrics.csv", "summary.json", "loss.png", "process-1.log"}


def test_the_result_alone_is_on_stdout(pair):
    """Not what Gloo has to say of its connections."""
    (line,) = pair[1].splitlines()
    assert line.startswith(f"{STEPS} steps, ")
    assert line.endswith(f"; see {pair[0]}")


def test_the_processes_of_schedulers_find_each_other(corpus, alone, tmp_path):
    """The first believes that SLURM started it, the second that Open MPI did. Here they share the batch, not the words."""
    schedulers = [
        {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
    ]  # fmt: skip
    port = {"JAX_COORDINATOR_PORT": str(free_port())}
    options = config(corpus, tmp_path, mesh=(2, 1))
    processes = [popen(options, **port, **scheduler) for scheduler in schedulers]
    said = [output(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    summary = assert_same_training(tmp_path, alone)
    assert summary["processes"] == 2
    assert summary["mesh"] == [2, 1]
    assert [len(stdout.splitlines()) for stdout, _ in said] == [1, 0]


# Killed.


def test_a_run_of_many_ends_resumes_bit_for_bit(corpus, pair, tmp_path, monkeypatch):
    """One process killed, the other, Ctrl-C, the command killed: each time all end, and --resume goes on."""
    for name, value in cache().items():
        monkeypatch.setenv(name, value)
    options = config(corpus, tmp_path, processes=2)
    for victim in (0, 1):
        before = rows(tmp_path)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            watching = pool.submit(start, dataclasses.replace(options, resume=before > 0))
            wait_for_rows(tmp_path, before + 8)
            children = sorted(multiprocessing.active_children(), key=lambda child: child.pid)
            os.kill(children[victim].pid, signal.SIGKILL)
            error = watching.exception(timeout=PATIENCE)
        assert isinstance(error, ScriptError)
        assert str(error) == (
            f"process {victim} of 2 was ended by SIGKILL, and the others with it; --resume goes on from the last checkpoint"
        )
        assert not [child for child in children if child.is_alive()]
    for number in (signal.SIGINT, signal.SIGKILL):
        before = rows(tmp_path)
        process = popen(dataclasses.replace(options, resume=True))
        wait_for_rows(tmp_path, before + 8)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, told = output(process)  # ends when the processes have closed it, too
        if number == signal.SIGINT:
            assert process.returncode == 130
            assert told.endswith("\ninterrupted; --resume goes on\n")
            assert "Traceback" not in told
    assert 32 <= rows(tmp_path) < STEPS
    start(dataclasses.replace(options, resume=True))
    assert_same_bytes(tmp_path, pair[0])


def test_ctrl_c_ends_a_process_that_waits_for_others(corpus, tmp_path):
    """For whom it would wait for minutes in JAX, which does not hear it."""
    options = config(corpus, tmp_path, processes=2, process_id=1, coordinator=f"127.0.0.1:{free_port()}")
    process = popen(options)
    assert process.stderr.readline() == f"process 1: meeting all 2 at {options.coordinator}\n"
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    assert output(process) == ("", "interrupted; --resume goes on\n")
    assert process.returncode == 130


@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_process_of_a_cluster_ends_the_other_with_an_error(corpus, tmp_path, victim):
    options = config(corpus, tmp_path, processes=2, coordinator=f"127.0.0.1:{free_port()}", steps=5000)
    processes = [popen(dataclasses.replace(options, process_id=n)) for n in range(2)]
    wait_for_rows(tmp_path, 3)
    processes[victim].send_signal(signal.SIGKILL)
    _, said = output(processes[1 - victim])
    output(processes[victim])
    assert processes[1 - victim].returncode != 0
    if victim == 1:
        assert "error: another process has ended, or the runtime failed (UNKNOWN: Gloo all-" in said
        assert "stack trace" not in said
    else:  # which is the coordinator, whose end JAX answers with an abort of its own
        assert "another process has ended" in said or "another task died" in said


def test_a_run_goes_on_with_another_number_of_processes(corpus, alone, tmp_path, pair):
    shutil.copytree(pair[0], tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / str(STEPS))
    run(config(corpus, tmp_path / "half", resume=True, mesh=(2, 4)))
    assert_same_training(tmp_path / "half", alone)


# Refused.


def test_processes_of_different_options_all_end_with_an_error(corpus, tmp_path):
    options = config(corpus, tmp_path, processes=2, coordinator=f"127.0.0.1:{free_port()}")
    processes = [popen(dataclasses.replace(options, process_id=n, seed=n)) for n in range(2)]
    said = "".join(output(process)[1] for process in processes)
    assert f"error: expected every process to have the same options and corpus, here {corpus}, 2408 words" in said
    assert all(process.returncode for process in processes)


def test_the_error_of_a_started_process_is_that_of_the_command(corpus, pair):
    process = popen(config(corpus, pair[0], processes=2, resume=True, seed=1))
    _, said = output(process)
    assert process.returncode == 1
    expected = f"error: --seed: {pair[0]}/checkpoints was written with 0, got 1: resume takes the same options"
    assert [line for line in said.split("\n") if "error" in line] == [expected]


def test_a_port_in_use_is_one_line(corpus, tmp_path):
    """Where JAX ends by a segmentation fault."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        options = config(corpus, tmp_path, coordinator=f"127.0.0.1:{port}", processes=2, process_id=0)
        process = popen(options)
        said, told = output(process)
    assert process.returncode == 1
    assert said == ""
    assert told.splitlines()[1:] == [f"error: --coordinator: cannot listen at port {port}: Address already in use"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0}, "--processes: expected at least 1, got 0"),
        ({"process_id": 1}, "--process-id 1: expected --coordinator and --processes with it"),
        ({"coordinator": "host"}, "--coordinator: expected ADDRESS:PORT, got 'host'"),
        ({"coordinator": "host:65536"}, "--coordinator: expected ADDRESS:PORT, got 'host:65536'"),
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
