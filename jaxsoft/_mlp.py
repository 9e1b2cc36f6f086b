"""A multilayer perceptron as two pure functions of its parameters."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, ArrayLike, Float, Key

from jaxsoft._arrays.checks import as_floating, as_integer

Layer = dict[str, Array]


def init_mlp(
    key: Key[Array, ""],
    sizes: Sequence[int],
    *,
    kernel_init: initializers.Initializer = initializers.lecun_normal(),
    bias_init: initializers.Initializer = initializers.zeros,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[Layer, ...]:
    """Draw the parameters of a multilayer perceptron.

    Args:
        key: a JAX random key.
        sizes: units of each layer from the features to the logits, such as (4, 5, 4, 3);
            two, such as (4, 3), are softmax regression.
        kernel_init: initializer of the kernels; by default variance 1/fan_in, which keeps the inputs
            of every layer at the scale where tanh is steep.
        bias_init: initializer of the biases.
        dtype: dtype of the parameters.

    Returns:
        One {"kernel": (inputs, outputs), "bias": (outputs,)} per layer. Each unit has one bias, so any
        number of samples can be scored.

    Raises:
        ValueError: fewer than two sizes, or a size below one.
        TypeError: a size that is not an integer, a seed in place of a key.

    Example:
        >>> import jax
        >>> from jaxsoft import init_mlp
        >>> [layer["kernel"].shape for layer in init_mlp(jax.random.key(0), (4, 5, 4, 3))]
        [(4, 5), (5, 4), (4, 3)]

    Source: D. E. Rumelhart, G. E. Hinton, R. J. Williams, "Learning representations by
    back-propagating errors" (1986); the scale: Y. LeCun et al., "Efficient backprop" (1998).
    """
    units = [as_integer(f"sizes[{n}]", size) for n, size in enumerate(sizes)]
    if len(units) < 2 or min(units) < 1:
        raise ValueError(f"sizes: expected at least two positive layer sizes, got {tuple(units)}")
    try:
        keys = jax.random.split(key, len(units) - 1)
    except TypeError:
        raise TypeError(f"key: expected a random key, such as jax.random.key(0), got {key!r}") from None

    def layer(key: Array, inputs: int, outputs: int) -> Layer:
        kernel_key, bias_key = jax.random.split(key)
        kernel, bias = kernel_init(kernel_key, (inputs, outputs), dtype), bias_init(bias_key, (outputs,), dtype)
        return {"kernel": kernel, "bias": bias}

    return tuple(map(layer, keys, units, units[1:]))


def apply_mlp(
    params: Sequence[Layer],
    features: Float[ArrayLike, " features"],
    *,
    activation: Callable[[Array], Array] = jnp.tanh,
) -> Float[Array, " classes"]:
    """Logits of one example; `jax.vmap(apply_mlp, in_axes=(None, 0))` scores a batch.

    x ← activation(x K + b) for every layer except the last, which is linear.

    Args:
        params: layers as `init_mlp` returns them.
        features: the features of one example.
        activation: the function between layers, elementwise.

    Returns:
        The last layer's outputs, in the dtype that features and parameters promote to.

    Raises:
        ValueError: no layers, or features of another length than the first kernel takes.
        TypeError: features that are not real numbers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxsoft import apply_mlp, init_mlp
        >>> params = init_mlp(jax.random.key(0), (4, 5, 4, 3))
        >>> jax.vmap(apply_mlp, in_axes=(None, 0))(params, jnp.ones((100, 4))).shape
        (100, 3)

    Source: D. E. Rumelhart, G. E. Hinton, R. J. Williams (1986).
    """
    x = as_floating("features", features)
    if not params:
        raise ValueError("params: expected at least one layer, got none")
    first = params[0]["kernel"]
    inputs = first.shape[0]
    if x.shape != (inputs,):
        raise ValueError(
            f"features: expected one example of shape ({inputs},), got {x.shape}; map batches with jax.vmap"
        )
    if jnp.issubdtype(jnp.result_type(features), jnp.integer):  # integers take the parameters' dtype, not a default
        x = x.astype(first.dtype)
    *hidden, last = params
    for layer in hidden:
        x = activation(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]
