"""Reductions over the class axes, in the form that is fast on the platform they are compiled for.

A plain reduction is what accelerators fuse best. XLA's CPU backend is 10 to 30 times slower than it could be, in jax
0.10, where the classes lie far apart or an axis before them has length one, and up to 10 times slower, in jax 0.12 too,
where more than 32,768 classes lie side by side or more than 32,768 rows one below the other. In half precision it
stores the logits widened where several expressions read them.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxsoft._checks import compute_dtype

FAR = 1 << 14  # elements from one class to the next
LONG = 1 << 15  # classes side by side, or rows of them
SHORT = 1 << 7  # the least that a run is cut to


def reduce_classes(
    op: Callable[[Array, Array], Array],
    start: ArrayLike,
    term: Callable[..., Array],
    arrays: tuple[Array, ...],
    axes: tuple[int, ...],
    *,
    read_once: bool = False,
    only_reduced: bool = False,
    apart: bool = False,
) -> Array:
    """`op` over `term(first, *arrays)`, elementwise in arrays whose first class has the index `first`.

    The first array has the classes, others may have a length of one in their place. The result keeps them with length
    one, in the dtype to compute in. The CPU folds classes far apart one after the other. Along a last axis it reduces
    views: long rows in runs, many rows in groups, no axis of length one; a term may count on no more than that the
    classes are last.

    `read_once`: the terms are exponentials and one expression alone reads the result. `only_reduced`: no array of
    their size is formed from the arrays, which XLA would have to read in both shapes if their rows were cut. `apart`:
    in half precision the first array is read behind a barrier of its own, or XLA would store it widened for all that
    reads it. Rows in runs and what is only reduced are without being asked, several axes and classes far apart never.
    """

    def at_once(*arrays: Array) -> Array:
        terms = term(0, *arrays)
        # Of a concrete number JAX makes a sum, whose derivative needs no known sizes.
        return lax.expand_dims(widen(lax.reduce(terms, np.asarray(start, terms.dtype), op, axes)), axes)

    if len(axes) != 1 or not is_known(arrays[0].size) or not arrays[0].size:
        return at_once(*arrays)
    (axis,), shape = axes, arrays[0].shape
    rows, classes = math.prod(shape[:-1]), shape[axis]
    rows_of_run, classes_of_run = run_length(rows) if only_reduced else rows, run_length(classes)
    cut = rows_of_run < rows or is_cut(classes)
    apart = is_narrow(arrays[0]) and (apart or only_reduced or is_cut(classes))

    def alone(logits: Array, *others: Array) -> tuple[Array, ...]:
        return lax.optimization_barrier(logits) if apart else logits, *others

    def at_once_alone(*arrays: Array) -> Array:
        return at_once(*alone(*arrays))

    def in_runs(*arrays: Array) -> Array:
        # No axis of length one: XLA would be slow with that, too.
        groups = (rows // rows_of_run, rows_of_run) if rows_of_run < rows else shape[:-1]
        of_rows = tuple(n for n in groups if n > 1)
        count = classes // classes_of_run
        runs = (count,) if count > 1 else ()

        def view(array: Array) -> Array:
            along = (*runs, classes_of_run)
            return array.reshape(*of_rows, *(along if array.shape[-1] > 1 else (1 for _ in along)))

        def reduce_last(terms: Array) -> Array:
            return lax.reduce(terms, jnp.asarray(start, terms.dtype), op, (terms.ndim - 1,))

        first = classes_of_run * jnp.arange(count, dtype=jnp.int32)[:, None] if runs else 0
        reduced = reduce_last(term(first, *alone(*map(view, arrays))))
        if runs:  # a barrier, because XLA takes a reduction of reductions for one
            reduced = reduce_last(widen(lax.optimization_barrier(reduced)))
        return widen(reduced).reshape(*shape[:-1], 1)

    def one_by_one(*arrays: Array) -> Array:
        def one(index: Array | int) -> Array:
            of_class = (a if a.shape[axis] == 1 else lax.dynamic_slice_in_dim(a, index, 1, axis) for a in arrays)
            return widen(term(index, *of_class))  # before it is folded, or XLA would round each step

        def fold(reduced: Array, first: Array | int, count: int) -> Array:
            return functools.reduce(op, (one(first + n) for n in range(count)), reduced)

        # XLA repeats the reduction in each expression that reads it, unless a loop of two turns or more stands between.
        block = 32 if read_once else min(16, (classes - 1) // 2)
        turns = (classes - 1) // block
        head = classes - turns * block
        first = one(0)
        reduced = fold(op(first, jnp.asarray(start, first.dtype)), 1, head - 1)
        return lax.fori_loop(0, turns, lambda n, reduced: fold(reduced, head + n * block, block), reduced)

    if classes > 2 and math.prod(shape[axis + 1 :]) > FAR:
        on_cpu = one_by_one
    elif axis == len(shape) - 1 and (1 in shape[:-1] or cut) and all(map(is_whole, arrays)):
        on_cpu = in_runs
    elif apart:
        on_cpu = at_once_alone
    else:
        return at_once(*arrays)
    return lax.platform_dependent(*arrays, cpu=on_cpu, default=at_once)


@functools.cache
def run_length(extent: int) -> int:
    """The largest divisor in [SHORT, LONG] of what is longer, or else the extent itself."""
    return extent if extent <= LONG else next((n for n in range(LONG, SHORT - 1, -1) if extent % n == 0), extent)


def is_known(size: int) -> bool:
    """Whether a size is a number, not a symbol of `jax.export`, which serves every size and cannot be compared."""
    return isinstance(size, int)


def widen(array: Array) -> Array:
    return array.astype(compute_dtype(array.dtype))


def is_narrow(array: Array) -> bool:
    return array.dtype != compute_dtype(array.dtype)


def is_cut(classes: int) -> bool:
    """Whether rows of so many classes are reduced in runs on the CPU, unless they are explicitly sharded."""
    return is_known(classes) and run_length(classes) < classes


def is_whole(array: Array, first: int = 0) -> bool:
    """Whether no axis from `first` on is explicitly sharded: JAX cuts none that is, and takes no dot along it."""
    return not any(jax.typeof(array).sharding.spec[first:])


def dot_classes(a: Array, b: Array, axes: tuple[int, ...]) -> Array:
    """Σ_j a_j b_j, the dot product of each vector with its partner."""

    def products(a: Array, b: Array) -> Array:
        return reduce_classes(lax.add, 0, lambda _, a, b: a * b, (a, b), axes)

    def dot(a: Array, b: Array) -> Array:
        return jnp.vecdot(a, b, precision=lax.Precision.HIGHEST)[..., None]

    if axes != (a.ndim - 1,) or not is_whole(a, -1):
        return products(a, b)
    return lax.platform_dependent(a, b, cpu=dot, default=products)
