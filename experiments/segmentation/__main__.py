"""Does a small fully convolutional network learn to label every pixel, and continue exactly where it was killed?

python -m experiments.segmentation --seed 0

Trains on scenes of overlapping handwritten digits with a void border, or on a folder of photographs and masks
(--data DIR), with the cross-entropy of every pixel that is not void. After a kill, the same command with
--resume gives the same metrics and parameters, bit for bit, as an uninterrupted run.

The folder has one of three layouts, and optionally classes.txt with one class name per line:

    JPEGImages/NAME.jpg                          PASCAL VOC's: photographs,
    SegmentationClass/NAME.png                   the class of each pixel in a palette or in grey, 255 = void,
    ImageSets/Segmentation/train.txt, val.txt    and what to train on and to hold out, one NAME per line

    train.txt, val.txt                           SegNet's: for each photograph a line "photograph.png mask.png"

    images/NAME.jpg                              without lists: a fifth of the photographs, drawn by --seed,
    masks/NAME.png or labels/NAME.png            is held out

Photographs are mirrored, scaled and brightened at random, their colours are normalised, rare classes get a higher
weight, and the network is deeper than for digits. `python -m experiments.segmentation.streets` draws a folder of
synthetic scenes.
"""

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

from experiments._checkpoints import latest_whole, read_record
from experiments._door import InputError, enter, make_folder, write_json
from experiments._runs import check_options, train
from experiments.segmentation.coding import DEFAULT, Coding, check_coding
from experiments.segmentation.colours import read_colours
from experiments.segmentation.network import DEEPER, WIDTHS, init_network
from experiments.segmentation.photographs import read_folder
from experiments.segmentation.pictures import (
    ROWS,
    digits_palette,
    palette_of,
    plot_classes,
    plot_examples,
    plot_loss,
)
from experiments.segmentation.scenes import NAMES, digit_scenes
from experiments.segmentation.trained import Trained, read_trained, write_predictions, write_trained
from experiments.segmentation.training import (
    EVEN,
    Source,
    batches,
    confusion,
    evaluate,
    predict_whole,
    recipe_of,
    score,
    train_step,
)

