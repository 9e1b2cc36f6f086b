"""Do the textbook steps from softmax to its gradients hold, and where do printed versions go wrong?

python -m experiments.derivations

Each formula is compared with automatic differentiation and central differences in float64, and each
misprint with the right formula.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments._door import enter, make_folder
from experiments._numbers import Number, each, report
from experiments._style import BLUE, GREY, PALE, RED, WIDE, plt, save
from jaxsoft import cross_entropy, log_softmax, softmax, softmax_jacobian, softmax_vjp

# Three inputs y, weights w_ij from input i to output j, biases b.
INPUTS = np.array([0.5, -1.0, 2.0])
WEIGHTS = np.array([[0.1, -0.2, 0.3], [0.4, 0.3, -0.1], [-0.5, 0.2, 0.6]])
BIASES = np.array([0.01, -0.02, 0.03])
LOGITS = (-1.34, -0.02, 1.48)
OUTPUTS = (0.046467814, 0.173948608, 0.779583577)
# For each target t: Σt, the loss and its gradient to the logits.
TARGETS = {
    (0.0, 1.0, 0.0): (1.0, 1.748995377, (0.046467814, -0.826051392, 0.779583577)),
    (0.2, 0.5, 0.3): (1.0, 1.562995377, (-0.153532186, -0.326051392, 0.479583577)),
    (0.5, 1.0, 0.25): (1.75, 3.345741910, (-0.418681325, -0.695589935, 1.114271261)),
}
# A network of three hidden units and two outputs.
HIDDEN = np.array([0.5, -1.0, 2.0])
TO_OUTPUTS = np.array([[0.1, -0.2], [0.4, 0.3], [-0.5, 0.2]])


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    out: Path = Path("out/derivations")
    """Folder for summary.json and the pictures."""


def difference(fn: Callable[[np.ndarray], jax.Array], at: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """The gradient of a scalar function by central differences."""
    gradient = np.empty(at.shape)
    for index in np.ndindex(at.shape):
        shift = np.zeros(at.shape)
        shift[index] = step
        gradient[index] = (float(fn(at + shift)) - float(fn(at - shift))) / (2 * step)
    return gradient


def worst(a: object, b: object) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def agrees(quantity: str, formula: object, fn: Callable, at: np.ndarray) -> list[Number]:
    """A formula for the gradient of `fn`, with automatic differentiation and differences."""
    return [
        Number(f"{quantity}: against autodiff", "<1e-13", worst(formula, jax.grad(fn)(at))),
        Number(f"{quantity}: against differences", "<1e-8", worst(formula, difference(fn, at))),
    ]


def three_classes() -> list[Number]:
    """Logits, outputs, and the loss's gradients to logits, weights and biases for three targets."""

    def logits(weights, biases):
        return INPUTS @ weights + biases

    z = logits(WEIGHTS, BIASES)
    o = np.asarray(softmax(z))
    numbers = each("z = yW + b", LOGITS, z, 2) + each("o = softmax(z)", OUTPUTS, o, 9)
    numbers += [
        Number("dlog o_j/dz_k = delta_jk - o_k", "<1e-14", worst(np.eye(3) - o, jax.jacrev(log_softmax)(z))),
        Number(
            "do_j/dz_k = o_j (delta_jk - o_k)", "<1e-14", worst(o[:, None] * (np.eye(3) - o), jax.jacrev(softmax)(z))
        ),
        Number("dy = (diag(y) - y y^T) dz", "<1e-14", worst(np.diag(o) - np.outer(o, o), softmax_jacobian(o))),
    ]
    for t, (tau, loss, gradient) in TARGETS.items():
        target = np.array(t)

        def error(z, target=target):
            return cross_entropy(z, target)

        name = f"t={t}"
        formula = target.sum() * o - target
        numbers += [Number(f"{name}: tau", f"{tau:.2f}", target.sum()), Number(f"{name}: E", f"{loss:.9f}", error(z))]
        numbers += each(f"{name}: dE/dz = tau o - t", gradient, formula, 9)
        numbers += agrees(f"{name}: dE/dz", formula, error, z)
        numbers += agrees(
            f"{name}: dE/dW = y (tau o - t)",
            np.outer(INPUTS, formula),
            lambda w, e=error: e(logits(w, BIASES)),
            WEIGHTS,
        )
        numbers += agrees(f"{name}: dE/db = tau o - t", formula, lambda b, e=error: e(logits(WEIGHTS, b)), BIASES)
        # The full double sum over outputs i and logits k; its indices are not reused.
        double = np.einsum("i,ik,p,kq->pq", -target / o, np.asarray(softmax_jacobian(o)), INPUTS, np.eye(3))
        numbers.append(
            Number(f"{name}: the double sum of the chain rule", "<1e-14", worst(double, np.outer(INPUTS, formula)))
        )
        # In the layout z = Wp + b the weights are the transpose: (1't) y p' - t p'.
        matrix = target.sum() * np.outer(o, INPUTS) - np.outer(target, INPUTS)
        numbers.append(Number(f"{name}: in matrix form", "<1e-14", worst(matrix, np.outer(INPUTS, formula).T)))
    return numbers


