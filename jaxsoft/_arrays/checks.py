"""Checks: shapes, dtypes and options when a function is traced, values when it is run under `checked`."""

import functools
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify
from jaxtyping import Array, ArrayLike, Bool, Float

from jaxsoft._jax_internals import Tracer, checking

P = ParamSpec("P")
R = TypeVar("R")
Option = TypeVar("Option")

# Labels that by custom mark ignored positions: in Keras and scikit-learn, in PyTorch, in images of 8 and 16 bits, and
# the least int32.
MARKERS = (-1, -100, 255, 65535, -(2**31))


def checked(fn: Callable[P, R]) -> Callable[P, R]:
    """Return `fn` with the values of its arguments checked as well as their shapes.

    A compiled function cannot raise, so a label out of range becomes a NaN loss and a NaN gradient. `checked(fn)` runs
    the same computation with JAX's `checkify` and raises instead. It looks at values, so it cannot be traced itself:
    wrap it around everything else, as in `checked(jax.jit(fn))` or `checked(jax.grad(fn))`.

    Args:
        fn: a function that calls this library, itself possibly transformed by `jax.jit`, `jax.grad` or `jax.vmap`.

    Returns:
        A function with the same arguments and results.

    Raises:
        ValueError: a label outside [0, classes) that is not `ignore_index`; a negative or non-finite target, weight or
            class weight; a NaN logit. The message names the argument, index and value of the first offender; under
            `jax.vmap` the index is relative to one of the mapped calls.
        TypeError: called inside `jit`, `grad` or `vmap`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxsoft import checked, cross_entropy
        >>> checked(jax.jit(cross_entropy))(jnp.zeros((2, 3)), jnp.array([1, 7]))
        Traceback (most recent call last):
        ...
        ValueError: targets[1] is 7: expected a label in [0, 3)
    """
    if not callable(fn):
        raise TypeError(f"checked: expected a function, got {type(fn).__name__}: write checked(function)(...)")
    run = checkify.checkify(fn, errors=checkify.user_checks)

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((args, kwargs))):
            raise TypeError(
                "checked: expected concrete arrays, got traced ones; wrap checked around jit, grad and vmap"
            )
        with checking(True):
            error, result = run(*args, **kwargs)
        message = error.get()
        if message is not None:
            raise ValueError(message.removesuffix(" (`check` failed)"))
        return result

    return wrapper


def is_checking() -> bool:
    """Whether this is traced or run inside `checked`."""
    return checking.value


def check_values(name: str, values: Array | np.ndarray, valid: Bool[ArrayLike, "..."], expected: str) -> None:
    """Under `checked`, fail with the first of `values` that is not valid; otherwise do nothing."""
    if not is_checking() or not values.size:
        return
    if isinstance(values, np.ndarray):
        refuse_values(name, values, np.asarray(valid), expected)
        return
    first = jnp.argmin(valid)
    index = jnp.unravel_index(first, values.shape)
    message = f"{_entry(name, ['{}' for _ in index])} is {{}}: expected {expected}"
    checkify.check(jnp.all(valid), message, *index, values.reshape(-1)[first])


def check_labels(
    name: str,
    labels: Array | np.ndarray,
    valid: Bool[ArrayLike, "..."],
    classes: int,
    ignored: int | None,
    option: str = "ignore_index",
) -> None:
    """Under `checked`, fail with the first label that is not valid, and say what to do with a usual one.

    `ignored` is the label that is given as `option`, or None.
    """
    if not is_checking() or not labels.size:
        return
    expected = f"a label in [0, {classes})" + ("" if ignored is None else f" or {option}={ignored}")
    hints = {classes: f"labels are 0 to {classes - 1}: if yours are 1 to {classes}, subtract 1"}
    if ignored is None:
        hints |= {label: f"to ignore this label, pass {option}={label}" for label in MARKERS}
    xp = np if isinstance(labels, np.ndarray) else jnp
    first = labels.reshape(-1)[xp.argmin(valid)]
    is_integer = jnp.issubdtype(labels.dtype, jnp.integer)
    limits = jnp.iinfo(labels.dtype) if is_integer else jnp.finfo(labels.dtype)
    for label, hint in hints.items():
        if limits.min <= label <= limits.max:  # otherwise the comparison would wrap the label
            check_values(name, labels, valid | (first != label), f"{expected}; {hint}")
    check_values(name, labels, valid, expected)


def refuse_values(name: str, values: np.ndarray, valid: np.ndarray, expected: str) -> None:
    """Fail with the first of NumPy's `values` that is not valid."""
    if not valid.all():
        first = np.unravel_index(valid.argmin(), valid.shape)
        raise ValueError(f"{_entry(name, map(str, first))} is {values[first]}: expected {expected}")


def _entry(name: str, index: Iterable[str]) -> str:
    indices = ", ".join(index)
    return f"{name}[{indices}]" if indices else name


