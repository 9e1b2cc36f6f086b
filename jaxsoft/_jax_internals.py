"""Every name of JAX that a release may move or change without notice, and the fallback without it.

A primitive gives a function its own rules; otherwise JAX would only trace it. If this JAX lacks a name that primitives
need, or has changed it, the plain functions run: slower, never wrong.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.core
import jax.custom_derivatives
import jax.interpreters.mlir
import numpy as np
from jaxtyping import Array

Results = tuple[Array, ...]
Function = Callable[[Any, Any], Results]


class _Context(threading.local):
    """A replacement of `jax.make_user_context`. JAX's caches do not depend on it, so it clears them when it changes."""

    value = False

    @contextlib.contextmanager
    def __call__(self, value: bool) -> Iterator[None]:
        before, self.value = self.value, value
        jax.clear_caches()
        try:
            yield
        finally:
            self.value = before
            jax.clear_caches()


def _tracer() -> type:
    """The class of traced values, from one of them."""
    seen = []
    jax.eval_shape(seen.append, jax.ShapeDtypeStruct((), "float32"))
    return next(kind for kind in type(seen[0]).__mro__ if kind.__name__ == "Tracer")


# Whether a call is traced or run inside `checked`, which is part of the key of every `jax.jit` cache. Checks are traced
# only inside it: their effect, even discarded, would cost every other compiled call JAX's fast dispatch (0.1 ms).
checking = jax.make_user_context(default_value=False) if hasattr(jax, "make_user_context") else _Context()
if TYPE_CHECKING:
    from jax.core import Tracer
else:
    Tracer = getattr(jax.core, "Tracer", None) or _tracer()
# The larger and the smaller of two sizes. With JAX's functions sizes may be symbols of `jax.export`.
max_dim, min_dim = getattr(jax.core, "max_dim", max), getattr(jax.core, "min_dim", min)


def jit_outside_traces(static_argnums: tuple[int, ...]) -> Callable[[Callable], Any]:
    """Compile a function when it is called with arrays; inside a trace it is traced as part of its caller.

    Each transformation would trace a separate `jax.jit` again.
    """

    def decorate(fn: Callable) -> Callable:
        compiled = jax.jit(fn, static_argnums=static_argnums)

        @functools.wraps(fn)
        def call(*args: Any) -> Any:
            traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(args))
            return fn(*args) if traced else compiled(*args)

        return call

    return decorate


def type_sharding(array: Any) -> Any:
    """The sharding that an array's type states; None if this JAX's types do not state one."""
    return getattr(jax.typeof(array), "sharding", None)


def knows_manual_axes(array: Any) -> bool:
    """Whether an array's type says over which mesh axes of a `shard_map` it varies."""
    return hasattr(jax.typeof(array), "mat")


def manual_axes(tree: object) -> frozenset:
    """The mesh axes over which any array of `tree` may differ from device to device inside a `shard_map`."""
    types = [jax.typeof(leaf) for leaf in jax.tree.leaves(tree)]
    return frozenset().union(*(kind.mat.varying for kind in types if hasattr(kind, "mat")))


def partial_jvp(fn: Callable[[Any], Any], primals: Any, tangents: Any) -> tuple[Any, Any]:
    """`jax.jvp` of `fn(primals)` for a tree of primals; those whose tangent is None are constants, and cost nothing."""
    leaves, tree = jax.tree.flatten(primals)
    given = tree.flatten_up_to(tangents)
    perturbed = [n for n, tangent in enumerate(given) if tangent is not None]

    def of_perturbed(*values: Array) -> Any:
        changed = dict(zip(perturbed, values, strict=True))
        return fn(jax.tree.unflatten(tree, [changed.get(n, leaf) for n, leaf in enumerate(leaves)]))

    return jax.jvp(of_perturbed, [leaves[n] for n in perturbed], [given[n] for n in perturbed])


