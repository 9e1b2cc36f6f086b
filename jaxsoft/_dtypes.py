"""The dtype in which half precision is reduced."""

import jax.numpy as jnp
from jaxtyping import Array


def compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype to reduce in: half precision is summed in float32."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def widen(array: Array) -> Array:
    return array.astype(compute_dtype(array.dtype))


def is_removed(logits: Array) -> Array:
    """Where they are −inf, without an infinity to compare with, which JAX's `debug_infs` would stop at."""
    return logits < jnp.finfo(logits.dtype).min
