"""The entropy of softmax, accurate for confident predictions."""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from jaxsoft._arrays.checks import check_values
from jaxsoft._arrays.classes import Axis, dense_arguments, remove_classes
from jaxsoft._arrays.sharding import AxisName
from jaxsoft._formula.head import Head, Untargeted, Values, evaluate, freeze_ignored
from jaxsoft._formula.moments import Moments, block_moments, moment_gradients
from jaxsoft._formula.targets import LogitsType, position_weights
from jaxsoft._jax_internals import Results


def entropy(
    logits: Float[ArrayLike, "..."],
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """Entropy of softmax(logits), in nats.

    H = −Σ_j p_j log p_j = log Σ_j e^{z_j − m} + Σ_j p_j (m − z_j),  m = max_j z_j        ∂H/∂z_j = −p_j (log p_j + H)

    Both sums omit the most likely class, and none of their terms is negative: even an entropy of 1e-9 is accurate.
    The difference lse − Σ_j p_j z_j has the rounding error of the logits, and may be negative.

    Args:
        logits: scores z of any shape, in float16, bfloat16, float32 or float64 (integers are promoted).
        axis: the class axis, several axes that together enumerate the classes, or None for all.
        where: booleans that broadcast to the logits' shape; False masks a class.
        axis_name: the mesh axis over which the classes are sharded, as in `softmax`; the result is over all classes.

    Returns:
        Array without `axis`, in float32, or float64 for float64 logits.

    Edges: 0 for one class, and if every class is masked; log n for n equal logits. A class of probability 0 adds
    nothing, and its gradient is 0.

    Differentiation: in reverse and forward mode to any order.

    Raises:
        TypeError, ValueError: as `softmax`; with `axis_name` several axes.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import entropy
        >>> print(entropy(jnp.zeros(8)).round(4), f"{entropy(jnp.array([0.0, 0.0, 25.0])):.4e}")
        2.0794 7.2217e-10

    Source: C. E. Shannon, "A mathematical theory of communication" (1948).
    """
    dense = dense_arguments(logits, axis, where, axis_name)
    z = remove_classes(dense.logits, dense.mask)
    check_values("logits", z, ~jnp.isnan(z), "a number")
    return _entropy(z, dense.axis, dense.axis_name)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _entropy(logits: Array, axis: int, axis_name: AxisName) -> Array:
    operands = Untargeted(jnp.expand_dims(position_weights(None, LogitsType(logits, axis)), axis))
    (entropies,), _ = cast(Values, evaluate(ENTROPY, logits, operands, axis, axis_name))
    return jnp.squeeze(entropies, axis)


def _values(operands: Untargeted, moments: Moments, axis: int) -> Values:
    return (jnp.where(operands.ignored, 0, moments.entropy),), ()


def _gradients(
    logits: Array, operands: Untargeted, moments: Moments, axis: int, cotangents: Results, *, in_place: bool
) -> tuple[Array, None]:
    ignored, logits = operands.ignored, freeze_ignored(logits, operands)[0]
    return moment_gradients(logits, moments, 0.0, jnp.where(ignored, 0, cotangents[0]), ignored, axis), None


ENTROPY = Head(lambda logits, axis, _, axis_name: block_moments(logits, axis, axis_name), _values, _gradients)
