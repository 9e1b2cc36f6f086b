"""Training over several processes: real ones on this machine, some of them killed.

They are forked from a server that has imported everything, since to import it takes longer than most tests; the
exhaustive ones start new interpreters, as the command does. A process that is to be killed waits for that.
"""

import atexit
import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing import forkserver

import jax
import numpy as np
import pandas as pd
import pytest
from test_vocabulary import PATIENCE, environment, in_bytes, parameters, write_corpus

from experiments import distributed
from experiments._door import InputError, enter
from experiments.distributed import Config, run, start
from experiments.vocabulary import __main__ as vocabulary
from experiments.vocabulary import training
from experiments.vocabulary.__main__ import Config as AloneConfig
from experiments.vocabulary.__main__ import run as run_alone

pytestmark = [pytest.mark.scripts, pytest.mark.x32]

STEPS = 16
CHECKPOINT_EVERY = 8
FORKED = "forkserver" if sys.platform == "linux" else "spawn"  # elsewhere what libraries start does not survive a fork


@pytest.fixture(scope="module", autouse=True)
def server():
    """The environment of all processes, and the server that they are forked from."""
    folders = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")]))
        multiprocessing.set_forkserver_preload([__name__])
        if FORKED == "forkserver":
            forkserver.ensure_running()
        yield
        forkserver._forkserver._stop()  # its memory is that of a process which has imported everything


@pytest.fixture(scope="module", params=[FORKED, pytest.param("spawn", marks=pytest.mark.exhaustive)])
def method(request):
    """How processes are started."""
    return request.param


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    monkeypatch.setattr(vocabulary, "plot_loss", lambda *_: None)


def config(corpus, out, kind=Config, **options):
    chosen = {"vocabulary": 32, "context": 3, "features": 16, "steps": STEPS, "batch_size": 32, "learning_rate": 0.01}
    return kind(**chosen | {"corpus": str(corpus), "checkpoint_every": CHECKPOINT_EVERY, "out": out} | options)


def arguments(configuration):
    found = []
    for name, value in dataclasses.asdict(configuration).items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, tuple) else [value]
        found += [f"--{name.replace('_', '-')}", *map(str, values)]
    return found


class Process:
    """The command with these options, what it writes and how it ends."""

    def __init__(self, configuration, method, gate=None, environ=()):
        context = multiprocessing.get_context(method)
        (out, write_out), (err, write_err) = context.Pipe(duplex=False), context.Pipe(duplex=False)
        self.read = [Reader(os.fdopen(os.dup(end.fileno()))) for end in (out, err)]
        self.process = context.Process(
            target=be, args=(arguments(configuration), dict(environ), gate, method, write_out, write_err)
        )
        self.process.start()
        for end in (out, err, write_out, write_err):
            end.close()
        self.pid = self.process.pid

    def output(self):
        """Its output on stdout and stderr, after it and all other writers have ended."""
        self.process.join(PATIENCE)
        self.process.kill()
        self.process.join()
        self.returncode = self.process.exitcode
        return tuple(reader.result() for reader in self.read)


class Reader(threading.Thread):
    """Reads a file to its end."""

    def __init__(self, file):
        super().__init__(daemon=True)
        self.file = file
        self.start()

    def run(self):
        with self.file:
            self.text = self.file.read()

    def result(self):
        self.join(PATIENCE)
        return self.text


def be(arguments, environ, gate, method, out, err):
    """Run what `python -m experiments.distributed` runs."""
    os.setsid()  # for Ctrl-C, which reaches a command with all its processes
    for number, end in enumerate((out, err), 1):
        os.dup2(end.fileno(), number)
        end.close()
    os.environ.update(environ)
    sys.argv = ["distributed", *arguments]
    if gate:
        wait_at(gate)
    if gate and method == "spawn":
        distributed.follow = Follow(gate)
    elif method != "spawn":
        multiprocessing.get_context = Forking
    try:
        enter(Config, start, None)
    finally:
        atexit._run_exitfuncs()  # which the end of an interpreter would call, the end of this process does not


class Forking:
    """Start processes as `spawn` does, with only their own end of a pipe, but by a fork."""

    def __init__(self, method):
        assert method == "spawn"
        self.senders = []

    def Pipe(self, duplex):
        receiver, sender = multiprocessing.Pipe(duplex)
        self.senders.append(sender)
        return receiver, sender

    def Process(self, target, args, daemon):
        def follow(configuration, own):
            for sender in self.senders:
                if sender is not own:
                    sender.close()
            target(configuration, own)

        return multiprocessing.context.ForkProcess(target=follow, args=args, daemon=daemon)


class Gate:
    """A gate where processes wait, after sending their numbers and ids, until they are let through or killed."""

    def __init__(self, step=None):
        """Before this step, or before they read the text."""
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.settimeout(PATIENCE)
        self.place = self.server.getsockname(), step
        self.waiting = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for each in (self.server, *self.waiting.values()):
            each.close()

    def wait_for(self, count):
        """The ids of the processes that have arrived, by their numbers."""
        pids = {}
        for _ in range(count):
            connection, _ = self.server.accept()
            connection.settimeout(PATIENCE)
            with connection.makefile() as said:
                number, pid = map(int, said.readline().split())
            pids[number], self.waiting[number] = pid, connection
        return pids

    def wait_for_ends(self):
        """The kernel closes what a process has left open."""
        for connection in self.waiting.values():
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""


def wait_at(gate):
    """Wait at the gate in this process."""
    address, step = gate
    owner, name = (distributed, "read_text") if step is None else (training, "training_batch")
    function = getattr(owner, name)

    def waiting(*arguments):
        if step in (None, arguments[-1]):
            with socket.create_connection(address) as connection:
                connection.sendall(f"{jax.process_index()} {os.getpid()}\n".encode())
                connection.recv(1)
        return function(*arguments)

    setattr(owner, name, waiting)


@dataclasses.dataclass
class Follow:
    """Run what a spawned process of the command runs."""

    gate: tuple

    def __call__(self, *arguments):
        wait_at(self.gate)
        distributed.follow(*arguments)


@pytest.fixture
def port():
    """A port held by a shareable socket, so that only the coordinator gets it."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def cluster(configuration, port):
    """The options of two processes of a cluster."""
    options = dataclasses.replace(configuration, processes=2, coordinator=f"127.0.0.1:{port}")
    return [dataclasses.replace(options, process_id=n) for n in range(2)]


def losses(out):
    return pd.read_csv(out / "metrics.csv")["loss"].to_numpy()


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """One process on one device, with no mesh."""
    out = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "plot_loss", lambda *_: None)
        return run_alone(config(corpus, out, AloneConfig, compare_sizes=())), out


@pytest.fixture(scope="module")
def pair(corpus, method, tmp_path_factory):
    """Two processes that the command started, without interruption, and their output on stdout."""
    out = tmp_path_factory.mktemp("pair")
    options = config(corpus, out, processes=2)
    if method == "spawn":
        command = [sys.executable, "-m", "experiments.distributed", *arguments(options)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        status, said, told = done.returncode, done.stdout, done.stderr
    else:
        process = Process(options, method)
        said, told = process.output()
        status = process.returncode
    assert status == 0, told
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


@pytest.mark.parametrize("mesh", [(4, 2), pytest.param(None, marks=pytest.mark.exhaustive)])
def test_eight_devices_of_one_process_train_as_one(corpus, alone, tmp_path, mesh):
    run(config(corpus, tmp_path, mesh=mesh))
    assert assert_same_training(tmp_path, alone)["mesh"] == list(mesh or (1, 8))


def test_two_processes_train_as_one(pair, alone):
    out, _ = pair
    summary = assert_same_training(out, alone)
    assert summary["processes"] == 2
    assert summary["mesh"] == [1, 2]
    assert {path.name for path in out.glob("*.*")} == {"metrics.csv", "summary.json", "loss.png", "process-1.log"}


def test_the_result_alone_is_on_stdout(pair):
    """Gloo's messages about its connections are not on stdout."""
    (line,) = pair[1].splitlines()
    assert line.startswith(f"{STEPS} steps, ")
    assert line.endswith(f"; see {pair[0]}")


