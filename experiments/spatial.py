"""What does it mean that an image of 300 × 500 labelled pixels is 150,000 losses?

python -m experiments.spatial --scenes 100

Every pixel is a position with its own softmax. This computes the losses and a map of them, the 1 × 1
convolution that is one inner product per pixel, the size of the Jacobians that are not stored, and corrects
two claims. 150,000 losses are not a batch of 150,000: neighbouring pixels resemble each other, and the mean
loss varies from image to image as much as the mean of far fewer independent pixels, N² / Σ corr(loss_a,
loss_b) over all pairs of pixels. And training on a sum of losses is training on their mean at another
learning rate.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from matplotlib.colors import ListedColormap

from experiments._door import InputError, check_seed, enter, make_folder
from experiments._numbers import Number, report
from experiments._style import GREY, SKY, WIDE, many_colors, plt, save
from jaxsoft import caffe, cross_entropy

HEIGHT, WIDTH, CLASSES, FEATURES = 300, 500, 21, 16
PIXELS = HEIGHT * WIDTH
VOID = 255
DIFFERENCE = math.sqrt(2)  # deviation of the difference of two scores of deviation 1
EFFECTIVE = {0: "150000", 5: "1286", 20: "86"}  # the key is the deviation of the blur in pixels


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    seed: int = 0
    """Seed for the scene and the random images."""
    scenes: int = 100
    """Random images, for each blur, whose mean losses are compared with the exact effective number."""
    out: Path = Path("out/spatial")
    """Folder for summary.json and the pictures."""


def run(config: Config) -> dict[str, float]:
    """Compute every number, write the results to `config.out` and return them."""
    if config.scenes < 10:
        raise InputError(f"--scenes: expected at least 10, got {config.scenes}")
    check_seed(config.seed)
    out = make_folder(config.out)
    rng = np.random.default_rng(config.seed)
    with jax.enable_x64(True):
        scene = draw_scene(rng)
        numbers = [
            *counted(),
            *pixelwise(scene, out / "losses.png"),
            *independent(rng, config.scenes, out / "effective_pixels.png"),
            *normalisers(scene),
        ]
    return report(numbers, out)


# 150,000 losses


def counted() -> list[Number]:
    """The losses of an undecided network, and the memory of one Jacobian per pixel."""
    losses = jax.jit(lambda z, labels: cross_entropy(z, labels, 1, reduction="none"))(
        np.zeros((1, CLASSES, HEIGHT, WIDTH)), np.zeros((1, HEIGHT, WIDTH), int)
    )
    losses = np.asarray(losses)
    jacobians = jax.eval_shape(lambda: jnp.zeros((PIXELS, CLASSES, CLASSES), jnp.float32))
    return [
        Number("losses of one image", "150000", losses.size),
        Number("zero scores: mean loss, log 21", "3.044522438", losses.mean()),
        Number("zero scores: sum of losses", "456678.366", losses.sum()),
        Number("stored Jacobians, float32, MB", "264.6", jacobians.size * jacobians.dtype.itemsize / 1e6),
        Number("stored probabilities instead, MB", "12.6", PIXELS * CLASSES * 4 / 1e6),
    ]


# One scene: a 1 × 1 convolution, its losses, its ignored pixels


class Scene(NamedTuple):
    """One image, what reads it and what it shows."""

    features: Float[np.ndarray, "1 features h w"]
    kernel: Float[np.ndarray, "classes features"]  # of the 1 × 1 convolution
    labels: Int[np.ndarray, "1 h w"]


def smooth_field(rng: np.random.Generator, sigma: float) -> Float[np.ndarray, "h w"]:
    """An image of N(0, 1) pixels with correlation exp(−distance²/4σ²): white noise blurred by exp(−distance²/2σ²).

    The noise reaches beyond the image, so that its border is like the rest.
    """
    rows, columns = blur_matrix(HEIGHT, sigma), blur_matrix(WIDTH, sigma)
    return rows @ rng.standard_normal((rows.shape[1], columns.shape[1]), np.float32) @ columns.T


@functools.cache
def blur_matrix(size: int, sigma: float) -> Float[np.ndarray, "size wider"]:
    """Each row a Gaussian of unit length around its own pixel."""
    if not sigma:
        return np.eye(size, dtype=np.float32)
    reach = math.ceil(4 * sigma)
    distance = np.arange(size + 2 * reach)[None, :] - reach - np.arange(size)[:, None]
    weights = np.exp(-(distance**2) / (2 * sigma**2)) * (np.abs(distance) <= reach)
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)


def draw_scene(rng: np.random.Generator) -> Scene:
    """Regions of one class each with a void rim, and features that are their class's vector and smooth noise."""
    classes = np.argmax([smooth_field(rng, 40) for _ in range(CLASSES)], axis=0)
    kernel = rng.normal(size=(CLASSES, FEATURES))
    kernel *= 3 / np.linalg.norm(kernel, axis=1, keepdims=True)
    noise = np.stack([smooth_field(rng, 6) for _ in range(FEATURES)])
    features = np.moveaxis(kernel[classes], -1, 0) + noise
    rim = np.any([np.roll(classes, (dy, dx), (0, 1)) != classes for dy in (-2, 0, 2) for dx in (-2, 0, 2)], axis=0)
    return Scene(features[None], kernel, np.where(rim, VOID, classes)[None])


