"""The tiles of a linear layer's positions on each platform, and their cost."""

from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from jaxsoft._arrays.checks import as_integer, as_option
from jaxsoft._arrays.dtypes import compute_dtype
from jaxsoft._formula.targets import REDUCTIONS, Reduction
from jaxsoft._jax_internals import max_dim, min_dim
from jaxsoft._platform.devices import Device, Platform, as_device, device_of_kind

CPU_BUDGET = 256 * 2**20
CPU_ROWS = 2048  # a product of one feature sums its rows in sequence: a longer sum in float32 would lose digits
# A tile that adds its own product to the float32 gradient of the kernel reads and writes all of it, 8·D·V bytes beside
# 2·R·D·V operations: from R = 4·peak/bandwidth rows on that hides, 836 on an H100, 663 on a TPU v5p, 962 on a v5e.
ACCELERATOR_ROWS = 1024
ACCELERATOR_LOSS_ROWS = 512  # the loss alone, which reads the kernel once for each tile
LEAST_ROWS = 256  # of a tile in a group
ALIGNED_ROWS = 128  # a TPU writes into an array at multiples of this without shifting rows
SHARE = 3  # of an accelerator's memory, what a tile and what is kept may take where no budget is given


class Tile(NamedTuple):
    """The rows of tiles."""

    rows: int
    loss_rows: int  # where there are no gradients to add up
    group_rows: int  # of a group of tiles, whose logit gradients are kept for one product for each input; or of a tile
    one_pass: bool = False  # whether exponentials are stored in half precision, and no logits: such a tile is a group


