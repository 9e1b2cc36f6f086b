"""What does a hand-written NumPy classifier of irises learn, with its spelling mistake and a bias for every flower?

python -m experiments.numpy_classifier

This is the training loop of a programmer who asked how to multiply by the derivative of softmax, with the
same data preparation, its mistakes one at a time, and their repairs:

- A: as written. The table of classes spells "veriscolor", so merging it silently drops 50 of the 150
  flowers; every flower has its own biases, whose gradients are not summed.
- B, C: the error term multiplied by the Jacobian, and by only the Jacobian's diagonal.
- D: one bias per unit. E: the spelling corrected. H: both; the tanh units are saturated and nothing is learned.
- The repairs of H: standardised measurements, normal weights of variance 1/fan_in with zero biases, both.

With normal weights on raw measurements these steps are too long: from about step 80 on the loss is erratic,
then alternates between two values, and rounding decides which of them is on even steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes

from experiments._door import enter, make_folder
from experiments._numbers import Number, report
from experiments._style import COLORS, GREY, WIDE, plt, save
from experiments.iris import FEATURES, read_split
from experiments.iris import Config as Iris
from jaxsoft import apply_mlp, cross_entropy

Matrix = Float[np.ndarray, "rows columns"]  # columns are flowers
Triple = tuple[Matrix, Matrix, Matrix]

ALPHA = 0.1
UNITS = (4, 5, 4, 3)
STEPS = (0, 1, 10, 100, 1000, 5000)
# Mean cross-entropy/accuracy at these steps. Where no class leads, the accuracy is noise and not stated.
TABLE = """
A      1.09163/.5  1.03426/.5  .814506/.5  .662065/1  .374943/1   .107506/1
B      1.09163     1.07781     .974379     .75785     .520528     .236324
C      1.09163     1.08097     .998501     .771753    .597641     .347086
D      -           -           -           .706426    .69449      .693416
E      1.18003     1.15784     1.09817     1.05514    .743806     .248639
H      1.18003     1.15339     1.1004      1.09861    1.09861     1.09861
scaled -           -           -           -          .0839/.973  .0390/.987
both   -           -           -           -          .0456/.987  .0342/.987
"""
# Of 225 flowers held out by five splits.
HELD_OUT = {"cross-entropy": ".969", "jacobian": ".969", "hadamard": ".978", "diagonal": ".822"}


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    out: Path = Path("out/numpy_classifier")
    """Folder for summary.json and the pictures."""


def softmax(x: Matrix) -> Matrix:
    """The programmer's: the maximum is taken over the whole array, not over each column."""
    e_x = np.exp(x - np.max(x))
    return e_x / e_x.sum(axis=0)


def jacobians(o: Matrix) -> Float[np.ndarray, "classes classes columns"]:
    """The programmer's (o eᵀ)∘(I − e oᵀ) of one output, for every column."""
    return o[:, None] * (np.eye(len(o), dtype=o.dtype)[..., None] - o[None])


DELTA3: dict[str, Callable[[Matrix, Matrix], Matrix]] = {
    "cross-entropy": lambda o, y: o - y,
    "jacobian": lambda o, y: np.einsum("ijn,jn->in", jacobians(o), o - y),
    "hadamard": lambda o, y: (o - y) * o * (1 - o),
    "diagonal": lambda o, y: -y * (1 - o),
}


class History(NamedTuple):
    """Mean cross-entropy and accuracy before every step, and how the loop ended."""

    loss: Float[np.ndarray, " steps"]
    accuracy: Float[np.ndarray, " steps"]
    weights: Triple
    biases: Triple


def forward(x: Matrix, weights: Triple, biases: Triple) -> Triple:
    (w1, w2, w3), (b0, b1, b2) = weights, biases
    x1 = np.tanh(w1 @ x + b0)
    x2 = np.tanh(w2 @ x1 + b1)
    return x1, x2, softmax(w3 @ x2 + b2)