def toy_paths(target: tuple[float, float]) -> tuple[float, float, float]:
    """The loss, and the contributions of both paths from it to w21: through output 1 and through output 2."""
    t = np.array(target)
    o = np.asarray(softmax(HIDDEN @ TO_OUTPUTS))
    by_output = -t / o * np.asarray(softmax_jacobian(o))[:, 0] * HIDDEN[1]
    by_output = by_output + 0.0  # no −0 in the table
    return float(cross_entropy(HIDDEN @ TO_OUTPUTS, t)), float(by_output[0]), float(by_output[1])


def toy_network(path: Path) -> list[Number]:
    """Two paths lead from w21 to the loss: the derivative is their sum."""
    z = HIDDEN @ TO_OUTPUTS
    o = np.asarray(softmax(z))
    numbers = each("toy: z", (-1.35, 0.0), z, 2) + each("toy: o", (0.205870372, 0.794129628), o, 9)
    stated = {(1.0, 0.0): (1.580508571, 0.794129628, 0.0), (0.0, 1.0): (0.230508571, 0.0, -0.205870372)}
    for target, values in stated.items():
        computed = toy_paths(target)
        for what, s, c in zip(("loss", "path by o1", "path by o2"), values, computed, strict=True):
            numbers.append(Number(f"toy, t={target}: {what}", f"{s:.9f}", c))
        to_w21 = jax.grad(lambda w, t=np.array(target): cross_entropy(HIDDEN @ w, t))(TO_OUTPUTS)[1, 0]
        numbers.append(
            Number(f"toy, t={target}: h2 (o1 - t1) is the sum", "<1e-15", abs(computed[1] + computed[2] - to_w21))
        )
        numbers.append(
            Number(f"toy, t={target}: and equals autodiff", "<1e-15", abs(HIDDEN[1] * (o[0] - target[0]) - to_w21))
        )
    # Two outputs, targets that need not sum to one.
    z, t = np.array([0.3, -0.8]), np.array([0.7, 0.6])
    o = np.asarray(softmax(z))
    numbers += agrees("two outputs: -t1 + o1 (t1 + t2)", t.sum() * o - t, lambda z: cross_entropy(z, t), z)
    numbers.append(Number("two outputs: the truth", "0.275338", t.sum() * o[0] - t[0]))
    numbers.append(Number("misprint, -t2 e^(z2) for -t2 e^(z1)", "-0.024974", o[0] * t[0] + o[1] * t[1] - t[0]))
    plot_toy(path)
    return numbers