class Plan(NamedTuple):
    """What `linear_cross_entropy` does for given shapes."""

    tiles: int
    rows: int  # positions in a tile; the loss alone may take fewer
    flops: int  # of the loss alone
    training_flops: int  # of the loss and all gradients
    tile_bytes: int  # logits and their gradient of one tile, or what is stored in their place
    kept_bytes: int  # logit gradients of a group of tiles, kept for one product for each input
    gradient_bytes: int  # gradients to features and kernel, the latter in float32 where tiles add up to it
    unfused_bytes: int  # logits and their gradient of all positions, which are not stored
    groups: int  # of tiles, each of which adds once to the kernel's gradient
    reason: str  # for these tiles

    def __str__(self) -> str:
        tile, kept, gradients, unfused = (
            f"{n / 2**20:,.1f} MiB" for n in (self.tile_bytes, self.kept_bytes, self.gradient_bytes, self.unfused_bytes)
        )
        stored = f"{tile} for a tile" + (f", {kept} for logit gradients" if self.kept_bytes else "")
        return (
            f"{self.tiles} tile{'s' if self.tiles > 1 else ''} of {self.rows} positions: "
            f"{self.flops / 1e9:,.1f} GFLOP for the loss, {self.training_flops / 1e9:,.1f} with its gradients; "
            f"{stored} and {gradients} for gradients, in place of {unfused} for all logits and their gradient; "
            f"{self.reason}"
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
    device_kind: str | None = None,
) -> Plan:
    """The tiles, FLOPs and bytes of `linear_cross_entropy` for given shapes.

    tile bytes = rows · classes · (logit + gradient),  training FLOPs = 6·N·D·V, with "none" 8·N·D·V

    On a CPU a tile has as many rows as 256 MiB hold, 2048 at most; without native kernels half as many, which is not
    counted here, since to know it a device is needed. On an accelerator in half precision it has as many as hide the
    reading of the kernel behind their product, 512 or 1024 by the kind of device. Of a group of tiles, as many as fit
    into a third of the device's memory, logit gradients are kept for one product for each input: each group reads and
    writes the kernel's gradient in float32, unless it is the only one. A group has 4096 positions at most, on a GPU
    2048, or 2·D more if these are all: they take no more than such a group and that gradient. Where none are kept, for
    distributions, a frozen kernel and float32, a tile has 1024 positions.

    On a TPU in bfloat16, for labels, a tile is such a group: its logits are used once, while they are computed, and
    exponentials are stored in their place, 2 bytes each. With label smoothing, a soft cap, a temperature or a bias that
    is learned, a TPU stores the logits of smaller tiles as a GPU does, which is not what this plan states.

    Args:
        positions: N; per device where the data are sharded.
        features: D.
        classes: V; per device where the classes are sharded.
        dtype: of features and kernel.
        distributions: whether the targets are distributions, whose rows count towards a tile's memory.
        reduction: as given to `linear_cross_entropy`.
        memory_budget: as given to `linear_cross_entropy`. On an accelerator what is kept is within it too, in place of
            the third of the memory, and a larger one makes no larger tiles.
        platform: "cpu", "gpu" or "tpu"; None for that of the kind, or else of JAX's default devices.
        device_kind: the `device_kind` of a `jax.Device`, such as "TPU v6 lite" or "TPU7x". None for that of the default
            devices, or, where a platform is given, for what loses least on all of it.

    Returns:
        A `Plan` of counts, in tiles, positions, FLOPs and bytes, that prints as a sentence.

    Edges: ignored positions count in the plan but cost no work. With a frozen kernel no logit gradients are kept. A
    kernel's gradient that is summed over devices is in float32. `jax.vmap` of a gradient uses a CPU's tiles.

    Raises:
        TypeError, ValueError: an argument that is not a positive integer, a platform that is none of these or not that
            of the kind, a budget below one position's logits and gradient.

    Example:
        >>> from jaxsoft import plan_linear_cross_entropy
        >>> print(plan_linear_cross_entropy(8192, 2304, 256_000, "bfloat16", device_kind="NVIDIA H100 80GB HBM3"))
        16 tiles of 512 positions: 9,663.7 GFLOP for the loss, 28,991.0 with its gradients; 1,000.0 MiB for a tile,
        1,000.0 MiB for logit gradients and 2,286.0 MiB for gradients, in place of 16,000.0 MiB for all logits and
        their gradient; for NVIDIA H100 80GB HBM3 within a third of 80 GB, where the kernel's gradient is written 4
        times
    """
    sizes = {"positions": positions, "features": features, "classes": classes}
    for name, size in sizes.items():
        if as_integer(name, size) < 1:
            raise ValueError(f"{name}: expected a positive integer, got {size}")
    as_option("reduction", reduction, REDUCTIONS)
    device = _as_device(platform, device_kind)
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
    wide, narrow = compute_dtype(dtype).itemsize, dtype.itemsize
    check_budget(classes, dtype, distributions, memory_budget)
    tile = plan_tile(device, (positions, features, classes), dtype, distributions, memory_budget, one_pass=True)
    keeps, groups = tile.group_rows > tile.rows, -(-positions // tile.group_rows)
    row = classes * narrow if tile.one_pass else bytes_of_row(classes, dtype, distributions)
    of_kernel = narrow if (keeps or tile.one_pass) and groups == 1 else wide
    product = 2 * positions * features * classes
    return Plan(
        tiles=-(-positions // tile.rows),
        rows=tile.rows,
        flops=product,
        training_flops=product * (4 if reduction == "none" else 3),
        tile_bytes=tile.rows * row,
        kept_bytes=tile.group_rows * classes * narrow if keeps else 0,
        gradient_bytes=features * (positions * narrow + classes * of_kernel),
        unfused_bytes=positions * classes * 2 * wide,
        groups=groups,
        reason=_reason(device, tile, groups, memory_budget),
    )


def _as_device(platform: Platform | None, kind: str | None) -> Device:
    if platform is not None:
        as_option("platform", platform, get_args(Platform))
    if kind is None:
        return as_device(jax.default_backend(), None) if platform is None else Device(platform)
    if not isinstance(kind, str):
        raise TypeError(f"device_kind: expected a string, got {kind!r}")
    device = device_of_kind(kind)
    if platform not in (None, device.platform):
        raise ValueError(f"device_kind: expected a kind of the platform {platform!r}, got {kind!r}")
    return device


def _reason(device: Device, tile: Tile, groups: int, memory_budget: int | None) -> str:
    """Why the tiles are as they are, in words."""
    if device.platform == "cpu":
        return "on a CPU"
    name = device.kind if device.known else f"any {device.platform.upper()}"
    limit = "the budget" if memory_budget is not None else f"a third of {device.traits.memory // 10**9} GB"
    times = "once" if groups == 1 else f"{groups} times"
    if tile.one_pass:
        return f"for {name} within {limit}, in one pass, where the kernel's gradient is written {times}"
    if tile.group_rows == tile.rows:
        return f"for {name} within {limit}, where each tile adds to the kernel's gradient"
    return f"for {name} within {limit}, where the kernel's gradient is written {times}"


def check_budget(classes: int, dtype: jnp.dtype, distributions: bool, memory_budget: int | None) -> None:
    if memory_budget is None or not isinstance(classes, int):  # but a symbol of `jax.export`, which serves every size
        return
    least = bytes_of_row(classes, dtype, distributions)
    if as_integer("memory_budget", memory_budget) < least:
        raise ValueError(
            f"memory_budget: expected at least {least} bytes, one position's logits and gradient, got {memory_budget}"
        )


def plan_tile(
    device: Device,
    shape: tuple[int, int, int],
    dtype: jnp.dtype,
    distributions: bool,
    memory_budget: int | None,
    *,
    kernel_moves: bool = True,
    one_pass: bool = False,
) -> Tile:
    """As many rows as the budget allows and the device likes, shared evenly among tiles; shape is (N, D, V).

    `one_pass` says that what is computed allows exponentials in place of logits.
    """
    positions, features, classes = shape
    row = bytes_of_row(classes, dtype, distributions)
    known = isinstance(classes, int)  # of unknown sizes tiles have the most rows that they may have
    if device.platform == "cpu":
        budget = CPU_BUDGET if memory_budget is None else memory_budget
        rows = _shared(positions, max(min(budget // row, CPU_ROWS), 1) if known else CPU_ROWS)
        # With no gradients to add up for each tile small ones, which stay in a cache, are faster.
        return Tile(rows, min_dim(rows, max_dim(rows // 8, 256)), rows)
    limit = device.traits.memory // SHARE if memory_budget is None else memory_budget
    most = max(min(limit // row, ACCELERATOR_ROWS), 1) if known else ACCELERATOR_ROWS
    loss_rows = _shared(positions, min(most, ACCELERATOR_LOSS_ROWS))
    if kernel_moves and jnp.finfo(dtype).bits == 16 and not distributions and known and isinstance(positions, int):
        # A single group, of 2·N·V bytes, does without the kernel's gradient in float32, which takes 4·D·V.
        _, tile_rows, kept = device.traits
        if isinstance(features, int) and positions <= kept + 2 * features:
            kept = positions + tile_rows
        fitting = min(limit // (classes * dtype.itemsize), kept)
        if one_pass and device.platform == "tpu" and dtype == jnp.bfloat16 and fitting >= min(LEAST_ROWS, positions):
            shared = _shared(positions, fitting)
            rows = shared if shared == positions else min(-(-shared // ALIGNED_ROWS) * ALIGNED_ROWS, fitting)
            return Tile(rows, loss_rows, rows, one_pass=True)
        grouped = _group(positions, (tile_rows, kept), (row, classes * dtype.itemsize), limit)
        if grouped is not None:
            return Tile(grouped[0], loss_rows, grouped[1])
    rows = _shared(positions, most)
    return Tile(rows, loss_rows, rows)


def _group(positions: int, liked: tuple[int, int], nbytes: tuple[int, int], limit: int) -> tuple[int, int] | None:
    """The rows of a tile and of a group within the limit; None if none is worth it.

    Both are given, as the device likes them, and the bytes that a row of each takes. Of smaller tiles those are taken
    that let all positions be kept, and else those that leave half of the limit for what is.
    """
    (rows, most), (row, kept_row) = liked, nbytes
    sizes = [size for size in (rows, rows // 2, rows // 4) if size >= LEAST_ROWS]
    fitting = {size: min(most, (limit - size * row) // kept_row) // size * size for size in sizes}
    halves = [size for size in sizes if 2 * size * row <= limit] + sizes[-1:]
    rows = next((size for size in sizes if fitting[size] >= positions), halves[0])
    most = fitting[rows]
    if positions <= rows or most < min(2 * rows, positions):
        return None
    share = _shared(positions, most)
    rows = min(rows, -(-_shared(share, rows) // ALIGNED_ROWS) * ALIGNED_ROWS)
    return rows, -(-share // rows) * rows


def _shared(positions: int, most: int) -> int:
    if not isinstance(positions, int):
        return min_dim(positions, most)
    tiles = -(-positions // most)
    return -(-positions // tiles)


def bytes_of_row(classes: int, dtype: jnp.dtype, distributions: bool) -> int:
    """A logit and its gradient per class; twice as much with distributions."""
    return classes * compute_dtype(dtype).itemsize * (4 if distributions else 2)
