"""Do several processes that share a vocabulary train as one, and what happens when one of them dies?

python -m experiments.distributed --processes 2

This is the training of `experiments.vocabulary`, compiled by plain `jax.jit`, on a grid of devices: the batch is
sharded over its first axis and the head's classes over its second, which `jaxsoft.linear_cross_entropy` learns from
batch_axes="data", axis_name="vocabulary". Every array of the state is sharded over the first axis too (fully sharded
data parallelism), and gathered for use. --processes N starts N processes on this machine, with one CPU device each.
On a cluster run the same command once per process, with --coordinator, --processes and --process-id; under SLURM or
Open MPI without these. If a process dies the others end too, within a minute and with an error; the same command with
--resume continues, on any number of processes. Only process 0 uses the folder of results.
"""

import contextlib
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from experiments._door import End, InputError, ScriptError, end_of, enter, make_folder
from experiments.vocabulary.__main__ import report
from experiments.vocabulary.corpus import read_text
from experiments.vocabulary.training import Batch, Layout, Training, all_it_depends_on, check, fit, loss_of

HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as dead."""


@dataclass(frozen=True)
class Config(Training):
    """Options of the experiment."""

    mesh: tuple[int, int] | None = None
    """Devices along the batch and along the vocabulary; by default 1 and all of them."""
    processes: int | None = None
    """Processes to start on this machine; with --coordinator, the number of all processes."""
    coordinator: str | None = None
    """ADDRESS:PORT at which process 0 of a cluster can be reached, the same for every process."""
    process_id: int | None = None
    """Number of this process of a cluster, from 0."""
    out: Path = Path("out/distributed")
    """Folder for metrics.csv (each training batch, before its step), summary.json, the picture and the checkpoints."""


def check_cluster(config: Config) -> None:
    check(config)
    if config.processes is not None and config.processes < 1:
        raise InputError(f"--processes: expected at least 1, got {config.processes}")
    if config.coordinator is None:
        if config.process_id is not None:
            raise InputError(f"--process-id {config.process_id}: expected --coordinator and --processes with it")
        return
    address = re.fullmatch(r".+:(\d+)", config.coordinator)
    if not address or not 0 < int(address[1]) < 2**16:
        raise InputError(f"--coordinator: expected ADDRESS:PORT, got {config.coordinator!r}")
    if config.processes is None or config.process_id is None:
        raise InputError("--coordinator: expected --processes and --process-id with it")
    if not 0 <= config.process_id < config.processes:
        raise InputError(
            f"--process-id: expected 0 to {config.processes - 1}, below --processes, got {config.process_id}"
        )


def grid(config: Config, devices: int) -> tuple[int, int]:
    """The numbers of devices along the batch and along the vocabulary, which must divide evenly."""
    data, vocabulary = shape = config.mesh or (1, devices)
    if min(shape) < 1 or math.prod(shape) != devices:
        raise InputError(
            f"--mesh: expected two numbers whose product is the devices' {devices}, got {data} {vocabulary}"
        )
    if config.batch_size % data:
        raise InputError(f"--batch-size: expected a multiple of {data}, the devices along it, got {config.batch_size}")
    if config.vocabulary % vocabulary:
        raise InputError(
            f"--vocabulary: expected a multiple of {vocabulary}, the devices along it, got {config.vocabulary}"
        )
    return shape


def spread(mesh: Mesh) -> Layout:
    """Shard the batch over one axis, the head's classes over the other, and all state over the first if it divides."""

    def spec(path: tuple, leaf: Any) -> P:
        in_head = jax.tree_util.DictKey("head") in path
        if in_head and leaf.ndim == 1:
            return P("vocabulary")
        even = leaf.ndim > 1 and leaf.shape[0] % mesh.shape["data"] == 0
        return P("data" if even else None, *(("vocabulary",) if in_head else ())) if leaf.ndim else P()

    def shardings(state):
        return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, spec(path, leaf)), state)

    def loss(params, batch: Batch, memory_budget: int):
        return loss_of(params, batch, memory_budget, batch_axes="data", axis_name="vocabulary")

    def put(batch: Batch) -> Batch:
        rows = NamedSharding(mesh, P("data"))
        return Batch(*(jax.make_array_from_callback(part.shape, rows, part.__getitem__) for part in batch))

    return Layout(loss, shardings, put)


def run(config: Config) -> dict[str, Any]:
    """Train on all devices of all processes; the first process writes the results to `config.out`."""
    check_cluster(config)
    shape = grid(config, jax.device_count())
    text = read_text(config.corpus, config.vocabulary, config.context, config.seed)
    same = zlib.crc32(repr((all_it_depends_on(config, text), config.checkpoint_every, shape)).encode())
    try:
        multihost_utils.assert_equal(np.uint32(same))
    except AssertionError:
        raise InputError(f"expected every process to have the same options and corpus, here {text.origin}") from None
    first = jax.process_index() == 0
    if first:
        make_folder(config.out)
    mesh = jax.make_mesh(shape, ("data", "vocabulary"), axis_types=(AxisType.Auto, AxisType.Auto))
    with jax.set_mesh(mesh):
        summary = fit(config, text, spread(mesh)) | {"mesh": shape, "processes": jax.process_count()}
    if first:
        report(config, text, summary)
    return summary


