"""What is read from the logits of every position, and the one rule by which any of it is differentiated."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoft._jax_internals import Results
from jaxsoft._meshes import broadcast_like
from jaxsoft._platform import Axes
from jaxsoft._shards import AxisName

Values = tuple[Results, Results]  # with the classes' axis of length one or so: what is differentiated, what is not


def one_number(positions: int, dtype: Any) -> Values:
    """0 for each of so many positions, of which one number is read."""
    return (jnp.zeros((positions, 1), dtype),), ()


class Reading(NamedTuple):
    """Something that is read from logits beside operands, such as a loss beside targets.

    Operands are a NamedTuple of arrays of the logits' rank. They have `idle`, where a position takes no part, `share`,
    0 at least there, `spread`, the one array of theirs that may be differentiated if `spread_moves`, and `is_wide`
    where one of them is as large as the logits.
    """

    statistics: Callable[..., Any]  # (logits, axes, operands, axis_name): summed over the classes, of all shards
    values: Callable[[Any, Any, Axes], Values]  # (operands, statistics, axes)
    # (logits, operands, statistics, axes, cotangents, in_place=False): the gradients of Σ cotangent·value to the logits
    # and to the spread, or None. In place the logits are not read again.
    gradients: Callable[..., tuple[Array, Array | None]]
    blank: Callable[[int, Any], Values] = one_number  # (positions, dtype): of so many that take no part
    copies: bool = False  # whether it takes a copy of the logits, for which tiles are to have room

    def __call__(self, logits: Array, operands: Any, axis: int, axis_name: AxisName) -> Values:
        """The values as the formula has them, without a rule."""
        return self.values(operands, self.statistics(logits, (axis,), operands, axis_name), (axis,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def read(reading: Reading, logits: Array, operands: Any, axis: int, axis_name: AxisName) -> Values:
    """The values of each position; every reduction is an ordinary function of them."""
    return reading(logits, operands, axis, axis_name)


def _read_fwd(reading: Reading, logits: Array, operands: Any, axis: int, axis_name: AxisName):
    moving, of_moving = taking_part(logits, operands)
    statistics = reading.statistics(moving, (axis,), of_moving, axis_name)
    return reading.values(operands, statistics, (axis,)), (logits, operands, statistics)


def _read_bwd(
    reading: Reading, axis: int, axis_name: AxisName, residuals: Any, cotangents: Values
) -> tuple[Array, Any]:
    logits, operands, statistics = residuals
    to_logits, to_spread = reading.gradients(logits, operands, statistics, (axis,), cotangents[0])
    return to_logits, to_operands(type(operands), to_spread)


read.defvjp(_read_fwd, _read_bwd)


def to_operands(kind: Any, to_spread: Array | None) -> Any:
    """The cotangents of operands of a kind: labels, weights and smoothing are no variables."""
    # None is JAX's word for a zero cotangent.
    return kind(**dict.fromkeys(kind._fields))._replace(spread=to_spread)


def taking_part(logits: Array, operands: Any) -> tuple[Array, Any]:
    """The same logits and operands, of which those of idle positions do not move.

    A derivative would take them to be constants only times a weight of 0, and padding may be NaN.
    """

    # Not by a rule of its own: inside a scan JAX forgets a `custom_jvp` once it has differentiated in reverse. XLA
    # drops this select, both of whose cases are one value, but not one inside `jnp.where`.
    def held(array: Array) -> Array:
        return lax.select(broadcast_like(operands.idle, array), lax.stop_gradient(array), array)

    return held(logits), operands._replace(spread=held(operands.spread)) if operands.spread_moves else operands


def scale_gradient(gradient: Array, cotangent: Array, idle: Array | bool = False) -> Array:
    """Their product, but 0 for what takes no part, and where the cotangent is 0 and the gradient infinite."""
    infinite = jnp.abs(gradient) > jnp.finfo(gradient.dtype).max  # `isinf` itself makes what `debug_infs` stops at
    return jnp.where(idle | ((cotangent == 0) & infinite), 0, cotangent * gradient)


class Positions(NamedTuple):
    """Operands that are no targets: the weight of each position, and what stands beside its logits."""

    share: Array
    beside: Any = None  # other logits
    spread: None = None

    @property
    def idle(self) -> Array:
        return self.share == 0

    @property
    def is_wide(self) -> bool:
        return self.beside is not None

    spread_moves = False
