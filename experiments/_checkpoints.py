"""Checkpoints of a training run: complete or absent; if the latest is damaged, the one before it is used.

Each is a folder, named by its step, with state.npz (the arrays by their paths), record.json, and the SHA-256 of both.
"""

import hashlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments._door import InputError, write_json

STATE, RECORD, CHECKSUMS = "state.npz", "record.json", "sha256.json"
KEPT = 2


class Checkpoint(NamedTuple):
    """A run after `step` steps: its arrays, and as JSON values everything else that it needs to continue."""

    step: int
    state: Any
    record: dict[str, Any]


def steps_of(folder: Path) -> list[int]:
    """The steps whose checkpoints a folder holds, the latest first."""
    return sorted((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), reverse=True)


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, which gets its name when it is complete, and keep only one of the checkpoints before it."""
    step, state, record = checkpoint
    unfinished = folder / "unfinished"
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **{name: np.asarray(leaf) for name, leaf in by_path(state)})
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        (unfinished / STATE).write_bytes(content.getvalue())
        write_json(unfinished / RECORD, record)
        write_json(unfinished / CHECKSUMS, checksums(unfinished))
        unfinished.rename(folder / str(step))
        for old in steps_of(folder)[KEPT:]:
            delete(folder, old)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)  # free the disk space
        raise InputError(f"{folder / str(step)}: cannot write the checkpoint: {error.strerror or error}") from error


def latest_whole(folder: Path) -> int | None:
    """The step of the latest undamaged checkpoint; damaged ones after it are deleted."""
    steps = steps_of(folder)
    whole = next((step for step in steps if is_whole(folder / str(step))), None)
    if whole is None:
        if steps:
            raise InputError(
                f"{folder}: expected a complete checkpoint, got only damaged ones "
                f"({', '.join(map(str, steps))}); start again with --overwrite, or choose another --out"
            )
        return None
    for step in steps[: steps.index(whole)]:
        print(f"{folder / str(step)}: damaged, taking the checkpoint before it", file=sys.stderr)
        delete(folder, step)
    return whole


def read_record(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / str(step) / RECORD).read_text())


def read_state(folder: Path, step: int, like: Any) -> Any:
    """The arrays of a checkpoint in the structure of `like`, in NumPy."""
    with np.load(folder / str(step) / STATE, allow_pickle=False) as arrays:
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name, _ in by_path(like)])


def delete(folder: Path, step: int) -> None:
    shutil.rmtree(folder / str(step))


def by_path(state: Any) -> list[tuple[str, Any]]:
    """Every array with its path in the state, such as 0/head/kernel."""
    paths = jax.tree_util.tree_leaves_with_path(state)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in paths]


def is_whole(checkpoint: Path) -> bool:
    try:
        return json.loads((checkpoint / CHECKSUMS).read_text()) == checksums(checkpoint)
    except (OSError, ValueError):
        return False


def checksums(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of both files, so that training does not continue from a flipped bit."""
    return {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in (STATE, RECORD)}
