"""A training run in a folder: one row per step, checkpoints, and continuing exactly where it was killed.

If several processes train together, only the first one reads and writes the folder.
"""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from experiments._checkpoints import Checkpoint, delete, latest_whole, read_record, read_state, save, steps_of
from experiments._door import InputError, Training, check_training, keep_finished, say_growth

Row = tuple[float, ...]


class Options(Training, Protocol):
    """The options of every training that can continue from checkpoints."""

    @property
    def batch_size(self) -> int: ...
    @property
    def checkpoint_every(self) -> int: ...
    @property
    def resume(self) -> bool: ...


class Loader(Protocol):
    """Batches in an order that can start at any step."""

    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


def check_options(config: Options, *counts: str) -> None:
    """Refuse options out of range; `counts` names further options that count something."""
    if config.resume and config.overwrite:
        raise InputError("--overwrite: expected without --resume, which continues the existing run")
    check_training(config, "batch_size", "checkpoint_every", *counts)


def train(
    config: Options,
    columns: tuple[str, ...],
    options: dict[str, Any],
    state: Any,
    advance: Callable[[Any, int], tuple[Any, Row]],
    unit: str,
    loader: Loader | None = None,
) -> tuple[Any, float]:
    """Take the remaining steps.

    Args:
        config: the options of the script.
        columns: the columns of metrics.csv: the step, its loss, and others.
        options: by name, all that the run depends on; a checkpoint continues only with the same options.
        state: the state at the start, as arrays on their devices.
        advance: takes a state and the number of the step; returns the next state, and the row without the step.
        unit: the name of a batch's entries, for the progress bar.
        loader: the source of `advance`'s batches, unless the step determines them.

    Returns:
        The state after the last step, and the seconds that all steps took.
    """
    first, size = jax.process_index() == 0, config.batch_size
    fresh = Checkpoint(0, state, {"options": options, "position": loader and loader.get_state(), "seconds": 0.0})
    done, state, record = begin(config, columns, fresh)
    if loader:
        loader.set_state(record["position"])
    start = time.perf_counter() - record["seconds"]
    with tqdm(total=config.steps * size, initial=done * size, unit=unit, unit_scale=True, disable=not first) as bar:
        for step in range(done + 1, config.steps + 1):
            state, row = advance(state, step)
            if not math.isfinite(row[0]):
                raise InputError(
                    f"--learning-rate {config.learning_rate:g}: expected a finite loss, got {row[0]} at step {step}"
                )
            if first:
                append(config.out / "metrics.csv", (step, *row))
            if step % config.checkpoint_every == 0 or step == config.steps:
                seconds = time.perf_counter() - start
                record = {"options": options, "position": loader and loader.get_state(), "seconds": seconds}
                whole = state if jax.process_count() == 1 else multihost_utils.process_allgather(state, tiled=True)
                if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(whole)):
                    raise InputError(
                        f"--learning-rate {config.learning_rate:g}: expected finite parameters, "
                        f"got others after step {step}"
                    )
                if first:
                    save(config.out / "checkpoints", Checkpoint(step, whole, record))
            bar.update(size)
            bar.set_postfix(loss=f"{row[0]:.4g}", refresh=False)
    if first:
        rows = (config.out / "metrics.csv").read_text().splitlines()
        say_growth(config, *(float(rows[n].split(",")[1]) for n in (1, -1)))
    return state, record["seconds"]


def begin(config: Options, columns: tuple[str, ...], fresh: Checkpoint) -> Checkpoint:
    """The checkpoint from which every process starts, read by the first process."""
    begun = start_or_resume(config, columns, fresh) if jax.process_index() == 0 else fresh
    if jax.process_count() > 1:
        assert fresh.record["position"] is None  # a position is not sent to the other processes
        begun = begun._replace(step=int(multihost_utils.broadcast_one_to_all(np.int32(begun.step))))
        if begun.step:
            begun = begun._replace(state=jax.tree.map(from_first, begun.state))
    return begun._replace(state=jax.tree.map(place, begun.state, fresh.state)) if begun.step else fresh


def start_or_resume(config: Options, columns: tuple[str, ...], fresh: Checkpoint) -> Checkpoint:
    """The checkpoint to start from; later rows are removed from metrics.csv."""
    checkpoints = config.out / "checkpoints"
    metrics, summary = config.out / "metrics.csv", config.out / "summary.json"
    header = ",".join(columns) + "\n"
    step = latest_whole(checkpoints) if config.resume else None
    if step is None:
        keep_finished(config)
        if steps_of(checkpoints) and not config.overwrite:
            raise InputError(
                f"{config.out}: holds an unfinished run: continue it with --resume, replace it with --overwrite, "
                "or choose another --out"
            )
        summary.unlink(missing_ok=True)
        for replaced in steps_of(checkpoints):
            delete(checkpoints, replaced)
        metrics.write_text(header)
        return fresh
    record = read_record(checkpoints, step)
    for name, value in fresh.record["options"].items():
        if record["options"][name] != value:
            raise InputError(
                f"--{name.replace('_', '-')}: {checkpoints} was written with "
                f"{record['options'][name]}, got {value}: --resume needs the same options"
            )
    # Steps after the checkpoint are repeated. Truncating the file, unlike rewriting it, survives another kill.
    rows = metrics.read_bytes().splitlines(keepends=True)[: step + 1]
    if len(rows) <= step or not rows[-1].startswith(b"%d," % step):
        raise InputError(f"{metrics}: expected the rows of steps 1 to {step}, from which the checkpoint continues")
    os.truncate(metrics, sum(map(len, rows)))
    return Checkpoint(step, read_state(checkpoints, step, fresh.state), record)


def append(path: Path, row: Row) -> None:
    try:
        with path.open("a") as file:
            file.write(",".join(map(repr, row)) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror}") from error


def from_first(array: np.ndarray | jax.Array) -> np.ndarray:
    """The first process's array, in every process."""
    values = array if isinstance(array, np.ndarray) else np.zeros(array.shape, array.dtype)
    # The broadcast adds the other processes' zeros: as bits, because adding numbers would turn -0 into 0.
    sent = multihost_utils.broadcast_one_to_all(np.frombuffer(values.tobytes(), np.uint8))
    return np.frombuffer(sent.tobytes(), values.dtype).reshape(values.shape)


def place(values: np.ndarray, like: jax.Array) -> jax.Array:
    """The values on the devices of another array."""
    return jax.make_array_from_callback(like.shape, like.sharding, lambda block: values[block])
