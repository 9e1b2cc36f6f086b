"""A `jax.custom_vjp` with forward mode: its derivative in forward mode is the transpose of its backward rule.

A backward rule is linear in its cotangent, so that it says all about the derivative: reverse mode is the rule itself,
and forward mode its transpose, which JAX can form. Nothing else of a rule changes: `defvjp(fwd, bwd)` is written as for
`jax.custom_vjp`, what is kept for the backward pass is what `fwd` keeps, and the backward program is `bwd`. Without
primitives (see `_jax_internals.py`) it is a `jax.custom_vjp`, and has no forward mode.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxsoft._jax_internals import (
    Results,
    as_primitive,
    checking,
    is_symbolic_zero,
    no_tangent,
    primitives_fail,
    zeros_of_type,
)
from jaxsoft._platform.dispatch import mapped_axis_first


class custom_vjp(jax.custom_vjp):
    """A function with a rule for reverse mode, as `jax.custom_vjp`, that has forward mode too.

    `defvjp(fwd, bwd, symbolic_zeros)` as there. Where JAX cannot transpose `bwd`, or not well, `forward` is what its
    transpose would be: `forward(*nondiff_args, residuals, tangents)` returns the tangents of the results, from those of
    the arguments, with None for what does not move.
    """

    both_modes: jax.custom_jvp | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return object.__new__(cls)  # `jax.custom_vjp` may choose another class

    def defvjp(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, fwd: Callable, bwd: Callable, symbolic_zeros: bool = False, *, forward: Callable | None = None
    ) -> None:
        super().defvjp(fwd, bwd, symbolic_zeros)
        self.rules = _Rules(fwd, bwd, forward)
        both_modes = jax.custom_jvp(self.fun, nondiff_argnums=self.nondiff_argnums)
        both_modes.defjvp(functools.partial(_differentiate, self), symbolic_zeros=True)
        self.both_modes = both_modes

    if TYPE_CHECKING:

        def __call__(self, *args: Any) -> Any: ...

    else:

        @property  # so that no frame stands between a call and its function
        def __call__(self) -> Callable[..., Any]:
            # With its own checks on, JAX 0.10 and 0.12 refuse a `custom_jvp` inside `checkify`.
            refused = checking.value and jax.config.jax_enable_checks
            return super().__call__ if self.both_modes is None or refused or primitives_fail() else self.both_modes


def jvp_of_moving(fun: Callable, primals: Any, tangents: Any) -> Any:
    """The tangents of `fun(primals)`, where the tangent of what does not move is None."""
    leaves, tree = jax.tree.flatten(primals)
    given = tree.flatten_up_to(tangents)
    moves = [n for n, tangent in enumerate(given) if tangent is not None]

    def of_moving(*moving: Array) -> Any:
        changed = dict(zip(moves, moving, strict=True))
        return fun(jax.tree.unflatten(tree, [changed.get(n, leaf) for n, leaf in enumerate(leaves)]))

    return jax.jvp(of_moving, [leaves[n] for n in moves], [given[n] for n in moves])[1]


class _Rules(NamedTuple):
    fwd: Callable
    bwd: Callable
    forward: Callable | None


class _Primal(NamedTuple):
    """What a forward rule with `symbolic_zeros` is given."""

    value: Array
    perturbed: bool


def _differentiate(rule: custom_vjp, *args: Any) -> tuple[Any, Any]:
    *static, primals, tangents = args
    leaves, tree = jax.tree.flatten(primals)
    tangent_leaves = jax.tree.leaves(tangents)
    moves = tuple(n for n, tangent in enumerate(tangent_leaves) if not is_symbolic_zero(tangent))
    given = primals
    if rule.symbolic_zeros:
        given = jax.tree.unflatten(tree, [_Primal(leaf, n in moves) for n, leaf in enumerate(leaves)])
    results, residuals = rule.rules.fwd(*_merge(rule, static, given))
    kept, kept_tree = jax.tree.flatten(residuals)
    result_leaves, result_tree = jax.tree.flatten(results)
    types = tuple(result.aval for result in result_leaves)
    derivative = _Derivative(rule, tuple(static), kept_tree, tree, moves, result_tree, types)
    changes = iter(_push((tuple(kept), tuple(tangent_leaves[n] for n in moves)), derivative))
    result_tangents = [next(changes) if _varies(kind) else no_tangent(kind) for kind in types]
    return results, jax.tree.unflatten(result_tree, result_tangents)


def _merge(rule: custom_vjp, static: Sequence[Any], primals: Sequence[Any]) -> list[Any]:
    """All arguments in their order: the static ones at `nondiff_argnums`, the primals elsewhere."""
    args = list(primals)
    for position, value in sorted(zip(rule.nondiff_argnums, static, strict=True)):
        args.insert(position, value)
    return args


def _varies(kind: Any) -> bool:
    return jnp.issubdtype(kind.dtype, np.inexact)


def _no_cotangent(kind: Any) -> Any:
    """The cotangent of an integer."""
    return np.zeros(kind.shape, jax.dtypes.float0)


class _Derivative(NamedTuple):
    """The derivative of a call: a linear map of the tangents of those leaves of its primals that move."""

    rule: custom_vjp
    static: tuple[Any, ...]
    kept_tree: Any  # of residuals
    tree: Any  # of primals
    moves: tuple[int, ...]
    result_tree: Any
    types: tuple[Any, ...]  # of results

    def push(self, kept: Results, moving: Results) -> Results:
        """The tangents of the results."""
        if self.rule.rules.forward is not None:
            given = dict(zip(self.moves, moving, strict=True))
            tangents = jax.tree.unflatten(self.tree, [given.get(n) for n in range(self.tree.num_leaves)])
            residuals = jax.tree.unflatten(self.kept_tree, kept)
            pushed = jax.tree.leaves(self.rule.rules.forward(*self.static, residuals, tangents))
            return tuple(t for t, kind in zip(pushed, self.types, strict=True) if _varies(kind))
        used: list[int] = []

        def pull(*cotangents: Array) -> list[Array]:
            pulled = self.pull(kept, cotangents)
            used[:] = [n for n, cotangent in enumerate(pulled) if cotangent is not None]
            return [cotangent for cotangent in pulled if cotangent is not None]

        _, transpose = jax.vjp(pull, *map(zeros_of_type, filter(_varies, self.types)))
        return transpose([moving[n] for n in used])

    def pull(self, kept: Results, cotangents: Results) -> list[Array | None]:
        """The cotangents of what moves, None for zero, by the backward rule."""
        residuals = jax.tree.unflatten(self.kept_tree, kept)
        given = iter(cotangents)
        leaves = [next(given) if _varies(kind) else _no_cotangent(kind) for kind in self.types]
        pulled = self.rule.rules.bwd(*self.static, residuals, jax.tree.unflatten(self.result_tree, leaves))
        found: dict[int, Array] = {}

        def note(cotangent: Any, index: Any) -> None:
            if cotangent is not None:  # JAX's word for zero, also for a whole tree
                found[index] = cotangent

        indices = jax.tree.unflatten(self.tree, range(self.tree.num_leaves))
        jax.tree.map(note, tuple(pulled), indices, is_leaf=lambda cotangent: cotangent is None)
        return [found.get(n) for n in self.moves]


class _Mapped(NamedTuple):
    """A derivative under `jax.vmap`: `axes` of what is kept are mapped, and the first one of what moves."""

    inner: Any
    axes: tuple[int | None, ...]
    size: int

    def push(self, kept: Results, moving: Results) -> Results:
        return jax.vmap(self.inner.push, (self.axes, 0), axis_size=self.size)(kept, moving)

    def pull(self, kept: Results, cotangents: Results) -> list[Array | None]:
        return jax.vmap(self.inner.pull, (self.axes, 0), axis_size=self.size)(kept, cotangents)


def _map(size: int, axes: Any, arrays: tuple[Results, Results], derivative: Any) -> tuple[Results, tuple[int, ...]]:
    kept, moving = arrays
    moving = mapped_axis_first(size, axes[1], moving)
    results = _push((kept, moving), _Mapped(derivative, tuple(axes[0]), size))
    return results, (0,) * len(results)


def _pull(cotangents: Results, arrays: tuple[Results, Any], derivative: Any) -> list[Array | None]:
    return derivative.pull(arrays[0], cotangents)


def _result_types(derivative: Any) -> list[Any] | None:
    return list(filter(_varies, derivative.types)) if isinstance(derivative, _Derivative) else None


@as_primitive(_map, transpose=_pull, result_types=_result_types)
def _push(arrays: tuple[Results, Results], derivative: Any) -> Results:
    """The tangents of a call's results from what is kept and the tangents of what moves."""
    return derivative.push(*arrays)
