"""Compile a program and call it on its values, with the derivative inside or outside of the transformation."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import jaxsoft
from experiments.fuzz.programs import SHARDED, Layout, Program
from experiments.fuzz.values import Values

INSIDE = ("vmap inside", "map inside")


def execute(program: Program, values: Values, chosen: slice = slice(None)) -> dict[str, np.ndarray]:
    """The results of the chosen calls by name; the first axis counts the sets of values."""
    with jax.enable_x64(program.x64), jax.numpy_dtype_promotion("standard"):
        run = compiled(program)
        calls = [run(*arguments) for arguments in list(batches(program, values))[chosen]]
        calls = jax.device_get(calls)
    joined = jax.tree.map(lambda *a: (np.stack if program.lanes == 1 else np.concatenate)(a), *calls)
    return named(program, joined)


def batches(program: Program, values: Values) -> Iterator[tuple]:
    """The arguments of each call: variables, constants, cotangents, tangents."""
    for first in range(0, program.sets, program.lanes):
        part = slice(first, first + program.lanes) if program.lanes > 1 else first

        def take(name: str, array: np.ndarray, part: Any = part) -> np.ndarray:
            axis = program.in_axes.get(name, 0)
            if axis is None:
                return array[first]  # noqa: B023
            return np.moveaxis(array[part], 0, axis) if axis else array[part]

        inputs = {name: take(name, array) for name, array in values.inputs.items()}
        variables = {name: inputs.pop(name) for name in program.variables}
        cotangents = tuple(g[part] for g in values.cotangents)
        tangents = {name: v[part] for name, v in values.tangents.items()}
        yield variables, inputs, cotangents, tangents


def public(name: str) -> Callable:
    found: Any = jaxsoft
    for part in name.split("."):
        found = getattr(found, part)
    return found


def keywords(program: Program, arrays: dict) -> dict[str, Any]:
    """The arrays and options of a program as its function takes them."""
    given = arrays | program.options
    if program.is_sparse:
        parts = (given.pop(name) for name in ("target_indices", "target_probs", "outside"))
        given["targets"] = jaxsoft.SparseTargets(*parts)
    return given


def compiled(program: Program) -> Callable:
    fn, lanes = public(program.function), program.lanes > 1

    def outputs(variables: dict, constants: dict) -> tuple:
        found = fn(**keywords(program, variables | constants))
        found = found if isinstance(found, tuple) else (found,)
        if "data" in program.mesh and not program.outputs[0][0]:
            return tuple(lax.psum(f, "data") for f in found)
        return found

    inner: Callable = outputs
    if program.wrap == "checkpoint":
        inner = jax.checkpoint(outputs)
    elif program.wrap == "vmap inside":
        inner = jax.vmap(outputs)
    elif program.wrap == "map inside":
        inner = lambda variables, constants: lax.map(lambda both: outputs(*both), (variables, constants))  # noqa: E731
    elif program.wrap == "shard_map":
        inner = sharded(program, outputs, 2)
    whole = differentiated(program, inner)
    if program.wrap == "eager":
        return whole
    if program.wrap == "grad in shard_map":
        whole = sharded(program, whole, 4)
    if program.wrap in SHARDED and lanes:
        whole = jax.vmap(whole)
    elif program.wrap == "vmap":
        axes = [
            {n: program.in_axes[n] for n in names}
            for names in (program.variables, program.arrays.keys() - set(program.variables))
        ]
        whole = jax.vmap(whole, (*axes, 0, 0))
    elif program.wrap == "map":
        whole = over_map(whole)
    elif program.wrap == "scan":
        whole = over_scan(whole)
    return jax.jit(whole)


def over_map(whole: Callable) -> Callable:
    return lambda *arguments: lax.map(lambda one: whole(*one), arguments)


def over_scan(whole: Callable) -> Callable:
    return lambda *arguments: lax.scan(lambda carry, one: (carry, whole(*one)), 0, arguments)[1]


def differentiated(program: Program, outputs: Callable) -> Callable:
    kind = program.derivative

    def pulled(variables: dict, constants: dict) -> tuple:
        found, pullback = jax.vjp(lambda v: outputs(v, constants), variables)
        return found, lambda g: pullback(g)[0]

    def value(variables, constants, cotangents, tangents):
        return outputs(variables, constants)

    def vjp(variables, constants, cotangents, tangents):
        found, pullback = pulled(variables, constants)
        return found, pullback(cotangents)

    def grad(variables, constants, cotangents, tangents):
        def total(variables):
            found = outputs(variables, constants)
            # A zero cotangent removes an entry from the sum, even where it is not finite.
            return sum(jnp.sum(jnp.where(g == 0, 0, f * g)) for f, g in zip(found, cotangents, strict=True)), found

        return jax.grad(total, has_aux=True)(variables)[::-1]

    def linear(variables, constants, cotangents, tangents):
        _, pullback = pulled(variables, constants)
        zeros = jax.tree.map(lambda g: jnp.zeros_like(g), cotangents)
        return jax.jvp(pullback, (zeros,), (cotangents,))

    def transpose(variables, constants, cotangents, tangents):
        _, pullback = pulled(variables, constants)
        zeros = jax.tree.map(lambda g: jnp.zeros_like(g), cotangents)
        return jax.vjp(pullback, zeros)[1](tangents)[0]

    def jvp_of_grad(variables, constants, cotangents, tangents):
        def value_and_gradients(variables):
            found, pullback = pulled(variables, constants)
            return found, pullback(cotangents)

        (_, gradients), (moved, bends) = jax.jvp(value_and_gradients, (variables,), (tangents,))
        return moved, gradients, bends

    def vjp_of_grad(variables, constants, cotangents, tangents):
        return jax.vjp(lambda v: pulled(v, constants)[1](cotangents), variables)[1](tangents)[0]

    chosen = {
        "value": value, "vjp": vjp, "grad": grad, "linear at 0": linear, "transpose": transpose,
        "jvp of grad": jvp_of_grad, "vjp of grad": vjp_of_grad,
    }  # fmt: skip
    return chosen[kind]


def named(program: Program, joined: Any) -> dict[str, np.ndarray]:
    kind = program.derivative

    def outputs(name: str, found: tuple) -> dict[str, np.ndarray]:
        return {f"{name} {n}" if n else name: f for n, f in enumerate(found)}

    def gradients(name: str, found: dict) -> dict[str, np.ndarray]:
        return {f"{name} to {n}": f for n, f in found.items()}

    if kind == "value":
        return outputs("value", joined)
    if kind in ("vjp", "grad"):
        return outputs("value", joined[0]) | gradients("gradient", joined[1])
    if kind == "linear at 0":
        return gradients("zero", joined[0]) | gradients("gradient", joined[1])
    if kind == "transpose":
        return outputs("derivative", joined)
    if kind == "jvp of grad":
        return outputs("derivative", joined[0]) | gradients("gradient", joined[1]) | gradients("bend", joined[2])
    return gradients("bend", joined)


def sharded(program: Program, fn: Callable, arguments: int) -> Callable:
    mesh = jax.make_mesh(
        tuple(program.mesh.values()), tuple(program.mesh), axis_types=(AxisType.Auto,) * len(program.mesh)
    )

    def spec(layout: Layout) -> PartitionSpec:
        names = {"c0": "classes"} | ({program.sharded_position: "data"} if program.sharded_position else {})
        return PartitionSpec(*(names.get(axis) for axis in layout))

    variables = {name: spec(program.arrays[name]) for name in program.variables}
    constants = {name: spec(layout) for name, layout in program.arrays.items() if name not in variables}
    outputs = tuple(spec(layout) for layout, _ in program.outputs)
    tangents = {name: s for name, s in variables.items() if not program.dtypes[name].startswith("int")}
    inputs = (variables, constants, outputs, tangents)[:arguments]
    results: Any = outputs
    if arguments == 4:
        results = {
            "value": outputs, "vjp": (outputs, variables), "grad": (outputs, variables),
            "linear at 0": (variables, variables), "transpose": outputs, "jvp of grad": (outputs, variables, variables),
            "vjp of grad": variables,
        }[program.derivative]  # fmt: skip
    return jax.shard_map(fn, mesh=mesh, in_specs=inputs, out_specs=results)
