"""Does a small tanh network with this library's softmax rule learn to tell three irises apart?

python -m experiments.iris --seed 42

Five networks are trained, each on four fifths of the flowers, and scored on the fifth that it has not seen, so that
every flower is held out once. Weight decay keeps the networks from overfitting: without it the held-out loss falls,
then rises again.
"""

import functools
import io
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from jaxtyping import Array, Float, Int, Key
from sklearn.model_selection import StratifiedKFold, train_test_split
from tqdm import tqdm

from experiments._door import InputError, check_training, enter, make_folder, say_growth, write_json
from experiments._style import BLUE, GREEN, ORANGE, RED, WIDE, plt, save, tint
from jaxsoft import apply_mlp, cross_entropy, init_mlp, softmax

FEATURES = ("SepalLength", "SepalWidth", "PetalLength", "PetalWidth")
SPECIES = ("setosa", "versicolor", "virginica")
COLORS = BLUE, ORANGE, GREEN
FOLDS = 5
LONGEST_PIECE = 10_000
OPTIMIZERS = {
    "adam": optax.adam,
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
}


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    seed: int = 42
    """Seed for the five parts of the flowers and the initial weights."""
    steps: int = 300
    """Gradient steps of each network, each on all of its training flowers."""
    optimizer: Literal["adam", "sgd", "momentum"] = "adam"
    """Optax optimizer."""
    learning_rate: float = 0.01
    """Step size of the optimizer."""
    weight_decay: float = 0.01
    """λ of a penalty ½λ‖w‖² on the parameters, against overfitting; 0 for none."""
    data: Path = Path(__file__).parents[1] / "data" / "iris.csv"
    """CSV file with the four measurements in centimetres and the species."""
    overwrite: bool = True
    """Replace a finished run in the folder of results."""
    out: Path = Path("out/iris")
    """Folder for metrics.csv, summary.json and the pictures."""


class Split(NamedTuple):
    """Standardised features and labels of the training and the held-out flowers."""

    train_x: Float[Array, "train 4"]
    train_y: Int[Array, " train"]
    test_x: Float[Array, "test 4"]
    test_y: Int[Array, " test"]
    mean: Float[np.ndarray, " 4"]  # of the training flowers, in centimetres
    scale: Float[np.ndarray, " 4"]


def read_iris(path: Path) -> tuple[Float[np.ndarray, "flowers 4"], Int[np.ndarray, " flowers"]]:
    """Measurements and species numbers, refusing whatever would otherwise be dropped or guessed."""
    try:
        # Blank lines at the end are no rows; others keep their place, so that errors count lines rightly.
        text = io.StringIO(path.read_text().rstrip())
        table = pd.read_csv(text, dtype=str, keep_default_na=False, skip_blank_lines=False)
    except pd.errors.EmptyDataError:
        raise InputError(f"{path}: expected a table with a header, got an empty file") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected comma-separated text: {str(error).strip()}") from None
    missing = [name for name in (*FEATURES, "Species") if name not in table]
    if missing:
        raise InputError(f"{path}: expected column {missing[0]!r}, got columns {', '.join(map(repr, table.columns))}")
    if not isinstance(table.index, pd.RangeIndex):
        raise InputError(f"{path}: expected rows of {len(table.columns)} values, as in the header, got more in some")
    if table.empty:
        raise InputError(f"{path}: expected at least one flower, got only a header")
    columns = [np.asarray(pd.to_numeric(table[name], errors="coerce"), float) for name in FEATURES]
    species = np.array([SPECIES.index(name) if name in SPECIES else -1 for name in table["Species"]])
    expected = {
        name: ((column > 0) & (column < np.inf), "a positive number")
        for name, column in zip(FEATURES, columns, strict=True)
    }
    expected["Species"] = species >= 0, f"one of {', '.join(SPECIES)}"
    for name, (good, what) in expected.items():
        if not good.all():
            row = int(good.argmin())
            raise InputError(f"{path}, line {row + 2}: {name} is {table[name][row]!r}, expected {what}")
    return np.stack(columns, axis=1), species


def read_split(path: Path, seed: int) -> Split:
    """Hold out 30 % of each species; standardise by the mean and deviation of the rest."""
    features, species = read_iris(path)
    check_species(path, species, 4)
    parts = train_test_split(np.arange(species.size), test_size=0.3, stratify=species, random_state=seed)
    return split_of(path, features, species, *map(np.asarray, parts))


def read_folds(path: Path, seed: int) -> list[Split]:
    """Five splits, in which every flower is held out once."""
    features, species = read_iris(path)
    check_species(path, species, FOLDS)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(features, species)
    return [split_of(path, features, species, train, test) for train, test in folds]


def check_species(path: Path, species: Int[np.ndarray, " flowers"], least: int) -> None:
    counts = np.bincount(species, minlength=len(SPECIES))
    if counts.min() < least:
        got = ", ".join(f"{count} {name}" for count, name in zip(counts, SPECIES, strict=True))
        raise InputError(f"{path}: expected at least {least} flowers of each species, got {got}")


