"""The tiles of a linear layer's positions, and what they take."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.core import min_dim
from jaxtyping import DTypeLike

from jaxsoft._checks import as_integer, as_option
from jaxsoft._dtypes import compute_dtype
from jaxsoft._targets import REDUCTIONS, Reduction

MEMORY_BUDGET = 256 * 2**20
MOST_ROWS = 2048  # a product of one feature sums its rows in sequence: a longer sum in float32 would lose digits


class Plan(NamedTuple):
    """What `linear_cross_entropy` does for given shapes."""

    tiles: int
    rows: int  # positions in a tile; the loss alone may take fewer
    flops: int  # of the loss alone
    training_flops: int  # of the loss and all gradients
    tile_bytes: int  # logits and their gradient of one tile, within the budget
    gradient_bytes: int  # gradients to features and kernel, the latter summed in float32
    unfused_bytes: int  # logits and their gradient of all positions, which are not stored

    def __str__(self) -> str:
        mib = (f"{n / 2**20:,.1f} MiB" for n in (self.tile_bytes, self.gradient_bytes, self.unfused_bytes))
        tile, gradients, unfused = mib
        plural = "s" if self.tiles > 1 else ""
        return (
            f"{self.tiles} tile{plural} of {self.rows} positions: {self.flops / 1e9:,.1f} GFLOP for the loss, "
            f"{self.training_flops / 1e9:,.1f} with its gradients; {tile} for a tile and {gradients} for gradients, "
            f"in place of {unfused} for all logits and their gradient"
        )


def plan_linear_cross_entropy(
    positions: int,
    features: int,
    classes: int,
    dtype: DTypeLike = "float32",
    *,
    distributions: bool = False,
    reduction: Reduction = "mean",
    memory_budget: int = MEMORY_BUDGET,
) -> Plan:
    """The tiles, operations and bytes of `linear_cross_entropy` for given shapes.

    tile bytes = rows · classes · (logit + gradient),  training operations = 6·N·D·V, with "none" 8·N·D·V

    Args:
        positions: N, of one shard where the data are sharded.
        features: D.
        classes: V, of one shard where the classes are sharded.
        dtype: of features and kernel.
        distributions: whether the targets are distributions, whose rows are part of a tile.
        reduction: as given to `linear_cross_entropy`.
        memory_budget: as given to `linear_cross_entropy`. A tile has at most 2048 positions, whatever the budget.

    Returns:
        A `Plan` of counts, in tiles, positions, floating-point operations and bytes, that prints as a sentence.

    Edges: ignored positions take part in the plan but not in the work.

    Raises:
        TypeError, ValueError: an argument that is not a positive integer, a budget below one position's logits.

    Example:
        >>> from jaxsoft import plan_linear_cross_entropy
        >>> print(plan_linear_cross_entropy(4096, 4096, 128_256, "bfloat16"))
        16 tiles of 256 positions: 4,303.6 GFLOP for the loss, 12,910.7 with its gradients; 250.5 MiB for a tile and
        2,036.0 MiB for gradients, in place of 4,008.0 MiB for all logits and their gradient
    """
    sizes = {"positions": positions, "features": features, "classes": classes}
    for name, size in sizes.items():
        if as_integer(name, size) < 1:
            raise ValueError(f"{name}: expected a positive integer, got {size}")
    as_option("reduction", reduction, REDUCTIONS)
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
    wide, narrow = compute_dtype(dtype).itemsize, dtype.itemsize
    rows = tile_rows(positions, classes, dtype, distributions, memory_budget)
    row_bytes = bytes_of_row(classes, dtype, distributions)
    product = 2 * positions * features * classes
    return Plan(
        tiles=-(-positions // rows),
        rows=rows,
        flops=product,
        training_flops=product * (4 if reduction == "none" else 3),
        tile_bytes=rows * row_bytes,
        gradient_bytes=features * (positions * narrow + classes * wide),
        unfused_bytes=positions * classes * 2 * wide,
    )


def tile_rows(positions: int, classes: int, dtype: jnp.dtype, distributions: bool, memory_budget: int) -> int:
    """Positions in a tile: as many as the budget allows, shared evenly; of unknown sizes the most that may be."""
    if not isinstance(classes, int):  # but a symbol of `jax.export`, which serves every size
        most = MOST_ROWS
    else:
        row_bytes = bytes_of_row(classes, dtype, distributions)
        if as_integer("memory_budget", memory_budget) < row_bytes:
            raise ValueError(
                f"memory_budget: expected at least {row_bytes} bytes, what one position's logits take, "
                f"got {memory_budget}"
            )
        most = min(memory_budget // row_bytes, MOST_ROWS)
    if not isinstance(positions, int):
        return min_dim(positions, most)
    tiles = -(-positions // most)
    return -(-positions // tiles)


def bytes_of_row(classes: int, dtype: jnp.dtype, distributions: bool) -> int:
    """A logit and its gradient for each class, and of distributions as much again."""
    return classes * compute_dtype(dtype).itemsize * (4 if distributions else 2)
