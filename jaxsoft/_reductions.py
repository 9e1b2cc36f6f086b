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
LONG, SHORT = 1 << 15, 1 << 7  # classes side by side; of a run of them


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

    The first array has the classes, others may have a length of one in their place. The CPU folds in classes far
    apart one after the other, and reduces long rows in runs, which the term sees as one axis more before the last.
    `read_once`: the terms are exponentials and one expression alone reads the result.
    """

    def at_once(*arrays: Array) -> Array:
        terms = term(0, *arrays)
        return lax.expand_dims(lax.reduce(terms, jnp.asarray(start, terms.dtype), op, axes), axes)

    axis = axes[-1]
    shape = arrays[0].shape
    classes = shape[axis]

    def in_runs(*arrays: Array) -> Array:
        count = classes // length
        runs = (a.reshape(*a.shape[:-1], *((1, 1) if a.shape[-1] == 1 else (count, length))) for a in arrays)
        terms = term(length * jnp.arange(count, dtype=jnp.int32)[:, None], *runs)
        reduced = lax.reduce(terms, jnp.asarray(start, terms.dtype), op, (axis + 1,))

        def fold(n: Array, total: Array) -> Array:
            return op(total, lax.dynamic_slice_in_dim(reduced, n, 1, axis))

        # XLA takes a reduction of reductions for one, unless a loop stands between.
        return lax.fori_loop(1, count, fold, reduced[..., :1])

    def one_by_one(*arrays: Array) -> Array:
        def one(index: Array | int) -> Array:
            of_class = (a if a.shape[axis] == 1 else lax.dynamic_slice_in_dim(a, index, 1, axis) for a in arrays)
            return term(index, *of_class)

        def fold(reduced: Array, first: Array | int, count: int) -> Array:
            return functools.reduce(op, (one(first + n) for n in range(count)), reduced)

        # XLA repeats the reduction in each expression that reads it, unless a loop of two turns or more stands between.
        block = 32 if read_once else min(16, (classes - 1) // 2)
        turns = (classes - 1) // block
        head = classes - turns * block
        first = one(0)
        reduced = fold(op(first, jnp.asarray(start, first.dtype)), 1, head - 1)
        return lax.fori_loop(0, turns, lambda n, reduced: fold(reduced, head + n * block, block), reduced)

    if len(axes) == 1 and classes > 2 and math.prod(shape[axis + 1 :]) > FAR:
        return lax.platform_dependent(*arrays, cpu=one_by_one, default=at_once)
    length = next(n for n in range(LONG, 0, -1) if classes % n == 0)
    if len(axes) == 1 and axis == len(shape) - 1 and classes > LONG and length >= SHORT:
        return lax.platform_dependent(*arrays, cpu=in_runs, default=at_once)
    return at_once(*arrays)


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