def descend(
    x: Matrix, y: Matrix, weights: Triple, biases: Triple, *, delta3: str = "cross-entropy", steps: int
) -> History:
    """Gradient descent in plain NumPy; the derivative at the output is the choice of `delta3`."""
    (w1, w2, w3), (b0, b1, b2) = weights, biases
    loss, accuracy = np.empty(steps + 1), np.empty(steps + 1)
    for step in range(steps + 1):
        x1, x2, x3 = forward(x, (w1, w2, w3), (b0, b1, b2))
        loss[step] = -np.mean(np.log(np.sum(x3 * y, axis=0)))
        accuracy[step] = np.mean(x3.argmax(axis=0) == y.argmax(axis=0))
        if step == steps:
            break
        delta_3 = DELTA3[delta3](x3, y) / y.shape[1]
        delta_2 = (w3.T @ delta_3) * (1 - x2**2)
        delta_1 = (w2.T @ delta_2) * (1 - x1**2)
        w1, b0 = w1 - ALPHA * delta_1 @ x.T, b0 - ALPHA * gathered(delta_1, b0)
        w2, b1 = w2 - ALPHA * delta_2 @ x1.T, b1 - ALPHA * gathered(delta_2, b1)
        w3, b2 = w3 - ALPHA * delta_3 @ x2.T, b2 - ALPHA * gathered(delta_3, b2)
    return History(loss, accuracy, (w1, w2, w3), (b0, b1, b2))


def gathered(delta: Matrix, bias: Matrix) -> Matrix:
    """A bias shared by all flowers receives the sum over them."""
    return delta.sum(axis=1, keepdims=True) if bias.shape[1] == 1 else delta


def descend_in_jax(x: Matrix, y: Matrix, weights: Triple, biases: Triple, *, steps: int) -> Float[np.ndarray, " steps"]:
    """The losses of the same descent with this library's network and loss, in float64."""
    shared = biases[0].shape[1] == 1
    axes = ({"kernel": None, "bias": None if shared else 0},) * len(weights)
    logits_of = jax.vmap(apply_mlp, in_axes=(axes, 0))

    @jax.jit
    def train(params, features, labels):
        def step(params, _):
            value, gradient = jax.value_and_grad(lambda p: cross_entropy(logits_of(p, features), labels))(params)
            return jax.tree.map(lambda p, g: p - ALPHA * g, params, gradient), value

        return jax.lax.scan(step, params, length=steps + 1)[1]

    with jax.enable_x64(True):
        params = tuple(
            {"kernel": jnp.asarray(w.T), "bias": jnp.asarray(b[:, 0] if shared else b.T)}
            for w, b in zip(weights, biases, strict=True)
        )
        return np.asarray(train(params, jnp.asarray(x.T), jnp.asarray(y.argmax(axis=0))))


def class_table(spelling: str) -> pd.DataFrame:
    rows = {"setosa": [1, 0, 0], spelling: [0, 1, 0], "virginica": [0, 0, 1]}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("Species").reset_index()


def prepare(spelling: str = "veriscolor") -> tuple[Matrix, Matrix]:
    """Measurements (4, flowers) and one-hot classes (3, flowers), by an inner merge on Species."""
    data = pd.merge(pd.read_csv(Iris().data), class_table(spelling)).drop(columns="Unnamed: 0")
    return data[list(FEATURES)].to_numpy(float).T, data[[0, 1, 2]].to_numpy(float).T


def merge_report() -> dict[str, int]:
    """What an outer merge would have told: rows in both tables, in the left or in the right only."""
    merged = pd.merge(pd.read_csv(Iris().data), class_table("veriscolor"), how="outer", indicator=True)
    return {str(where): int(count) for where, count in merged["_merge"].value_counts().items()}


def draw_weights(*, normal: bool = False) -> Triple:
    """Seed 42, in the order w1, w2, w3: uniform on [0, 1), or normal with variance 1/fan_in."""
    random = np.random.RandomState(42)
    shapes = zip(UNITS[1:], UNITS, strict=False)
    w1, w2, w3 = (random.randn(m, n) / np.sqrt(n) if normal else random.rand(m, n) for m, n in shapes)
    return w1, w2, w3


def constant_biases(value: float, columns: int) -> Triple:
    b0, b1, b2 = (np.full((units, columns), value) for units in UNITS[1:])
    return b0, b1, b2


def standardise(x: Matrix) -> Matrix:
    return (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)


class Setup(NamedTuple):
    """What a run changes in the programmer's loop."""

    label: str
    delta3: str = "cross-entropy"
    typo: bool = True
    shared: bool = False
    scaled: bool = False
    normal: bool = False  # normal weights and zero biases


SETUPS = {
    "A": Setup("A: as written"),
    "B": Setup("B: times the Jacobian", delta3="jacobian"),
    "C": Setup("C: times o(1 − o)", delta3="hadamard"),
    "D": Setup("D: one bias per unit", shared=True),
    "E": Setup("E: a bias for every flower", typo=False),
    "H": Setup("H: one bias per unit", typo=False, shared=True),
    "scaled": Setup("H, standardised", typo=False, shared=True, scaled=True),
    "normal": Setup("H, normal weights (alternates)", typo=False, shared=True, normal=True),
    "both": Setup("H, standardised, normal weights", typo=False, shared=True, scaled=True, normal=True),
}