def as_array(name: str, value: ArrayLike) -> Array:
    """`value` as a JAX array, or an error that names the argument."""
    refuse_mask(name, value)
    refuse_strings(name, value)
    # For a list or an array JAX's own error is the most precise.
    is_array = isinstance(value, jax.Array | np.ndarray | Sequence) and not isinstance(value, str)
    try:
        if isinstance(value, str):
            raise TypeError
        return jnp.asarray(value)
    except (TypeError, ValueError):
        if is_array:
            raise
        raise TypeError(f"{name}: expected an array, got {type(value).__name__}") from None


def refuse_mask(name: str, value: object, ignored: str = "ignore_index") -> None:
    """Refuse masked arrays, whose mask NumPy would drop; `ignored` is the option that ignores labels."""
    if isinstance(value, np.ma.MaskedArray):
        is_label = name in ("targets", "labels") and value.dtype.kind in "iu"
        instead = f"{name}.filled(-1) with {ignored}=-1" if is_label else f"{name}.filled(...)"
        raise TypeError(f"{name}: expected an array without a mask, got a NumPy masked array: pass {instead}")


def refuse_strings(name: str, value: object) -> None:
    """Refuse lists and arrays of strings, such as the class names in a column of a table."""
    if isinstance(value, np.ndarray):
        strings = value.dtype.kind in "UST" or (value.dtype.kind == "O" and any(isinstance(v, str) for v in value.flat))
    else:
        strings = isinstance(value, list | tuple) and any(isinstance(entry, str) for entry in value)
    if strings:
        number = "number the classes: names, labels = numpy.unique(strings, return_inverse=True)"
        remedy = f"; {number}" if name in ("targets", "labels") else ""
        raise TypeError(f"{name}: expected an array of numbers, got strings{remedy}")


def as_floating(name: str, value: ArrayLike) -> Array:
    """`value` as a floating array of 16 bits or more: integers are promoted as `jax.nn` promotes them."""
    array = as_array(name, value)
    if jnp.issubdtype(array.dtype, jnp.integer):
        return array.astype(jnp.result_type(float))
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    if array.dtype.itemsize < 2:  # some of these have no infinity, which masks classes, and all are too coarse
        raise TypeError(f"{name}: expected at least 16 bits, got dtype {array.dtype}: convert to bfloat16 first")
    return array


def as_mask(name: str, value: ArrayLike, shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """`value` as booleans of the given shape."""
    mask = as_array(name, value)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"{name}: expected booleans, got dtype {mask.dtype}")
    return broadcast(name, mask, shape)


def broadcast(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    """`array` broadcast to `shape`, or a ValueError that names it."""
    try:
        return jnp.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(f"{name}: expected a shape that broadcasts to {shape}, got {array.shape}") from None


def as_integer(name: str, value: int) -> int:
    """`value` as a Python integer; it must be static, not traced."""
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name}: expected an integer known when the function is traced, got a traced value: "
            f"bind it with functools.partial, or name it in jax.jit's static_argnames"
        )
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None


def as_axis(axis: int, ndim: int, name: str = "axis") -> int:
    """`axis` as an index in [0, ndim)."""
    index = as_integer(name, axis)
    if ndim == 0:
        raise ValueError(f"{name}: expected an array with at least one axis, the classes, got a scalar")
    if not -ndim <= index < ndim:
        raise ValueError(f"{name}: expected an integer in [{-ndim}, {ndim}), got {index}")
    return index % ndim


def as_axes(axis: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """One axis, several, or None for all of them, as sorted indices in [0, ndim)."""
    if axis is None:
        return tuple(range(ndim))
    axes = [as_axis(a, ndim) for a in (axis if isinstance(axis, Sequence) else (axis,))]
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis: expected distinct axes, got {axis!r}")
    return tuple(sorted(axes))


def as_number(
    name: str, value: Float[ArrayLike, ""], low: float, high: float = math.inf, *, above: bool = False
) -> float | Array:
    """`value` within [low, high], or above low: a Python float, or an array if it is traced, for schedules."""
    is_array = isinstance(value, np.ndarray | jax.Array)  # traced ones too
    if isinstance(value, bool) or not (isinstance(value, numbers.Real) or is_array):
        raise TypeError(f"{name}: expected a number or a scalar array, got {type(value).__name__}")
    if is_array and (value.shape or not any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer))):
        raise TypeError(f"{name}: expected a real scalar, got shape {value.shape} and dtype {value.dtype}")
    bounds = f"{'above' if above else 'at least'} {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
    if isinstance(value, Tracer):
        number = lax.stop_gradient(value)
        inside = (number > low if above else number >= low) & (number <= high) & jnp.isfinite(number)
        check_values(name, number, inside, f"a finite number {bounds}")
        return number
    number = float(value)
    if not (low < number if above else low <= number) or not number <= high or number == math.inf:
        raise ValueError(f"{name}: expected a finite number {bounds}, got {number:g}")
    return number


def as_option(name: str, value: Option, options: Sequence[Option]) -> Option:
    """`value` if it is one of the options."""
    if value not in options:
        raise ValueError(f"{name}: expected {', '.join(map(repr, options[:-1]))} or {options[-1]!r}, got {value!r}")
    return value