def split_of(path: Path, features: np.ndarray, species: np.ndarray, train: np.ndarray, test: np.ndarray) -> Split:
    """The chosen flowers, standardised by the mean and deviation of the training flowers."""
    mean, scale = features[train].mean(0), features[train].std(0)
    if not scale.all():
        name = FEATURES[int(scale.argmin())]
        raise InputError(f"{path}: expected {name} to vary, got one value for all training flowers")
    standardised, labels = jnp.asarray((features - mean) / scale, jnp.float32), jnp.asarray(species, jnp.int32)
    return Split(standardised[train], labels[train], standardised[test], labels[test], mean, scale)


logits_of = jax.vmap(apply_mlp, in_axes=(None, 0))


def accuracy(params, features: Float[Array, "flowers 4"], labels: Int[Array, " flowers"]) -> Float[Array, ""]:
    return jnp.mean(jnp.argmax(logits_of(params, features), axis=-1) == labels)


def measure(params, split: Split) -> dict[str, Array]:
    return {
        "loss": cross_entropy(logits_of(params, split.train_x), split.train_y),
        "test_loss": cross_entropy(logits_of(params, split.test_x), split.test_y),
        "train_accuracy": accuracy(params, split.train_x, split.train_y),
        "test_accuracy": accuracy(params, split.test_x, split.test_y),
    }


def train_step(state, split: Split, optimizer: optax.GradientTransformation):
    """One step; reports the parameters as they were before it."""
    params, moments = state
    metrics = measure(params, split)
    gradient = jax.grad(lambda p: cross_entropy(logits_of(p, split.train_x), split.train_y))(params)
    updates, moments = optimizer.update(gradient, moments, params)
    return (optax.apply_updates(params, updates), moments), metrics


@functools.partial(jax.jit, static_argnames=("optimizer", "steps"))
def train(state, split: Split, optimizer: optax.GradientTransformation, steps: int):
    """`steps` steps as one compiled loop."""
    return jax.lax.scan(lambda carry, _: train_step(carry, split, optimizer), state, length=steps)


def table_of(metrics: dict[str, Array], step: int, learning_rate: float) -> pd.DataFrame:
    """A row for each step from `step` on; refuses a loss that is not finite."""
    table = pd.DataFrame({name: np.atleast_1d(column) for name, column in metrics.items()}, dtype=float)
    lost = ~np.isfinite(table["loss"])
    if lost.any():
        raise InputError(
            f"--learning-rate {learning_rate:g}: expected a finite loss, got none from step {step + lost.argmax()} on"
        )
    return table


@functools.cache
def make_optimizer(name: str, learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(weight_decay), OPTIMIZERS[name](learning_rate))