def start(setup: Setup) -> tuple[Matrix, Matrix, Triple, Triple]:
    """Measurements, classes, weights and biases before the first step."""
    x, y = prepare() if setup.typo else prepare("versicolor")
    biases = constant_biases(0.0 if setup.normal else 1.0, 1 if setup.shared else y.shape[1])
    return standardise(x) if setup.scaled else x, y, draw_weights(normal=setup.normal), biases


def follow(name: str, steps: int = STEPS[-1]) -> History:
    setup = SETUPS[name]
    return descend(*start(setup), delta3=setup.delta3, steps=steps)


def controls(name: str, steps: int = STEPS[-1]) -> dict[str, History]:
    """A run without its measurements, and with classes given to the wrong flowers."""
    x, y, *parameters = start(SETUPS[name])
    shuffled = np.random.default_rng(0).permutation(y, axis=1)
    return {
        "measurements set to 0": descend(0 * x, y, *parameters, steps=steps),
        "labels shuffled": descend(x, shuffled, *parameters, steps=steps),
    }


def broadcast_error() -> str:
    """What NumPy says once the spelling is mended and the biases still have 100 columns."""
    try:
        forward(prepare("versicolor")[0], draw_weights(), constant_biases(1.0, 100))
    except ValueError as error:
        return str(error)
    return "none"


def held_out_accuracy(delta3: str, steps: int = 3000) -> float:
    """Over five stratified splits of 105 and 45 flowers, of the network with every repair."""
    weights, biases = draw_weights(normal=True), constant_biases(0.0, 1)
    right = []
    for seed in range(5):
        train_x, train_y, test_x, test_y = (np.asarray(part) for part in read_split(Iris().data, seed)[:4])
        x, test_x = train_x.T.astype(float), test_x.T.astype(float)
        learned = descend(x, np.eye(3)[:, train_y], weights, biases, delta3=delta3, steps=steps)
        *_, outputs = forward(test_x, learned.weights, learned.biases)
        right.append(np.mean(outputs.argmax(axis=0) == test_y))
    return float(np.mean(right))


def run(config: Config) -> dict[str, float]:
    """Follow every run, write the results to `config.out` and return the computed numbers."""
    out = make_folder(config.out)
    histories = {name: follow(name) for name in SETUPS}
    memory = {name: {"measurements and labels": histories[name], **controls(name)} for name in ("E", "both")}
    plot_runs(histories, out / "runs.png")
    plot_memory(memory, out / "memorisation.png")
    print(f"with the spelling mended NumPy says: {broadcast_error()}\n")
    return report(
        [
            *data_numbers(),
            *table_numbers(histories),
            *alternating_numbers(histories["normal"]),
            *jax_numbers(histories),
            *memory_numbers(memory["E"], memory["both"]),
            *held_out_numbers(),
        ],
        out,
    )


def data_numbers() -> list[Number]:
    merged = merge_report()
    x, _, weights, biases = start(SETUPS["A"])
    x1, *_ = forward(x, weights, biases)
    return [
        Number("merge: rows in both tables", "100", merged["both"]),
        Number("merge: rows in the data only", "50", merged["left_only"]),
        Number("merge: rows in the table of classes only", "1", merged["right_only"]),
        Number("A: weights", "52", sum(w.size for w in weights)),
        Number("A: biases", "1200", sum(b.size for b in biases)),
        Number("A: largest 1 − x1² before learning", ".0402", np.max(1 - x1**2)),
    ]


def table_numbers(histories: dict[str, History]) -> list[Number]:
    numbers = []
    for name, *cells in map(str.split, TABLE.strip().splitlines()):
        for step, cell in zip(STEPS, cells, strict=True):
            loss, _, accuracy = cell.partition("/")
            if loss != "-":
                numbers.append(Number(f"{name}: loss at step {step}", loss, histories[name].loss[step]))
            if accuracy:
                numbers.append(Number(f"{name}: accuracy at step {step}", accuracy, histories[name].accuracy[step]))
    return numbers


def alternating_numbers(history: History) -> list[Number]:
    """Of two consecutive steps, since rounding decides which comes first, and to the digits that it leaves."""
    numbers = []
    for step, high, accuracy, low in ((1000, ".11", ".96", ".08"), (5000, ".05", ".98", ".046")):
        loss, correct = history.loss[step - 1 : step + 1], history.accuracy[step - 1 : step + 1]
        numbers += [
            Number(f"normal: higher loss of steps {step - 1} and {step}", high, loss.max()),
            Number(
                f"normal: accuracy at the higher loss of steps {step - 1} and {step}", accuracy, correct[loss.argmax()]
            ),
            Number(f"normal: lower loss of steps {step - 1} and {step}", low, loss.min()),
        ]
    return numbers


