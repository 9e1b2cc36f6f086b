"""The CPU's programs: the kernels of `native`, each one trip through memory over (outer, classes, inner).

XLA's CPU compiler reads the classes once for each maximum, sum and result; these have a row in the cache for all three.
"""

import ctypes
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike

from jaxsoft._dtypes import compute_dtype
from jaxsoft._platform import Axes, Program
from jaxsoft._primitive import Function, Results

SWITCH = "JAXSOFT_NATIVE"  # 0: never, 1: where they are faster, always: wherever they can run
LIBRARY = "libjaxsoft_native"
NAMES = ("statistics", "gradient", "softmax", "log_softmax", "softmax_vjp", "log_softmax_vjp")
LEAST = 1 << 13  # elements below which a call costs more than it saves

DTYPES = (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16)

Type = Array | jax.ShapeDtypeStruct  # what has a shape and a dtype
Types = tuple[Type | None, ...]


class NativeKernels(NamedTuple):
    """Whether the CPU's kernels are in use, and why or from where."""

    loaded: bool
    detail: str

    def __str__(self) -> str:
        return f"native CPU kernels: {'loaded from' if self.loaded else 'none,'} {self.detail}"


def native_kernels() -> NativeKernels:
    """Whether this process runs the kernels compiled for the CPU, or the plain formula in their place.

    Both give the same results, to rounding. The environment variable JAXSOFT_NATIVE, read when the library is
    imported, chooses: 0 turns the kernels off, 1, the default, uses them where they are faster, and "always" wherever
    they can run.

    Returns:
        `loaded`, and `detail`: the file of the kernels or why there are none.

    Edges: arrays that XLA is to lay over several devices (inside `jax.shard_map` each device is one), programs made by
    `jax.export` and accelerators take the plain formula in any case.

    Raises:
        ValueError: when the library is imported, a value of JAXSOFT_NATIVE that is none of these.

    Example:
        >>> from jaxsoft import native_kernels
        >>> native_kernels().loaded in (True, False)
        True
    """
    return _KERNELS


def _load() -> NativeKernels:
    mode = os.environ.get(SWITCH, "1")
    if mode not in ("0", "1", "always"):
        raise ValueError(f"{SWITCH}: expected 0, 1 or always, got {mode!r}")
    if mode == "0":
        return NativeKernels(False, f"turned off by {SWITCH}=0")
    # In an editable installation the package has two folders: the sources', and that of what was built.
    folders = [Path(folder) / "native" for folder in sys.modules["jaxsoft"].__path__]
    files = [file for folder in folders for end in ("so", "dylib") if (file := folder / f"{LIBRARY}.{end}").exists()]
    if not files:
        return NativeKernels(False, "not built when the package was installed")
    try:
        library = ctypes.CDLL(str(files[0]))
        for name in NAMES:
            symbol = f"jaxsoft_{name}"
            jax.ffi.register_ffi_target(symbol, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    except Exception as error:  # of another machine, or built with headers newer than this jaxlib
        return NativeKernels(False, f"{files[0]} was refused: {error}")
    return NativeKernels(True, str(files[0]))


_KERNELS = _load()
_LEAST = 0 if os.environ.get(SWITCH) == "always" else LEAST


def _positions(logits: Type, axes: Axes, dtype: DTypeLike | None = None) -> Type:
    """The type of one number a position, in the dtype to compute in if no other is given."""
    shape = list(logits.shape)
    for axis in axes:
        shape[axis] = 1
    return jax.ShapeDtypeStruct(tuple(shape), dtype or compute_dtype(logits.dtype))


def _of_statistics(axes: Axes, logits: Type, label: Type | None, spread: Type | None) -> Types:
    number = _positions(logits, axes)
    return number, number, *(None if array is None else number for array in (label, spread, spread))


def _like_first(axes: Axes, first: Type, *others: Type | None) -> Types:
    return (first,)


def _of_log_softmax(axes: Axes, logits: Type) -> Types:
    return logits, _positions(logits, axes), _positions(logits, axes)


def _program(name: str, results: Callable[..., Types]) -> Program:
    """The kernel `name` as the program of a plain function of the same arrays, whose absent results are None."""

    def choose(local: bool, types: tuple[Type | None, ...], axes: Axes) -> Function | None:
        if not (_KERNELS.loaded and local and _fits(types, axes)):
            return None

        def run(arrays: tuple[Array | None, ...], axes: Axes) -> Results:
            # The handlers know an absent array by its having no elements.
            nothing = jnp.zeros(0, jnp.float32)
            expected = results(axes, *arrays)
            types = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in (nothing if r is None else r for r in expected)]
            kernel = jax.ffi.ffi_call(f"jaxsoft_{name}", types)
            outputs = kernel(
                *(nothing if a is None else a for a in arrays), first=np.int64(axes[0]), last=np.int64(axes[-1])
            )
            return tuple(output for output, result in zip(outputs, expected, strict=True) if result is not None)

        return run

    return choose


statistics = _program("statistics", _of_statistics)
gradient = _program("gradient", _like_first)
softmax = _program("softmax", _like_first)
log_softmax = _program("log_softmax", _of_log_softmax)
softmax_vjp = _program("softmax_vjp", _like_first)
log_softmax_vjp = _program("log_softmax_vjp", _like_first)


def log1p(local: bool, types: tuple[Type], axes: Axes) -> Function:
    """log(1 + x) of x ≥ 0 as log u + (x − (u − 1)) / u, u being 1 + x as it is rounded (W. Kahan's correction).

    XLA's own chooses between two formulas, and where a choice follows its CPU makes both for each number alone: that
    took 10 times as long as logarithms side by side.
    """

    def run(arrays: tuple[Array], axes: Axes) -> tuple[Array]:
        (x,) = arrays
        u = jnp.maximum(1 + x, 1)  # of no effect, but for XLA not to simplify u − 1
        return (jnp.log(u) + (x - (u - 1)) / u,)

    return run


def _fits(types: tuple[Type | None, ...], axes: Axes) -> bool:
    """Whether the kernels take arrays of these types, and are faster than XLA for so many elements."""
    logits, *others = (t for t in types if t is not None)
    shape, (first, *_, last) = logits.shape, (*axes, axes[-1])
    if not all(isinstance(size, int) for size in shape):  # a symbol of `jax.export` serves every size
        return False
    if logits.dtype not in DTYPES or math.prod(shape) < _LEAST or axes != tuple(range(first, last + 1)):
        return False
    one = _positions(logits, axes).shape
    ahead, classes, behind = shape[:first], shape[first : last + 1 or None], one[last + 1 :] if last < -1 else ()

    def fits(array: Type) -> bool:
        # A weight of each class may be shared by consecutive vectors, as under `vmap` by those of one example.
        shared = array.shape[first:] == (*classes, *(1 for _ in behind)) and any(
            array.shape[:first] == (*ahead[:n], *(1 for _ in ahead[n:])) for n in range(len(ahead) + 1)
        )
        return array.shape in (shape, one) or shared

    return math.prod(shape) > 0 and all(map(fits, others))
