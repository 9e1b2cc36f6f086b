"""The tiles into which a linear layer's positions are split on each platform, and their cost."""

from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from jaxsoft._arrays.checks import as_integer, as_option
from jaxsoft._arrays.dtypes import compute_dtype
from jaxsoft._formula.targets import REDUCTIONS, Reduction
from jaxsoft._jax_internals import max_dim, min_dim
from jaxsoft._platform.devices import KINDS, Device, Platform, as_device, device_of_kind

CPU_BUDGET = 256 * 2**20
CPU_ROWS = 2048  # a matmul with one feature sums its rows in sequence, and longer sums in float32 are less accurate
# A tile that adds to the kernel's float32 gradient reads and writes all of it: 8·D·V bytes for a matmul of 2·R·D·V
# FLOPs. From R = 4·peak/bandwidth rows on the matmul hides this: 836 on an H100, 663 on a TPU v5p, 962 on a v5e.
ACCELERATOR_ROWS = 1024
ACCELERATOR_LOSS_ROWS = 512  # for the loss alone, which reads the kernel once per tile
LEAST_ROWS = 256  # of a tile in a group
ALIGNED_ROWS = 128  # a TPU writes into an array at multiples of this without shifting rows
SHARE = 3  # without a budget, a tile and the stored logit gradients may take 1/SHARE of an accelerator's memory


class Tile(NamedTuple):
    """The number of positions in tiles and groups of tiles."""

    rows: int
    loss_rows: int  # of a tile of the loss alone
    group_rows: int  # of a group of tiles, whose logit gradients are stored for one matmul per input; or else of a tile
    one_pass: bool = False  # whether a tile is a group, and terms of gradients are stored, not its logits


class Plan(NamedTuple):
    """What `linear_cross_entropy` does for given shapes."""

    tiles: int
    rows: int  # positions in a tile; the loss alone may take fewer
    flops: int  # of the loss alone
    training_flops: int  # of the loss and all gradients
    tile_bytes: int  # one tile's logits and their gradient, or what is stored instead
    kept_bytes: int  # a group's logit gradients, stored for one matmul per input
    gradient_bytes: int  # gradients of features and kernel, the latter in float32 unless a single group writes it
    unfused_bytes: int  # all logits and their gradient, which are not stored
    groups: int  # of tiles; each group adds once to the kernel's gradient
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

    On a CPU a tile has as many positions as fit into 256 MiB, at most 2048. (Without native kernels it has half as
    many; the plan ignores this, because only a process with a CPU device knows.)

    On an accelerator in half precision a tile has 512 or 1024 positions, depending on the kind of device: enough for
    the matmul to hide reading the kernel. The logit gradients of a group of tiles, as many as fit into a third of the
    device's memory, are stored for one matmul per input. Each group reads and writes the kernel's gradient in float32,
    unless it is the only group. A group has at most 4096 positions, on a GPU 2048. If there are at most 2·D more
    positions than that, they are one group, which takes no more memory than such a group and that gradient.
    For distributions, a frozen kernel or float32 no logit gradients are stored, and a tile has 1024 positions.

    On a TPU, with labels in bfloat16, a group is one tile, also with a frozen kernel: its logits are used once, while
    they are computed, and only exponentials are stored, 2 bytes each, or nothing for the loss alone. The plan ignores
    that with statistics, or for gradients with both label smoothing and a soft cap or temperature, a TPU stores the
    logits of smaller tiles, as a GPU does.

    Args:
        positions: N; per device if the positions are sharded.
        features: D.
        classes: V; per device if the classes are sharded.
        dtype: of features and kernel.
        distributions: whether the targets are distributions, whose rows count towards a tile's memory.
        reduction: as given to `linear_cross_entropy`.
        memory_budget: as given to `linear_cross_entropy`. On an accelerator it replaces the third of the memory, and
            limits the stored logit gradients too; a larger budget makes no larger tiles.
        platform: "cpu", "gpu" or "tpu"; None for the kind's platform, or else the platform of JAX's default devices.
        device_kind: the `device_kind` of a `jax.Device`, such as "TPU v6 lite" or "TPU7x"; the error for an unknown one
            lists the known ones. None for the kind of the default devices, or, if a platform is given, for tiles that
            lose least on all devices of the platform.

    Returns:
        A `Plan` of counts, in tiles, positions, FLOPs and bytes, that prints as a sentence.

    Edges: ignored positions count in the plan but cost no work. With a frozen kernel no logit gradients are stored,
    except in one pass. A kernel's gradient that is summed over devices is in float32. `jax.vmap` of a gradient uses a
    CPU's tiles.

    Raises:
        TypeError, ValueError: an argument that is not a positive integer, an unknown platform or kind of device, a kind
            of another platform, a budget below one position's logits and gradient.

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
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype: expected a floating dtype, such as 'bfloat16', got {dtype!r}") from None
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
    if kind != "cpu" and not device.known:
        known = ", ".join(map(repr, KINDS))
        raise ValueError(
            f"device_kind: expected 'cpu' or a name that begins with one of {known}, got {kind!r}; "
            "for another device pass its platform alone, 'gpu' or 'tpu'"
        )
    if platform not in (None, device.platform):
        raise ValueError(f"device_kind: expected a kind of the platform {platform!r}, got {kind!r}")
    return device