def zeros_of_type(kind: Any) -> Array:
    """Zeros of a type, sharded and varying as it states."""
    from jax.interpreters.ad import Zero, instantiate_zeros

    return instantiate_zeros(Zero(kind))


def no_tangent(kind: Any) -> Any:
    """The tangent of an integer of a type, as a rule of `jax.custom_jvp` returns it."""
    symbolic_zero = getattr(jax.custom_derivatives, ZERO, None)
    if symbolic_zero is None:
        return np.zeros(kind.shape, jax.dtypes.float0)
    return symbolic_zero(kind.to_tangent_aval())  # which varies over a mesh as the type says


ZERO = "SymbolicZero"  # of jax.custom_derivatives
CONTEXTS = ("SPMDAxisContext", "ShardingContext")  # of jax.interpreters.mlir: of a shard_map, and of other programs


def is_symbolic_zero(cotangent: Any) -> bool:
    """Whether a cotangent is JAX's symbolic zero; NumPy's arrays and numbers have no `aval`."""
    return hasattr(cotangent, "aval") and not isinstance(cotangent, jax.Array)


def is_on_one_device(context: Any) -> bool:
    """Whether the program that is being lowered runs on one device, as inside a `shard_map`; False if unknown."""
    try:
        if context.module_context.lowering_parameters.for_export:  # the devices are unknown
            return False
        devices = context.module_context.axis_context
        manual, automatic = (getattr(jax.interpreters.mlir, name, ()) for name in CONTEXTS)
        if isinstance(devices, manual):
            return set(devices.manual_axes) == set(devices.mesh.axis_names)
        return isinstance(devices, automatic) and devices.num_devices == 1
    except AttributeError:
        return False


def device_lowered_for(context: Any) -> Any:
    """A device, perhaps abstract, for which the program is being lowered; None if JAX does not tell.

    Outside of a `shard_map` JAX tells only the primitives of `as_primitive(..., needs_devices=True)`.
    """
    try:
        if context.module_context.lowering_parameters.for_export:
            return None
        devices = context.module_context.axis_context
        if isinstance(devices, getattr(jax.interpreters.mlir, CONTEXTS[0], ())):
            return devices.mesh.abstract_mesh.abstract_device
        return devices.device_assignment[0]
    except (AttributeError, TypeError):
        return None


def as_primitive(
    batch: Callable[[int, Any, Any, Any], tuple[Results, tuple[int, ...]] | None],
    programs: Mapping[str, Callable[[Any, Any, Any], Function]] | None = None,
    formula: Function | None = None,
    *,
    transpose: Callable[[Results, Any, Any], list[Array | None]] | None = None,
    result_types: Callable[[Any], Any] | None = None,
    needs_devices: bool = False,
) -> Callable[[Function], Function]:
    """Give `fn(arrays, static)`, which returns a tuple of arrays, another form under `jax.vmap`, or on a platform.

    `batch(size, axes, arrays, static)` returns the mapped results and their mapped axes, or None to leave `fn` to
    `jax.vmap`; `axes` has the structure of `arrays`, with None for an array that is not mapped. `programs` maps a
    platform's name to a function of the lowering's context, the arrays' types and `static`, which returns the function
    to compile. Neither needs to be differentiable: derivatives are those of `formula`, or else of `fn`, in any mode and
    to any order. If `fn` is linear in the last of its arrays, a tuple, it may have its own
    `transpose(cotangents, arrays, static)`, which returns their cotangents. `result_types(static)` are the types of its
    results, if known, which saves tracing it. A user's own `checkify` sees only the results of a primitive.
    """

    def decorate(fn: Function) -> Function:
        plain = fn if formula is None else _with_derivative_of(formula, fn)
        rules = _Rules(fn, plain, batch, formula, transpose, result_types)
        make = functools.cache(lambda: _bind(rules, programs or {}, needs_devices))

        @functools.wraps(fn)
        def wrapper(arrays: Any, static: Hashable) -> Results:
            leaves, tree = jax.tree.flatten(arrays)
            # Without tracers nothing is mapped or compiled, and `checkify` cannot look into this primitive.
            if (checking.value and transpose is None) or not any(isinstance(leaf, Tracer) for leaf in leaves):
                return plain(arrays, static)
            if primitives_fail():
                return (formula or fn)(arrays, static)
            return tuple(make()(*leaves, tree=tree, static=static))

        return wrapper

    return decorate


