"""A head computes values from the logits of every position; one rule differentiates all heads."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._arrays.sharding import AxisName, PerPosition, broadcast_like, is_replicated, sum_shards
from jaxsoft._custom_vjp import custom_vjp
from jaxsoft._jax_internals import Results, zeros_of_type

Values = tuple[Results, Results]  # differentiable results and constants; the class axis has length 1, or k for top-k


class Operands(Protocol):
    """A head's inputs in addition to logits: a NamedTuple of arrays of the logits' rank, or of another layer."""

    ignored: Array  # where a position contributes nothing
    position_weight: Array  # 0 at ignored positions; an operand may have further weights
    target_weights: Array | None  # the only array here that may be differentiated, if the next is true
    weights_differentiable: bool
    is_wide: bool  # whether one of the arrays is as large as the logits


def check_operands(operands: Any, rank: int) -> None:
    """Refuse operands that do not follow the protocol, which the loops over tiles rely on."""
    kind = type(operands).__name__
    for name in Operands.__annotations__:
        if not hasattr(operands, name):
            raise TypeError(f"{kind}: expected the operands of a head to have {name}, see _formula/head.py")
    for name, array in operands._asdict().items():
        if isinstance(array, jax.Array) and array.ndim != rank:
            raise TypeError(f"{kind}.{name}: expected the logits' rank {rank}, got shape {array.shape}")


class Untargeted(NamedTuple):
    """Operands of a head without targets: the weight of each position, and a teacher's logits or layer."""

    position_weight: PerPosition
    teacher: Any = None
    target_weights: None = None

    @property
    def ignored(self) -> Array:
        return self.position_weight == 0

    @property
    def is_wide(self) -> bool:
        return self.teacher is not None

    weights_differentiable = False


class Head(NamedTuple):
    """A computation from logits and operands, such as a loss from targets: three short functions.

    `statistics(logits, axis, operands, axis_name)` are sums over the classes of all shards, and `values(operands,
    statistics, axis)` the results. `gradients(logits, operands, statistics, axis, cotangents, *, in_place)` are the
    gradients of Σ cotangent·value to the logits and to the target weights, or None for the latter; with `in_place` they
    may overwrite the logits. If the gradients to the logits are factor·exp(z_j − m) − weight·q_j, and the label's
    is at_label − weight·q_j, `factors(operands, statistics, cotangents)` returns (factor, at_label, weight); the weight
    is None if there are no target weights q.
    """

    statistics: Callable[[Array, int, Any, AxisName], Any]
    values: Callable[[Any, Any, int], Values]
    gradients: Callable[..., tuple[Array, Array | None]]
    widths: tuple[int, ...] = (1,)  # lengths of the differentiable values along the class axis
    numbers: int = 0  # how many constants are numbers
    indices: int = 0  # the length of the last constant, the indices of classes; 0 without it
    copies: bool = False  # whether it needs a copy of the logits, for which tiles must have memory
    factors: Callable[[Any, Any, Results], tuple[Array, Array, Array | None]] | None = None

    def ignored_values(self, positions: int, dtype: Any) -> Values:
        """The values of ignored positions."""
        differentiable = tuple(jnp.zeros((positions, width), dtype) for width in self.widths)
        numbers = (jnp.zeros((positions, 1), dtype),) * self.numbers
        indices = (jnp.full((positions, self.indices), -1, jnp.int32),) if self.indices else ()
        return differentiable, (*numbers, *indices)


def evaluate_plainly(head: Head, logits: Array, operands: Any, axis: int, axis_name: AxisName) -> Values:
    """The values of each position by the plain formula; every reduction is an ordinary function of them."""
    return head.values(operands, head.statistics(logits, axis, operands, axis_name), axis)


_evaluate = custom_vjp(evaluate_plainly, nondiff_argnums=(0, 3, 4))  # differentiated by the rule below


