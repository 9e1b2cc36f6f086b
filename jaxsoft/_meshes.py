"""Arrays whose types say how they are laid over the devices of a mesh (explicit axes)."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array


def stated_sharding(array: Array | jax.ShapeDtypeStruct) -> NamedSharding | None:
    """What an array's type says of its sharding; None where no axis of its mesh is explicit."""
    if isinstance(array, jax.ShapeDtypeStruct):
        return None
    sharding = jax.typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def lay_like(array: Array, like: Array | jax.ShapeDtypeStruct, *absent: int) -> Array:
    """`array` laid as `like` is, whose axes it has but for the `absent`; where it has a length of one, on every device."""
    sharding = stated_sharding(like)
    if sharding is None:
        return array
    kept = [axis for axis in range(like.ndim) if axis not in absent]
    names = (*sharding.spec, *(None for _ in range(like.ndim - len(sharding.spec))))
    spec = (names[axis] if size == like.shape[axis] else None for axis, size in zip(kept, array.shape, strict=True))
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def broadcast_like(array: Array, like: Array) -> Array:
    """`array` broadcast to the shape of `like`, and laid as it is: of the cases of a choice JAX asks for both."""
    return jnp.broadcast_to(array, like.shape, out_sharding=stated_sharding(like))
