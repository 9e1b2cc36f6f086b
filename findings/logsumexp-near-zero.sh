#!/usr/bin/env bash
# jax.scipy.special.logsumexp is documented as scipy.special.logsumexp, but loses all accuracy near 0, where scipy does not.
#
# Guess, before it was run: both are accurate to the rounding of the value, in float64.
# Seen (jax 0.10.2, scipy 1.17.1, Python 3.11, CPU), logsumexp([0, -40]) in float64, whose value is 4.248e-18:
#     scipy.special.logsumexp       4.248354255291589e-18
#     jax.scipy.special.logsumexp   0.0
#     jax.nn.logsumexp              0.0
# The difference matters: the loss of a confident prediction is a logsumexp near 0. Scipy removes the largest term from the
# sum and uses log1p; JAX takes the logarithm of the whole sum.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 scipy==1.17.1
JAX_PLATFORMS=cpu JAX_ENABLE_X64=1 "$work/venv/bin/python" - <<'PYTHON'
import jax
import numpy as np
import scipy.special

logits = np.array([0.0, -40.0])
found = {
    "scipy.special.logsumexp": float(scipy.special.logsumexp(logits)),
    "jax.scipy.special.logsumexp": float(jax.scipy.special.logsumexp(logits)),
    "jax.nn.logsumexp": float(jax.nn.logsumexp(logits)),
}
for name, value in found.items():
    print(f"{name:30} {value!r}")
scipys, *jaxs = found.values()
assert abs(scipys / np.exp(-40.0) - 1) < 1e-12, "scipy is no longer accurate"
assert jaxs == [0.0, 0.0], "JAX is accurate now"
PYTHON