def test_the_processes_of_schedulers_find_each_other(corpus, alone, tmp_path, port, method):
    """The first process has SLURM's environment, the second Open MPI's. Here they share the batch, not the tokens."""
    schedulers = [
        {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
    ]  # fmt: skip
    options = config(corpus, tmp_path, mesh=(2, 1))
    processes = [Process(options, method, environ={"JAX_COORDINATOR_PORT": str(port)} | s) for s in schedulers]
    said = [process.output() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    summary = assert_same_training(tmp_path, alone)
    assert summary["processes"] == 2
    assert summary["mesh"] == [2, 1]
    assert [len(stdout.splitlines()) for stdout, _ in said] == [1, 0]


def test_a_run_resumes_with_another_number_of_processes(corpus, alone, tmp_path, pair):
    shutil.copytree(pair[0], tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / str(STEPS))
    run(config(corpus, tmp_path / "half", resume=True, mesh=(4, 2)))
    assert_same_training(tmp_path / "half", alone)


# Killed.


def killed(options, step, method, victim):
    """Start a cluster and kill one of its two processes at the gate: the other's message and exit status."""
    with Gate(step) as gate:
        processes = [Process(part, method, gate.place if n == victim else None) for n, part in enumerate(options)]
        os.kill(gate.wait_for(1)[victim], signal.SIGKILL)
        (_, told), _ = processes[1 - victim].output(), processes[victim].output()
    assert processes[victim].returncode == -signal.SIGKILL
    return told, processes[1 - victim].returncode


def test_a_cluster_of_which_one_was_killed_ends_with_an_error_and_resumes_bit_for_bit(
    corpus, pair, tmp_path, port, method
):
    """The other process prints its own message, not the runtime's."""
    options = cluster(config(corpus, tmp_path), port)
    told, status = killed(options, 11, method, victim=1)
    assert status == 1
    assert "error: another process has ended, or the runtime failed (" in told
    assert "Traceback" not in told
    assert not (tmp_path / "summary.json").exists()
    rows = (tmp_path / "metrics.csv").read_text().count("\n") - 1
    assert CHECKPOINT_EVERY < rows < STEPS
    processes = [Process(dataclasses.replace(part, resume=True), method) for part in options]
    said = [process.output() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert_same_bytes(tmp_path, pair[0])


@pytest.mark.parametrize("step", [None, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (3, 11))])
def test_killing_the_coordinator_ends_the_other(corpus, tmp_path, port, step, method):
    """By an abort inside JAX, or by the script's error."""
    _, status = killed(cluster(config(corpus, tmp_path), port), step, method, victim=0)
    assert status != 0
    assert not (tmp_path / "summary.json").exists()


ENDINGS = ["first", "second", "Ctrl-C", "command"]


def end(options, step, method, ending):
    """Start processes and end them at the gate: one of them, all by Ctrl-C, or only the command."""
    with Gate(step) as gate:
        process = Process(options, method, gate.place)
        children = gate.wait_for(2)
        if ending == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(process.pid if ending == "command" else children[ENDINGS.index(ending)], signal.SIGKILL)
        gate.wait_for_ends()
        _, told = process.output()
    if ending == "command":
        assert process.returncode == -signal.SIGKILL
    elif ending == "Ctrl-C":
        assert process.returncode == 130
        first = f" before the first checkpoint, of step {options.checkpoint_every}; --resume begins again"
        goes_on = (options.out / "checkpoints").exists()
        assert told.endswith(f"\ninterrupted{'; --resume continues' if goes_on else first}\n")
        assert "Traceback" not in told
    else:
        assert process.returncode == 1
        assert told.endswith(
            f"\nerror: process {ENDINGS.index(ending)} of 2 was ended by SIGKILL, and the others with it; "
            "--resume continues from the last checkpoint\n"
        )
    assert not (options.out / "summary.json").exists()


@pytest.mark.parametrize("ending", ENDINGS)
def test_all_processes_end_together(corpus, tmp_path, method, ending):
    """Here before they compile anything."""
    end(config(corpus, tmp_path, processes=2), None, method, ending)


@pytest.mark.exhaustive
def test_a_run_of_many_ends_resumes_bit_for_bit(corpus, pair, tmp_path, method):
    options = config(corpus, tmp_path, processes=2, checkpoint_every=2)
    for step, ending in zip((4, 7, 10, 13), ENDINGS, strict=True):
        end(dataclasses.replace(options, resume=step > 4), step, method, ending)
        assert (tmp_path / "metrics.csv").read_text().count("\n") == step
    process = Process(dataclasses.replace(options, resume=True), method)
    process.output()
    assert process.returncode == 0
    assert_same_bytes(tmp_path, pair[0])


def test_ctrl_c_ends_a_process_that_waits_for_others(corpus, tmp_path, method):
    """JAX would wait for minutes without reacting to Ctrl-C. Here the process reached a coordinator that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE)
        options = cluster(config(corpus, tmp_path), silent.getsockname()[1])[1]
        process = Process(options, method)
        with silent.accept()[0]:
            os.killpg(process.pid, signal.SIGINT)
            output = process.output()
    assert output == ("", f"process 1: meeting all 2 at {options.coordinator}\ninterrupted; --resume continues\n")
    assert process.returncode == 130


# Refused.


def test_processes_of_different_options_all_end_with_an_error(corpus, tmp_path, port, method):
    parts = cluster(config(corpus, tmp_path), port)
    processes = [Process(dataclasses.replace(part, seed=n), method) for n, part in enumerate(parts)]
    said = "".join(process.output()[1] for process in processes)
    assert f"error: expected every process to have the same options and corpus, here {corpus}, 2408 tokens" in said
    assert all(process.returncode for process in processes)


def error_of(options, method):
    process = Process(options, method)
    _, said = process.output()
    assert process.returncode == 1
    (line,) = [line for line in said.split("\n") if "error" in line]
    return line


def test_the_error_of_started_processes_becomes_the_error_of_the_command(tmp_path, method):
    options = config(tmp_path / "nowhere", tmp_path / "out", processes=2)
    assert error_of(options, method) == f"error: {tmp_path}/nowhere: No such file or directory"


@pytest.mark.exhaustive
def test_the_error_of_a_started_process_becomes_the_error_of_the_command(corpus, pair, method):
    """The other process waits for the failed one."""
    expected = f"error: --seed: {pair[0]}/checkpoints was written with 0, got 1: --resume needs the same options"
    assert error_of(config(corpus, pair[0], processes=2, resume=True, seed=1), method) == expected


def test_a_port_in_use_is_one_line(corpus, tmp_path, method):
    """JAX itself would end with a segmentation fault."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        process = Process(cluster(config(corpus, tmp_path), port)[0], method)
        said, told = process.output()
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