def start(config: Config) -> None:
    """Start processes on this machine, or be one process of a cluster, or the only process."""
    check_cluster(config)
    if config.processes is not None and config.coordinator is None:
        watch(config, config.processes)
        return
    if config.coordinator is not None:
        print(f"process {config.process_id}: meeting all {config.processes} at {config.coordinator}", file=sys.stderr)
    with end_at_once(config, lambda line: print(line, file=sys.stderr, flush=True)):
        in_cluster = meet(config)
        if in_cluster:
            run(config)
    if not in_cluster:
        run(config)


def meet(config: Config, bind_address: str | None = None) -> bool:
    """Wait until all processes have started; False if this one does not belong to a cluster."""
    if config.coordinator is not None and config.process_id == 0:
        check_free(int(config.coordinator.rpartition(":")[2]))
    keep_stdout()
    meeting = ThreadPoolExecutor().submit(
        jax.distributed.initialize,
        config.coordinator,
        config.processes,
        config.process_id,
        heartbeat_timeout_seconds=HEARTBEAT,
        coordinator_bind_address=bind_address,
    )
    try:
        meeting.result()  # unlike the meeting itself, this reacts to Ctrl-C
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise
        return False
    return True


def check_free(port: int) -> None:
    """Refuse a port on which something listens; JAX would end without a message."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise InputError(f"--coordinator: cannot listen at port {port}: {reason}") from None


def keep_stdout() -> None:
    """Leave stdout to Python: send the output of C++ libraries such as Gloo to stderr."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)


@contextlib.contextmanager
def end_at_once(config: Config, tell: Callable[[str], None]) -> Iterator[None]:
    """End this process if the body fails: an ordinary exit waits for the others, which may wait for this one."""
    try:
        yield
    except BaseException as error:
        end = end_of(error, config)
        if end is None:
            line = " ".join(str(error).split())
            if re.match(r"[A-Z_]+: ", line):  # a status in a message of JAX's runtime
                line = f"another process has ended, or the runtime failed ({line[:200]}); start all again with --resume"
            else:
                traceback.print_exc()
                line = f"{type(error).__name__}: {line}"
            end = End(f"error: {line}", 1)
        tell(end.line)
        os._exit(end.status)


def watch(config: Config, count: int) -> None:
    """Start processes on this machine, and end them all if one fails."""
    grid(config, count)
    make_folder(config.out)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe(duplex=False) for _ in range(count)]
    processes = [
        spawn.Process(target=follow, args=(replace(config, coordinator=address, process_id=n), sender), daemon=True)
        for n, (_, sender) in enumerate(pipes)
    ]
    resource_tracker.ensure_running()  # otherwise the first start would start it, which unblocks the signals
    # Ctrl-C reaches all processes, but only the watcher decides.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        running = dict(enumerate(processes))
        while running:
            ended = connection.wait([process.sentinel for process in running.values()])
            codes = {}
            for n in [n for n, process in running.items() if process.sentinel in ended]:
                process = running.pop(n)
                process.join()
                codes[n] = process.exitcode
            failed = [n for n in codes if codes[n]]
            if failed:  # of several at once, report the one that a signal killed: the others only noticed
                first = min(failed, key=codes.__getitem__)
                raise ScriptError(last_words(first, count, codes[first], pipes[first][0]))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
        if processes[0].exitcode == -signal.SIGKILL:
            print(file=sys.stderr)  # after its progress bar


def last_words(n: int, count: int, exitcode: int, told: connection.Connection) -> str:
    """Why a process failed: its own message, or its exit status."""
    try:
        return told.recv().removeprefix("error: ")
    except EOFError:
        how = f"was ended by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with status {exitcode}"
        return f"process {n} of {count} {how}, and the others with it; --resume continues from the last checkpoint"


def follow(config: Config, sender: connection.Connection) -> None:
    """Run as one of the processes that `watch` started."""
    watcher = multiprocessing.parent_process()
    assert watcher is not None

    def end_with_it():  # otherwise they would write where the next run begins
        connection.wait([watcher.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
    if config.process_id:
        log = os.open(config.out / f"process-{config.process_id}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
    tqdm.set_lock(threading.RLock())  # its own lock is shared between processes, and a kill leaks it
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]  # gRPC would look for this machine through the proxy
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    with end_at_once(config, lambda line: sender.send(line)):
        meet(config, bind_address=config.coordinator)
        run(config)


if __name__ == "__main__":
    enter(Config, start, __doc__)
