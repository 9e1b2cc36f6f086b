"""How accurate are a loss and its gradient in float32, as the margin of the label's logit grows?

python -m experiments.exactness

The label's logit is the largest other logit plus a margin. Losses of jaxsoft and other libraries in float32, and their
derivatives with respect to that logit, are compared with the same float32 logits in float64, where the loss is log1p of
the sum over the other classes. The difference of two logits is rounded before the exponential, which alone gives an
error of up to the margin times half the machine epsilon. A relative error of 1 means that the loss or the gradient is
0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments._door import InputError, check_counts, check_seed, enter, make_folder
from experiments._numbers import Number, report
from experiments._style import BLUE, GREY, ORANGE, SKY
from jaxsoft import cross_entropy

MARGINS = np.arange(-20, 80.5, 0.5)
MAX_CLASSES = 10_000
FLOOR = 1e-9  # smaller errors are drawn here
LINES = (GREY, "-"), (ORANGE, "--"), (BLUE, "-"), (SKY, "--")  # so that two curves are visible where they coincide

Logits = Float[np.ndarray, "margins draws classes"]
Curves = dict[str, Float[np.ndarray, " margins"]]


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    classes: int = 5
    """Classes, of which the first is the label."""
    draws: int = 64
    """Draws of the other logits, from a normal distribution; the worst draw counts."""
    seed: int = 0
    """Seed for the logits."""
    out: Path = Path("out/exactness")
    """Folder for summary.json and the picture."""


def run(config: Config) -> dict[str, float]:
    """Compute every number, write the results to `config.out` and return them."""
    check_counts(config, "draws")
    if not 2 <= config.classes <= MAX_CLASSES:
        raise InputError(f"--classes: expected an integer in [2, {MAX_CLASSES}], got {config.classes}")
    check_seed(config.seed)
    out = make_folder(config.out)
    logits = draw_logits(config)
    losses, gradients = measure(logits)
    plot(losses, gradients, out / "exactness.svg")
    at_20 = MARGINS.tolist().index(20)
    return report(
        [
            Number("jaxsoft: loss, worst of all margins", "<1e-5", losses["jaxsoft"].max()),
            Number("jaxsoft: gradient, worst of all margins", "<1e-5", gradients["jaxsoft"].max()),
            Number("jaxsoft, one-hot: loss, worst of all margins", "<1e-5", losses["jaxsoft, one-hot"].max()),
            Number("jaxsoft, one-hot: gradient, worst of all margins", "<1e-5", gradients["jaxsoft, one-hot"].max()),
            Number("optax: loss at 20", "1", losses["optax"][at_20]),
            Number("optax: gradient at 20", "1", gradients["optax"][at_20]),
            Number("−log softmax: loss at 20", "1", losses["−log softmax"][at_20]),
        ],
        out,
    )


def draw_logits(config: Config) -> Logits:
    """Logits in float32, the label first."""
    shape = len(MARGINS), config.draws, config.classes - 1
    others = np.random.default_rng(config.seed).normal(size=shape)
    label = others.max(-1, keepdims=True) + MARGINS[:, None, None]
    return np.concatenate([label, others], -1).astype(np.float32)


def truth(logits: Logits) -> tuple[Float[np.ndarray, "margins draws"], Float[np.ndarray, "margins draws"]]:
    """Losses, and their derivatives to the label's logit, in float64."""
    z = logits.astype(np.float64)
    others = np.exp(z[..., 1:] - z[..., :1]).sum(-1)
    return np.log1p(others), -others / (1 + others)


def optax_loss(z: Float[Array, " classes"]) -> Float[Array, ""]:
    return optax.softmax_cross_entropy_with_integer_labels(z, jnp.array(0))


PEERS: dict[str, Callable[[Float[Array, " classes"]], Float[Array, ""]]] = {
    "−log softmax": lambda z: -jnp.log(jax.nn.softmax(z)[0]),
    "optax": optax_loss,
    "jaxsoft": lambda z: cross_entropy(z, jnp.array(0)),
    "jaxsoft, one-hot": lambda z: cross_entropy(z, jax.nn.one_hot(0, z.size)),
}


def measure(logits: Logits) -> tuple[Curves, Curves]:
    """The worst relative errors of loss and gradient, for each implementation and margin."""
    true_losses, true_gradients = truth(logits)
    losses, gradients = {}, {}
    for name, fn in PEERS.items():
        loss, gradient = jax.jit(jax.vmap(jax.vmap(jax.value_and_grad(fn))))(jnp.asarray(logits))
        losses[name] = worst(np.asarray(loss, np.float64), true_losses)
        gradients[name] = worst(np.asarray(gradient[..., 0], np.float64), true_gradients)
    return losses, gradients


def worst(computed: np.ndarray, true: np.ndarray) -> Float[np.ndarray, " margins"]:
    """The worst relative error of the draws; an error that is not finite counts as 1, no right digit."""
    error = np.abs(computed / true - 1)
    return np.where(np.isfinite(error), error, 1).max(1)


def plot(losses: Curves, gradients: Curves, path: Path) -> None:
    """Relative error over margin, of the loss and of its derivative to the label's logit."""
    with plt.rc_context({"svg.hashsalt": "exactness"}):  # the same file from the same numbers
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
        panels = {"loss": losses, "derivative with respect to the label's logit": gradients}
        for ax, (title, curves) in zip(axes, panels.items(), strict=True):
            for (name, errors), (color, line) in zip(curves.items(), LINES, strict=True):
                ax.semilogy(MARGINS, np.maximum(errors, FLOOR), line, color=color, label=name)
            ax.axhline(np.finfo(np.float32).eps, color="black", linewidth=0.8, linestyle=":")
            ax.set(title=title, xlabel="margin: label's logit minus the largest other", ylim=(FLOOR, 3))
        axes[0].text(79, np.finfo(np.float32).eps * 1.4, "float32 rounding", ha="right", fontsize=8)
        axes[0].set_ylabel("relative error")
        axes[0].legend(loc="center right", bbox_to_anchor=(1, 0.62), frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    enter(Config, run, __doc__)
