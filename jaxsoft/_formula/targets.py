"""Targets: labels or distributions, ignored, weighted, smoothed, in one representation; reductions over them."""

import functools
import operator
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxsoft._arrays.checks import as_array, as_integer, as_number, broadcast, check_labels, check_values, refuse_mask
from jaxsoft._arrays.dtypes import at_least_int32, compute_dtype, nan_unless
from jaxsoft._arrays.sharding import (
    AxisName,
    Names,
    PerClass,
    PerPosition,
    Replicated,
    Typed,
    all_classes,
    first_class,
    look_up,
    pvary,
    shard_like,
    sum_shards,
)
from jaxsoft._platform import cpu
from jaxsoft._platform.dispatch import Axes, with_platform_impl

Reduction = Literal["none", "sum", "mean"]
REDUCTIONS = get_args(Reduction)


class Targets(NamedTuple):
    """The weights q_j = label_weight·[j = label] + position_weight·target_weights_j of one loss per position.

    Arrays have the logits' rank; all except `target_weights` and `differentiable` have length one along the class axis.
    A term that is None is absent. A term ignores a position whose weight is 0: weights decide this, never a cotangent.
    """

    label: Array | None = None  # index of the label within the block, possibly outside of it
    label_weight: Any = None  # 0 where ignored, NaN where the label is out of range
    position_weight: Any = None  # multiplies a position's target weights
    z_loss_weight: Array | None = None  # multiplies lse²
    target_weights: Array | None = None  # of all classes, broadcasting against the logits
    differentiable: Array | None = None  # False at a class of a distribution that is masked or has weight 0

    @property
    def ignored(self) -> Array:
        """Which positions have weight 0 in every term."""
        weights = [
            self.z_loss_weight,
            None if self.label is None else self.label_weight,
            None if self.target_weights is None else self.position_weight,
        ]
        return functools.reduce(operator.and_, (weight == 0 for weight in weights if weight is not None))

    @property
    def weights_differentiable(self) -> bool:
        """Whether the target weights are a distribution, not label smoothing."""
        return self.label is None

    @property
    def is_wide(self) -> bool:
        return self.label is None


class Options(NamedTuple):
    """How a loss transforms its targets; None skips a step. Arrays, so that a schedule compiles once."""

    weights: PerPosition | None = None  # broadcasting to the positions
    class_weights: Replicated | None = None  # of all classes
    where: PerClass | None = None  # broadcasting against the logits
    label_smoothing: Replicated | None = None
    z_loss: Replicated | None = None

    @property
    def weighted(self) -> bool:
        """Whether a position may have another weight than 0 or 1."""
        return self.weights is not None or self.class_weights is not None


def as_options(
    weights: ArrayLike | None,
    class_weights: ArrayLike | None,
    where: Array | None,
    label_smoothing: ArrayLike,
    z_loss: ArrayLike,
    dtype: jnp.dtype,
) -> Options:
    """A user's options, with numbers in the dtype to compute in; None in place of a zero that is not traced."""

    def number(name: str, value: ArrayLike, *limits: float) -> Array | None:
        checked = as_number(name, value, *limits)
        return None if isinstance(checked, float) and checked == 0 else jnp.asarray(checked, dtype)

    return Options(
        None if weights is None else as_array("weights", weights),
        None if class_weights is None else as_array("class_weights", class_weights),
        where,
        number("label_smoothing", label_smoothing, 0, 1),
        number("z_loss", z_loss, 0),
    )


