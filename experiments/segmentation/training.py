"""Batches, steps and scores."""

import functools
from typing import Any, NamedTuple, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from experiments.segmentation.network import apply_network
from experiments.segmentation.scenes import VOID, Pair
from jaxsoft import cross_entropy

LEAST_SHARE = 1e-3
"""A share of all pixels: rarer or absent classes get no higher weight than a class with this share."""
MULTIPLE = 32
"""The coarsest stride: sides of images are padded to multiples of it."""


class Source(Protocol):
    """Random access to labelled images."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Pair: ...


class Recipe(NamedTuple):
    """How the pixels of all images are normalised, and the weight of each class."""

    mean: Float[np.ndarray, " 3"]
    deviation: Float[np.ndarray, " 3"]
    class_weights: Float[np.ndarray, " classes"] | None


EVEN = Recipe(np.full(3, 127.5, np.float32), np.full(3, 127.5, np.float32), None)
"""For scenes of all colours, with equal weights of the classes."""


def recipe_of(source: Source, classes: int) -> Recipe:
    """Normalise colours by their mean and deviation over all images; weight classes by the root of their rarity.

    With their whole rarity as weights, rare classes would be predicted where they are not.
    """
    sums, pixels, counts = np.zeros((2, 3)), 0, np.zeros(classes)
    for n in range(len(source)):
        image, labels = source[n]
        colors = image.reshape(-1, 3).astype(float)
        sums += colors.sum(0), (colors**2).sum(0)
        pixels += len(colors)
        counts += np.bincount(labels[labels != VOID], minlength=classes)
    mean, square = sums / pixels
    share = counts / counts.sum()
    weights = np.maximum(share, LEAST_SHARE) ** -0.5
    deviation = np.sqrt(np.maximum(square - mean**2, 1))
    return Recipe(*(part.astype(np.float32) for part in (mean, deviation, weights / (share @ weights))))


def batches(
    source: Source, batch_size: int, crop: int, seed: int, augmented: bool = False
) -> grain.DatasetIterator[Pair]:
    """Endless batches in an order drawn from the seed; `get_state` and `set_state` tell and move the position."""
    pairs = grain.MapDataset.source(source).seed(seed).shuffle().repeat()  # pyright: ignore[reportArgumentType]
    crops = pairs.random_map(functools.partial(random_view if augmented else random_crop, size=crop))
    return iter(crops.batch(batch_size).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def random_crop(pair: Pair, rng: np.random.Generator, size: int) -> Pair:
    """A window of the image, padded with void if the image is smaller."""
    image, labels = pad(pair, size, size)
    top, left = (rng.integers(0, length - size + 1) for length in labels.shape)
    window = np.s_[top : top + size, left : left + size]
    return Pair(image[window], labels[window])


def random_view(pair: Pair, rng: np.random.Generator, size: int) -> Pair:
    """A window at a random scale, perhaps mirrored, with another brightness."""
    scale = 2 ** rng.uniform(-0.5, 0.75)
    window = random_crop(pair, rng, round(size / scale))
    image = Image.fromarray(window.image).resize((size, size), Image.Resampling.BILINEAR)
    labels = Image.fromarray(window.labels).resize((size, size), Image.Resampling.NEAREST)
    light = rng.uniform(0.7, 1.4) * rng.normal(1, 0.07, 3)
    lit = (np.asarray(image) * light + rng.normal(0, 15)).clip(0, 255).astype(np.uint8)
    mirrored = np.s_[:, :: rng.choice([-1, 1])]
    return Pair(lit[mirrored], np.asarray(labels)[mirrored])


def pad(pair: Pair, height: int, width: int) -> Pair:
    """Pad with void below and to the right, to at least height × width."""
    rows, columns = (max(0, want - have) for want, have in zip((height, width), pair.labels.shape, strict=True))
    space = ((0, rows), (0, columns))
    return Pair(np.pad(pair.image, (*space, (0, 0))), np.pad(pair.labels, space, constant_values=VOID))


def logits_of(params, images: UInt8[Array, "n h w 3"], recipe: Recipe = EVEN) -> Float[Array, "n h w classes"]:
    return apply_network(params, (images.astype(jnp.float32) - recipe.mean) / recipe.deviation)


def loss_of(params, batch: Pair, recipe: Recipe = EVEN) -> tuple[Float[Array, ""], UInt8[Array, "n h w"]]:
    """Mean cross-entropy over the pixels that are not void, and the predicted class of every pixel."""
    logits = logits_of(params, jnp.asarray(batch.image), recipe)
    loss = cross_entropy(logits, batch.labels, axis=-1, ignore_index=VOID, class_weights=recipe.class_weights)
    return loss, jnp.argmax(logits, axis=-1).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames="optimizer")
def train_step(state, batch: Pair, recipe: Recipe, optimizer: optax.GradientTransformation):
    """One step; returns the loss and the prediction before the step."""
    params, moments = state
    (loss, predicted), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, batch, recipe)
    updates, moments = optimizer.update(gradient, moments, params)
    return (optax.apply_updates(params, updates), moments), loss, predicted


@jax.jit
def predict(params, images: UInt8[Array, "n h w 3"], recipe: Recipe) -> UInt8[Array, "n h w"]:
    return jnp.argmax(logits_of(params, images, recipe), axis=-1).astype(jnp.uint8)


def predict_whole(params, image: UInt8[np.ndarray, "h w 3"], recipe: Recipe) -> UInt8[np.ndarray, "h w"]:
    """The classes of one image, padded by its edges to multiples, so that many sizes share compiled programs."""
    height, width, _ = image.shape
    padded = np.pad(image, ((0, -height % MULTIPLE), (0, -width % MULTIPLE), (0, 0)), mode="edge")
    return np.asarray(predict(params, padded[None], recipe))[0, :height, :width]


def confusion(
    labels: UInt8[np.ndarray, "..."], predicted: UInt8[np.ndarray, "..."], classes: int
) -> Int[np.ndarray, "classes classes"]:
    """The number of pixels by true class and predicted class, without void."""
    valid = labels != VOID
    return np.bincount(classes * labels[valid].astype(int) + predicted[valid], minlength=classes**2).reshape(
        classes, classes
    )


def score(counts: Int[np.ndarray, "classes classes"]) -> dict[str, Any]:
    """Accuracy and intersection over union; a class in neither truth nor prediction has None and does not count."""
    right = np.diag(counts)
    union = counts.sum(0) + counts.sum(1) - right
    shares = [float(r / u) if u else None for r, u in zip(right, union, strict=True)]
    met = [share for share in shares if share is not None]
    return {
        "pixel_accuracy": float(right.sum() / counts.sum()) if met else float("nan"),
        "mean_iou": float(np.mean(met)) if met else float("nan"),
        "per_class_iou": shares,
        "valid_pixels": int(counts.sum()),
    }


def evaluate(params, source: Source, recipe: Recipe, classes: int, most: int | None = None) -> dict[str, Any]:
    """Scores over whole images, all of them or the first."""
    total = np.zeros((classes, classes), int)
    for n in range(min(len(source), most or len(source))):
        pair = source[n]
        total += confusion(pair.labels, predict_whole(params, pair.image, recipe), classes)
    return score(total)
