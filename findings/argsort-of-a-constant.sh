#!/usr/bin/env bash
# XLA sorts a constant when it compiles, one comparison at a time; for instance labels that a jitted function closes over.
#
# Guess, before it was run: an argsort of 70,000 numbers compiles in the same time whether they are an argument or a
# constant, or folding the constant takes as long as NumPy's argsort, some milliseconds.
# Seen (jax 0.10.2, Python 3.11, CPU, two cores): as an argument it compiles in 0.1 s, as a constant in several seconds, and
# the program that remains has no sort in it. XLA's evaluator of constants calls the comparison once for each pair.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import time

import jax
import jax.numpy as jnp
import numpy as np

labels = np.random.default_rng(0).integers(-1, 50, 70_000).astype(np.int32)


def order(labels):
    return jnp.argsort(labels == -1, stable=True)


def compiled(lowered):
    start = time.perf_counter()
    program = lowered.compile()
    return time.perf_counter() - start, " sort(" in program.as_text()


jax.jit(jnp.sin).lower(1.0).compile()  # the first compilation takes longer
argument, sorts_argument = compiled(jax.jit(order).lower(labels))
constant, sorts_constant = compiled(jax.jit(lambda: order(labels)).lower())
print(f"as an argument compiled in {argument:.2f} s, with a sort in the program: {sorts_argument}")
print(f"as a constant  compiled in {constant:.2f} s, with a sort in the program: {sorts_constant}")
assert sorts_argument
assert not sorts_constant, "the constant is no longer sorted by the compiler"
assert constant > 5 * argument, "and no longer slowly"
PYTHON
