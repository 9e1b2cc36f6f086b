"""Is logistic regression the two-class case of softmax, digit for digit, however large the input?

python -m experiments.logistic --largest 800
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments._door import InputError, enter, make_folder
from experiments._numbers import Number, report
from experiments._style import WIDE, plt, save
from jaxsoft import cross_entropy, softmax

# Stated at x = 0.7: the sigmoid, and the losses of the labels 1 and 0.
X, SIGMOID, LOSSES = 0.7, "0.66818777", {1: "0.40318605", 0: "1.10318605"}


# What is compared. The rule of softmax alone, s * (g − s·g), subtracts from one: its slope is exact to
# rounding, but not in relative terms where the class leads. The losses and their gradients are.
NAMES = {
    "probability": "P(1), relative error",
    "slope": "dP(1)/dx, absolute error",
    "loss_1": "loss of label 1, relative error",
    "loss_0": "loss of label 0, relative error",
    "gradient_1": "gradient of label 1, relative error",
    "gradient_0": "gradient of label 0, relative error",
}


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    largest: float = 800.0
    """Inputs range from minus this number to this number."""
    step: float = 0.05
    """Distance between inputs."""
    out: Path = Path("out/logistic")
    """Folder for summary.json and the picture."""


class Curves(NamedTuple):
    """What a binary classifier computes from x, for both labels."""

    probability: Float[np.ndarray | Array, " inputs"]
    slope: Float[np.ndarray | Array, " inputs"]  # d probability/dx
    loss_1: Float[np.ndarray | Array, " inputs"]
    loss_0: Float[np.ndarray | Array, " inputs"]
    gradient_1: Float[np.ndarray | Array, " inputs"]  # d loss_1/dx
    gradient_0: Float[np.ndarray | Array, " inputs"]


def logistic(x: Float[np.ndarray, " inputs"]) -> Curves:
    """Logistic regression in NumPy, from exponentials that cannot overflow."""
    small = np.exp(-np.abs(x))
    likely, unlikely = 1 / (1 + small), small / (1 + small)
    one, zero = np.where(x > 0, likely, unlikely), np.where(x > 0, unlikely, likely)
    loss_1, loss_0 = np.maximum(-x, 0) + np.log1p(small), np.maximum(x, 0) + np.log1p(small)
    return Curves(one, one * zero, loss_1, loss_0, -zero, one)


@jax.jit
def two_classes(x: Float[Array, " inputs"]) -> Curves:
    """The same from this library's softmax and cross-entropy of the logits (0, x)."""

    def probability(x):
        return softmax(jnp.stack([jnp.zeros_like(x), x]))[1]

    def loss(x, label):
        return cross_entropy(jnp.stack([jnp.zeros_like(x), x]), label)

    def one_input(x):
        (loss_1, gradient_1), (loss_0, gradient_0) = (jax.value_and_grad(loss)(x, label) for label in (1, 0))
        return Curves(*jax.value_and_grad(probability)(x), loss_1, loss_0, gradient_1, gradient_0)

    return jax.vmap(one_input)(x)


def relative_error(ours: np.ndarray, theirs: np.ndarray | Array) -> np.ndarray:
    """Relative to `theirs`; 0 or 1 below the smallest normal number, which may be flushed to zero."""
    tiny = np.finfo(float).tiny
    error = np.abs(ours - theirs)
    return np.where(np.abs(theirs) < tiny, error > tiny, error / np.maximum(np.abs(theirs), tiny))


