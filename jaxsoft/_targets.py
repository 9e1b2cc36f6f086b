"""Targets: labels or distributions, ignored, weighted, smoothed, in one representation; reductions over them."""

import functools
import operator
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxsoft._checks import as_array, as_integer, as_number, broadcast, check_values, is_checking, refuse_mask
from jaxsoft._dtypes import compute_dtype
from jaxsoft._meshes import Names, lay_like, look_up, stated_sharding
from jaxsoft._shards import AxisName, all_classes, first_class, sum_shards, vary

Reduction = Literal["none", "sum", "mean"]
REDUCTIONS = get_args(Reduction)


class Targets(NamedTuple):
    """The weights q_j = hot·[j = label] + share·spread_j of one loss per position, and that of its z-loss.

    Arrays have the logits' rank; all but `spread` and `variable` have length one along the class axis. What is None is
    absent. A position takes part in a term whose weight is not 0: weights decide that, never the cotangent of a loss.
    """

    label: Array | None = None  # index of the label within the block, possibly outside of it
    hot: Any = None  # its weight; 0 where ignored, NaN where the label is out of range
    spread: Array | None = None  # weights of all classes, broadcasting against the logits
    share: Any = None  # what a position's weights are multiplied by
    square: Array | None = None  # what lse² is multiplied by
    variable: Array | None = None  # False at a class of a distribution that is removed or weighs nothing

    @property
    def idle(self) -> Array:
        """Where a position takes no part in any term."""
        weights = (self.square, None if self.label is None else self.hot, None if self.spread is None else self.share)
        return functools.reduce(operator.and_, (weight == 0 for weight in weights if weight is not None))

    @property
    def spread_moves(self) -> bool:
        """Whether the weights are a distribution, not those of smoothing."""
        return self.label is None

    @property
    def is_wide(self) -> bool:
        return self.label is None


class Options(NamedTuple):
    """What a loss makes of its targets; None leaves a step out. Arrays, so that a schedule compiles once."""

    weights: Array | None = None  # broadcasting to the positions
    class_weights: Array | None = None  # of all classes
    where: Array | None = None  # broadcasting against the logits
    label_smoothing: Array | None = None
    z_loss: Array | None = None


def read_options(
    weights: ArrayLike | None,
    class_weights: ArrayLike | None,
    where: Array | None,
    label_smoothing: ArrayLike,
    z_loss: ArrayLike,
    dtype: jnp.dtype,
) -> Options:
    """The options as a user gives them, numbers in the dtype to compute in; zeros known beforehand leave no trace."""
    numbers = (as_number("label_smoothing", label_smoothing, 0, 1), as_number("z_loss", z_loss, 0))
    traced_or_not_zero = (None if isinstance(n, float) and n == 0 else jnp.asarray(n, dtype) for n in numbers)
    arrays = {"weights": weights, "class_weights": class_weights}
    of_positions, of_classes = (None if a is None else as_array(name, a) for name, a in arrays.items())
    return Options(of_positions, of_classes, where, *traced_or_not_zero)


