"""What is the error at a softmax output: how does a 3 × 3 derivative extend to 100 columns of 3 outputs?

python -m experiments.delta

Every column n has its own Jacobian J_n: a stack of shape 3 × 3 × 100, and one matrix-vector product
J_n (∂L/∂o)_n per column, without elementwise products or averages. The stack need not be computed, because
J v = o∘(v − ⟨o, v⟩). For cross-entropy, where (∂L/∂o)_n = −y_n/o_n, the product is o_n − y_n: the error
before multiplying by any derivative is already the gradient.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments import numpy_classifier
from experiments._door import enter, make_folder
from experiments._numbers import Number, report
from experiments._style import WIDE, plt, save
from jaxsoft import cross_entropy, softmax, softmax_jacobian, softmax_vjp

OUTPUT = (0.1, 0.2, 0.7)
TARGET = (0.0, 1.0, 0.0)
JACOBIAN = ((".09", "-.02", "-.07"), ("-.02", ".16", "-.14"), ("-.07", "-.14", ".21"))
EIGENVALUES = ("0.000000", ".125597", ".334403")

Vector = Float[Array, " classes"]


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    out: Path = Path("out/delta")
    """Folder for summary.json and the picture."""


class Candidate(NamedTuple):
    """An error at the output, and the loss, a function of logits and target, whose gradient it is."""

    formula: str
    delta: Callable[[Vector, Vector], Vector]
    loss: Callable[[Vector, Vector], Float[Array, ""]] | None
    loss_name: str


def brier(logits: Vector, target: Vector) -> Float[Array, ""]:
    """½‖softmax(z) − y‖², half the Brier score."""
    return jnp.sum((softmax(logits) - target) ** 2) / 2


CANDIDATES = {  # the names in numpy_classifier.DELTA3
    "cross-entropy": Candidate("o − y", lambda o, y: o - y, cross_entropy, "cross-entropy"),
    "jacobian": Candidate("J (o − y)", lambda o, y: softmax_vjp(o, o - y), brier, "½‖o − y‖² (Brier)"),
    "hadamard": Candidate("(o − y)∘o(1 − o)", lambda o, y: (o - y) * o * (1 - o), None, "no function"),
    "diagonal": Candidate("−y(1 − o)", lambda o, y: -y * (1 - o), None, "no function"),
}


def network_outputs(steps: int = 30) -> tuple[Float[np.ndarray, "3 100"], Float[np.ndarray, "3 100"]]:
    """Outputs and one-hot classes of the programmer's 100 flowers, early in the repaired network's learning."""
    setup = numpy_classifier.SETUPS["both"]._replace(typo=True)
    x, y, weights, biases = numpy_classifier.start(setup)
    learned = numpy_classifier.descend(x, y, weights, biases, steps=steps)
    return numpy_classifier.forward(x, learned.weights, learned.biases)[-1], y


def asymmetry(candidate: Candidate, logits: Vector, target: Vector) -> Float[Array, ""]:
    """Largest |∂δ_i/∂z_j − ∂δ_j/∂z_i|: a gradient's Jacobian is a Hessian, so it is 0 for every gradient."""
    hessian = jax.jacrev(lambda z: candidate.delta(softmax(z), target))(logits)
    return jnp.max(jnp.abs(hessian - hessian.T))


def explicit_product(gap: float) -> Float[np.ndarray, "3 1"]:
    """J·(−y/o) in float32 as a programmer writes it, the label `gap` below the leading class."""
    with np.errstate(all="ignore"):  # the overflow is shown on purpose
        o = numpy_classifier.softmax(np.array([[0], [-gap], [-1]], np.float32))
        y = np.array([[0], [1], [0]], np.float32)
        return numpy_classifier.jacobians(o)[..., 0] @ (-y / o)


def collapsed(gap: float) -> Float[np.ndarray, " 3"]:
    """The same gradient from this library, in float32."""
    return np.asarray(jax.grad(cross_entropy)(jnp.array([0.0, -gap, -1.0], jnp.float32), jnp.array(1)))


def columns_lost(gap: float, dtype: type[np.floating]) -> int:
    """NaN columns of a softmax shifted by one maximum for the whole array, the second `gap` below the first."""
    with np.errstate(invalid="ignore"):
        outputs = numpy_classifier.softmax(np.array([[0, -gap]] * 3, dtype))
    return int(np.isnan(outputs).any(axis=0).sum())


def run(config: Config) -> dict[str, float]:
    """Compute every number, write the results to `config.out` and return them."""
    out = make_folder(config.out)
    with jax.enable_x64(True):
        o, y = map(jnp.asarray, network_outputs())
        stack = jax.vmap(softmax_jacobian, in_axes=1, out_axes=2)(o)
        plot_jacobians(stack, y, out / "jacobian.png")
        return report(
            [*example_numbers(), *stack_numbers(o, y, stack), *candidate_numbers(o, y), *breakdown_numbers()], out
        )


def example_numbers() -> list[Number]:
    """The worked example for one output."""
    o, t = jnp.array(OUTPUT), jnp.array(TARGET)
    matrix = softmax_jacobian(o)
    product = matrix @ (-t / o)
    return [
        *(Number(f"example: J[{i},{j}]", JACOBIAN[i][j], matrix[i, j]) for i in range(3) for j in range(3)),
        *(
            Number(f"example: eigenvalue {n} of J", stated, value)
            for n, (stated, value) in enumerate(zip(EIGENVALUES, jnp.linalg.eigvalsh(matrix), strict=True), 1)
        ),
        Number("example: trace of J", ".46", jnp.trace(matrix)),
        Number("example: 1 − ‖o‖²", ".46", 1 - o @ o),
        Number("example: largest row sum of J", "<1e-15", jnp.abs(matrix.sum(axis=1)).max()),
        *(
            Number(f"example: J (−t/o), entry {n}", s, v)
            for n, (s, v) in enumerate(zip((".1", "-.8", ".7"), product, strict=True), 1)
        ),
    ]