class LogitsType(NamedTuple):
    """The type of the logits to which targets belong; under `axis_name`, of one block of the classes."""

    logits: Typed
    axis: int
    axis_name: AxisName = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.logits.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype to compute in."""
        return compute_dtype(self.logits.dtype)

    @property
    def position_shape(self) -> tuple[int, ...]:
        return self.shape[: self.axis] + self.shape[self.axis + 1 :]

    @property
    def classes(self) -> int:
        """The number of classes in all blocks."""
        return all_classes(self.shape[self.axis], self.axis_name)

    @property
    def first_class(self) -> Array | int:
        return first_class(self.shape[self.axis], self.axis_name)

    def along_classes(self, array: Array) -> Array:
        """One number per class of the block, to broadcast against the logits."""
        sizes = tuple(size if axis == self.axis else 1 for axis, size in enumerate(self.shape))
        return shard_like(array.reshape(sizes), self.logits)


class Averaging(NamedTuple):
    """A reduction over the positions behind the first axes, the examples, on all devices of the mesh axes `batch`."""

    reduction: Reduction
    examples: int = 0
    batch: Names = ()

    def denominator(self, weights: Array, *, weighted: bool) -> Array | None:
        """The denominator of the sum of losses, or None; not `weighted`, it is a count of positions."""
        if self.reduction != "mean":
            return None
        count = self.sum(weights, exact=not weighted)
        return jnp.where(count == 0, 1, count)

    def sum(self, array: Array, *, exact: bool = False) -> Array:
        """The sum over all axes except the examples', kept with length one, and over devices.

        An `exact` sum, such as a count, is the same in any order. XLA computes it, while compiling if it is constant.
        """
        axes = tuple(range(self.examples - array.ndim, 0))
        on_device = jnp.sum(array, axes, keepdims=True) if exact else _total((array,), axes)[0]
        return lax.psum(pvary(on_device, frozenset(self.batch)), self.batch) if self.batch else on_device

    def reduce(self, losses: Array, denominator: Array | None, axis: int) -> Array:
        """The losses of all positions without their class axis, or their sum or mean."""
        if self.reduction == "none":
            return jnp.squeeze(losses, axis)
        total = self.sum(losses)
        reduced = total if denominator is None else total / denominator
        return jnp.squeeze(reduced, tuple(range(self.examples, losses.ndim)))


@with_platform_impl(cpu=cpu.total)
def _total(arrays: tuple[Array], axes: Axes) -> tuple[Array]:
    """The sum over axes, which are kept. The CPU has a kernel, because XLA's result depends on its threads."""
    return (jnp.sum(arrays[0], axes, keepdims=True),)


def dense_operands(
    targets: Array,
    logits: LogitsType,
    options: Options,
    averaging: Averaging,
    ignore_index: int | None,
    name: str = "targets",
) -> tuple[Targets, Array | None]:
    """Labels or a distribution, checked against the logits' type and represented in the dtype to compute in.

    Also the denominator of the sum of their losses, or None: the z-loss has its own denominator, which its weight
    includes. Labels and class weights refer to all classes, the rest to the block.
    """
    if not jnp.issubdtype(targets.dtype, jnp.floating) and targets.shape == logits.shape and logits.classes != 1:
        targets = _one_hot(targets, logits.dtype)
    class_weights, block_weights = _class_weights(options.class_weights, logits)
    uniform = None if options.label_smoothing is None else _uniform(block_weights, options.where, logits)
    counted = position_weights(options.weights, logits)
    if jnp.issubdtype(targets.dtype, jnp.integer):
        operands, counted, weights = _label_operands(targets, logits, counted, class_weights, ignore_index, name)
        if uniform is not None:
            smoothing = cast(Array, options.label_smoothing)
            label_weight = operands.label_weight * (1 - smoothing)
            operands = operands._replace(label_weight=label_weight, target_weights=smoothing * uniform)
    else:
        counted = weights = jnp.expand_dims(counted, logits.axis)
        distribution = _as_distribution(targets, logits, ignore_index)
        operands = _distribution_operands(distribution, logits, counted, block_weights, uniform, options)
    denominator = averaging.denominator(weights, weighted=options.weighted)
    return operands._replace(z_loss_weight=z_loss_weights(options, counted, denominator, averaging)), denominator


def _one_hot(targets: Array, dtype: jnp.dtype) -> Array:
    """Integers or booleans of the logits' shape as a distribution."""
    targets = targets.astype(jnp.int32) if targets.dtype == jnp.bool_ else targets
    valid = (targets == 0) | (targets == 1)
    check_values("targets", targets, valid, "0 or 1, or labels of the logits' shape without the class axis")
    return jnp.where(valid, targets, 0).astype(dtype) * nan_unless(valid, dtype)