def evaluate(head: Head, logits: Array, operands: Any, axis: int, axis_name: AxisName) -> Values:
    """The values of each position, differentiated by the head's rule."""
    # With no positions the values do not depend on the logits: under `jax.vmap` they have no mapped axis while their
    # tangents have one, which JAX forbids a `custom_jvp`.
    program = evaluate_plainly if 0 in logits.shape else _evaluate
    return program(head, logits, operands, axis, axis_name)


def _evaluate_fwd(head: Head, logits: Array, operands: Any, axis: int, axis_name: AxisName):
    frozen_logits, frozen = freeze_ignored(logits, operands)
    statistics = head.statistics(frozen_logits, axis, frozen, axis_name)
    return head.values(operands, statistics, axis), (logits, operands, statistics)


def _evaluate_bwd(head: Head, axis: int, axis_name: AxisName, residuals: Any, cotangents: Values) -> tuple[Array, Any]:
    logits, operands, statistics = residuals
    grad_logits, grad_weights = head.gradients(logits, operands, statistics, axis, cotangents[0], in_place=False)
    return grad_logits, operand_cotangents(type(operands), grad_weights)


def _evaluate_forward(head: Head, axis: int, axis_name: AxisName, residuals: Any, tangents: Any) -> Values:
    """Transpose the logits' gradients, but multiply the target weights' gradients by their tangents.

    A target weight's gradient may be infinite, and the transpose, which is derived at a cotangent of 0, would lose it.
    """
    logits, operands, statistics = residuals
    logit_tangents, operand_tangents = tangents
    values, constants = head.values(operands, statistics, axis)
    pushed = tuple(zeros_of_type(value.aval) for value in values)

    def gradients(*cotangents: Array) -> tuple[Array, Array | None]:
        return head.gradients(logits, operands, statistics, axis, cotangents, in_place=False)

    if logit_tangents is not None:
        _, transpose = jax.vjp(lambda *cotangents: gradients(*cotangents)[0], *pushed)
        pushed = transpose(logit_tangents)
    if operands.weights_differentiable and operand_tangents.target_weights is not None:
        _, grad_weights = gradients(*map(jnp.ones_like, values))
        terms = scale_gradient(cast(Array, grad_weights), operand_tangents.target_weights, operands.ignored)
        shards = None if is_replicated(operands.target_weights, axis_name) else axis_name
        pushed = (pushed[0] + sum_shards(jnp.sum(terms, axis, keepdims=True), shards),)
    return pushed, jax.tree.map(jnp.zeros_like, constants)


_evaluate.defvjp(_evaluate_fwd, _evaluate_bwd, forward=_evaluate_forward)


def operand_cotangents(kind: Any, grad_weights: Array | None) -> Any:
    """The cotangents of operands; labels, weights and smoothing are not differentiated, for which JAX expects None."""
    return kind(**dict.fromkeys(kind._fields))._replace(target_weights=grad_weights)


def freeze_ignored(logits: Array, operands: Any) -> tuple[Array, Any]:
    """The same logits and operands, constant at ignored positions.

    A derivative would multiply them by a weight of 0, which gives NaN if padding is NaN.
    """

    # Not a `custom_jvp`, because JAX forgets its rule inside a scan after differentiating in reverse. XLA drops this
    # select, whose two cases have the same value, but would not drop a `jnp.where`.
    def freeze(array: Array) -> Array:
        return lax.select(broadcast_like(operands.ignored, array), lax.stop_gradient(array), array)

    if operands.weights_differentiable:
        operands = operands._replace(target_weights=freeze(operands.target_weights))
    return freeze(logits), operands


def scale_gradient(gradient: Array, cotangent: Array, ignored: Array | bool = False) -> Array:
    """cotangent·gradient, but 0 where ignored, and where the cotangent is 0 and the gradient infinite."""
    infinite = jnp.abs(gradient) > jnp.finfo(gradient.dtype).max  # `isinf` uses an infinity; `debug_infs` stops at it
    return jnp.where(ignored | ((cotangent == 0) & infinite), 0, cotangent * gradient)