@jax.jit
def both_ways(scene: Scene) -> tuple[Float[Array, "..."], ...]:
    """Scores and losses of the image by convolution, the gradient to the scores, and scores and losses by pixel."""
    features, kernel, labels = map(jnp.asarray, scene)
    scores = jax.lax.conv_general_dilated(features, kernel[:, :, None, None], (1, 1), "VALID")
    inner_product = jax.vmap(lambda pixel: kernel @ pixel)(features[0].reshape(FEATURES, PIXELS).T)
    losses = cross_entropy(scores, labels, 1, ignore_index=VOID, reduction="none")
    gradient = jax.grad(lambda z: cross_entropy(z, labels, 1, ignore_index=VOID, reduction="sum"))(scores)
    one_by_one = jax.vmap(lambda z, y: cross_entropy(z, y, ignore_index=VOID, reduction="none"))(
        inner_product, labels.reshape(-1)
    )
    return scores, losses, gradient, inner_product.T.reshape(scores.shape), one_by_one


def pixelwise(scene: Scene, path: Path) -> list[Number]:
    """Scores by convolution and pixel by pixel, the gradient of ignored pixels, and the map of the losses."""
    scores, losses, gradient, by_pixel, one_by_one = jax.device_get(both_ways(scene))
    ignored = scene.labels[0] == VOID
    plot_scene(scene.labels[0], scores[0], losses[0], path)
    return [
        Number("1 × 1 convolution against one product per pixel", "<1e-13", np.abs(scores - by_pixel).max()),
        Number("losses of the image against pixel by pixel", "<1e-12", np.abs(losses.reshape(-1) - one_by_one).max()),
        Number("ignored pixels", ">1000", ignored.sum()),
        Number("ignored pixels: largest loss", "0", losses[0][ignored].max()),
        Number("ignored pixels: largest gradient", "0", np.abs(gradient[0][:, ignored]).max()),
        Number("other pixels: largest sum of a gradient", "<1e-13", np.abs(gradient.sum(1)).max()),
    ]


def plot_scene(
    labels: Int[np.ndarray, "h w"],
    scores: Float[np.ndarray, "c h w"],
    losses: Float[np.ndarray, "h w"],
    path: Path,
) -> None:
    """Labels and predictions above the losses, which are larger; ignored pixels have a colour that no loss has."""
    void = labels == VOID
    figure, axes = plt.subplot_mosaic(
        [["labels", "scores"], ["losses", "losses"]], figsize=(WIDE, 7.2), height_ratios=(1, 1.9)
    )
    colors = {"cmap": ListedColormap(many_colors(CLASSES)), "vmin": 0, "vmax": CLASSES - 1, "interpolation": "nearest"}
    axes["labels"].imshow(np.ma.array(labels, mask=void), **colors)
    axes["labels"].set(title="labels, of 21 classes (white: ignored)", ylabel="row (pixels)")
    axes["scores"].imshow(scores.argmax(0), **colors)
    axes["scores"].set(title="class of the largest score")
    losses_or_void = np.ma.array(losses, mask=void)
    image = axes["losses"].imshow(losses_or_void, cmap="inferno", interpolation="nearest", vmin=0, vmax=8)
    figure.colorbar(image, ax=axes["losses"], label="loss (nats)", extend="max", shrink=0.8)
    axes["losses"].set(
        title=f"{np.sum(~void):,} losses, mean {losses[~void].mean():.2f} (blue: the other pixels, ignored)",
        xlabel="column (pixels)",
        ylabel="row (pixels)",
        facecolor=SKY,
    )
    save(figure, path)