def _class_weights(class_weights: Array | None, logits: LogitsType) -> tuple[Array | None, Array]:
    """The weights of all classes, or None, and the block's own, to broadcast against the logits."""
    block = logits.shape[logits.axis]
    if class_weights is None:
        return None, logits.along_classes(jnp.ones(block, logits.dtype))
    weights = _weights("class_weights", class_weights, logits.dtype)
    if weights.shape != (logits.classes,):
        expected = f"({logits.classes},), one weight per class"
        raise ValueError(f"class_weights: expected shape {expected}, got {weights.shape}")
    own = weights if logits.axis_name is None else lax.dynamic_slice_in_dim(weights, logits.first_class, block)
    return weights, logits.along_classes(own)


def _uniform(block_weights: Array, where: Array | None, logits: LogitsType) -> Array:
    """The uniform distribution of label smoothing over the classes that are not masked, times class weights."""
    if where is None:
        return block_weights / jnp.asarray(logits.classes, logits.dtype)
    left = sum_shards(jnp.sum(where, logits.axis, keepdims=True, dtype=logits.dtype), logits.axis_name)
    return jnp.where(where, block_weights, 0) / jnp.maximum(left, 1)


def _label_operands(
    labels: Array,
    logits: LogitsType,
    counted: Array,
    class_weights: Array | None,
    ignore_index: int | None,
    name: str,
) -> tuple[Targets, Array, Array]:
    """Labels as targets, each position's weight (0 if ignored), and this weight times its label's class weight."""
    if labels.shape != logits.position_shape:
        raise ValueError(
            f"targets: expected integer labels of shape {logits.position_shape}, the logits' {logits.shape} "
            f"without axis {logits.axis}, got {labels.shape}{_remedy(labels.shape, logits)}"
        )
    labels = at_least_int32(shard_like(labels, logits.logits, logits.axis))
    inside, ignored = (labels >= 0) & (labels < logits.classes), equals(labels, ignore_index)
    counted = jnp.where(ignored, 0, counted)
    check_labels(name, labels, inside | (counted == 0), logits.classes, ignore_index)
    # A label out of range gives NaN; it is never clamped or wrapped.
    position_weight = jnp.where(inside, counted, 0) * nan_unless(inside | (counted == 0), logits.dtype)
    label = jnp.where(inside, labels.astype(jnp.int32), -1)
    at_label = jnp.ones_like(counted) if class_weights is None else look_up(class_weights, jnp.maximum(label, 0))
    arrays = label, position_weight, at_label, counted
    label, position_weight, at_label, counted = (jnp.expand_dims(array, logits.axis) for array in arrays)
    targets = Targets(label - logits.first_class, position_weight * at_label, position_weight)
    return targets, counted, counted * at_label


def _as_distribution(targets: Array, logits: LogitsType, ignore_index: int | None) -> Array:
    if not jnp.issubdtype(targets.dtype, jnp.floating):
        raise TypeError(f"targets: expected integer labels or a distribution, got dtype {targets.dtype}")
    if targets.shape != logits.shape:
        raise ValueError(
            f"targets: expected a distribution of the logits' shape {logits.shape}, got {targets.shape}; "
            "labels must have an integer dtype"
        )
    if ignore_index is not None:
        raise ValueError(
            "ignore_index: expected None with distributions and one-hot targets (of the logits' shape), which have no "
            "index; use weights, or labels of the shape without the class axis"
        )
    check_values("targets", targets, (targets >= 0) & jnp.isfinite(targets), "a finite probability of at least 0")
    return shard_like(targets.astype(logits.dtype), logits.logits)


def _distribution_operands(
    distribution: Array,
    logits: LogitsType,
    counted: Array,
    block_weights: Array,
    uniform: Array | None,
    options: Options,
) -> Targets:
    """A distribution as targets, constant at classes that are masked or have weight 0."""
    differentiable = block_weights != 0
    if options.where is not None:
        differentiable &= options.where
    if options.label_smoothing is not None:
        differentiable &= options.label_smoothing != 1
    target_weights = jnp.where(differentiable, distribution, lax.stop_gradient(distribution)) * block_weights
    if uniform is not None:
        smoothing = cast(Array, options.label_smoothing)
        target_weights = (1 - smoothing) * target_weights + smoothing * uniform
    return Targets(target_weights=target_weights, position_weight=counted, differentiable=differentiable)


