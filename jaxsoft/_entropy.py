"""The entropy of softmax, exact where one class is nearly certain."""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from jaxsoft._checks import as_floating, as_mask, check_values
from jaxsoft._classes import Axis, along_one_axis
from jaxsoft._dtypes import widen
from jaxsoft._meshes import broadcast_like, lay_like
from jaxsoft._moments import Moments, block_moments
from jaxsoft._platform import Axes
from jaxsoft._readings import Positions, Reading, Values, read, taking_part
from jaxsoft._shards import AxisName, as_axis_name
from jaxsoft._targets import is_label, position_weights


def entropy(
    logits: Float[ArrayLike, "..."],
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """Entropy of softmax(logits), in nats.

    H = −Σ_j p_j log p_j = log Σ_j e^{z_j − m} + Σ_j p_j (m − z_j),  m = max_j z_j        ∂H/∂z_j = −p_j (log p_j + H)

    Both terms are sums over the classes that do not lead, none of them negative: an entropy of 1e-9 has its digits.
    The difference lse − Σ_j p_j z_j leaves rounding of the logits, and may be below 0.

    Args:
        logits: scores z of any shape, in float16, bfloat16, float32 or float64 (integers are promoted).
        axis: the class axis, several axes that together enumerate the classes, or None for all.
        where: booleans that broadcast to the logits' shape; False removes a class.
        axis_name: the mesh axis over which the classes are sharded, as in `softmax`; the result is that of all.

    Returns:
        Array without `axis`, in float32, or float64 for float64 logits.

    Edges: 0 for one class, and where no class is left; log n for n equal logits. A class of probability 0 adds
    nothing, and has no gradient.

    Differentiation: in reverse mode to any order, and forward over reverse.

    Raises:
        TypeError, ValueError: as `softmax`; with `axis_name` several axes.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import entropy
        >>> print(entropy(jnp.zeros(8)).round(4), f"{entropy(jnp.array([0.0, 0.0, 25.0])):.4e}")
        2.0794 7.2217e-10

    Source: C. E. Shannon, "A mathematical theory of communication" (1948).
    """
    array = as_floating("logits", logits)
    if where is not None:
        array = jnp.where(lay_like(as_mask("where", where, array.shape), array), array, -jnp.inf)
    axis, array, _ = along_one_axis(axis, axis_name, array)
    if array.shape[axis] == 0:
        raise ValueError(f"logits: expected at least one class along axis {axis}, got shape {array.shape}")
    check_values("logits", array, ~jnp.isnan(array), "a number")
    axis_name = as_axis_name(axis_name, "logits", array)
    return _entropy(array, axis, axis_name)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _entropy(logits: Array, axis: int, axis_name: AxisName) -> Array:
    everywhere = Positions(jnp.expand_dims(position_weights(None, logits, axis), axis))
    (found,), _ = cast(Values, read(ENTROPIES, logits, everywhere, axis, axis_name))
    return jnp.squeeze(found, axis)


def entropy_gradients(
    logits: Array,
    moments: Moments,
    axes: Axes,
    to_lse: Array | float,
    to_entropy: Array,
    idle: Array,
    label: Array | None = None,
    at_label: Array | None = None,
) -> Array:
    """p_j (b − h (log p_j + H)) for the cotangents b of lse and h of H, but `at_label` at the label.

    log p_j + H is G − (m − z_j), for G = Σ_j p_j (m − z_j): the logarithm that both have is not subtracted.
    """
    statistics, total = moments.statistics, moments.statistics.total
    below = statistics.largest - widen(logits)
    exponentials = jnp.exp(-below)
    below = jnp.where(exponentials == 0, 0, below)
    result = exponentials * ((to_lse - to_entropy * moments.mean_gap) / total + to_entropy / total * below)
    if label is not None:
        result = jnp.where(is_label(logits, label, axes), broadcast_like(cast(Array, at_label), result), result)
    return jnp.where(broadcast_like(idle, result), 0, result).astype(logits.dtype)


def _statistics(logits: Array, axes: Axes, positions: Positions, axis_name: AxisName) -> Moments:
    (axis,) = axes
    return block_moments(logits, axis, axis_name)


def _values(positions: Positions, moments: Moments, axes: Axes) -> Values:
    return (jnp.where(positions.idle, 0, moments.entropy),), ()


def _gradients(
    logits: Array,
    positions: Positions,
    moments: Moments,
    axes: Axes,
    cotangents: tuple[Array],
    *,
    in_place: bool = False,
) -> tuple[Array, None]:
    idle, (logits, _) = positions.idle, taking_part(logits, positions)
    return entropy_gradients(logits, moments, axes, 0.0, jnp.where(idle, 0, cotangents[0]), idle), None


ENTROPIES = Reading(_statistics, _values, _gradients)
