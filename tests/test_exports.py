"""Stored programs: by `jax.export` with jaxsoft's types as arguments and results, and compiled ones."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import jaxsoft
from jaxsoft import SparseTargets, checked, cross_entropy, linear_cross_entropy, linear_log_probs, linear_top_k

rng = np.random.default_rng(0)
X, W = rng.normal(size=(6, 3)), rng.normal(size=(3, 5))
LABELS = rng.integers(0, 5, 6)


@pytest.mark.parametrize("outside", ["tail", pytest.param("renormalise", marks=pytest.mark.exhaustive)])
def test_jaxsoft_s_types_as_arguments_and_results_of_a_stored_program(outside):
    def teach(x, w, labels):
        top = linear_top_k(x, w, 2)
        return top, linear_log_probs(x, w, labels, entropy=True), top.as_targets(outside)

    def learn(x, w, targets, top):
        return linear_cross_entropy(x, w, targets) + cross_entropy(x @ w, targets) + top.logsumexp.sum()

    def stored(fn, *args):
        exported = jax.export.export(jax.jit(fn))(*args)
        return jax.export.deserialize(exported.serialize(vjp_order=1)).call

    # As NumPy's arrays: of those that an exported program returns jax 0.10.2 exports no gradient.
    taught = jax.tree.map(np.asarray, stored(teach, X, W, LABELS)(X, W, LABELS))
    expected = jax.jit(teach)(X, W, LABELS)
    assert jax.tree.structure(taught) == jax.tree.structure(expected)
    assert isinstance(taught[2], SparseTargets)
    assert taught[2].outside == outside
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), taught, expected)
    top, _, targets = taught
    learnt = stored(learn, X, W, targets, top)
    value, gradient = jax.jit(jax.value_and_grad(learn, 1))(X, W, targets, top)
    np.testing.assert_allclose(learnt(X, W, targets, top), value, rtol=1e-12)
    np.testing.assert_allclose(jax.grad(learnt, 1)(X, W, targets, top), gradient, rtol=1e-10, atol=1e-14)


def test_types_without_labels_and_entropy():
    exported = jax.export.export(jax.jit(lambda x, w: linear_log_probs(x, w, LABELS)))(X, W)
    found = jax.export.deserialize(exported.serialize()).call(X, W)
    assert found.entropy is None
    np.testing.assert_allclose(found.label_log_prob, linear_log_probs(X, W, LABELS).label_log_prob, rtol=1e-12)


def fresh(program, *args):
    """The output of a program in a separate process."""
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, env=os.environ.copy())
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_starts_no_backend():
    assert fresh("import jaxsoft; from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())") == [
        "False"
    ]


def test_a_compiled_program_with_kernels_runs_in_another_process_once_they_are_registered(tmp_path):
    if not jaxsoft.native_kernels().loaded:
        pytest.skip("without kernels a compiled program calls none")
    stored = tmp_path / "program"
    store = """
import pickle, sys
import jax, jax.numpy as jnp
from jax.experimental.serialize_executable import serialize
from jaxsoft import softmax
compiled = jax.jit(softmax).lower(jnp.zeros((150, 300))).compile()
pickle.dump(serialize(compiled), open(sys.argv[1], "wb"))
"""
    load = """
import pickle, sys
import jax.numpy as jnp
from jax.experimental.serialize_executable import deserialize_and_load
from jaxsoft import native_kernels
assert native_kernels().loaded
program = deserialize_and_load(*pickle.load(open(sys.argv[1], "rb")))
print(float(program(jnp.zeros((150, 300))).sum().round()))
"""
    fresh(store, str(stored))
    assert fresh(load, str(stored)) == ["150.0"]


@pytest.mark.x32
def test_a_flax_module_is_checked_inside_its_jit_as_a_state():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.head = nnx.Linear(3, 4, rngs=rngs)

    graph, state = nnx.split(Network(nnx.Rngs(0)))
    loss = checked(jax.jit(lambda state, x, labels: cross_entropy(nnx.merge(graph, state).head(x), labels)))
    assert np.isfinite(loss(state, np.ones((2, 3), np.float32), np.array([0, 1])))
    with pytest.raises(ValueError, match=r"targets\[1\] is 9"):
        loss(state, np.ones((2, 3), np.float32), np.array([0, 9]))