def read_targets(
    targets: Array,
    logits: Array | jax.ShapeDtypeStruct,
    axis: int,
    options: Options,
    *,
    ignore_index: int | None,
    name: str = "targets",
    reduction: Reduction,
    axis_name: AxisName = None,
    examples: int = 0,
    batch: Names = (),
) -> tuple[Targets, Array | None]:
    """Check the targets against the logits' type and represent them in the dtype to compute in, laid as the logits.

    Under `axis_name` the logits' shape is that of one block of the classes; labels and class weights are of all. The
    mean is that of the positions behind the first axes, the `examples`, on all devices of the mesh axes `batch`. Beside
    the targets, what the sum of their losses is to be divided by, or None: the z-loss has a denominator of its own,
    which its weights contain.
    """
    where, smoothing = options.where, options.label_smoothing
    shape, dtype = logits.shape, compute_dtype(logits.dtype)
    block, positions = shape[axis], shape[:axis] + shape[axis + 1 :]
    classes, first = all_classes(block, axis_name), first_class(block, axis_name)
    along_classes = tuple(block if n == axis else 1 for n in range(len(shape)))
    counted = position_weights(options.weights, logits, axis)
    by_class = None
    if options.class_weights is not None:
        by_class = _weights("class_weights", options.class_weights, dtype)
        if by_class.shape != (classes,):
            raise ValueError(f"class_weights: expected shape ({classes},), one weight a class, got {by_class.shape}")

    of_block = jnp.ones(along_classes, dtype)
    if by_class is not None:
        own = by_class if axis_name is None else lax.dynamic_slice_in_dim(by_class, first, block)
        of_block = own.reshape(along_classes)
    of_block = lay_like(of_block, logits)
    uniform = None
    if smoothing is not None:  # its mass is shared among the classes that are left, each by its class weight
        uniform = of_block / jnp.asarray(classes, dtype)
        if where is not None:
            left = sum_shards(jnp.sum(where, axis, keepdims=True, dtype=dtype), axis_name)
            uniform = jnp.where(where, of_block, 0) / jnp.maximum(left, 1)

    if not jnp.issubdtype(targets.dtype, jnp.floating) and targets.shape == shape and classes != 1:
        targets = targets.astype(jnp.int32) if targets.dtype == jnp.bool_ else targets
        one_hot = (targets == 0) | (targets == 1)
        check_values("targets", targets, one_hot, "0 or 1, or labels of the logits' shape without the class axis")
        targets = jnp.where(one_hot, targets, 0).astype(dtype) / one_hot.astype(dtype)  # 0/0 is NaN

    if jnp.issubdtype(targets.dtype, jnp.integer):
        if targets.shape != positions:
            raise ValueError(
                f"targets: expected integer labels of shape {positions}, the logits' {shape} "
                f"without axis {axis}, got {targets.shape}{_remedy(targets.shape, shape, positions)}"
            )
        targets = lay_like(targets, logits, axis)
        if targets.dtype.itemsize < 4:  # int8 cannot hold the number of classes to compare with
            targets = targets.astype(jnp.int32)
        inside, ignored = (targets >= 0) & (targets < classes), equals(targets, ignore_index)
        counted = jnp.where(ignored, 0, counted)
        check_values(name, targets, inside | (counted == 0), _allowed(classes, ignore_index))
        # NaN, never a clamped or wrapped class: a compiled function has no other way to object. It is written 0/0,
        # because JAX's `debug_nans` stops at a literal NaN even where it is not chosen.
        share = jnp.where(inside, counted, 0) / jnp.where(inside | (counted == 0), 1, 0).astype(dtype)
        label = jnp.where(inside, targets.astype(jnp.int32), -1)
        by_label = jnp.ones_like(counted) if by_class is None else look_up(by_class, jnp.maximum(label, 0))
        label, share, by_label, counted = (jnp.expand_dims(a, axis) for a in (label, share, by_label, counted))
        hot, spread = share * by_label, None
        if smoothing is not None:
            hot, spread = hot * (1 - smoothing), smoothing * cast(Array, uniform)
        read, weighted = Targets(label - first, hot, spread, share), counted * by_label
    else:
        spread = lay_like(_read_distribution(targets, shape, dtype, ignore_index), logits)
        variable = lay_like(jnp.ones(along_classes, bool), logits) if where is None else where
        if by_class is not None:
            variable &= of_block != 0
        if smoothing is not None:
            variable &= smoothing != 1
        spread = jnp.where(variable, spread, lax.stop_gradient(spread)) * of_block
        if smoothing is not None:
            spread = (1 - smoothing) * spread + smoothing * cast(Array, uniform)
        counted = jnp.expand_dims(counted, axis)
        read, weighted = Targets(spread=spread, share=counted, variable=variable), counted

    count, square = count_positions(weighted, counted, options, reduction, examples, batch)
    return read._replace(square=square), count


def position_weights(weights: ArrayLike | None, logits: Array | jax.ShapeDtypeStruct, axis: int) -> Array:
    """The weight of each position, laid as the logits."""
    positions, dtype = logits.shape[:axis] + logits.shape[axis + 1 :], compute_dtype(logits.dtype)
    counted = jnp.ones(positions, dtype)
    if weights is not None:
        counted = broadcast("weights", _weights("weights", weights, dtype, masks=True), positions)
    return lay_like(counted, logits, axis)


def count_positions(
    weighted: Array, counted: Array, options: Options, reduction: Reduction, examples: int, batch: Names
) -> tuple[Array | None, Array | None]:
    """What a sum of losses is to be divided by, or None, and what lse² is to be multiplied by."""
    count = or_one(sum_positions(weighted, examples, batch)) if reduction == "mean" else None
    if options.z_loss is None:
        return count, None
    # The averages of the two terms have denominators of their own, so that class weights leave the z-loss alone.
    ratio = 1 if count is None else count / or_one(sum_positions(counted, examples, batch))
    return count, options.z_loss * counted * ratio


def reduce_losses(
    losses: Array, reduction: Reduction, count: Array | None, axis: int, examples: int = 0, batch: Names = ()
) -> Array:
    """The losses of all positions without their class axis, or their sum or mean over what follows the `examples`."""
    if reduction == "none":
        return jnp.squeeze(losses, axis)
    total = sum_positions(losses, examples, batch)
    return jnp.squeeze(total if count is None else total / count, tuple(range(examples, losses.ndim)))