def jax_numbers(histories: dict[str, History]) -> list[Number]:
    numbers = []
    for name in ("A", "D", "E", "H"):
        losses = descend_in_jax(*start(SETUPS[name]), steps=STEPS[-1])
        difference = np.abs(losses - histories[name].loss).max()
        numbers.append(Number(f"{name}: loss in JAX against NumPy, all steps", "<1e-12", difference))
    return numbers


def memory_numbers(flower: dict[str, History], unit: dict[str, History]) -> list[Number]:
    (real, blank, shuffled), (_, unit_blank, unit_shuffled) = flower.values(), unit.values()
    new_flower = prepare("versicolor")[0][:, :1]
    answers = forward(new_flower, real.weights, real.biases)[2].argmax(axis=0)
    change = np.abs(real.loss - blank.loss).max()
    return [
        Number("a bias per flower: change of the loss by measurements of 0", "<.001", change),
        Number("a bias per flower: accuracy with measurements of 0", "1.000", blank.accuracy[-1]),
        Number("a bias per flower: accuracy on shuffled labels", "1.000", shuffled.accuracy[-1]),
        Number("a bias per flower: different answers for one flower", "3", np.unique(answers).size),
        Number("a bias per unit: loss with measurements of 0 (ln 3)", "1.098612", unit_blank.loss[-1]),
        Number("a bias per unit: loss on shuffled labels", ">.8", unit_shuffled.loss[-1]),
    ]


def held_out_numbers() -> list[Number]:
    return [Number(f"held out: {name}", stated, held_out_accuracy(name)) for name, stated in HELD_OUT.items()]


def plot_runs(histories: dict[str, History], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(WIDE, 4.6), sharey=True)
    titles = ("misspelt class: 100 flowers, two species", "spelling mended: 150 flowers, three species")
    for axes, title, typo, classes in zip(panels, titles, (True, False), (2, 3), strict=True):
        shown = [name for name, setup in SETUPS.items() if setup.typo == typo]
        for name, color in zip(shown, COLORS, strict=False):
            draw_envelope(axes, histories[name].loss[1:], color, SETUPS[name].label)
        axes.axhline(np.log(classes), color=GREY, linestyle=":", label=f"ln {classes}: guessing")
        axes.set(title=title, xlabel="step", xscale="log", yscale="log")
        axes.legend(loc="lower left")
    panels[0].set(ylabel="mean cross-entropy (nats)")
    save(figure, path)


def draw_envelope(axes: Axes, loss: Float[np.ndarray, " steps"], color: str, label: str) -> None:
    """From the lowest to the highest loss about each step: one line where it is smooth, a band where it is not."""
    edges = np.unique(np.geomspace(1, loss.size, 150).astype(int)) - 1
    low, high = np.minimum.reduceat(loss, edges), np.maximum.reduceat(loss, edges)
    # The lines above all bands, which else would hide them.
    axes.fill_between(edges + 1, low, high, color=color, alpha=0.3, linewidth=0, zorder=1)
    axes.plot(edges + 1, high, color=color, zorder=2, label=label)
    axes.plot(edges + 1, low, color=color, zorder=2)


def plot_memory(memory: dict[str, dict[str, History]], path: Path) -> None:
    figure, panels = plt.subplots(2, 2, figsize=(WIDE, 6), sharex=True, sharey="row")
    titles = ("a bias for every flower: it memorises", "a bias for every unit: it learns")
    for (upper, lower), title, runs in zip(panels.T, titles, memory.values(), strict=True):
        for (label, history), style in zip(runs.items(), ("-", "--", ":"), strict=True):
            steps = np.arange(1, history.loss.size)
            upper.semilogx(steps, history.loss[1:], style, label=label, linewidth=2)
            lower.semilogx(steps, history.accuracy[1:], style, label=label, linewidth=2)
        upper.set(title=title)
        lower.set(xlabel="step", ylim=(0, 1.04))
    panels[0, 0].legend(loc="lower left")
    panels[0, 0].set(ylabel="mean cross-entropy (nats)")
    panels[1, 0].set(ylabel="accuracy on the same flowers")
    save(figure, path)


if __name__ == "__main__":
    enter(Config, run, __doc__)