def one_sample(path: Path) -> list[Number]:
    """X = (1, 2, 3) with label 2: the loss, the three cases of its gradient, and the layer without a loss."""
    x, label, top_diff = np.array([1.0, 2.0, 3.0]), 2, np.array([0.5, -1.0, 2.0])
    p = np.asarray(softmax(x))
    truth = p - np.eye(3)[label]
    numbers = each("X=(1,2,3): p", (0.09003057, 0.24472847, 0.66524096), p, 8)
    numbers.append(Number("X=(1,2,3), label 2: loss", "0.40760596", cross_entropy(x, np.array(label))))
    numbers += each("X=(1,2,3), label 2: gradient", (0.09003057, 0.24472847, -0.33475904), truth, 8)
    numbers += agrees("X=(1,2,3), label 2: gradient", truth, lambda z: cross_entropy(z, np.array(label)), x)
    ignored = jax.grad(lambda z: cross_entropy(z, np.array(255), ignore_index=255))(x)
    numbers.append(Number("an ignored position: its largest derivative", "<1e-300", np.abs(ignored).max()))
    # As printed the cases i = k and i != k are exchanged and every class has the label's exponential.
    printed = np.where(np.arange(3) == label, p[label], p[label] - 1)
    numbers += each("three cases, as printed", (-0.3348, -0.3348, 0.6652), printed, 4)
    numbers += each("three cases, corrected", (0.0900, 0.2447, -0.3348), truth, 4)
    numbers.append(Number("softmax alone: <top, top_diff>", "1.13076873", p @ top_diff))
    bottom_diff = p * (top_diff - p @ top_diff)
    numbers += each("softmax alone: bottom_diff", (-0.056788, -0.521460, 0.578248), softmax_vjp(p, top_diff), 6)
    numbers += agrees("softmax alone: bottom_diff", bottom_diff, lambda z: jnp.sum(softmax(z) * top_diff), x)
    through = np.asarray(softmax_jacobian(p)) @ (-np.eye(3)[label] / p)
    numbers.append(
        Number("through the softmax output and directly: the same in exact arithmetic", "<1e-15", worst(through, truth))
    )
    plot_cases(printed, truth, path)
    return numbers


def through_the_output_in_float32() -> list[Number]:
    """dNLL/do · do/dz divides by an underflowed o; the direct gradient o − 1 does not."""
    numbers = []
    for gap, stated in ((90.0, "-inf"), (110.0, "nan")):
        z = np.array([gap, 0.0], np.float32)
        # The two factors of the chain rule in plain NumPy: a library would rescue them.
        with np.errstate(all="ignore"):
            e = np.exp(z - z.max())
            o = e / e.sum()
            product = -1 / o[1] * (o[1] * (1 - o[1]))
        direct = jax.grad(lambda x: cross_entropy(x, np.array(1)))(jnp.asarray(z))[1]
        numbers.append(Number(f"float32, gap {gap:g}: by the output", stated, product))
        numbers.append(Number(f"float32, gap {gap:g}: directly", "-1.000000", direct))
    return numbers


def misprints() -> list[Number]:
    """Formulas as printed, each with the right formula."""
    z = INPUTS @ WEIGHTS + BIASES
    o = np.asarray(softmax(z))
    t = np.array([0.0, 1.0, 0.0])
    numbers = each("misprint -t (1 - o)", (0.0, -0.826, 0.0), -t * (1 - o), 3)
    numbers += each("truth, o - t", (0.046, -0.826, 0.780), o - t, 3)
    numbers.append(Number("truth: its sum", "<1e-15", abs((o - t).sum())))
    numbers.append(Number("misprint -t (1 - o): its sum, so not shift invariant", ">0.8", abs((-t * (1 - o)).sum())))
    # The derivative of a gradient is symmetric. For -t (1 - o) it is symmetric only if all t_j are equal.
    t = np.array([0.2, 0.5, 0.3])
    matrix = np.asarray(jax.jacrev(lambda z: -t * (1 - softmax(z)))(z))
    numbers.append(
        Number("misprint -t (1 - o): asymmetry, so the gradient of no function", ">0.01", worst(matrix, matrix.T))
    )
    wrong_sign = -t[0] * (1 - o[0]) - o[0] * (t[1] + t[2])
    right_sign = -t[0] * (1 - o[0]) + o[0] * (t[1] + t[2])
    numbers.append(Number("misprint, minus for the sum over k != i", "-0.227881", wrong_sign))
    numbers.append(Number("truth, plus for the sum over k != i", "-0.153532", right_sign))
    t = np.array([0.5, 1.0, 0.25])
    numbers += each("o - t for t that sums to 1.75", (-0.4535, -0.8261, 0.5296), o - t, 4)
    numbers += each("truth, 1.75 o - t", (-0.4187, -0.6956, 1.1143), t.sum() * o - t, 4)
    return numbers


