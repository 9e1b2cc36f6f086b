#!/usr/bin/env bash
# Is the sum of one array the same number, whatever the number of cores that a process may use?
#
# Guess: yes, and so is the sum of each column. Seen with jax 0.10.2 on Linux x86-64: the sum of all 600,000 float32 numbers
# of a (200000, 3) array has different last bits on one core and on two, but the sum of a column is the same; with 0.12.0.1
# both are the same. Needs two cores. Fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/sums.py" <<'PYTHON'
import os, sys

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
import jax, jax.numpy as jnp, numpy as np

z = np.random.default_rng(0).normal(size=(200_000, 3)).astype(np.float32)
total = jax.jit(jnp.sum)
print("all", np.asarray(total(z)).tobytes().hex(), "column", np.asarray(total(z[:, 0])).tobytes().hex())
PYTHON

sums() { # VERSION PYTHON: on one core and on two
  "$2" -m venv "$folder/$1"
  "$folder/$1/bin/pip" install -q "jax==$1" "jaxlib==$1" "numpy==2.4.6"
  for cores in 1 2; do JAX_PLATFORMS=cpu "$folder/$1/bin/python" "$folder/sums.py" "$cores"; done
}

newer=${PYTHON312:-python3.12}
sums 0.10.2 python3 >"$folder/old"
cat "$folder/old"
[ "$(cut -d' ' -f2 "$folder/old" | sort -u | wc -l)" = 2 ] # all: two numbers
[ "$(cut -d' ' -f4 "$folder/old" | sort -u | wc -l)" = 1 ] # a column: one
if command -v "$newer" >/dev/null; then
  sums 0.12.0.1 "$newer" >"$folder/new"
  cat "$folder/new"
  [ "$(cut -d' ' -f2 "$folder/new" | sort -u | wc -l)" = 1 ]
fi
echo "as seen"