def run(config: Config) -> dict[str, float]:
    """Train on each fold, write the results to `config.out` and return the summary."""
    check_training(config)
    if not 0 <= config.weight_decay < float("inf"):
        raise InputError(f"--weight-decay: expected a number of at least 0, got {config.weight_decay}")
    folds = read_folds(config.data, config.seed)
    out = make_folder(config.out)
    start = time.perf_counter()
    optimizer = make_optimizer(config.optimizer, config.learning_rate, config.weight_decay)
    # The loop is cut in pieces so that progress shows and Ctrl-C is heard; it is compiled before, which is no progress.
    piece = min(max(1, config.steps // 20), LONGEST_PIECE)
    counts = [piece] * (config.steps // piece) + [config.steps % piece] * (config.steps % piece > 0)
    print("compiling ...", file=sys.stderr)
    keys = jax.random.split(jax.random.key(config.seed), FOLDS)
    states = [initial_state(key, optimizer) for key in keys]
    compiled, measured = {}, {}
    for state, split in zip(states, folds, strict=True):
        size = split.test_y.size  # which may differ by a flower in other data
        if size not in measured:
            measured[size] = jax.jit(measure).lower(state[0], split).compile()
            compiled |= {(count, size): train.lower(state, split, optimizer, count).compile() for count in set(counts)}
    tables, networks = [], []
    with tqdm(total=FOLDS * config.steps, unit="step", smoothing=0) as bar:
        for state, split in zip(states, folds, strict=True):
            history, done = [], 0
            for count in counts:
                state, metrics = compiled[count, split.test_y.size](state, split)
                history.append(table_of(metrics, done, config.learning_rate))
                done += count
                bar.update(count)
                bar.set_postfix(loss=f"{history[-1]['loss'].iloc[-1]:.4g}")
            params, _ = state
            final = measured[split.test_y.size](params, split)
            history.append(table_of(final, config.steps, config.learning_rate))
            tables.append(pd.concat(history, ignore_index=True))
            networks.append(params)
    sizes = [split.test_y.size for split in folds]
    table = pd.DataFrame({name: np.average([t[name] for t in tables], 0, sizes) for name in tables[0]})
    table.index.name = "step"
    table.to_csv(out / "metrics.csv", columns=["loss", "test_loss", "train_accuracy", "test_accuracy"])
    last = table.iloc[-1]
    summary = {
        "train_loss": float(last["loss"]),
        "test_loss": float(last["test_loss"]),
        "train_accuracy": float(last["train_accuracy"]),
        "test_accuracy": float(last["test_accuracy"]),
        "steps": config.steps,
        "seconds": round(time.perf_counter() - start, 3),
        "seed": config.seed,
    }
    write_json(out / "summary.json", summary)
    plot_loss(table, out / "loss.png")
    plot_confusion(networks, folds, out / "confusion.png")
    plot_regions(networks, folds, out / "regions.png")
    say_growth(config, table["loss"].iloc[0], table["loss"].iloc[-1])
    print(
        f"{FOLDS} networks, {config.steps} steps each: training loss {table['loss'].iloc[0]:.4g} -> "
        f"{summary['train_loss']:.4g}, accuracy {summary['train_accuracy']:.3f} in training, "
        f"{summary['test_accuracy']:.3f} held out; see {out}"
    )
    return summary


@functools.partial(jax.jit, static_argnames="optimizer")
def initial_state(key: Key[Array, ""], optimizer: optax.GradientTransformation):
    params = init_mlp(key, (len(FEATURES), 5, 4, len(SPECIES)))
    return params, optimizer.init(params)


def plot_loss(table: pd.DataFrame, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2)
    for suffix, color, label in (("train", BLUE, "training"), ("test", RED, "held out")):
        loss = table["loss" if suffix == "train" else "test_loss"]
        left.semilogy(table.index, loss, color=color, label=label)
        right.plot(table.index, table[f"{suffix}_accuracy"], color=color, label=label)
    left.set(title="loss", xlabel="step", ylabel="cross-entropy (nats)")
    left.legend(loc="lower left")
    right.set(title="accuracy", xlabel="step", ylabel="fraction correct", ylim=(0, 1.02))
    right.legend(loc="lower right")
    save(figure, path)


def plot_confusion(networks, folds: list[Split], path: Path) -> None:
    """Every flower, as predicted by the network that has not seen it."""
    counts = np.zeros((len(SPECIES), len(SPECIES)), int)
    for params, split in zip(networks, folds, strict=True):
        predicted = np.argmax(logits_of(params, split.test_x), axis=-1)
        np.add.at(counts, (np.asarray(split.test_y), predicted), 1)
    figure, axes = plt.subplots(figsize=(5, 4.4))
    axes.imshow(counts, cmap="Blues")
    for (row, column), count in np.ndenumerate(counts):
        axes.text(
            column, row, str(count), ha="center", va="center", color="white" if count > counts.max() / 2 else "black"
        )
    axes.set_xticks(range(len(SPECIES)), SPECIES)
    axes.set_yticks(range(len(SPECIES)), SPECIES)
    axes.set(title="held-out flowers", xlabel="predicted", ylabel="true")
    save(figure, path)


def plot_regions(networks, folds: list[Split], path: Path) -> None:
    """The most likely species over the two petal measurements, and which flowers their network gets wrong."""
    length, width = 2, 3
    x, y = np.meshgrid(np.linspace(0.5, 7.5, 300), np.linspace(-0.2, 3.0, 300))
    probs = np.zeros((*x.shape, len(SPECIES)))
    flowers, species, wrong = [], [], []
    for params, split in zip(networks, folds, strict=True):
        grid = np.broadcast_to(split.mean, (*x.shape, len(FEATURES))).copy()
        grid[..., length], grid[..., width] = x, y
        standardised = jnp.asarray((grid - split.mean) / split.scale, jnp.float32)
        probs += np.asarray(softmax(jax.vmap(logits_of, in_axes=(None, 0))(params, standardised)))
        flowers.append(np.asarray(split.test_x) * split.scale + split.mean)
        species.append(np.asarray(split.test_y))
        wrong.append(np.argmax(logits_of(params, split.test_x), axis=-1) != split.test_y)
    centimetres, label, missed = (np.concatenate(arrays) for arrays in (flowers, species, wrong))
    figure, axes = plt.subplots(figsize=(WIDE, 4.4))
    axes.contourf(x, y, probs.argmax(-1), levels=[-0.5, 0.5, 1.5, 2.5], colors=[*map(tint, COLORS)])
    for number, (name, color) in enumerate(zip(SPECIES, COLORS, strict=True)):
        chosen = centimetres[label == number]
        axes.scatter(
            chosen[:, length], chosen[:, width], 26, color=color, edgecolor="black", linewidth=0.4, label=name
        )  # fmt: skip
    axes.scatter(
        centimetres[missed, length], centimetres[missed, width], 140, facecolor="none", edgecolor="black",
        linewidth=1.6, label=f"wrong when held out: {missed.sum()}",
    )  # fmt: skip
    axes.set(
        title="areas: most likely species, for a sepal of mean size",
        xlabel="petal length (cm)",
        ylabel="petal width (cm)",
    )
    figure.legend(loc="outside right center")
    save(figure, path)


if __name__ == "__main__":
    enter(Config, run, __doc__)
