"""Does a small fully convolutional network learn to name every pixel, and go on exactly where it was killed?

python -m experiments.segmentation --seed 0

Trains on scenes of overlapping handwritten digits with a void border, or on any folder in PASCAL VOC layout
(--data DIR), through the cross-entropy of every pixel that is not void. After a kill, the same command with
--resume ends in the same metrics and parameters, bit for bit, as the run that was left alone.
"""

import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
import pandas as pd
from tqdm import tqdm

from experiments._checkpoints import Checkpoint, latest_whole, open_checkpoints, read_record, read_state, save
from experiments._door import InputError, enter, make_folder, write_json
from experiments.segmentation.network import init_network
from experiments.segmentation.pictures import ROWS, plot_examples, plot_loss
from experiments.segmentation.scenes import NAMES, digit_scenes
from experiments.segmentation.training import Source, batches, confusion, evaluate, predict_whole, score, train_step
from experiments.segmentation.voc import voc_folder

COLUMNS = ("step", "loss", "pixel_accuracy", "mean_iou")
HELD_OUT = 256


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    data: str = "digits"
    """"digits", or a folder in PASCAL VOC layout."""
    classes: int | None = None
    """Classes of the folder's masks; the largest label + 1 where not given."""
    steps: int = 4000
    """Gradient steps, each on one batch."""
    batch_size: int = 16
    """Images in a batch."""
    learning_rate: float = 0.003
    """Largest step size of AdamW, reached after a tenth of the steps and then falling to 0 as a cosine."""
    crop: int = 64
    """Height and width in pixels of a scene, or of the window of a photograph, that is trained on."""
    seed: int = 0
    """Draws the held-out digits, the scenes, their order and the initial weights."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    resume: bool = False
    """Go on from the latest whole checkpoint in the folder of results."""
    out: Path = Path("out/segmentation")
    """Folder for metrics.csv (each training batch, before its step), summary.json, the pictures and the checkpoints."""


def check_options(config: Config) -> None:
    for name in ("steps", "batch_size", "checkpoint_every"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(config, name)}")
    if not 0 < config.learning_rate < float("inf"):
        raise InputError(f"--learning-rate: expected a positive number, got {config.learning_rate}")
    if not 0 <= config.seed < 2**32:
        raise InputError(f"--seed: expected an integer in [0, 2**32), got {config.seed}")
    if config.crop < 32:
        raise InputError(f"--crop: expected at least 32 pixels, got {config.crop}")
    if config.classes is not None and not 2 <= config.classes <= 255:
        raise InputError(f"--classes: expected an integer from 2 to 255, got {config.classes}")
    if config.data == "digits" and config.classes not in (None, len(NAMES)):
        raise InputError(f"--classes: the digits have {len(NAMES)} with their background, got {config.classes}")


def read_data(config: Config) -> tuple[Source, Source, tuple[str, ...]]:
    """What to train on, what to test on and the names of the classes."""
    if config.data == "digits":
        return *digit_scenes(config.seed, config.crop, HELD_OUT), NAMES
    train, test, classes = voc_folder(Path(config.data), config.classes)
    return train, test, tuple(str(label) for label in range(classes))


def start_or_resume(config: Config, checkpoints: ocp.CheckpointManager, fresh: Checkpoint) -> Checkpoint:
    """Where to begin, with metrics.csv holding the rows up to there and no more."""
    metrics, summary = config.out / "metrics.csv", config.out / "summary.json"
    header = ",".join(COLUMNS) + "\n"
    if not config.resume:
        if checkpoints.all_steps() and not summary.exists():
            raise InputError(f"{config.out}: holds an unfinished run: go on with --resume, or choose another --out")
        summary.unlink(missing_ok=True)
        for step in checkpoints.all_steps():
            checkpoints.delete(step)
    step = latest_whole(checkpoints) if config.resume else None
    if step is None:
        metrics.write_text(header)
        return fresh
    record = read_record(checkpoints, step)
    for name, value in fresh.record["options"].items():
        if record["options"][name] != value:
            raise InputError(
                f"--{name.replace('_', '-')}: {checkpoints.directory} was written with "
                f"{record['options'][name]}, got {value}: resume takes the same options"
            )
    # The rows after the checkpoint are taken again. Cutting them off, unlike writing anew, survives the next kill.
    rows = metrics.read_bytes().splitlines(keepends=True)[: step + 1]
    if len(rows) <= step or not rows[-1].startswith(b"%d," % step):
        raise InputError(f"{metrics}: expected the rows of steps 1 to {step}, which the checkpoint goes on from")
    os.truncate(metrics, sum(map(len, rows)))
    return Checkpoint(step, read_state(checkpoints, step, fresh.state), record)


def append(path: Path, row: tuple[float, ...]) -> None:
    try:
        with path.open("a") as file:
            file.write(",".join(map(repr, row)) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror}") from error


def run(config: Config) -> dict[str, Any]:
    """Train, write the results to `config.out` and return the summary."""
    check_options(config)
    train, test, names = read_data(config)
    out = make_folder(config.out)
    classes = len(names)
    schedule = optax.warmup_cosine_decay_schedule(0, config.learning_rate, config.steps // 10, config.steps)
    optimizer = optax.adamw(schedule)
    params = jax.jit(init_network, static_argnums=1)(jax.random.key(config.seed), classes)
    loader = batches(train, config.batch_size, config.crop, config.seed)
    apart = ("out", "resume", "checkpoint_every")
    options = {name: value for name, value in asdict(config).items() if name not in apart} | {"classes": classes}
    record = {"options": options, "position": loader.get_state(), "seconds": 0.0}
    with open_checkpoints(out / "checkpoints") as checkpoints:
        begun = start_or_resume(config, checkpoints, Checkpoint(0, (params, jax.jit(optimizer.init)(params)), record))
        state = begun.state
        loader.set_state(begun.record["position"])
        start = time.perf_counter() - begun.record["seconds"]
        size = config.batch_size
        with tqdm(total=config.steps * size, initial=begun.step * size, unit="image") as bar:
            for step in range(begun.step + 1, config.steps + 1):
                batch = next(loader)
                state, loss, predicted = train_step(state, batch, optimizer)
                loss, scores = float(loss), score(confusion(batch.labels, jax.device_get(predicted), classes))
                if not math.isfinite(loss):
                    raise InputError(
                        f"--learning-rate {config.learning_rate:g}: expected a finite loss, got {loss} at step {step}"
                    )
                append(out / "metrics.csv", (step, loss, scores["pixel_accuracy"], scores["mean_iou"]))
                if step % config.checkpoint_every == 0 or step == config.steps:
                    seconds = time.perf_counter() - start
                    record = {"options": options, "position": loader.get_state(), "seconds": seconds}
                    save(checkpoints, Checkpoint(step, state, record))
                bar.update(size)
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
    params, _ = state
    held_out = evaluate(params, test, classes, config.crop)
    summary = {**held_out, "steps": config.steps, "seconds": round(time.perf_counter() - start, 3)}
    pairs = [test[n] for n in range(min(ROWS, len(test)))]
    plot_examples(pairs, [predict_whole(params, pair, config.crop) for pair in pairs], names, out / "examples.png")
    plot_loss(pd.read_csv(out / "metrics.csv"), held_out, out / "loss.png")
    write_json(out / "summary.json", summary)
    print(
        f"{config.steps} steps: pixel accuracy {summary['pixel_accuracy']:.4f}, mean IoU {summary['mean_iou']:.4f} "
        f"over {summary['valid_pixels']} held-out pixels of {len(test)} images; see {out}"
    )
    return summary


if __name__ == "__main__":
    enter(Config, run, __doc__)
