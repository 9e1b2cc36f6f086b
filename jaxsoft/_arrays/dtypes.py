"""The dtype in which half precision is reduced, and non-finite numbers."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype to reduce in: half precision is summed in float32."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def widen(array: Array) -> Array:
    return array.astype(compute_dtype(array.dtype))


def is_removed(logits: Array) -> Array:
    """Where logits are −inf, without comparing with an infinity, at which JAX's `debug_infs` would stop."""
    return logits < jnp.finfo(logits.dtype).min


def nan_unless(valid: Bool[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """1 where valid, else NaN: a compiled function has no other way to report an invalid value.

    NaN is computed as a root of −1, because JAX's `debug_nans` stops at a literal NaN even if it is not selected.
    """
    return jnp.sqrt(jnp.where(valid, 1, -1).astype(dtype))


def at_least_int32(labels: Array) -> Array:
    """Labels, of NumPy or JAX, in a dtype that can hold the number of classes, unlike int8."""
    return labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels
