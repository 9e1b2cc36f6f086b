"""A function as a primitive of JAX's, which can have rules of its own where JAX would only look into it."""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from jaxsoft._checks import is_checking

Results = tuple[Array, ...]
Function = Callable[[Any, Any], Results]


def as_primitive(
    batch: Callable[[int, Any, Any, Any], tuple[Results, tuple[int, ...]] | None],
    programs: Mapping[str, Callable[[mlir.LoweringRuleContext, Any, Any], Function]] | None = None,
    formula: Function | None = None,
) -> Callable[[Function], Function]:
    """Give `fn(arrays, static)`, which returns a tuple of arrays, another form under `jax.vmap`, or on a platform.

    `batch(size, axes, arrays, static)`, `axes` of the structure of `arrays` with None where one is not mapped, returns
    the mapped results and their mapped axes, or None to leave `fn` to `jax.vmap`. `programs` gives for the name of a
    platform what chooses the function that is compiled there, given where it will run and the arrays' types. Neither
    has to be differentiated: derivatives are those of the `formula`, or of `fn` where there is none, in any mode and to
    any order. Of a primitive a user's own `checkify` sees the results, not what is inside.
    """

    def decorate(fn: Function) -> Function:
        primitive = Primitive(fn.__name__)
        primitive.multiple_results = True

        def call(*leaves: Array, tree: Any, static: Hashable) -> Results:
            return fn(jax.tree.unflatten(tree, leaves), static)

        def of_formula(*leaves: Array, tree: Any, static: Hashable) -> Results:
            return (formula or fn)(jax.tree.unflatten(tree, leaves), static)

        def batched(leaves, axes, *, tree, static):
            (size,) = {leaf.shape[axis] for leaf, axis in zip(leaves, axes, strict=True) if axis is not None}
            arrays, mapped = jax.tree.unflatten(tree, leaves), jax.tree.unflatten(tree, axes)
            results = batch(size, mapped, arrays, static)
            if results is None:
                by_jax = jax.vmap(functools.partial(call, tree=tree, static=static), in_axes=axes)(*leaves)
                return by_jax, (0,) * len(by_jax)
            return results

        def differentiate(primals, tangents, **params):
            moves = [not isinstance(tangent, ad.Zero) for tangent in tangents]

            def of_moving(*moving: Array) -> Results:  # the others stay constants, and cost no derivative
                given = iter(moving)
                return of_formula(*(next(given) if m else p for m, p in zip(moves, primals, strict=True)), **params)

            moving, their_tangents = ([v for v, m in zip(vs, moves, strict=True) if m] for vs in (primals, tangents))
            results, of_results = jax.jvp(of_moving, moving, their_tangents)
            return primitive.bind(*primals, **params) if programs else results, of_results

        def transpose(cotangents, *leaves, **params):
            unknown = [ad.is_undefined_primal(leaf) for leaf in leaves]

            def of_unknown(*values: Array) -> Results:
                given = iter(values)
                return call(*(next(given) if u else leaf for u, leaf in zip(unknown, leaves, strict=True)), **params)

            back = jax.linear_transpose(of_unknown, *(leaf.aval for leaf, u in zip(leaves, unknown, strict=True) if u))
            found = iter(back(tuple(map(ad.instantiate_zeros, cotangents))))
            return [next(found) if u else None for u in unknown]

        def abstract(*avals, **params):
            return jax.make_jaxpr(functools.partial(call, **params))(*avals).out_avals

        def lower(choose):
            def rule(ctx, *values, tree, static):
                chosen = choose(ctx, jax.tree.unflatten(tree, ctx.avals_in), static)

                def program(*leaves: Array) -> Results:
                    return chosen(jax.tree.unflatten(tree, leaves), static)

                return mlir.lower_fun(program, multiple_results=True)(ctx, *values)

            return rule

        primitive.def_impl(call)
        primitive.def_abstract_eval(abstract)
        batching.primitive_batchers[primitive] = batched
        ad.primitive_jvps[primitive] = differentiate
        ad.primitive_transposes[primitive] = transpose
        mlir.register_lowering(primitive, mlir.lower_fun(call, multiple_results=True))
        for platform, choose in (programs or {}).items():
            mlir.register_lowering(primitive, lower(choose), platform=platform)

        @functools.wraps(fn)
        def wrapper(arrays: Any, static: Hashable) -> Results:
            leaves, tree = jax.tree.flatten(arrays)
            # Nothing concrete is mapped or compiled, and `checkify` looks into no primitive it does not know.
            if is_checking() or not any(isinstance(leaf, Tracer) for leaf in leaves):
                return fn(arrays, static)
            return tuple(primitive.bind(*leaves, tree=tree, static=static))

        return wrapper

    return decorate
