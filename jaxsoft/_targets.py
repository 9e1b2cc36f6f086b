"""Targets: integer labels or distributions, ignored, weighted, smoothed, in one representation."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxsoft._checks import broadcast, check_values
from jaxsoft._shards import AxisName, all_classes, first_class, sum_shards


class Targets(NamedTuple):
    """The weights q_j = hot·[j = label] + share·spread_j of one loss per position.

    Arrays have the logits' rank; `label`, `hot` and `share` have length one along the class axis.
    """

    label: Array | None = None  # index of the label within the block, possibly outside of it
    hot: Array | float = 0.0  # its weight; 0 where ignored, NaN where the label is out of range
    spread: Array | None = None  # weights of all classes, broadcasting against the logits
    share: Array | float = 1.0  # what a position's weights are multiplied by


class Counts(NamedTuple):
    """What each position counts in a mean: one weight for its loss, one for its z-loss."""

    loss: Array
    position: Array


def read_targets(
    targets: ArrayLike,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    axis: int,
    *,
    ignore_index: int | None,
    weights: ArrayLike | None,
    class_weights: ArrayLike | None,
    where: Array | None,
    label_smoothing: float,
    axis_name: AxisName = None,
) -> tuple[Targets, Counts]:
    """Check the targets against the shape of the logits and represent them in the dtype to compute in.

    Under `axis_name` the logits' shape is that of one block of the classes; labels and class weights are of all.
    """
    given = jnp.asarray(targets)
    block, positions = shape[axis], shape[:axis] + shape[axis + 1 :]
    classes, first = all_classes(block, axis_name), first_class(block, axis_name)
    along_classes = tuple(block if n == axis else 1 for n in range(len(shape)))
    counted = jnp.ones(positions, dtype)
    if weights is not None:
        counted = broadcast("weights", _constant("weights", weights, dtype), positions)
    by_class = jnp.ones(classes, dtype)
    if class_weights is not None:
        by_class = _constant("class_weights", class_weights, dtype)
        if by_class.shape != (classes,):
            raise ValueError(f"class_weights: expected shape ({classes},), one weight a class, got {by_class.shape}")

    own = by_class if axis_name is None else lax.dynamic_slice_in_dim(by_class, first, block)
    of_block = own.reshape(along_classes)

    # Smoothing shares its mass among the classes that are left, each by its class weight.
    uniform = of_block / classes
    if where is not None and label_smoothing:
        left = sum_shards(jnp.sum(where, axis, keepdims=True, dtype=dtype), axis_name)
        uniform = jnp.where(where, of_block, 0) / jnp.maximum(left, 1)

    if jnp.issubdtype(given.dtype, jnp.integer):
        if given.shape != positions:
            raise ValueError(
                f"targets: expected integer labels of shape {positions}, the logits' {shape} "
                f"without axis {axis}, got {given.shape}"
            )
        if given.dtype.itemsize < 4:  # int8 cannot hold the number of classes to compare with
            given = given.astype(jnp.int32)
        inside = (given >= 0) & (given < classes)
        allowed = f"a label in [0, {classes})"
        if ignore_index is not None:
            counted = jnp.where(equals(given, ignore_index), 0, counted)
            allowed += f" or ignore_index={ignore_index}"
        check_values("targets", given, inside | (counted == 0), allowed)
        # NaN, never a clamped or wrapped class: a compiled function has no other way to object.
        share = jnp.where(counted == 0, 0, jnp.where(inside, counted, jnp.nan))
        label = given.astype(jnp.int32)
        by_label = by_class[jnp.where(inside, label, 0)] if class_weights is not None else jnp.ones_like(counted)
        label, share, by_label, counted = (jnp.expand_dims(a, axis) for a in (label, share, by_label, counted))
        hot = share * by_label * (1 - label_smoothing)
        spread = label_smoothing * uniform if label_smoothing else None
        return Targets(label - first, hot, spread, share), Counts(counted * by_label, counted)

    if not jnp.issubdtype(given.dtype, jnp.floating):
        raise TypeError(f"targets: expected integer labels or a floating distribution, got dtype {given.dtype}")
    if given.shape != shape:
        raise ValueError(
            f"targets: expected a distribution of the logits' shape {shape}, got {given.shape}; "
            "labels must have an integer dtype"
        )
    if ignore_index is not None:
        raise ValueError("ignore_index: expected None with distributions, which have no index; use weights")
    check_values("targets", given, (given >= 0) & (given < jnp.inf), "a finite probability of at least 0")
    spread = given.astype(dtype)
    if where is not None:  # a removed class is no variable of the loss
        spread = jnp.where(where, spread, lax.stop_gradient(spread))
    if class_weights is not None:
        spread = jnp.where(of_block == 0, 0, of_block * spread)  # a class without weight has no gradient, even at −inf
    if label_smoothing:
        spread = (1 - label_smoothing) * spread + label_smoothing * uniform
    counted = jnp.expand_dims(counted, axis)
    return Targets(spread=spread, share=counted), Counts(counted, counted)


def _constant(name: str, value: ArrayLike, dtype: jnp.dtype) -> Array:
    """Weights: real, finite, not negative, and no variables of the loss."""
    array = jnp.asarray(value)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    check_values(name, array, (array >= 0) & (array < jnp.inf), "a finite weight of at least 0")
    return lax.stop_gradient(array.astype(dtype))


def equals(labels: Array, index: int) -> Array:
    """Labels == index, also where the labels' dtype cannot hold the index and comparing would wrap it."""
    limits = jnp.iinfo(labels.dtype)
    return labels == index if limits.min <= index <= limits.max else jnp.zeros(labels.shape, bool)
