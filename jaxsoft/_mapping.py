"""A function whose `jax.vmap` is of its own making, seen before any derivative is taken."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from jaxsoft._checks import is_checking

Mapped = Callable[[Any, Any], Array]


def mapped_by(rule: Callable[[int, Any, Any, Any], tuple[Array, int] | None]) -> Callable[[Mapped], Mapped]:
    """Give `fn(arrays, static)`, which returns one array, another form under `jax.vmap`.

    `rule(size, axes, arrays, static)`, `axes` of the structure of `arrays` with None where one is not mapped, returns
    the mapped result and its mapped axis, or None to leave `fn` to `jax.vmap`. Unlike what
    `jax.custom_batching.custom_vmap` makes, the result can be differentiated in reverse, as `fn` itself.
    """

    def decorate(fn: Mapped) -> Mapped:
        primitive = Primitive(fn.__name__)

        def call(*leaves: Array, tree: Any, static: Hashable) -> Array:
            return fn(jax.tree.unflatten(tree, leaves), static)

        def batch(leaves, axes, *, tree, static):
            (size,) = {leaf.shape[axis] for leaf, axis in zip(leaves, axes, strict=True) if axis is not None}
            arrays, mapped = jax.tree.unflatten(tree, leaves), jax.tree.unflatten(tree, axes)
            result = rule(size, mapped, arrays, static)
            if result is None:
                result = jax.vmap(functools.partial(call, tree=tree, static=static), in_axes=axes)(*leaves), 0
            return result

        def differentiate(primals, tangents, **params):
            moves = [not isinstance(tangent, ad.Zero) for tangent in tangents]

            def of_moving(*moving: Array) -> Array:  # the others stay constants, and cost no derivative
                given = iter(moving)
                return call(*(next(given) if m else p for m, p in zip(moves, primals, strict=True)), **params)

            moving, their_tangents = ([v for v, m in zip(vs, moves, strict=True) if m] for vs in (primals, tangents))
            return jax.jvp(of_moving, moving, their_tangents)

        def abstract(*avals, **params):
            return jax.make_jaxpr(functools.partial(call, **params))(*avals).out_avals[0]

        primitive.def_impl(call)
        primitive.def_abstract_eval(abstract)
        batching.primitive_batchers[primitive] = batch
        ad.primitive_jvps[primitive] = differentiate
        mlir.register_lowering(primitive, mlir.lower_fun(call, multiple_results=False))

        @functools.wraps(fn)
        def wrapper(arrays: Any, static: Hashable) -> Array:
            leaves, tree = jax.tree.flatten(arrays)
            # Nothing concrete is being mapped, and `checkify` looks into no primitive it does not know.
            if is_checking() or not any(isinstance(leaf, Tracer) for leaf in leaves):
                return fn(arrays, static)
            return primitive.bind(*leaves, tree=tree, static=static)

        return wrapper

    return decorate
