"""The tiles of a linear layer's positions on each platform, and their cost."""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from jaxsoft._arrays.checks import as_integer, as_option
from jaxsoft._arrays.dtypes import compute_dtype
from jaxsoft._formula.targets import REDUCTIONS, Reduction
from jaxsoft._jax_internals import max_dim, min_dim

Platform = Literal["cpu", "gpu", "tpu"]

CPU_BUDGET = 256 * 2**20
CPU_ROWS = 2048  # a matmul of one feature sums its rows in sequence: a longer sum in float32 would lose accuracy
# Each tile reads and writes the float32 gradient of the kernel, 8·D·V bytes for 2·R·D·V FLOPs: from
# R = 4·peak/bandwidth rows on that is hidden behind the matmul, 836 on an H100, 663 on a TPU v5p, 962 on a v5e.
ACCELERATOR_ROWS = 1024
ACCELERATOR_LOSS_ROWS = 512  # the loss alone, which reads the kernel once for each tile
DEFERRED_ROWS = 256


class Tile(NamedTuple):
    """The rows of tiles."""

    rows: int
    loss_rows: int  # where there are no gradients to add up
    deferred: bool  # whether logit gradients are kept, in half precision, for one matmul per input at the end


class Plan(NamedTuple):
    """What `linear_cross_entropy` does for given shapes."""

    tiles: int
    rows: int  # positions in a tile; the loss alone may take fewer
    flops: int  # of the loss alone
    training_flops: int  # of the loss and all gradients
    tile_bytes: int  # logits and their gradient of one tile
    kept_bytes: int  # logit gradients of all positions, kept where each input's gradient is one matmul
    gradient_bytes: int  # gradients of features and kernel, the kernel's in float32 where tiles add to it
    unfused_bytes: int  # logits and their gradient of all positions, which are not stored

    def __str__(self) -> str:
        tile, kept, gradients, unfused = (
            f"{n / 2**20:,.1f} MiB" for n in (self.tile_bytes, self.kept_bytes, self.gradient_bytes, self.unfused_bytes)
        )
        stored = f"{tile} for a tile" + (f", {kept} for logit gradients" if self.kept_bytes else "")
        return (
            f"{self.tiles} tile{'s' if self.tiles > 1 else ''} of {self.rows} positions: "
            f"{self.flops / 1e9:,.1f} GFLOP for the loss, {self.training_flops / 1e9:,.1f} with its gradients; "
            f"{stored} and {gradients} for gradients, in place of {unfused} for all logits and their gradient"
        )