COLUMNS = ("step", "loss", "pixel_accuracy", "mean_iou", "held_out_pixel_accuracy", "held_out_mean_iou")
HELD_OUT = 256
CHECKPOINTS = "checkpoints"
TIMES, FIRST = 20, 32
"""How often the first so many held-out images are scored on the way."""
LARGEST_CROP = 2048
"""Pixels along each side; with more, one scene alone takes gigabytes."""


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    data: str = "digits"
    """"digits", or a folder of photographs and masks in one of the layouts above."""
    classes: int | None = None
    """Number of classes in the folder's masks; by default up to the last that occurs."""
    void: tuple[int, ...] = ()
    """Values in the masks that are no class: not trained on and not scored; 255 by default. The other values are the
    classes 0, 1, ... in their order: with --void 0, as for ADE20K, 1 is class 0."""
    values: tuple[int, ...] = ()
    """Values in the masks that are the classes 0, 1, ..., if they are not consecutive: 0 255 for masks of black and
    white. Values other than these and --void are refused."""
    colours: Path | None = None
    """Text file with a line "R G B name" per class, in their order, for masks drawn in colours; a line named void is
    no class."""
    steps: int | None = None
    """Gradient steps, each on one batch; by default 4000 for digits and 3000 for photographs."""
    batch_size: int | None = None
    """Images in a batch; by default 16 for digits and 4 for photographs."""
    learning_rate: float = 0.003
    """Largest step size of AdamW, reached after a tenth of the steps and then falling to 0 as a cosine."""
    crop: int | None = None
    """Pixels along each side of a scene, or of the window of a photograph, that is trained on; by default 64 for digits
    and 192 for photographs."""
    seed: int = 0
    """Seed for the scenes, their order, the initial weights and, if no list names them, the held-out images."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    resume: bool = False
    """Continue from the latest complete checkpoint in the folder of results."""
    overwrite: bool = False
    """Replace the run in the folder of results."""
    start: Path | None = None
    """Folder of a finished run with the same number of classes, from whose parameters to start."""
    predict: tuple[Path, ...] = ()
    """Photographs whose pixels the finished run in --out labels, in its folder predictions; nothing is trained."""
    out: Path = Path("out/segmentation")
    """Folder for metrics.csv (each training batch, before its step, and sometimes held-out images after it),
    summary.json, the pictures, the checkpoints, and network.json, which predictions need too."""


@dataclass(frozen=True)
class Chosen(Config):
    """The options with the values that depend on the data."""

    steps: int = 4000
    batch_size: int = 16
    crop: int = 64


def choose(config: Config) -> Chosen:
    # As large a window as predictions will see: a network trained only near borders fails far from them.
    chosen: dict[str, Any] = (
        {"steps": 4000, "batch_size": 16, "crop": 64}
        if config.data == "digits"
        else {"steps": 3000, "batch_size": 4, "crop": 192}
    )
    chosen |= {name: value for name, value in asdict(config).items() if value is not None}
    return Chosen(**chosen)


def check(config: Chosen) -> None:
    check_options(config)
    if not 32 <= config.crop <= LARGEST_CROP:
        raise InputError(f"--crop: expected 32 to {LARGEST_CROP} pixels, got {config.crop}")
    if config.classes is not None and not 2 <= config.classes <= 255:
        raise InputError(f"--classes: expected an integer from 2 to 255, got {config.classes}")
    if config.data == "digits" and config.classes not in (None, len(NAMES)):
        raise InputError(f"--classes: the digits have {len(NAMES)} with their background, got {config.classes}")
    apart = bool(config.values or config.void)
    if config.data == "digits" and (apart or config.colours):
        raise InputError("--values, --void and --colours: expected with a folder, --data DIR: the digits have no masks")
    if config.colours and apart:
        raise InputError("--colours: expected without --values and --void: its lines say what is void")


def read_coding(config: Chosen) -> Coding:
    coding = read_colours(config.colours) if config.colours else Coding(config.values, config.void or DEFAULT.void)
    check_coding(coding, config.classes)
    return coding


def read_data(config: Chosen, coding: Coding) -> tuple[Source, Source, tuple[str, ...]]:
    """The training data, the held-out data, and the names of the classes."""
    if config.data == "digits":
        return *digit_scenes(config.seed, config.crop, HELD_OUT), NAMES
    return read_folder(Path(config.data), coding, config.classes, config.seed)


def run(config: Config) -> dict[str, Any]:
    """Train, or predict if that is requested."""
    if config.predict:
        write_predictions(read_trained(config.out), config.predict, config.out / "predictions")
        return {}
    return learn(config)


def check_resumed(config: Chosen) -> None:
    """Before any data are read, raise an error if --resume comes with other data than the run's.

    Without --data the digits would be trained on, silently if the run has no checkpoint yet.
    """
    if not config.resume or (config.out / "summary.json").exists():
        return
    step = latest_whole(config.out / CHECKPOINTS)
    if step is None:
        print(f"{config.out}: no checkpoint to resume from: starting at step 1, on {config.data}", file=sys.stderr)
        return
    data = read_record(config.out / CHECKPOINTS, step)["options"].get("data", config.data)
    if data != config.data:
        raise InputError(
            f"--data: {config.out} is a run on {data}, got {config.data}: --resume needs the same options, "
            f"here --data {data}"
        )


def check_continued(config: Chosen, options: dict[str, Any]) -> None:
    """Raise an error if --resume cannot continue the run."""
    step = latest_whole(config.out / CHECKPOINTS) if config.resume else None
    if step is None:
        return
    known = read_record(config.out / CHECKPOINTS, step)["options"]
    if not options.keys() <= known.keys():
        raise InputError(
            f"{config.out}: expected a run of this version, got one of an earlier version, which cannot continue: "
            "start again with --overwrite, or choose another --out"
        )
    if known["steps"] != config.steps:
        raise InputError(
            f"--steps: expected {known['steps']}, over which the learning rate of {config.out} falls to 0, got "
            f"{config.steps}: resume with the run's own options; to train longer, start another run from its "
            f"parameters when it is finished, --start {config.out} --out DIR"
        )


def start_with(config: Chosen, classes: int, widths: tuple[int, ...]) -> Any:
    """Parameters drawn by the seed, or another run's parameters."""
    fresh = jax.jit(init_network, static_argnums=(1, 2))(jax.random.key(config.seed), classes, widths)
    if config.start is None:
        return fresh
    learnt = read_trained(config.start)
    if jax.tree.map(jnp.shape, learnt.params) != jax.tree.map(jnp.shape, fresh):
        kind = "the digits" if config.data == "digits" else "photographs"
        got = f"got {config.start}, of {len(learnt.names)}"
        raise InputError(f"--start: expected a run on {kind} with {classes} classes, {got}")
    return jax.tree.map(jnp.asarray, learnt.params)