# Effective independent pixels


def loss_correlation(rho: Float[np.ndarray, " n"], nodes: int = 24) -> Float[np.ndarray, " n"]:
    """Correlation of two pixels' losses, where their labels' and their scores' fields correlate by rho.

    Two classes: the label is the sign of one field, independent of the two fields of scores.
    Signs agree with probability 1/2 + asin(ρ)/π; the expectation over the differences is a quadrature.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    points, weights = DIFFERENCE * points, weights / weights.sum()
    first, second = points[:, None], rho[:, None, None] * points[:, None] + np.sqrt(1 - rho**2)[:, None, None] * points
    agree = 0.5 + np.arcsin(rho) / np.pi
    products = [
        np.einsum("i,j,ij,nij->n", weights, weights, pixel_loss(first, 1) + 0 * points, pixel_loss(second, label))
        for label in (1, 0)
    ]
    mean = weights @ (pixel_loss(points, 1) + pixel_loss(points, 0)) / 2
    square = weights @ (pixel_loss(points, 1) ** 2 + pixel_loss(points, 0) ** 2) / 2
    # Label 1 with 1 equals 0 with 0, by symmetry, and 1 with 0 equals 0 with 1.
    return (agree * products[0] + (1 - agree) * products[1] - mean**2) / (square - mean**2)


def pixel_loss(difference: Float[np.ndarray, "*n"], label: int) -> Float[np.ndarray, "*n"]:
    return np.asarray(two_class_loss(difference, label))


@jax.jit
def two_class_loss(difference: Float[Array, "*n"], label: Int[Array, ""]) -> Float[Array, "*n"]:
    scores = jnp.stack([jnp.zeros_like(difference), difference])
    return cross_entropy(scores, jnp.full(difference.shape, label), 0, reduction="none")


def effective_pixels(sigma: float) -> float:
    """N² / Σ corr(loss_a, loss_b): how many independent pixels would have a mean loss that varies as much."""
    if not sigma:
        return PIXELS
    dy, dx = np.arange(-HEIGHT + 1, HEIGHT), np.arange(-WIDTH + 1, WIDTH)
    pairs = np.outer(HEIGHT - np.abs(dy), WIDTH - np.abs(dx))
    rho = np.exp(-(dy[:, None] ** 2 + dx**2) / (4 * sigma**2))
    return PIXELS**2 / float(np.sum(pairs * np.interp(rho, *correlation_table())))


@functools.cache
def correlation_table() -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """`loss_correlation`, finest near 1, where it is steepest."""
    rho = np.sin(np.linspace(0, np.pi / 2, 2000))
    return rho, loss_correlation(rho)


@jax.jit
def image_moments(label: Float[Array, "h w"], score: Float[Array, "h w"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean loss and mean squared loss of one random image of two classes."""
    scores = jnp.stack([jnp.zeros_like(score), DIFFERENCE * score])
    losses = cross_entropy(scores, (label > 0).astype(jnp.int32), 0, reduction="none")
    return losses.mean(), (losses**2).mean()


def simulate(rng: np.random.Generator, scenes: int, sigma: float) -> float:
    """Variance of a pixel's loss over the variance of an image's mean loss, over random images."""
    moments = [image_moments(*(smooth_field(rng, sigma) for _ in range(2))) for _ in range(scenes)]  # pyright: ignore[reportArgumentType]
    means, squares = np.array(moments, float).T
    return (squares.mean() - means.mean() ** 2) / means.var(ddof=1)