def position_weights(weights: ArrayLike | None, logits: LogitsType) -> Array:
    """The weight of each position, sharded as the logits."""
    counted = jnp.ones(logits.position_shape, logits.dtype)
    if weights is not None:
        counted = broadcast("weights", _weights("weights", weights, logits.dtype, masks=True), logits.position_shape)
    return shard_like(counted, logits.logits, logits.axis)


def z_loss_weights(options: Options, counted: Array, denominator: Array | None, averaging: Averaging) -> Array | None:
    """The factor of lse² in a sum that is divided by the denominator.

    The z-loss's own average is over the positions that are not ignored, so that class weights do not affect it.
    """
    if options.z_loss is None or denominator is None:
        return None if options.z_loss is None else options.z_loss * counted
    own = cast(Array, averaging.denominator(counted, weighted=options.weights is not None))
    return options.z_loss * counted * (denominator / own)


def labels_as_array(
    labels: ArrayLike, classes: int, ignore_index: int | None, name: str = "targets"
) -> tuple[Array, int | None]:
    """Labels, or other targets, in one of JAX's dtypes, and the label to ignore.

    Without x64 JAX keeps the lower 32 bits of a label, which may be a valid class. Labels in NumPy arrays or lists are
    read before that, and a label that does not fit becomes a label out of range.
    """
    if ignore_index is not None:
        ignore_index = as_integer("ignore_index", ignore_index)
    if isinstance(labels, jax.Array) or jax.config.read("jax_enable_x64"):
        return as_array(name, labels), ignore_index
    refuse_mask(name, labels)
    given = np.asarray(labels)
    if given.dtype.kind not in "iu" or given.dtype.itemsize < 4:
        return as_array(name, labels), ignore_index
    limits = np.iinfo(np.int32)
    if ((given >= limits.min) & (given <= limits.max)).all():
        return jnp.asarray(given.astype(np.int32)), ignore_index
    inside = (given >= 0) & (given < classes)
    ignored = np.zeros(given.shape, bool) if ignore_index is None else given == ignore_index
    check_labels(name, given, inside | ignored, classes, ignore_index)
    narrow = np.where(inside, given, 0).astype(np.int32)  # unsigned labels cannot hold a negative number
    narrow[~inside] = -2
    narrow[ignored] = -1
    return jnp.asarray(narrow), None if ignore_index is None else -1


def equals(labels: Array, index: int | None) -> Array:
    """Labels == index, also if the labels' dtype cannot hold the index and a comparison would wrap it."""
    limits = jnp.iinfo(labels.dtype)
    if index is None or not limits.min <= index <= limits.max:
        return jnp.zeros(labels.shape, bool)
    return labels == index


def _remedy(labels: tuple[int, ...], logits: LogitsType) -> str:
    """A hint that makes labels of another shape fit, if there is a simple one."""
    for axis in range(len(logits.shape)):
        if logits._replace(axis=axis).position_shape == labels:
            return f"; these labels fit axis={axis}"
    return "; squeeze their last axis: targets[..., 0]" if labels == (*logits.position_shape, 1) else ""


def _weights(name: str, value: ArrayLike, dtype: jnp.dtype, *, masks: bool = False) -> Array:
    """Weights: real, finite, not negative, and constants of the loss."""
    array = as_array(name, value)
    kinds = (jnp.floating, jnp.integer, *((jnp.bool_,) if masks else ()))
    if not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise TypeError(f"{name}: expected real numbers{' or booleans' if masks else ''}, got dtype {array.dtype}")
    array = array.astype(dtype)
    check_values(name, array, (array >= 0) & jnp.isfinite(array), "a finite weight of at least 0")
    return lax.stop_gradient(array)