def _with_derivative_of(formula: Function, fn: Function) -> Function:
    """`fn` with the derivative of a formula that has the same values."""
    plain = jax.custom_jvp(fn, nondiff_argnums=(1,))

    @plain.defjvp
    def differentiate(static: Hashable, primals: tuple[Any], tangents: tuple[Any]) -> tuple[Results, Results]:
        return jax.jvp(lambda arrays: formula(arrays, static), primals, tangents)

    return plain


def _bind(rules: "_Rules", programs: Mapping[str, Callable], needs_devices: bool = False) -> Callable[..., Results]:
    """The function that adds a primitive with these rules to what is traced."""
    from jax.extend.core import Primitive
    from jax.interpreters.ad import primitive_jvps, primitive_transposes
    from jax.interpreters.batching import primitive_batchers
    from jax.interpreters.mlir import lower_fun, register_lowering

    primitive = Primitive(rules.fn.__name__)
    primitive.multiple_results = True
    rules = rules._replace(value=primitive.bind if programs and not rules.formula else None)
    primitive.def_impl(rules.call)
    primitive.def_abstract_eval(rules.abstract)
    primitive_batchers[primitive] = rules.batched
    primitive_jvps[primitive] = rules.differentiate
    primitive_transposes[primitive] = rules.transpose
    register_lowering(primitive, lower_fun(rules.call, multiple_results=True))
    for platform, choose in programs.items():
        register_lowering(primitive, functools.partial(_lower, choose), platform=platform)
    if needs_devices and (told := _primitives_told_of_devices()) is not None:
        told.add(primitive)
    return primitive.bind


def _primitives_told_of_devices() -> set | None:
    """The primitives whose lowering knows the devices; None if this JAX has no such set."""
    try:
        from jax._src.dispatch import prim_requires_devices_during_lowering
    except ImportError:
        return None
    return prim_requires_devices_during_lowering


class _Rules(NamedTuple):
    """The rules of a primitive, whose parameters are the structure of the arrays and `static`."""

    fn: Function
    plain: Function  # the same function, for JAX to trace
    batch: Callable
    formula: Function | None = None
    own_transpose: Callable | None = None
    result_types: Callable | None = None
    value: Callable[..., Results] | None = None  # the program that computes the value under differentiation

    def call(self, *leaves: Array, tree: Any, static: Hashable) -> Results:
        return self.fn(jax.tree.unflatten(tree, leaves), static)

    def abstract(self, *types, tree, static):
        known = self.result_types and self.result_types(static)
        if known is not None:
            return known
        return jax.make_jaxpr(self.fn, static_argnums=1)(jax.tree.unflatten(tree, types), static).out_avals

    def batched(self, leaves, axes, *, tree, static):
        (size,) = {leaf.shape[axis] for leaf, axis in zip(leaves, axes, strict=True) if axis is not None}
        results = self.batch(size, jax.tree.unflatten(tree, axes), jax.tree.unflatten(tree, leaves), static)
        if results is not None:
            return results
        by_jax = jax.vmap(lambda *leaves: self.plain(jax.tree.unflatten(tree, leaves), static), in_axes=axes)(*leaves)
        return by_jax, (0,) * len(by_jax)

    def differentiate(self, primals, tangents, *, tree, static):
        from jax.interpreters.ad import Zero

        given = [None if isinstance(tangent, Zero) else tangent for tangent in tangents]
        formula = self.formula or self.fn
        results, result_tangents = partial_jvp(
            lambda leaves: formula(jax.tree.unflatten(tree, leaves), static), list(primals), given
        )
        if self.value is not None:
            results = self.value(*primals, tree=tree, static=static)
        return results, result_tangents

    def transpose(self, cotangents, *leaves, tree, static):
        from jax.interpreters.ad import Zero, instantiate_zeros, is_undefined_primal

        unknown = [is_undefined_primal(leaf) for leaf in leaves]
        if self.own_transpose is not None:
            pulled = self.own_transpose(
                tuple(map(instantiate_zeros, cotangents)), jax.tree.unflatten(tree, leaves), static
            )
            zeros = [
                Zero(leaf.aval) if c is None else c for c, leaf in zip(pulled, leaves[-len(pulled) :], strict=True)
            ]
            return [None] * (len(leaves) - len(zeros)) + zeros

        def linear_part(*values: Array) -> Results:
            given = iter(values)
            known = (next(given) if is_unknown else leaf for is_unknown, leaf in zip(unknown, leaves, strict=True))
            return self.call(*known, tree=tree, static=static)

        types = (leaf.aval for leaf, is_unknown in zip(leaves, unknown, strict=True) if is_unknown)
        pulled = iter(jax.linear_transpose(linear_part, *types)(tuple(map(instantiate_zeros, cotangents))))
        return [next(pulled) if is_unknown else None for is_unknown in unknown]


def _lower(choose: Callable, context: Any, *values: Any, tree: Any, static: Hashable) -> Any:
    """Lower the function that is chosen for a platform."""
    from jax.interpreters.mlir import lower_fun

    chosen = choose(context, jax.tree.unflatten(tree, context.avals_in), static)
    program = lambda *leaves: chosen(jax.tree.unflatten(tree, leaves), static)  # noqa: E731
    return lower_fun(program, multiple_results=True)(context, *values)


@functools.cache
def primitives_fail() -> str:
    """Why primitives cannot be used with this JAX; empty if they can."""
    failed: list[str] = []

    def attempt() -> None:
        try:
            _try_primitive()
        except Exception as error:  # a changed JAX may raise anything
            failed.append(f"{type(error).__name__}: {error}".splitlines()[0])

    # In a new thread nothing is being traced, no mesh is set, and no mode of JAX is on.
    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return failed[0] if failed else ""


def _try_primitive() -> None:
    """Trace every rule of a primitive; do not compile, which might need a device."""

    def double(arrays: tuple[Array], static: Hashable) -> Results:
        return (arrays[0] + arrays[0],)

    choose = {"cpu": lambda context, types, static: double}
    bind = _bind(_Rules(double, double, lambda *_: None), choose)
    tree = jax.tree.structure((0,))
    number = jax.ShapeDtypeStruct((), "float32")

    def each(x: Array) -> Array:
        return bind(x, tree=tree, static=())[0]

    with jax.disable_jit(False):
        for rule in (jax.grad(each), lambda x: jax.vmap(each)(x[None]), lambda x: jax.linear_transpose(each, x)(x)):
            jax.eval_shape(rule, number)


def lacking() -> list[str]:
    """The optional parts of JAX that this version lacks, one phrase each."""
    lacks = [f"primitives ({reason})"] if (reason := primitives_fail()) else []
    lacks += ["jax.make_user_context"] if isinstance(checking, _Context) else []
    lacks += [f"jax.interpreters.mlir.{name}" for name in CONTEXTS if not hasattr(jax.interpreters.mlir, name)]
    number = jax.ShapeDtypeStruct((), "float32")
    lacks += [f"jax.custom_derivatives.{ZERO}"] if not hasattr(jax.custom_derivatives, ZERO) else []
    lacks += ["primitives that are told of devices"] if _primitives_told_of_devices() is None else []
    lacks += ["the manual axes of a type"] if not knows_manual_axes(number) else []
    lacks += ["the sharding of a type"] if type_sharding(number) is None else []
    return lacks + [f"jax.core.{name}" for name in ("Tracer", "max_dim", "min_dim") if not hasattr(jax.core, name)]
