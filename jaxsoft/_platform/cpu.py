"""The CPU's programs: the kernels of `native`, each one pass through memory over (outer, classes, inner).

XLA's CPU compiler reads the classes once for each maximum, sum and result; the kernels keep a row in the cache for all.
"""

import ctypes
import functools
import hashlib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxsoft._arrays.dtypes import compute_dtype
from jaxsoft._jax_internals import Function, Results, primitives_fail
from jaxsoft._platform.dispatch import Axes, Program

SWITCH = "JAXSOFT_NATIVE"  # 0: no kernels; 1: kernels wherever they can run; or the file of another library
LIBRARY = "libjaxsoft_native"
NAMES: set[str] = set()  # of the kernels; `_program` adds them
DTYPES = (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16)

Type = Array | jax.ShapeDtypeStruct  # anything with a shape and a dtype
Types = tuple[Type | None, ...]


class NativeKernels(NamedTuple):
    """Whether the CPU's kernels are in use, and from which file, or why not."""

    loaded: bool
    detail: str

    def __str__(self) -> str:
        return f"native CPU kernels: {'loaded from' if self.loaded else 'none,'} {self.detail}"


_MODE = os.environ.get(SWITCH, "1")
if _MODE not in ("0", "1") and not Path(_MODE).is_file():
    raise ValueError(f"{SWITCH}: expected 0, 1 or the file of a library, got {_MODE!r}")


@functools.cache
def native_kernels() -> NativeKernels:
    """Whether this process runs the kernels compiled for the CPU, or the plain formula in their place.

    Both give the same results up to rounding. The environment variable JAXSOFT_NATIVE, read when jaxsoft is imported,
    decides: 0 turns the kernels off; 1, the default, uses them wherever they can run; a path uses that library file.

    Returns:
        `loaded`, and `detail`: the file of the kernels, or why they are not loaded.

    Edges: kernels do not run on arrays that XLA shards over several devices (inside `jax.shard_map` each device runs
    them), in programs made by `jax.export`, or on accelerators. This call initialises JAX's CPU: call
    `jax.distributed.initialize` first.

    Raises:
        ValueError: when jaxsoft is imported, for any other value of JAXSOFT_NATIVE.

    Example:
        >>> from jaxsoft import native_kernels
        >>> native_kernels().loaded in (True, False)
        True
    """
    if _MODE == "0":
        return NativeKernels(False, f"turned off by {SWITCH}=0")
    if reason := primitives_fail():
        return NativeKernels(False, f"JAX {jax.__version__} has changed: {reason}")
    # In an editable installation the package has two folders: one of the sources and one of the built files.
    folders = [Path(folder) / "native" for folder in sys.modules["jaxsoft"].__path__]
    built = [folder / f"{LIBRARY}.{end}" for folder in folders for end in ("so", "dylib")]
    files = [file for file in built if file.exists()] if _MODE == "1" else [Path(_MODE)]
    if not files:
        return NativeKernels(False, "not built when the package was installed")
    # Initialise the CPU first: JAX would defer a registration, and if that failed, its CPU would not start at all.
    jax.local_devices(backend="cpu")
    try:
        library = ctypes.CDLL(str(files[0]))
        _check_sources(library, Path(__file__).parents[1] / "native")
        for name in NAMES:
            symbol = f"jaxsoft_{name}"
            jax.ffi.register_ffi_target(symbol, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    except Exception as error:  # a library of another machine, or built with headers newer than this jaxlib
        return NativeKernels(False, f"{files[0]} was refused: {error}")
    return NativeKernels(True, str(files[0]))


def _check_sources(library: ctypes.CDLL, folder: Path) -> None:
    """Refuse kernels of other sources than the checkout's, whose arguments may mean something else."""
    sources = [folder / name for name in ("ffi.cc", "kernels.cc", "kernels.h")]
    if all(file.exists() for file in sources):  # only in a checkout, and not in an installed wheel
        hashes = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in sources)
        expected = hashlib.sha256(hashes.encode()).hexdigest()
        if ctypes.c_char_p.in_dll(library, "jaxsoft_sources").value != expected.encode():
            raise ImportError(f"{folder} has changed since it was built; install again")


def _of_statistics(axes: Axes, logits: Type, label: Type | None, target_weights: Type | None) -> Types:
    number = _position(logits, axes)
    weighed = None if target_weights is None else number
    distribution = None if label is not None else weighed
    return number, number, (distribution if label is None else number), weighed, weighed, distribution


def _of_moments(axes: Axes, logits: Type) -> Types:
    number = _position(logits, axes)
    return number, number, number, number, jax.ShapeDtypeStruct(number.shape, jnp.int32)


def _like_first(axes: Axes, first: Type, *others: Type | None) -> Types:
    return (first,)


