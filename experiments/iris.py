"""Does a small tanh network with this library's softmax rule learn to tell three irises apart?

python -m experiments.iris --seed 42
"""

import functools
import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from jaxtyping import Array, Float, Int
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from experiments._door import InputError, check_training, enter, make_folder, say_growth, write_json
from experiments._style import BLUE, GREEN, ORANGE, RED, WIDE, plt, save, tint
from jaxsoft import apply_mlp, cross_entropy, init_mlp

FEATURES = ("SepalLength", "SepalWidth", "PetalLength", "PetalWidth")
SPECIES = ("setosa", "versicolor", "virginica")
COLORS = BLUE, ORANGE, GREEN
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
    """Draws the held-out flowers and the initial weights."""
    steps: int = 300
    """Gradient steps, each on all training flowers."""
    optimizer: Literal["adam", "sgd", "momentum"] = "adam"
    """Optax optimizer."""
    learning_rate: float = 0.01
    """Step size of the optimizer."""
    data: Path = Path(__file__).parents[1] / "data" / "iris.csv"
    """CSV file with the four measurements in centimetres and the species."""
    overwrite: bool = False
    """Replace the run in the folder of results."""
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
        raise InputError(f"{path}: expected rows of {len(table.columns)} values, as the header has, got more in some")
    if table.empty:
        raise InputError(f"{path}: expected at least one flower, got a header alone")
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
    counts = np.bincount(species, minlength=len(SPECIES))
    if counts.min() < 4:
        got = ", ".join(f"{count} {name}" for count, name in zip(counts, SPECIES, strict=True))
        raise InputError(f"{path}: expected at least 4 flowers of each species, got {got}")
    train, test = train_test_split(np.arange(species.size), test_size=0.3, stratify=species, random_state=seed)
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


def run(config: Config) -> dict[str, float]:
    """Train, write the results to `config.out` and return the summary."""
    check_training(config)
    split = read_split(config.data, config.seed)
    out = make_folder(config.out)
    start = time.perf_counter()
    optimizer = OPTIMIZERS[config.optimizer](config.learning_rate)
    params = init_mlp(jax.random.key(config.seed), (len(FEATURES), 5, 4, len(SPECIES)))
    state = params, optimizer.init(params)
    # The loop is cut in pieces so that progress shows and Ctrl-C is heard; it is compiled before, which is no progress.
    piece = min(max(1, config.steps // 20), LONGEST_PIECE)
    counts = [piece] * (config.steps // piece) + [config.steps % piece] * (config.steps % piece > 0)
    compiled = {count: train.lower(state, split, optimizer, count).compile() for count in set(counts)}
    history = []
    with tqdm(total=config.steps, unit="step", smoothing=0) as bar:
        for count in counts:
            state, metrics = compiled[count](state, split)
            history.append(table_of(metrics, bar.n, config.learning_rate))
            bar.update(count)
            bar.set_postfix(loss=f"{history[-1]['loss'].iloc[-1]:.4g}")
    params, _ = state
    final = measure(params, split)
    table = pd.concat([*history, table_of(final, config.steps, config.learning_rate)], ignore_index=True)
    table.index.name = "step"
    table.to_csv(out / "metrics.csv", columns=["loss", "test_loss", "train_accuracy", "test_accuracy"])
    summary = {
        "train_loss": float(final["loss"]),
        "test_loss": float(final["test_loss"]),
        "train_accuracy": float(final["train_accuracy"]),
        "test_accuracy": float(final["test_accuracy"]),
        "steps": config.steps,
        "seconds": round(time.perf_counter() - start, 3),
        "seed": config.seed,
    }
    write_json(out / "summary.json", summary)
    plot_loss(table, out / "loss.png")
    plot_confusion(params, split, out / "confusion.png")
    plot_regions(params, split, out / "regions.png")
    say_growth(config, table["loss"].iloc[0], table["loss"].iloc[-1])
    print(
        f"{config.steps} steps: training loss {table['loss'].iloc[0]:.4g} -> {summary['train_loss']:.4g}, "
        f"accuracy {summary['train_accuracy']:.3f} in training, {summary['test_accuracy']:.3f} held out; see {out}"
    )
    return summary


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


def plot_confusion(params, split: Split, path: Path) -> None:
    predicted = np.argmax(logits_of(params, split.test_x), axis=-1)
    counts = np.zeros((len(SPECIES), len(SPECIES)), int)
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


def plot_regions(params, split: Split, path: Path) -> None:
    """The predicted class over the two petal measurements, at the mean sepal."""
    length, width = 2, 3
    x, y = np.meshgrid(np.linspace(0.5, 7.5, 300), np.linspace(-0.2, 3.0, 300))
    grid = np.broadcast_to(split.mean, (*x.shape, len(FEATURES))).copy()
    grid[..., length], grid[..., width] = x, y
    standardised = jnp.asarray((grid - split.mean) / split.scale, jnp.float32)
    predicted = np.argmax(jax.vmap(logits_of, in_axes=(None, 0))(params, standardised), axis=-1)
    figure, axes = plt.subplots(figsize=(WIDE, 4.4))
    axes.contourf(x, y, predicted, levels=[-0.5, 0.5, 1.5, 2.5], colors=[*map(tint, COLORS)])
    for features, labels, marker, name in (
        (split.train_x, split.train_y, "o", "training"),
        (split.test_x, split.test_y, "^", "held out"),
    ):
        centimetres = np.asarray(features) * split.scale + split.mean
        for label, (species, color) in enumerate(zip(SPECIES, COLORS, strict=True)):
            chosen = centimetres[np.asarray(labels) == label]
            axes.scatter(
                chosen[:, length], chosen[:, width], 26, color=color, marker=marker, edgecolor="black", linewidth=0.4,
                label=f"{species}, {name}",
            )  # fmt: skip
    wrong = np.argmax(logits_of(params, split.test_x), axis=-1) != split.test_y
    missed = (np.asarray(split.test_x) * split.scale + split.mean)[wrong]
    axes.scatter(
        missed[:, length], missed[:, width], 140, facecolor="none", edgecolor="black", linewidth=1.6,
        label=f"held out and wrong: {len(missed)}",
    )  # fmt: skip
    axes.set(
        title="areas: the species predicted for a sepal of mean size",
        xlabel="petal length (cm)",
        ylabel="petal width (cm)",
    )
    figure.legend(loc="outside right center")
    save(figure, path)


if __name__ == "__main__":
    enter(Config, run, __doc__)
