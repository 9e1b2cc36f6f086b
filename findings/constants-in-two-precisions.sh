#!/usr/bin/env bash
# Can one compiled function be called in float64 mode and outside of it, if it uses a float64 NumPy array?
#
# Guess: yes. JAX traces it again for each mode, and outside of float64 mode the array becomes float32.
# Seen with jax 0.10.2 and 0.12.0.1: the first call works in either mode. A call in the other mode raises
# "Cannot lower jaxpr with verifier errors", as if the array kept the dtype of the first mode. If the array is an argument,
# both calls work.
# Fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/modes.py" <<'PYTHON'
import re

import jax, jax.numpy as jnp, numpy as np

array = np.full(3, 0.2)


def kind(fn, is_double, *makers):
    with jax.enable_x64(is_double):
        try:
            return fn(jnp.ones(3), *(make(array) for make in makers)).dtype
        except ValueError as error:
            return re.search("verifier errors", str(error))[0]


def product(x, other):
    return x * other


for first in (False, True):
    uses = {"constant": (lambda x: x * array,), "argument": (product, np.array)}
    for name, (fn, *makers) in uses.items():
        jax.clear_caches()
        compiled = jax.jit(fn)
        print(f"{name}: {kind(compiled, first, *makers)} then {kind(compiled, not first, *makers)}")
PYTHON
cat >"$folder/expected" <<'TEXT'
constant: float32 then verifier errors
argument: float32 then float64
constant: float64 then verifier errors
argument: float64 then float32
TEXT

check() { # VERSION PYTHON
  "$2" -m venv "$folder/$1"
  "$folder/$1/bin/pip" install -q "jax==$1" "jaxlib==$1" "numpy==2.4.6"
  JAX_PLATFORMS=cpu "$folder/$1/bin/python" "$folder/modes.py" 2>/dev/null | tee "$folder/seen-$1"
  diff "$folder/expected" "$folder/seen-$1"
}

check 0.10.2 python3
newer=${PYTHON312:-python3.12}
if command -v "$newer" >/dev/null; then check 0.12.0.1 "$newer"; fi
echo "as seen"
