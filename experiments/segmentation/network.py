"""A fully convolutional network as pure functions: strided convolutions down to coarse scales, and back up.

What is found at each scale is added on the way up, as in O. Ronneberger, P. Fischer and T. Brox, "U-Net" (2015).
Channels come last.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

WIDTHS = (24, 48, 96)
"""Channels at strides 2, 4 and 8."""
DEEPER = (32, 48, 64, 96, 128)
"""For photographs, whose whole window the network must see: channels at strides 2 to 32."""
GROUPS = 8
"""The number of channels that are normalised together."""


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
    """For each scale, the finest first, a convolution to it and one at it; the same back up; and the scores."""
    keys = iter(jax.random.split(key, 4 * len(widths)))

    def stage(size: int, channels: int, features: int, gain: float):
        return {
            "onto": init_convolution(next(keys), size, channels, features, gain),
            "on": init_convolution(next(keys), 3, features, features),
        }

    return {
        "down": [stage(3, channels, features, 2.0) for channels, features in zip((3, *widths), widths, strict=False)],
        "up": [stage(1, channels, features, 1.0) for channels, features in zip(widths[1:], widths, strict=False)],
        "score": init_convolution(next(keys), 1, widths[0], classes, gain=0.01),
    }


def normalise(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """Normalise over a whole image, in groups of channels (Y. Wu and K. He, "Group normalization", 2018)."""
    groups = x.reshape(len(x), -1, GROUPS, x.shape[-1] // GROUPS)
    centred = groups - groups.mean((1, 3), keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.mean(centred**2, (1, 3), keepdims=True) + 1e-5)).reshape(x.shape)


def activate(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    return jax.nn.relu(normalise(x))


def refine(layer, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """Add a residual convolution (K. He et al., 2016)."""
    return x + activate(convolve(layer, x))


def apply_network(params, images: Float[Array, "n h w 3"]) -> Float[Array, "n h w classes"]:
    """A logit for every class at every pixel of images of any size."""
    x, found = images, []
    for stage in params["down"]:
        x = refine(stage["on"], activate(convolve(stage["onto"], x, stride=2)))
        found.append(x)
    for stage, finer in zip(reversed(params["up"]), reversed(found[:-1]), strict=True):
        x = finer + jax.image.resize(convolve(stage["onto"], x), finer.shape, "bilinear")
        x = refine(stage["on"], x)
    scores = convolve(params["score"], normalise(x))
    return jax.image.resize(scores, (*images.shape[:-1], scores.shape[-1]), "bilinear")
