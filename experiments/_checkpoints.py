"""Checkpoints of a training run: whole or absent, and the one before where the latest is damaged."""

import hashlib
import json
import sys
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
        checkpoints.save(step, args=items, force=True)
        (folder / CHECKSUMS).write_text(json.dumps(checksums(folder)))
    except Exception as error:  # a full disk makes orbax and its store raise anything from OSError to ValueError
        raise InputError(f"{folder}: cannot write the checkpoint: {brief(error)}") from error


def latest_whole(checkpoints: ocp.CheckpointManager) -> int | None:
    """The step of the latest checkpoint that is as it was written; damaged ones after it are deleted."""
    for step in sorted(checkpoints.all_steps(), reverse=True):
        folder = Path(checkpoints.directory) / str(step)
        try:
            whole = json.loads((folder / CHECKSUMS).read_text()) == checksums(folder)
        except (OSError, ValueError):
            whole = False
        if whole:
            return step
        print(f"{folder}: damaged or unfinished, taking the checkpoint before it", file=sys.stderr)
        checkpoints.delete(step)
    return None


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
