"""A fully convolutional network as pure functions: strided convolutions, 1×1 scores, bilinear upsampling.

The scores of every scale are summed from the coarsest to the finest, as in the FCN-8s of E. Shelhamer,
J. Long and T. Darrell, "Fully convolutional networks for semantic segmentation" (2017). Channels come last.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

WIDTHS = (24, 48, 96)
"""Channels at strides 2, 4 and 8."""


def init_convolution(key: Array, size: int, channels: int, features: int, gain: float = 2.0):
    """He's normal weights (K. He et al., 2015) and zero biases."""
    scale = (gain / (size * size * channels)) ** 0.5
    weights = scale * jax.random.normal(key, (size, size, channels, features), jnp.float32)
    return weights, jnp.zeros(features, jnp.float32)


def convolve(layer, x: Float[Array, "n h w c"], stride: int = 1) -> Float[Array, "n h2 w2 k"]:
    weights, bias = layer
    strides, layout = (stride, stride), ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, weights, strides, "SAME", dimension_numbers=layout) + bias


def init_network(key: Array, classes: int, widths: tuple[int, ...] = WIDTHS):
    """For each scale: a convolution onto it, one on it, and the 1×1 convolution to its scores."""
    scales = []
    for channels, features in zip((3, *widths), widths, strict=False):
        key, onto, on, score = jax.random.split(key, 4)
        scales.append(
            {
                "onto": init_convolution(onto, 3, channels, features),
                "on": init_convolution(on, 3, features, features),
                "score": init_convolution(score, 1, features, classes, gain=0.01),
            }
        )
    return scales


def apply_network(params, images: Float[Array, "n h w 3"]) -> Float[Array, "n h w classes"]:
    """A logit for every class at every pixel of images of any size."""
    x, scores = images, []
    for scale in params:
        x = jax.nn.relu(convolve(scale["onto"], x, stride=2))
        x = jax.nn.relu(convolve(scale["on"], x))
        scores.append(convolve(scale["score"], x))
    *skips, total = scores
    for skip in reversed(skips):
        total = skip + jax.image.resize(total, skip.shape, "bilinear")
    return jax.image.resize(total, (*images.shape[:-1], total.shape[-1]), "bilinear")