def run(config: Config) -> dict[str, float]:
    """Compare in float64, write the results to `config.out` and return the numbers."""
    if not 0 < config.largest <= 1e6:
        raise InputError(f"--largest: expected a number in (0, 1e6], got {config.largest}")
    if not config.largest / 1e6 <= config.step <= config.largest:
        raise InputError(
            f"--step: expected a number in [{config.largest / 1e6:g}, {config.largest:g}], got {config.step}"
        )
    out = make_folder(config.out)
    count = round(config.largest / config.step)
    x = config.step * np.arange(-count, count + 1)
    expected = logistic(x)
    with jax.enable_x64(True):
        computed = jax.device_get(two_classes(jnp.asarray(x)))
        stated = jax.device_get(two_classes(jnp.array([X])))
    errors = {
        NAMES[name]: np.abs(ours - theirs) if name == "slope" else relative_error(ours, theirs)
        for name, ours, theirs in zip(Curves._fields, computed, expected, strict=True)
    }
    with np.errstate(divide="ignore"):
        written = -np.log(1 - expected.probability)  # as usually written: 1 − σ is 0 from x = 53·log 2 = 36.7 on
    plot(x, expected, computed, errors, written, out / "logistic.png")
    numbers = [
        Number(f"sigmoid at x = {X}", SIGMOID, stated.probability[0]),
        *(Number(f"loss of label {y} at x = {X}", LOSSES[y], getattr(stated, f"loss_{y}")[0]) for y in (1, 0)),
        Number(f"gradient of label 1 at x = {X}", f"{float(SIGMOID) - 1:.8f}", stated.gradient_1[0]),
        Number(f"gradient of label 0 at x = {X}", SIGMOID, stated.gradient_0[0]),
        *(Number(f"{name}, |x| to {config.largest:g}", "<1e-12", error.max()) for name, error in errors.items()),
    ]
    # The first input of the grid at or after 53·log 2, where 1 + exp(−x) rounds to 1.
    first = config.step * np.ceil(53 * np.log(2) / config.step)
    if first <= x[-1]:
        numbers.append(Number("−log(1 − σ) is infinite from x =", f"{first:.6f}", x[np.isinf(written).argmax()]))
    return report(numbers, out)


def plot(
    x: np.ndarray, expected: Curves, computed: Curves, errors: dict[str, np.ndarray], written: np.ndarray, path: Path
) -> None:
    figure, (left, middle, right) = plt.subplots(3, 1, figsize=(WIDE, 9.6), height_ratios=(1, 1, 0.9))
    near = np.abs(x) <= 8
    for name, label in (("probability", "P(1)"), ("loss_1", "loss of label 1"), ("loss_0", "loss of label 0")):
        (line,) = left.plot(
            x[near], getattr(computed, name)[near], lw=4, alpha=0.4, label=f"{label}, softmax of (0, x)"
        )
        left.plot(
            x[near], getattr(expected, name)[near], "--", lw=1.2, color=line.get_color(), label=f"{label}, logistic"
        )
    left.set(title="the same curves", xlabel="input x", ylabel="probability, loss (nats)")
    left.legend(loc="upper center")
    positive = (x > 0) & (x <= 60)
    middle.semilogy(x[positive], expected.loss_1[positive], label="label 1: log(1 + exp(−x))")
    middle.semilogy(x[positive], computed.loss_1[positive], "--", label="label 1: cross-entropy of (0, x)")
    middle.semilogy(x[positive], expected.loss_0[positive], label="label 0: x + log(1 + exp(−x))")
    finite = positive & np.isfinite(written)
    middle.semilogy(x[finite], written[finite], "k:", lw=2, label="label 0: −log(1 − σ), infinite from 36.7 on")
    middle.set(title="the losses far out", xlabel="input x", ylabel="loss (nats)")
    middle.legend(loc="lower left")
    largest = [max(error.max(), 1e-18) for error in errors.values()]
    right.barh([name.replace(", ", "\n") for name in errors], largest, left=1e-18)
    right.axvline(1e-12, color="black", ls="--", lw=1, label="bound 1e-12")
    right.invert_yaxis()
    right.set(
        title=f"softmax against logistic, |x| to {x[-1]:g}", xlabel="largest error", xscale="log", xlim=(1e-18, 1e-11)
    )
    right.legend(loc="lower center")
    save(figure, path)


if __name__ == "__main__":
    enter(Config, run, __doc__)