def stack_numbers(o: Float[Array, "3 100"], y: Float[Array, "3 100"], stack: Float[Array, "3 3 100"]) -> list[Number]:
    """All columns at once."""
    rows, columns, flowers = stack.shape
    products = jnp.einsum("ijn,jn->in", stack, -y / o)
    unformed = softmax_vjp(o, -y / o, axis=0)
    return [
        Number("stack: rows", "3", rows),
        Number("stack: columns", "3", columns),
        Number("stack: flowers", "100", flowers),
        Number("J (−y/o) against o − y, 100 columns", "<1e-14", jnp.abs(products - (o - y)).max()),
        Number("o∘(v − ⟨o, v⟩) against J v, 100 columns", "<1e-14", jnp.abs(unformed - products).max()),
    ]


def candidate_numbers(o: Float[Array, "3 100"], y: Float[Array, "3 100"]) -> list[Number]:
    """The function whose gradient each error is, over all columns; log o are logits of o."""
    z = jnp.log(o)
    numbers = []
    for name, candidate in CANDIDATES.items():
        delta = jax.vmap(candidate.delta, in_axes=1, out_axes=1)(o, y)
        in_numpy = numpy_classifier.DELTA3[name](np.asarray(o), np.asarray(y))
        skew = jax.vmap(functools.partial(asymmetry, candidate), in_axes=1)(z, y).max()
        numbers.append(Number(f"{candidate.formula}: NumPy against JAX", "<1e-15", np.abs(in_numpy - delta).max()))
        if candidate.loss:
            gradient = jax.vmap(jax.grad(candidate.loss), in_axes=1, out_axes=1)(z, y)
            error = jnp.abs(delta - gradient).max()
            numbers.append(
                Number(f"{candidate.formula}: against the gradient of {candidate.loss_name}", "<2e-13", error)
            )
            numbers.append(Number(f"{candidate.formula}: asymmetry of its Jacobian", "<1e-15", skew))
        else:
            numbers.append(
                Number(f"{candidate.formula}: asymmetry, the gradient of {candidate.loss_name}", ">.005", skew)
            )
    return numbers


def breakdown_numbers() -> list[Number]:
    """Where explicit products and a global maximum give infinities and NaN."""
    numbers = []
    for gap, infinite, nan in ((88, "0", "0"), (90, "3", "0"), (104, "0", "3")):
        explicit = explicit_product(gap)
        exact = np.array([1 / (1 + np.exp(-1)), -1, np.exp(-1) / (1 + np.exp(-1))])  # o − y, the label at 0
        numbers += [
            Number(f"float32, gap {gap}: infinities in J (−y/o)", infinite, np.isinf(explicit).sum()),
            Number(f"float32, gap {gap}: NaN in J (−y/o)", nan, np.isnan(explicit).sum()),
            Number(
                f"float32, gap {gap}: error of cross_entropy's gradient", "<1e-7", np.abs(collapsed(gap) - exact).max()
            ),
        ]
    for dtype, last, first in ((np.float64, 745, 746), (np.float32, 103, 104)):
        for gap, lost in ((last, "0"), (first, "1")):
            name = f"{dtype.__name__}, global maximum: columns lost at {gap}"
            numbers.append(Number(name, lost, columns_lost(gap, dtype)))
    return numbers


def plot_jacobians(stack: Float[Array, "3 3 100"], y: Float[Array, "3 100"], path: Path) -> None:
    """One Jacobian with its numbers, and a hundred: each column of the right picture is one Jacobian, flattened."""
    one = np.asarray(softmax_jacobian(jnp.array(OUTPUT)))
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 3.5), width_ratios=(1, 1.8))
    colors = {"cmap": "RdBu_r", "vmin": -0.25, "vmax": 0.25}  # no entry of any Jacobian is larger
    left.imshow(one, **colors)
    for (row, column), value in np.ndenumerate(one):
        ink = "white" if abs(value) > 0.15 else "black"
        left.text(column, row, f"{value:.2f}".replace("-", "−"), ha="center", va="center", color=ink, fontsize=12)
    left.set_xticks(range(3), [f"z{n}" for n in (1, 2, 3)])
    left.set_yticks(range(3), [f"o{n}" for n in (1, 2, 3)])
    left.set(title="diag(o) − o oᵀ\nat o = (.1, .2, .7)", xlabel="by logit", ylabel="derivative of output")
    image = right.imshow(stack.reshape(9, -1), aspect="auto", interpolation="nearest", **colors)
    right.set_yticks(range(9), [f"∂o{i}/∂z{j}" for i in (1, 2, 3) for j in (1, 2, 3)])
    for border in np.flatnonzero(np.diff(np.argmax(y, axis=0))):
        right.axvline(border + 0.5, color="black", linewidth=1)
    right.set(title="one Jacobian per column: 50 setosa, then 50 virginica", xlabel="flower")
    figure.colorbar(image, ax=right, label="derivative")
    save(figure, path)


if __name__ == "__main__":
    enter(Config, run, __doc__)