def plan_linear_cross_entropy(
    positions: int,
    features: int,
    classes: int,
    dtype: DTypeLike = "float32",
    *,
    distributions: bool = False,
    reduction: Reduction = "mean",
    memory_budget: int | None = None,
    platform: Platform | None = None,
) -> Plan:
    """The tiles, FLOPs and bytes of `linear_cross_entropy` for given shapes.

    tile bytes = rows · classes · (logit + gradient),  training FLOPs = 6·N·D·V, with "none" 8·N·D·V

    On a CPU a tile has as many rows as fit in 256 MiB, 2048 at most; without native kernels half as many, which is not
    counted here, since finding out takes a device. On an accelerator it has 1024 rows, whatever their width: enough to
    hide the accumulation of the kernel's gradient behind the matmul. There, in half precision and for N ≤ 2·D, the
    kernel's gradient in float32 would take more memory than the gradients of all logits in half precision: those are
    kept, and each input's gradient is one matmul at the end.

    Args:
        positions: N; per device where the data are sharded.
        features: D.
        classes: V; per device where the classes are sharded.
        dtype: of features and kernel.
        distributions: whether the targets are distributions, whose rows count towards a tile's memory.
        reduction: as given to `linear_cross_entropy`.
        memory_budget: as given to `linear_cross_entropy`. On an accelerator the kept logit gradients are within it too,
            and a larger one does not make tiles larger than the default.
        platform: "cpu", "gpu" or "tpu"; None for the platform of JAX's default devices.

    Returns:
        A `Plan` of counts, in tiles, positions, FLOPs and bytes, that prints as a sentence.

    Edges: ignored positions count in the plan but cost no work. With a frozen kernel no logit gradients are kept. A
    kernel's gradient that is summed over devices is in float32. `jax.vmap` of a gradient uses a CPU's tiles.

    Raises:
        TypeError, ValueError: an argument that is not a positive integer, a platform that is none of these, a budget
            below one position's logits and gradient.

    Example:
        >>> from jaxsoft import plan_linear_cross_entropy
        >>> print(plan_linear_cross_entropy(8192, 2304, 256_000, "bfloat16", platform="gpu"))
        8 tiles of 1024 positions: 9,663.7 GFLOP for the loss, 28,991.0 with its gradients; 2,000.0 MiB for a tile and
        2,286.0 MiB for gradients, in place of 16,000.0 MiB for all logits and their gradient
    """
    sizes = {"positions": positions, "features": features, "classes": classes}
    for name, size in sizes.items():
        if as_integer(name, size) < 1:
            raise ValueError(f"{name}: expected a positive integer, got {size}")
    as_option("reduction", reduction, REDUCTIONS)
    if platform is None:
        platform = as_platform(jax.default_backend())
    as_option("platform", platform, get_args(Platform))
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
    wide, narrow = compute_dtype(dtype).itemsize, dtype.itemsize
    check_budget(classes, dtype, distributions, memory_budget)
    tile = plan_tile(platform, (positions, features, classes), dtype, distributions, memory_budget)
    product = 2 * positions * features * classes
    return Plan(
        tiles=-(-positions // tile.rows),
        rows=tile.rows,
        flops=product,
        training_flops=product * (4 if reduction == "none" else 3),
        tile_bytes=tile.rows * bytes_of_row(classes, dtype, distributions),
        kept_bytes=positions * classes * narrow if tile.deferred else 0,
        gradient_bytes=features * (positions * narrow + classes * (narrow if tile.deferred else wide)),
        unfused_bytes=positions * classes * 2 * wide,
    )


def as_platform(name: str) -> Platform:
    """The platform of devices that JAX calls so."""
    return name if name in ("cpu", "tpu") else "gpu"  # JAX's names of the last: gpu, cuda, rocm


def check_budget(classes: int, dtype: jnp.dtype, distributions: bool, memory_budget: int | None) -> None:
    if memory_budget is None or not isinstance(classes, int):  # but a symbol of `jax.export`, which serves every size
        return
    least = bytes_of_row(classes, dtype, distributions)
    if as_integer("memory_budget", memory_budget) < least:
        raise ValueError(
            f"memory_budget: expected at least {least} bytes, one position's logits and gradient, got {memory_budget}"
        )


def plan_tile(
    platform: Platform,
    shape: tuple[int, int, int],
    dtype: jnp.dtype,
    distributions: bool,
    memory_budget: int | None,
    *,
    kernel_moves: bool = True,
) -> Tile:
    """As many rows as the budget and the platform allow, split evenly into tiles; shape is (N, D, V)."""
    positions, features, classes = shape
    row = bytes_of_row(classes, dtype, distributions)
    known = isinstance(classes, int)  # of unknown sizes tiles have the most rows that they may have
    if platform == "cpu":
        budget = CPU_BUDGET if memory_budget is None else memory_budget
        rows = _shared(positions, max(min(budget // row, CPU_ROWS), 1) if known else CPU_ROWS)
        # Without gradients to accumulate, small tiles, which stay in the cache, are faster.
        return Tile(rows, min_dim(rows, max_dim(rows // 8, 256)), deferred=False)
    most = max(memory_budget // row, 1) if known and memory_budget is not None else ACCELERATOR_ROWS
    loss_rows = _shared(positions, min(most, ACCELERATOR_LOSS_ROWS))
    deferred = kernel_moves and jnp.finfo(dtype).bits == 16 and not distributions
    deferred &= all(isinstance(n, int) for n in (positions, features, classes)) and positions <= 2 * features
    if deferred and memory_budget is not None:
        deferred = positions * classes * dtype.itemsize + DEFERRED_ROWS * row <= memory_budget
    rows = _shared(positions, DEFERRED_ROWS if deferred else min(most, ACCELERATOR_ROWS))
    return Tile(rows, loss_rows, deferred)


def _shared(positions: int, most: int) -> int:
    if not isinstance(positions, int):
        return min_dim(positions, most)
    tiles = -(-positions // most)
    return -(-positions // tiles)


def bytes_of_row(classes: int, dtype: jnp.dtype, distributions: bool) -> int:
    """A logit and its gradient per class; twice as much with distributions."""
    return classes * compute_dtype(dtype).itemsize * (4 if distributions else 2)