def sum_positions(array: Array, examples: int = 0, batch: Names = ()) -> Array:
    """The sum over all axes behind those of the examples, kept with length one, and over devices."""
    of_device = jnp.sum(array, tuple(range(examples, array.ndim)), keepdims=True)
    return lax.psum(vary(of_device, frozenset(batch)), batch) if batch else of_device


def or_one(count: Array) -> Array:
    return jnp.where(count == 0, 1, count)


def as_targets(
    targets: ArrayLike, classes: int, ignore_index: int | None, name: str = "targets"
) -> tuple[Array, int | None]:
    """The targets in a dtype of JAX's, and what to ignore among them.

    Without x64 JAX keeps the lower 32 bits of a label, which may be a class. Labels that come as NumPy arrays or lists
    are seen before that, and what does not fit becomes a label that is no class.
    """
    if ignore_index is not None:
        ignore_index = as_integer("ignore_index", ignore_index)
    if isinstance(targets, jax.Array) or jax.config.read("jax_enable_x64"):
        return as_array(name, targets), ignore_index
    refuse_mask(name, targets)
    labels = np.asarray(targets)
    if labels.dtype.kind not in "iu" or labels.dtype.itemsize < 4:
        return as_array(name, targets), ignore_index
    limits = np.iinfo(np.int32)
    if ((labels >= limits.min) & (labels <= limits.max)).all():
        return jnp.asarray(labels.astype(np.int32)), ignore_index
    inside = (labels >= 0) & (labels < classes)
    ignored = np.zeros(labels.shape, bool) if ignore_index is None else labels == ignore_index
    valid = inside | ignored
    if is_checking() and not valid.all():
        first = tuple(int(n) for n in np.argwhere(~valid)[0])
        where = f"[{', '.join(map(str, first))}]" if first else ""
        raise ValueError(f"{name}{where} is {labels[first]}: expected {_allowed(classes, ignore_index)}")
    narrow = np.where(inside, labels, 0).astype(np.int32)  # before a number below 0, which unsigned labels cannot hold
    narrow[~inside] = -2
    narrow[ignored] = -1
    return jnp.asarray(narrow), None if ignore_index is None else -1


def is_label(logits: Array, label: Array, axes: tuple[int, ...]) -> Array:
    """A mask by comparison, not a scatter: it fuses on every platform."""
    (axis,) = axes
    index = lax.broadcasted_iota(label.dtype, logits.shape, axis % logits.ndim, out_sharding=stated_sharding(logits))
    return index == label


def equals(labels: Array, index: int | None) -> Array:
    """Labels == index, also where the labels' dtype cannot hold the index and comparing would wrap it."""
    limits = jnp.iinfo(labels.dtype)
    if index is None or not limits.min <= index <= limits.max:
        return jnp.zeros(labels.shape, bool)
    return labels == index


def _allowed(classes: int, ignore_index: int | None) -> str:
    return f"a label in [0, {classes})" + ("" if ignore_index is None else f" or ignore_index={ignore_index}")


def _remedy(labels: tuple[int, ...], logits: tuple[int, ...], positions: tuple[int, ...]) -> str:
    """What makes labels of another shape fit, if anything simple does."""
    fitting = [n for n in range(len(logits)) if logits[:n] + logits[n + 1 :] == labels]
    if fitting:
        return f"; these labels fit axis={fitting[0]}"
    return "; squeeze their last axis: targets[..., 0]" if labels == (*positions, 1) else ""


def _read_distribution(targets: Array, shape: tuple[int, ...], dtype: jnp.dtype, ignore_index: int | None) -> Array:
    if not jnp.issubdtype(targets.dtype, jnp.floating):
        raise TypeError(f"targets: expected integer labels or a distribution, got dtype {targets.dtype}")
    if targets.shape != shape:
        raise ValueError(
            f"targets: expected a distribution of the logits' shape {shape}, got {targets.shape}; "
            "labels must have an integer dtype"
        )
    if ignore_index is not None:
        raise ValueError(
            "ignore_index: expected None with distributions and one-hot targets (of the logits' shape), which have no "
            "index; use weights, or labels of the shape without the class axis"
        )
    check_values("targets", targets, (targets >= 0) & jnp.isfinite(targets), "a finite probability of at least 0")
    return targets.astype(dtype)


def _weights(name: str, value: ArrayLike, dtype: jnp.dtype, *, masks: bool = False) -> Array:
    """Weights: real, finite, not negative, and no variables of the loss."""
    array = as_array(name, value)
    kinds = (jnp.floating, jnp.integer, *((jnp.bool_,) if masks else ()))
    if not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise TypeError(f"{name}: expected real numbers{' or booleans' if masks else ''}, got dtype {array.dtype}")
    array = array.astype(dtype)
    check_values(name, array, (array >= 0) & jnp.isfinite(array), "a finite weight of at least 0")
    return lax.stop_gradient(array)
