"""Batches, steps and scores."""

import functools
from typing import Any, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

from experiments.segmentation.network import apply_network
from experiments.segmentation.scenes import VOID, Pair
from jaxsoft import cross_entropy


class Source(Protocol):
    """Random access to labelled images."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Pair: ...


def batches(source: Source, batch_size: int, crop: int, seed: int) -> grain.DatasetIterator[Pair]:
    """Endless batches in an order drawn from the seed; `get_state` and `set_state` tell and move the position."""
    pairs = grain.MapDataset.source(source).seed(seed).shuffle().repeat()  # pyright: ignore[reportArgumentType]
    crops = pairs.random_map(functools.partial(random_crop, size=crop))
    return iter(crops.batch(batch_size).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def random_crop(pair: Pair, rng: np.random.Generator, size: int) -> Pair:
    """A window of the image, which is padded with void where it is smaller."""
    image, labels = pad(pair, size, size)
    top, left = (rng.integers(0, length - size + 1) for length in labels.shape)
    window = np.s_[top : top + size, left : left + size]
    return Pair(image[window], labels[window])


def pad(pair: Pair, height: int, width: int) -> Pair:
    """Void below and to the right, up to at least height × width."""
    rows, columns = (max(0, want - have) for want, have in zip((height, width), pair.labels.shape, strict=True))
    space = ((0, rows), (0, columns))
    return Pair(np.pad(pair.image, (*space, (0, 0))), np.pad(pair.labels, space, constant_values=VOID))


def logits_of(params, images: UInt8[Array, "n h w 3"]) -> Float[Array, "n h w classes"]:
    return apply_network(params, images.astype(jnp.float32) / 127.5 - 1)


def loss_of(params, batch: Pair) -> tuple[Float[Array, ""], UInt8[Array, "n h w"]]:
    """Mean cross-entropy over the pixels that are not void, and the predicted class of every pixel."""
    logits = logits_of(params, jnp.asarray(batch.image))
    loss = cross_entropy(logits, batch.labels, axis=-1, ignore_index=VOID)
    return loss, jnp.argmax(logits, axis=-1).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames="optimizer")
def train_step(state, batch: Pair, optimizer: optax.GradientTransformation):
    """One step; reports loss and prediction as they were before it."""
    params, moments = state
    (loss, predicted), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, batch)
    updates, moments = optimizer.update(gradient, moments, params)
    return (optax.apply_updates(params, updates), moments), loss, predicted


@jax.jit
def predict(params, images: UInt8[Array, "n h w 3"]) -> UInt8[Array, "n h w"]:
    return jnp.argmax(logits_of(params, images), axis=-1).astype(jnp.uint8)


def predict_whole(params, pair: Pair, multiple: int) -> UInt8[np.ndarray, "h w"]:
    """The classes of one image, padded to multiples so that images of many sizes share few compilations."""
    height, width = pair.labels.shape
    image, _ = pad(pair, -height % multiple + height, -width % multiple + width)
    return np.asarray(predict(params, image[None]))[0, :height, :width]


def confusion(
    labels: UInt8[np.ndarray, "..."], predicted: UInt8[np.ndarray, "..."], classes: int
) -> Int[np.ndarray, "classes classes"]:
    """Pixels by true class and predicted class, void left out."""
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


def evaluate(params, source: Source, classes: int, multiple: int) -> dict[str, Any]:
    """Scores over whole images."""
    total = np.zeros((classes, classes), int)
    for n in range(len(source)):
        pair = source[n]
        total += confusion(pair.labels, predict_whole(params, pair, multiple), classes)
    return score(total)