def _program(name: str, roles: str, results: Callable[..., Types], *, in_place: bool = False) -> Program:
    """The kernel `name` as the program of a plain function of the same arrays; absent results are None.

    `roles` are the roles of the arrays after the first, see `_takes`. `in_place` overwrites the first array with the
    result; if the array is read again, XLA copies it before.
    """

    def choose(single_device: bool, types: Types, axes: Axes) -> Function | None:
        logits, *others = types
        assert logits is not None
        if not (single_device and _fits(logits, axes) and native_kernels().loaded):
            return None
        given = ((role, array) for role, array in zip(roles.split(), others, strict=True) if array is not None)
        return run if all(_takes(role, array, logits, axes) for role, array in given) else None

    def run(arrays: tuple[Array | None, ...], axes: Axes) -> Results:
        # For the handlers, an array without elements is absent.
        nothing = jnp.zeros(0, jnp.float32)
        expected = results(axes, *arrays)
        types = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in (nothing if r is None else r for r in expected)]
        kernel = jax.ffi.ffi_call(f"jaxsoft_{name}", types, input_output_aliases={0: 0} if in_place else None)
        operands = (nothing if array is None else array for array in arrays)
        outputs = kernel(*operands, first=np.int64(axes[0]), last=np.int64(axes[-1]))
        return tuple(output for output, result in zip(outputs, expected, strict=True) if result is not None)

    NAMES.add(name)
    return choose


statistics = _program("statistics", "label weights", _of_statistics)
moments = _program("moments", "", _of_moments)
OF_GRADIENT = "position position mask label" + 4 * " position" + " weights"
gradient = _program("gradient", OF_GRADIENT, _like_first)
gradient_in_place = _program("gradient", OF_GRADIENT, _like_first, in_place=True)
OF_LOSS = "label position position position weights number"
loss = _program("loss", OF_LOSS, lambda axes, logits, *targets: (_position(logits, axes), logits))
total = _program("total", "", lambda axes, numbers: (_position(numbers, axes),))
softmax = _program("softmax", "", _like_first)
log_softmax = _program("log_softmax", "", lambda axes, logits: (logits, *2 * (_position(logits, axes),)))
softmax_vjp = _program("softmax_vjp", "like", _like_first)
log_softmax_vjp = _program("log_softmax_vjp", "position position like", _like_first)


def leading_sums(single_device: bool, types: tuple[Type], axes: Axes) -> Function | None:
    """The first three results of `moments`."""
    run = moments(single_device, types, axes)
    return None if run is None else lambda arrays, axes: run(arrays, axes)[:3]


def _fits(logits: Type, axes: Axes) -> bool:
    """Whether a kernel takes such logits, of any size, so that a row's bits do not depend on its batch."""
    known = all(isinstance(size, int) for size in logits.shape)  # a symbol of `jax.export` stands for every size
    together = bool(axes) and axes == tuple(range(axes[0], axes[-1] + 1))
    return known and together and logits.dtype in DTYPES and 0 not in logits.shape


def _takes(role: str, array: Type, logits: Type, axes: Axes) -> bool:
    """Whether a kernel can take the array in its role with these logits: kernels do not check bounds."""
    if role == "like":
        return (array.shape, array.dtype) == (logits.shape, logits.dtype)
    dtype = {"label": jnp.int32, "mask": jnp.bool_}.get(role, compute_dtype(logits.dtype))
    if role == "number":
        return (math.prod(array.shape), array.dtype) == (1, dtype)
    if role != "weights":
        return (array.shape, array.dtype) == (_position(logits, axes).shape, dtype)
    first, ahead = logits.ndim + axes[0], logits.shape[: axes[0]]
    # Consecutive vectors may share one weight per class: all vectors, or under `vmap` the vectors of one example.
    class_sizes = tuple(
        size if axis in axes else 1 for axis, size in zip(range(-logits.ndim, 0), logits.shape, strict=True)
    )
    shared = [ahead[:n] + class_sizes[n:] for n in range(first + 1)]
    return array.shape in (logits.shape, *shared) and array.dtype == dtype


def _position(logits: Type, axes: Axes) -> jax.ShapeDtypeStruct:
    """The type of one number per position, in the dtype to compute in."""
    shape = list(logits.shape)
    for axis in axes:
        shape[axis] = 1
    return jax.ShapeDtypeStruct(tuple(shape), compute_dtype(logits.dtype))


def log1p(single_device: bool, types: tuple[Type], axes: Axes) -> Function:
    """log(1 + x) for x ≥ 0 as log u + (x − (u − 1)) / u, where u is 1 + x after rounding (W. Kahan's correction).

    XLA's log1p selects between two formulas. If another select follows, XLA's CPU compiler computes both without
    vectorising, which took 10 times as long as vectorised logarithms.
    """

    def run(arrays: tuple[Array], axes: Axes) -> tuple[Array]:
        (x,) = arrays
        u = jnp.maximum(1 + x, 1)  # no effect on the value: keeps XLA from simplifying u − 1
        return (jnp.log(u) + (x - (u - 1)) / u,)

    return run
