#!/usr/bin/env bash
# jnp.put_along_axis cannot be exported with a symbolic batch, where jnp.take_along_axis and .at[].set can.
#
# Guess, before it was run: all three work, since each is one gather or scatter and an iota over the batch.
# Seen (jax 0.10.2, Python 3.11), jax.export with arguments of shapes (b, 7) and (b, 2):
#     jnp.take_along_axis   exported
#     array.at[].set        exported
#     jnp.put_along_axis    TypeError: '_DimExpr' object cannot be interpreted as an integer
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax import export, lax


def by_index(array, classes):
    rows = lax.broadcasted_iota(classes.dtype, classes.shape, 0)
    return array.at[rows, classes].set(0.0)


functions = {
    "jnp.take_along_axis": lambda array, classes: jnp.take_along_axis(array, classes, 1),
    "array.at[].set": by_index,
    "jnp.put_along_axis": lambda array, classes: jnp.put_along_axis(array, classes, 0.0, 1, inplace=False),
}
(batch,) = export.symbolic_shape("b")
arguments = jax.ShapeDtypeStruct((batch, 7), jnp.float32), jax.ShapeDtypeStruct((batch, 2), jnp.int32)
found = {}
for name, function in functions.items():
    try:
        export.export(jax.jit(function))(*arguments)
        found[name] = "exported"
    except TypeError as error:
        found[name] = f"TypeError: {error}"
    print(f"{name:20} {found[name]}")
assert list(found.values())[:2] == ["exported", "exported"]
assert found["jnp.put_along_axis"] == "TypeError: '_DimExpr' object cannot be interpreted as an integer", "it is exported now"
PYTHON
