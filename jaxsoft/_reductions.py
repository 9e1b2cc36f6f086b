"""Reductions over the class axes, in the form that is fast on the platform they are compiled for.

A plain reduction is what accelerators fuse best. XLA's CPU backend is 10 to 30 times slower than it could be,
in jax 0.10, where the classes lie far apart or the array begins with an axis of length one.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

FAR = 1 << 14  # elements from one class to the next


def reduce_classes(
    op: Callable[[Array, Array], Array],
    start: ArrayLike,
    term: Callable[..., Array],
    arrays: tuple[Array, ...],
    axes: tuple[int, ...],
    *,
    read_once: bool = False,
) -> Array:
    """`op` over `term(first, *arrays)`, elementwise in arrays whose first class has the index `first`.

    Where classes lie far apart, the CPU folds in one class after the other. `read_once`: the terms are
    exponentials and one expression alone reads the result.
    """

    def at_once(*arrays: Array) -> Array:
        terms = term(0, *arrays)
        return lax.expand_dims(lax.reduce(terms, jnp.asarray(start, terms.dtype), op, axes), axes)

    axis = axes[-1]
    shape = arrays[0].shape
    classes = shape[axis]
    if len(axes) > 1 or classes < 3 or math.prod(shape[axis + 1 :]) <= FAR:
        return at_once(*arrays)

    def one_by_one(*arrays: Array) -> Array:
        def one(index: Array | int) -> Array:
            return term(index, *(lax.dynamic_slice_in_dim(a, index, 1, axis) for a in arrays))

        def fold(reduced: Array, first: Array | int, count: int) -> Array:
            return functools.reduce(op, (one(first + n) for n in range(count)), reduced)

        # XLA repeats the reduction in each expression that reads it, unless a loop of two turns or more stands between.
        block = 32 if read_once else min(16, (classes - 1) // 2)
        turns = (classes - 1) // block
        head = classes - turns * block
        first = one(0)
        reduced = fold(op(first, jnp.asarray(start, first.dtype)), 1, head - 1)
        return lax.fori_loop(0, turns, lambda n, reduced: fold(reduced, head + n * block, block), reduced)

    return lax.platform_dependent(*arrays, cpu=one_by_one, default=at_once)


def dot_classes(a: Array, b: Array, axes: tuple[int, ...]) -> Array:
    """Σ_j a_j b_j, the dot product of each vector with its partner."""

    def products(a: Array, b: Array) -> Array:
        return reduce_classes(lax.add, 0, lambda _, a, b: a * b, (a, b), axes)

    def dot(a: Array, b: Array) -> Array:
        return jnp.vecdot(a, b, precision=lax.Precision.HIGHEST)[..., None]

    is_last, is_whole = axes == (a.ndim - 1,), jax.typeof(a).sharding.spec[-1:] in ((), (None,))
    if not (is_last and is_whole):  # JAX takes no dot along an axis that is explicitly sharded
        return products(a, b)
    return lax.platform_dependent(a, b, cpu=dot, default=products)
