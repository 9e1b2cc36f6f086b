"""How does Caffe compute softmax's gradient along any axis of one flat buffer, and which layouts get it wrong?

python -m experiments.flat_buffer

Memory holds outer × classes × inner numbers: class c of pixel (i, j) lies at i·dim + c·inner + j, where
dim = classes·inner, and its label at i·inner + j. For each i the layer takes inner dot products at stride
inner, subtracts them from all classes by one matmul (of ones[classes × 1] and dots[1 × inner])
and multiplies by the probabilities in place. Two mistakes, a dot at stride 1 and a broadcast laid out as
[inner, classes], compute something else, except along the last axis, where the results are the same.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from experiments._door import check_seed, enter, make_folder
from experiments._numbers import Number, report
from experiments._style import BLUE, GREEN, GREY, ORANGE, RED, WIDE, plt, save, tint
from jaxsoft import softmax, softmax_vjp

SHAPE = (2, 3, 2, 2)  # for the picture
PIXEL = (1, 3)
COLORS = tuple(tint(color, 0.45) for color in (BLUE, ORANGE, GREEN))
# Largest error of the gradient after each slip, by axis, for seed 0.
STRIDE, LAYOUT = "dot at stride 1", "broadcast as [inner, classes]"
SLIPS = {
    STRIDE: ("2.396367743", "1.585587351", "1.539525628", "<1e-15"),
    LAYOUT: ("2.725371726", "2.057041554", "1.748396318", "<1e-15"),
}

Buffer = Float[np.ndarray, " numbers"]
Product = Callable[[float, Float[np.ndarray, "m k"], Float[np.ndarray, "k n"], float, Float[np.ndarray, "m n"]], None]


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    seed: int = 0
    """Seed for scores and cotangent. The two errors are stated for seed 0, and only printed for other seeds."""
    out: Path = Path("out/flat_buffer")
    """Folder for summary.json and the picture."""


def split(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """An array as (outer, classes, inner)."""
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def class_indices(i: int, j: int, classes: int, inner: int) -> Int[np.ndarray, " classes"]:
    """Where the classes of pixel (i, j) lie."""
    return i * classes * inner + np.arange(classes) * inner + j


def gemm(
    alpha: float, a: Float[np.ndarray, "m k"], b: Float[np.ndarray, "k n"], beta: float, c: Float[np.ndarray, "m n"]
) -> None:
    """C ← βC + αAB, into C's own memory, as in the BLAS routine of this name."""
    c *= beta
    c += alpha * (a @ b)


def dots(x: Buffer, y: Buffer, start: int, classes: int, inner: int, *, stride: int) -> Float[np.ndarray, "1 inner"]:
    """⟨x, y⟩ for each pixel of one i, over `classes` numbers that are `stride` apart."""
    reach = stride * (classes - 1) + 1
    pairs = ((x[at : at + reach : stride], y[at : at + reach : stride]) for at in range(start, start + inner))
    return np.array([[u @ v for u, v in pairs]])


def backward(
    top: Buffer,
    top_diff: Buffer,
    bottom_diff: Buffer,
    sizes: tuple[int, int, int],
    *,
    stride: int | None = None,
    transposed: bool = False,
) -> None:
    """Write the gradient to the scores into `bottom_diff`, which may be `top_diff` itself."""
    outer, classes, inner = sizes
    bottom_diff[:] = top_diff
    for i in range(outer):
        start, stop = i * classes * inner, (i + 1) * classes * inner
        scale = dots(bottom_diff, top, start, classes, inner, stride=stride or inner)
        if transposed:
            gemm(-1, scale.T, np.ones((1, classes)), 1, bottom_diff[start:stop].reshape(inner, classes))
        else:
            gemm(-1, np.ones((classes, 1)), scale, 1, bottom_diff[start:stop].reshape(classes, inner))
    bottom_diff *= top


def run(config: Config) -> dict[str, float]:
    """Compute every number, write the results to `config.out` and return them."""
    check_seed(config.seed)
    out = make_folder(config.out)
    plot_layout(out / "layout.png")
    return report([*index_numbers(), *gradient_numbers(config.seed)], out)


def index_numbers() -> list[Number]:
    """Compare the index map with NumPy's, along every axis; return the pixel of the picture."""
    wrong = 0
    for axis in range(len(SHAPE)):
        outer, classes, inner = split(SHAPE, axis)
        buffer = np.arange(math.prod(SHAPE)).reshape(outer, classes, inner)
        wrong += sum(
            (class_indices(i, j, classes, inner) != buffer[i, :, j]).sum() for i in range(outer) for j in range(inner)
        )
    _, classes, inner = split(SHAPE, 1)
    i, j = PIXEL
    label = np.ravel_multi_index((i, *np.unravel_index(j, SHAPE[2:])), (SHAPE[0], *SHAPE[2:]))
    indices = class_indices(i, j, classes, inner)
    return [
        Number("index map: entries that differ from NumPy's, all axes", "0", wrong),
        *(
            Number(f"{SHAPE}, axis 1, pixel {PIXEL}: class {c}", s, indices[c])
            for c, s in enumerate(("15", "19", "23"))
        ),
        Number(f"{SHAPE}, axis 1, pixel {PIXEL}: label", "7", label),
    ]