def _reason(device: Device, tile: Tile, groups: int, memory_budget: int | None) -> str:
    """Why these tiles were chosen, in words."""
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
    if memory_budget is None or not isinstance(classes, int):  # a symbol of `jax.export` stands for every size
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
    """As many rows as the budget allows and suit the device, shared evenly among tiles; shape is (N, D, V).

    `one_pass` says that the gradients can be computed from one stored number per logit, instead of the logit.
    """
    positions, features, classes = shape
    row = bytes_of_row(classes, dtype, distributions)
    known = isinstance(classes, int)  # for unknown sizes tiles have the largest allowed number of rows
    if device.platform == "cpu":
        budget = CPU_BUDGET if memory_budget is None else memory_budget
        rows = _shared(positions, max(min(budget // row, CPU_ROWS), 1) if known else CPU_ROWS)
        # Without gradients to add to, small tiles are faster, because they stay in a cache.
        return Tile(rows, min_dim(rows, max_dim(rows // 8, 256)), rows)
    limit = device.traits.memory // SHARE if memory_budget is None else memory_budget
    most = max(min(limit // row, ACCELERATOR_ROWS), 1) if known else ACCELERATOR_ROWS
    loss_rows = _shared(positions, min(most, ACCELERATOR_LOSS_ROWS))
    if jnp.finfo(dtype).bits == 16 and not distributions and known and isinstance(positions, int):
        _, tile_rows, kept = device.traits
        # A single group, of 2·N·V bytes, needs no float32 copy of the kernel's gradient, which takes 4·D·V.
        if kernel_moves and isinstance(features, int) and positions <= kept + 2 * features:
            kept = positions + tile_rows
        fitting = min(limit // (classes * dtype.itemsize), kept)
        if one_pass and device.platform == "tpu" and dtype == jnp.bfloat16 and fitting >= min(LEAST_ROWS, positions):
            shared = _shared(positions, fitting)
            rows = shared if shared == positions else min(-(-shared // ALIGNED_ROWS) * ALIGNED_ROWS, fitting)
            return Tile(rows, rows, rows, one_pass=True)
        grouped = _group(positions, (tile_rows, kept), (row, classes * dtype.itemsize), limit)
        if kernel_moves and grouped is not None:
            return Tile(grouped[0], loss_rows, grouped[1])
    rows = _shared(positions, most)
    return Tile(rows, loss_rows, rows)


def _group(positions: int, liked: tuple[int, int], nbytes: tuple[int, int], limit: int) -> tuple[int, int] | None:
    """The rows of a tile and of a group within the limit; None if a group would not pay.

    `liked` are the rows of both that suit the device, `nbytes` the bytes per row of both. Tiles are made smaller if
    that lets one group have all positions, or else until a tile leaves half of the limit to its group.
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
