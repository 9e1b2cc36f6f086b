"""Checkpoints of a training run: whole or absent, and the one before where the latest is damaged."""

import contextlib
import hashlib
import io
import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments._door import InputError

CHECKSUMS = "sha256.json"


class Checkpoint(NamedTuple):
    """A run after `step` steps: its arrays, and whatever else it needs to go on as JSON values."""

    step: int
    state: Any
    record: dict[str, Any]


def open_checkpoints(folder: Path) -> ocp.CheckpointManager:
    """The two latest checkpoints of `folder`, created where missing; of several processes one alone calls this."""
    folder.mkdir(parents=True, exist_ok=True)
    process = jax.process_index()
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2,
        enable_async_checkpointing=False,  # a checkpoint is on disk before the next step is taken
        create=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process}),
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(checkpoints: ocp.CheckpointManager, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, its checksums last: one without them was not finished."""
    step, state, record = checkpoint
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
    folder = Path(checkpoints.directory) / str(step)
    try:
        with uninterrupted(), silent_failure():
            checkpoints.save(step, args=items, force=True)
            (folder / CHECKSUMS).write_text(json.dumps(checksums(folder)))
    except Exception as error:  # a full disk makes orbax and its store raise anything from OSError to ValueError
        raise InputError(f"{folder}: cannot write the checkpoint: {brief(error)}") from error


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put Ctrl-C off until the body is done, which would be cut short in one of its threads alone."""
    if threading.current_thread() is not threading.main_thread():  # which alone it interrupts
        yield
        return
    came = []
    handler = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


@contextlib.contextmanager
def silent_failure() -> Iterator[None]:
    """Keep back what goes to stderr, and for good where the body fails: a failure is told once, not by every thread."""
    logging.disable()
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            yield
    finally:
        logging.disable(logging.NOTSET)
    sys.stderr.write(said.getvalue())


def latest_whole(checkpoints: ocp.CheckpointManager) -> int | None:
    """The step of the latest checkpoint that is as it was written; damaged ones after it are deleted."""
    folders = {step: Path(checkpoints.directory) / str(step) for step in sorted(checkpoints.all_steps(), reverse=True)}
    whole = next((step for step in folders if is_whole(folders[step])), None)
    # A kill may leave the first checkpoint unfinished, its checksums missing: then there is none yet.
    if whole is None and folders and (len(folders) > 1 or (folders[max(folders)] / CHECKSUMS).exists()):
        damaged = ", ".join(map(str, folders))
        raise InputError(
            f"{checkpoints.directory}: expected a whole checkpoint to go on from, got damaged ones alone ({damaged}); "
            "begin again with --overwrite in place of --resume, or choose another --out"
        )
    for step, folder in folders.items():
        if whole is None or step > whole:
            print(f"{folder}: damaged or unfinished, taking the checkpoint before it", file=sys.stderr)
            checkpoints.delete(step)
    return whole


def is_whole(folder: Path) -> bool:
    try:
        return json.loads((folder / CHECKSUMS).read_text()) == checksums(folder)
    except (OSError, ValueError):
        return False


def read_record(checkpoints: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    return checkpoints.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]


def read_state(checkpoints: ocp.CheckpointManager, step: int, like: Any) -> Any:
    """The arrays of a checkpoint in the structure of `like`, in NumPy."""
    template = ocp.args.StandardRestore(jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), like))
    return checkpoints.restore(step, args=ocp.args.Composite(state=template))["state"]


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file: the store itself does not notice a flipped bit."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CHECKSUMS)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def brief(error: Exception) -> str:
    """One line; of a long one the end, where the store names the cause."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else f"… {text[-120:]}"