def gradient_numbers(seed: int) -> list[Number]:
    """Compare the loop over the buffer and its two mistakes with softmax_vjp, along every axis of (2, 3, 4, 5)."""
    shape = (2, 3, 4, 5)
    x, g = np.random.default_rng(seed).normal(size=(2, *shape))
    numbers = []
    for axis in range(len(shape)):
        sizes = split(shape, axis)
        with jax.enable_x64(True):
            probs = softmax(jnp.asarray(x), axis)
            expected = np.asarray(softmax_vjp(probs, jnp.asarray(g), axis)).reshape(-1)
        top, top_diff, bottom_diff = np.asarray(probs).reshape(-1), g.reshape(-1), np.empty(x.size)
        backward(top, top_diff, bottom_diff, sizes)
        in_place = top_diff.copy()
        backward(top, in_place, in_place, sizes)
        numbers += [
            Number(f"axis {axis}: error of the walk", "<1e-15", np.abs(bottom_diff - expected).max()),
            Number(f"axis {axis}: numbers that differ in place", "0", (in_place != bottom_diff).sum()),
        ]
        for slip in SLIPS:
            stride = 1 if slip == STRIDE else None
            backward(top, top_diff, bottom_diff, sizes, stride=stride, transposed=slip == LAYOUT)
            stated = SLIPS[slip][axis]
            if seed and sizes[2] > 1:
                stated = ">.01"
            numbers.append(Number(f"axis {axis}: error of a {slip}", stated, np.abs(bottom_diff - expected).max()))
    return numbers


def plot_layout(path: Path) -> None:
    """The array and the one line of memory it lies in, one pixel marked; the broadcast right and wrong."""
    outer, classes, inner = split(SHAPE, 1)
    marked = class_indices(*PIXEL, classes, inner)
    figure, axes = plt.subplot_mosaic(
        [["array"] * 2, ["memory"] * 2, ["right", "wrong"]],
        figsize=(WIDE, 6.6),
        height_ratios=(2.2, 1.1, 2.2),
    )
    for index in range(outer * classes * inner):
        i, c, j = map(int, np.unravel_index(index, (outer, classes, inner)))
        fill = COLORS[c] if index in marked else "white"
        draw_cell(axes["array"], i * (inner + 1) + j, c, str(index), fill)
        draw_cell(axes["memory"], index, 0, str(index), fill)
    for start, end in itertools.pairwise(marked):
        arrow = {"arrowstyle": "->", "connectionstyle": "arc3,rad=-0.4"}
        axes["memory"].annotate("", (end, 0.5), (start, 0.5), arrowprops=arrow)
        axes["memory"].text((start + end) / 2, 1.8, f"+{inner}", ha="center", va="center")
    for name, at in (("right", lambda k: k % inner), ("wrong", lambda k: k // classes)):
        for k in range(classes * inner):
            dot = at(k)
            mistaken = dot != k % inner
            draw_cell(axes[name], k % inner, k // inner, f"dot {dot}", tint(RED, 0.45) if mistaken else "white")
    finish(axes["array"], f"{SHAPE}, axis 1: classes of pixel {PIXEL}", (-0.6, 2 * inner + 0.6), (classes - 0.4, -0.6))
    axes["array"].set_xticks(
        [i * (inner + 1) + j for i in range(outer) for j in range(inner)],
        [f"({i}, {j})" for i in range(outer) for j in range(inner)],
    )
    axes["array"].set(xlabel="pixel (i, j)", ylabel="class c")
    axes["array"].set_yticks(range(classes))
    finish(axes["memory"], "the same in memory: i·dim + c·inner + j", (-0.6, 23.6), (-0.6, 2.4))
    axes["memory"].set_xticks([])
    for name, title in (
        ("right", "dots subtracted as [classes, inner]"),
        ("wrong", "a slip: laid out as [inner, classes]"),
    ):
        finish(axes[name], title, (-0.6, inner - 0.4), (classes - 0.4, -0.6))
        axes[name].set_xticks(range(inner))
        axes[name].set_yticks(range(classes))
        axes[name].set(xlabel="pixel j (shaded: the dot of another pixel)", ylabel="class c")
    save(figure, path)


def draw_cell(axes: Axes, x: int, y: int, text: str, fill: str) -> None:
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=fill, edgecolor=GREY))
    axes.text(x, y, text, ha="center", va="center", fontsize=9)


def finish(axes: Axes, title: str, xlim: tuple[float, float], ylim: tuple[float, float]) -> None:
    axes.set(title=title, xlim=xlim, ylim=ylim)
    axes.spines[:].set_visible(False)
    axes.set_yticks([])
    axes.tick_params(length=0)


if __name__ == "__main__":
    enter(Config, run, __doc__)
