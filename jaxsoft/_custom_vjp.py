"""A `jax.custom_vjp` with forward mode: its JVP is the transpose of its backward rule.

A backward rule is linear in its cotangent, and so determines the derivative: reverse mode calls the rule, and forward
mode its transpose, which JAX derives. Everything else is as in `jax.custom_vjp`: `defvjp(fwd, bwd)`, the residuals, and
the backward program. If this JAX has no primitives (see `_jax_internals.py`), it is a `jax.custom_vjp` without forward
mode.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxsoft._jax_internals import (
    Results,
    as_primitive,
    checking,
    is_symbolic_zero,
    jit_outside_traces,
    no_tangent,
    primitives_fail,
    zeros_of_type,
)
from jaxsoft._platform.dispatch import mapped_axis_first


class custom_vjp(jax.custom_vjp):
    """A `jax.custom_vjp` that can be differentiated in forward mode too.

    `defvjp(fwd, bwd, symbolic_zeros)` is as in `jax.custom_vjp`. If JAX cannot transpose `bwd`, or only to a slow
    program, `forward` replaces the transpose: `forward(*nondiff_args, residuals, tangents)` returns the tangents of the
    results. The tangent of an argument that is not perturbed is None.
    """

    forward: Callable | None = None
    both_modes: jax.custom_jvp | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return object.__new__(cls)  # `jax.custom_vjp` may choose another class

    def defvjp(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, fwd: Callable, bwd: Callable, symbolic_zeros: bool = False, *, forward: Callable | None = None
    ) -> None:
        super().defvjp(fwd, bwd, symbolic_zeros)
        self.forward = forward
        both_modes = jax.custom_jvp(self.fun, nondiff_argnums=self.nondiff_argnums)
        both_modes.defjvp(functools.partial(_differentiate, self), symbolic_zeros=True)
        self.both_modes = both_modes

    if TYPE_CHECKING:

        def __call__(self, *args: Any) -> Any: ...

    else:

        @property  # so that a traceback has no frame between a call and its function
        def __call__(self) -> Callable[..., Any]:
            # With jax_enable_checks JAX 0.10 and 0.12 raise an AssertionError for a `custom_jvp` inside `checkify`.
            refused = checking.value and jax.config.jax_enable_checks
            return super().__call__ if self.both_modes is None or refused or primitives_fail() else self.both_modes


def with_rule(fwd: Callable, bwd: Callable) -> Callable[..., Array]:
    """`fwd(array, axes, axis_name)[0]` with the rule `bwd(axes, axis_name, residuals, cotangent)`.

    Each of them is compiled where it is called outside of traces.
    """

    @functools.partial(custom_vjp, nondiff_argnums=(1, 2))
    @functools.wraps(fwd)
    def primal(array: Array, axes: Any, axis_name: Any) -> Array:
        return fwd(array, axes, axis_name)[0]

    primal.defvjp(jit_outside_traces(static_argnums=(1, 2))(fwd), jit_outside_traces(static_argnums=(0, 1))(bwd))
    return jit_outside_traces(static_argnums=(1, 2))(primal)


class _Primal(NamedTuple):
    """The argument of a `fwd` with `symbolic_zeros`."""

    value: Array
    perturbed: bool


def _differentiate(rule: custom_vjp, *args: Any) -> tuple[Any, Any]:
    """The rule of `jax.custom_jvp`: results and their tangents, which are linear in those of the arguments."""
    *static, primals, tangents = args
    leaves, tree = jax.tree.flatten(primals)
    tangent_leaves = jax.tree.leaves(tangents)
    perturbed = tuple(n for n, tangent in enumerate(tangent_leaves) if not is_symbolic_zero(tangent))
    given = primals
    if rule.symbolic_zeros:
        given = jax.tree.unflatten(tree, [_Primal(leaf, n in perturbed) for n, leaf in enumerate(leaves)])
    results, residuals = cast(Callable, rule.fwd)(*_merge(rule, static, given))
    residual_leaves, residual_tree = jax.tree.flatten(residuals)
    result_leaves, result_tree = jax.tree.flatten(results)
    types = tuple(result.aval for result in result_leaves)
    derivative = _Derivative(rule, tuple(static), residual_tree, tree, perturbed, result_tree, types)
    pushed = iter(_pushforward((tuple(residual_leaves), tuple(tangent_leaves[n] for n in perturbed)), derivative))
    result_tangents = [next(pushed) if _is_inexact(kind) else no_tangent(kind) for kind in types]
    return results, jax.tree.unflatten(result_tree, result_tangents)


def _merge(rule: custom_vjp, static: Sequence[Any], primals: Sequence[Any]) -> list[Any]:
    """All arguments in their order: the static ones at `nondiff_argnums`, the primals elsewhere."""
    args = list(primals)
    for position, value in sorted(zip(rule.nondiff_argnums, static, strict=True)):
        args.insert(position, value)
    return args


def _is_inexact(kind: Any) -> bool:
    return jnp.issubdtype(kind.dtype, np.inexact)


class _Derivative(NamedTuple):
    """The derivative of one call: a linear map from the tangents of its perturbed leaves to those of its results."""

    rule: custom_vjp
    static: tuple[Any, ...]
    residual_tree: Any
    primal_tree: Any
    perturbed: tuple[int, ...]  # indices of leaves of the primals
    result_tree: Any
    result_types: tuple[Any, ...]

    def pushforward(self, residuals: Results, tangents: Results) -> Results:
        """The tangents of the results."""
        if self.rule.forward is None:
            return self._transposed(residuals, tangents)
        given = dict(zip(self.perturbed, tangents, strict=True))
        tree = jax.tree.unflatten(self.primal_tree, [given.get(n) for n in range(self.primal_tree.num_leaves)])
        pushed = self.rule.forward(*self.static, jax.tree.unflatten(self.residual_tree, residuals), tree)
        pairs = zip(jax.tree.leaves(pushed), self.result_types, strict=True)
        return tuple(tangent for tangent, kind in pairs if _is_inexact(kind))

    def _transposed(self, residuals: Results, tangents: Results) -> Results:
        used: list[int] = []

        def pullback(*cotangents: Array) -> list[Array]:
            pulled = self.pullback(residuals, cotangents)
            used[:] = [n for n, cotangent in enumerate(pulled) if cotangent is not None]
            return [cotangent for cotangent in pulled if cotangent is not None]

        # The pullback is linear, so its derivative at 0 is its derivative everywhere.
        _, transpose = jax.vjp(pullback, *map(zeros_of_type, filter(_is_inexact, self.result_types)))
        return transpose([tangents[n] for n in used])

    def pullback(self, residuals: Results, cotangents: Results) -> list[Array | None]:
        """The cotangents of the perturbed leaves by the backward rule, None for zero."""
        given = iter(cotangents)
        leaves = [
            next(given) if _is_inexact(kind) else np.zeros(kind.shape, jax.dtypes.float0) for kind in self.result_types
        ]
        result_cotangents = jax.tree.unflatten(self.result_tree, leaves)
        backward, residuals = cast(Callable, self.rule.bwd), jax.tree.unflatten(self.residual_tree, residuals)
        pulled = backward(*self.static, residuals, result_cotangents)
        by_index: dict[int, Array] = {}

        def note(cotangent: Any, index: Any) -> None:
            if cotangent is not None:  # None is JAX's zero, of a leaf or of a whole tree
                by_index[index] = cotangent

        indices = jax.tree.unflatten(self.primal_tree, range(self.primal_tree.num_leaves))
        jax.tree.map(note, tuple(pulled), indices, is_leaf=lambda cotangent: cotangent is None)
        return [by_index.get(n) for n in self.perturbed]


class _Mapped(NamedTuple):
    """A derivative under `jax.vmap`, with the mapped axes of the residuals; tangents are mapped along their first."""

    inner: Any
    residual_axes: tuple[int | None, ...]
    size: int

    def pushforward(self, residuals: Results, tangents: Results) -> Results:
        return jax.vmap(self.inner.pushforward, (self.residual_axes, 0), axis_size=self.size)(residuals, tangents)

    def pullback(self, residuals: Results, cotangents: Results) -> list[Array | None]:
        return jax.vmap(self.inner.pullback, (self.residual_axes, 0), axis_size=self.size)(residuals, cotangents)


def _map(size: int, axes: Any, arrays: tuple[Results, Results], derivative: Any) -> tuple[Results, tuple[int, ...]]:
    residuals, tangents = arrays
    residual_axes, tangent_axes = axes
    tangents = mapped_axis_first(size, tangent_axes, tangents)
    results = _pushforward((residuals, tangents), _Mapped(derivative, tuple(residual_axes), size))
    return results, (0,) * len(results)


def _pullback(cotangents: Results, arrays: tuple[Results, Any], derivative: Any) -> list[Array | None]:
    residuals, _ = arrays
    return derivative.pullback(residuals, cotangents)


def _result_types(derivative: Any) -> list[Any] | None:
    return list(filter(_is_inexact, derivative.result_types)) if isinstance(derivative, _Derivative) else None


@as_primitive(_map, transpose=_pullback, result_types=_result_types)
def _pushforward(arrays: tuple[Results, Results], derivative: Any) -> Results:
    """The tangents of a call's results from its residuals and the tangents of its perturbed leaves."""
    return derivative.pushforward(*arrays)