def learn(config: Config) -> dict[str, Any]:
    """Train, write the results to `config.out` and return the summary."""
    config = choose(config)
    check(config)
    check_resumed(config)
    digits, crop = config.data == "digits", config.crop
    coding = read_coding(config)
    train_on, test, names = read_data(config, coding)
    out = make_folder(config.out)
    classes = len(names)
    recipe = EVEN if digits else recipe_of(train_on, classes)
    schedule = optax.warmup_cosine_decay_schedule(0, config.learning_rate, config.steps // 10, config.steps)
    optimizer = optax.adamw(schedule)
    widths = WIDTHS if digits else DEEPER
    params = start_with(config, classes, widths)
    loader = batches(train_on, config.batch_size, crop, config.seed, augmented=not digits)

    def advance(state, step: int):
        batch = next(loader)
        state, loss, predicted = train_step(state, batch, recipe, optimizer)
        scores = [score(confusion(batch.labels, jax.device_get(predicted), classes))]
        if step % max(1, config.steps // TIMES) == 0:
            scores.append(evaluate(state[0], test, recipe, classes, FIRST))
        else:
            scores.append({"pixel_accuracy": math.nan, "mean_iou": math.nan})
        return state, (float(loss), *(part[name] for part in scores for name in ("pixel_accuracy", "mean_iou")))

    apart = ("out", "resume", "overwrite", "checkpoint_every", "predict")
    options = {name: value for name, value in asdict(config).items() if name not in apart}
    options |= {"classes": classes, "void": list(config.void), "values": list(config.values)}
    options |= {"colours": [list(colour) for colour in coding.colours], "start": config.start and str(config.start)}
    check_continued(config, options)
    begun = params, jax.jit(optimizer.init)(params)
    state, seconds = train(config, COLUMNS, options, begun, advance, "image", loader)
    params, _ = state
    held_out = evaluate(params, test, recipe, classes)
    summary = {**held_out, "steps": config.steps, "seconds": round(seconds, 3)}
    pairs = [test[n] for n in range(min(ROWS, len(test)))]
    predictions = [predict_whole(params, pair.image, recipe) for pair in pairs]
    colors = digits_palette() if digits else palette_of(coding)
    values = np.array(coding.classes[:classes], np.uint8)
    by_value = colors.copy()
    by_value[values] = colors[:classes]
    write_trained(out, Trained(params, recipe, names, values, by_value), widths)
    plot_examples(pairs, predictions, names, colors, out / "examples.png")
    plot_classes(held_out["per_class_iou"], names, held_out["mean_iou"], out / "classes.png")
    plot_loss(pd.read_csv(out / "metrics.csv"), held_out, out / "loss.png")
    write_json(out / "summary.json", summary)
    print(
        f"{config.steps} steps: pixel accuracy {summary['pixel_accuracy']:.4f}, mean IoU {summary['mean_iou']:.4f} "
        f"over {summary['valid_pixels']} held-out pixels of {len(test)} images; see {out}"
    )
    return summary


if __name__ == "__main__":
    enter(Config, run, __doc__)