def run(config: Config) -> dict[str, float]:
    """Evaluate every formula, write the table and the pictures."""
    out = make_folder(config.out)
    with jax.enable_x64(True):
        numbers = [
            *three_classes(),
            *toy_network(out / "toy_network.png"),
            *one_sample(out / "three_cases.png"),
            *through_the_output_in_float32(),
            *misprints(),
        ]
    return report(numbers, out)


def plot_toy(path: Path) -> None:
    """The network, with the contribution of each path from the loss to w21 for the two one-hot targets."""
    z = HIDDEN @ TO_OUTPUTS
    o = np.asarray(softmax(z))
    figure, panels = plt.subplots(1, 2, figsize=(WIDE, 3.7))
    for axes, target in zip(panels, ((1.0, 0.0), (0.0, 1.0)), strict=True):
        loss, by_first, by_second = toy_paths(target)
        nodes = {f"h{'₁₂₃'[n]}\n{h:g}": (0.0, 2.0 - n) for n, h in enumerate(HIDDEN)}
        nodes |= {f"z{'₁₂'[n]}\n{value:.3g}": (1.6, 1.5 - n) for n, value in enumerate(z)}
        nodes |= {f"o{'₁₂'[n]}\n{value:.4f}": (3.2, 1.5 - n) for n, value in enumerate(o)}
        nodes[f"E\n{loss:.4f}"] = (4.8, 1.0)
        places = list(nodes.values())
        edges = [(i, 3 + j) for i in range(3) for j in range(2)] + [(3 + i, 5 + j) for i in range(2) for j in range(2)]
        for start, end in [*edges, (5, 7), (6, 7)]:
            axes.plot(*zip(places[start], places[end], strict=True), color=PALE, zorder=1)
        for color, output, value, height in ((BLUE, 5, by_first, 2.2), (RED, 6, by_second, -0.3)):
            for start, end in ((1, 3), (3, output), (output, 7)):
                offset = 0.03 if output == 5 else -0.03
                x, y = zip(places[start], places[end], strict=True)
                axes.plot(x, np.array(y) + offset, color=color, linewidth=2.4, zorder=2)
            axes.text(
                3.2, height, f"through o{'₁₂'[output - 5]}: {signed(value)}", color=color, ha="center", weight="bold"
            )
        for label, (x, y) in nodes.items():
            axes.scatter(x, y, 1250, color="white", edgecolor="black", zorder=3)
            axes.text(x, y, label.replace("-", "−"), ha="center", va="center", fontsize=8.5, zorder=4)
        # On the edge, the mixture of both colours.
        axes.text(0.68, 1.21, "w₂₁", ha="center", va="center", zorder=4, bbox={"color": "white", "pad": 1})
        sign = "−" if by_second < 0 else "+"
        total = f"{signed(by_first)} {sign} {abs(by_second):.6g} = {signed(by_first + by_second)}"
        axes.set(title=f"target {target}\n∂E/∂w₂₁ = {total}", xlim=(-0.5, 5.3), ylim=(-0.5, 2.5))
        axes.axis("off")
    save(figure, path)


def signed(value: float) -> str:
    """Six digits, with the minus sign of print."""
    return f"{value:.6g}".replace("-", "−")


def plot_cases(printed: np.ndarray, truth: np.ndarray, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4))
    classes = np.arange(3)
    for offset, values, color, label in (
        (-0.2, printed, GREY, "as printed"),
        (0.2, truth, BLUE, "corrected: p − 1 at the label, p elsewhere"),
    ):
        bars = axes.bar(classes + offset, values, 0.38, color=color, label=label)
        axes.bar_label(bars, fmt="%.4f", fontsize=9, padding=2)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(classes, ["class 0", "class 1", "class 2, the label"])
    axes.set(title="gradient of the loss at X = (1, 2, 3)", ylabel="dL/dX", ylim=(-0.5, 0.95))
    axes.legend(loc="upper left")
    save(figure, path)


if __name__ == "__main__":
    enter(Config, run, __doc__)