def independent(rng: np.random.Generator, scenes: int, path: Path) -> list[Number]:
    """Effective pixels of the three blurs, exactly and from random images; four standard errors are allowed."""
    numbers, simulated = [], {}
    for sigma, stated in EFFECTIVE.items():
        exact = effective_pixels(sigma)
        simulated[sigma] = simulate(rng, scenes, sigma)
        error = abs(exact / simulated[sigma] - 1)
        allowed = 4 * math.sqrt(2 / scenes)
        name = f"effective pixels, blur σ = {sigma} px"
        numbers += [
            Number(name, stated, exact),
            Number(f"{name}: exact over random images', minus 1", f"<{allowed:.3f}", error),
        ]
    plot_effective(simulated, math.sqrt(2 / scenes), path)
    return numbers


def plot_effective(simulated: dict[int, float], error: float, path: Path) -> None:
    sigmas = np.geomspace(0.7, 40, 25)
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    axes.loglog(sigmas, [effective_pixels(sigma) for sigma in sigmas], label="N² / Σ corr(loss, loss)")
    drawn = [sigma for sigma in simulated if sigma]
    values = [simulated[sigma] for sigma in drawn]
    axes.errorbar(
        drawn, values, [2 * error * v for v in values], fmt="o", capsize=4, label="random images, ± 2 standard errors"
    )
    axes.axhline(PIXELS, color=GREY, linestyle="--", label=f"independent pixels: {PIXELS:,}")
    axes.set(
        title="How many independent pixels is an image of 300 × 500?",
        xlabel="blur σ of scores and labels (pixels)",
        ylabel="effective pixels",
    )
    axes.legend()
    save(figure, path)


# Sum against mean


def normalisers(scene: Scene) -> list[Number]:
    """NONE at rate η equals VALID at rate η·n, so the published settings for batches of 1 and of 20 agree."""
    features, kernel, labels = scene.features[:, :, ::10, ::10], scene.kernel, scene.labels[:, ::10, ::10]
    count, rate, momentum = int((labels != VOID).sum()), 0.1, 0.9
    ends = {
        name: np.asarray(train(np.zeros_like(kernel), features, labels, name, eta, momentum))
        for name, eta in (("NONE", rate / count), ("VALID", rate))
    }
    return [
        Number(
            "NONE at η against VALID at η·n, 50 steps with momentum",
            "<1e-13",
            np.abs(ends["NONE"] - ends["VALID"]).max(),
        ),
        Number("the same: how far the weights went", ">.1", np.abs(ends["VALID"]).max()),
        Number("rate per loss, sum: 1e-10 · 187,500 / (1 − .99)", ".001875", 1e-10 * 375 * 500 / (1 - 0.99)),
        Number("rate per loss, mean: 1e-4 / (1 − .9)", ".001", 1e-4 / (1 - 0.9)),
    ]


@functools.partial(jax.jit, static_argnames="normalization")
def train(
    kernel: Float[Array, "classes features"],
    features: Float[Array, "1 features h w"],
    labels: Int[Array, "1 h w"],
    normalization: caffe.Normalization,
    rate: float,
    momentum: float,
) -> Float[Array, "classes features"]:
    """Fifty steps of gradient descent with momentum on a 1 × 1 convolution."""
    optimizer = optax.sgd(rate, momentum)

    def loss(kernel: Array) -> Array:
        scores = jnp.einsum("cf,bfhw->bchw", kernel, features)
        return caffe.softmax_with_loss(scores, labels, ignore_label=VOID, normalization=normalization)[0]

    def step(state, _):
        updates, moments = optimizer.update(jax.grad(loss)(state[0]), state[1])
        return (optax.apply_updates(state[0], updates), moments), None

    return jax.lax.scan(step, (kernel, optimizer.init(kernel)), length=50)[0][0]  # pyright: ignore[reportReturnType]


if __name__ == "__main__":
    enter(Config, run, __doc__)
