"""The public interface itself."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxsoft

FUNCTIONS = {name: fn for name in jaxsoft.__all__ if inspect.isfunction(fn := getattr(jaxsoft, name))}
# What may be passed by position after the first argument: arrays, and the axis and mask of jax.nn's names.
POSITIONAL = {
    "k",
    "kernel",
    "labels",
    "teacher_bias",
    "teacher_features",
    "teacher_kernel",
    "teacher_logits",
    "targets",
    "bias",
    "classes",
    "dtype",
    "cotangent",
    "features",
    "gradient",
    "axis",
    "where",
    "sizes",
    "value",
}

BIAS = np.array([0.5, -1], np.float32)
CALLS = {
    "apply_mlp": lambda z: jaxsoft.apply_mlp([{"kernel": np.eye(6, 2, dtype=np.float32), "bias": BIAS}], z),
    "cross_entropy": lambda z: jaxsoft.cross_entropy(z, np.array(1)),
    "linear_cross_entropy": lambda z: jaxsoft.linear_cross_entropy(z, np.eye(6, dtype=np.float32)[:, :4], np.array(1)),
    "entropy": jaxsoft.entropy,
    "kl_divergence": lambda z: jaxsoft.kl_divergence(z, np.arange(6.0, dtype=np.float32)),
    "linear_kl_divergence": lambda z: jaxsoft.linear_kl_divergence(
        z, np.eye(6, dtype=np.float32)[:, :4], z[:3], np.eye(3, 4, dtype=np.float32)
    ),
    "linear_log_probs": lambda z: (
        jaxsoft.linear_log_probs(z, np.eye(6, dtype=np.float32)[:, :4], np.array(1)).label_log_prob
    ),
    "linear_top_k": lambda z: jaxsoft.linear_top_k(z, np.eye(6, dtype=np.float32)[:, :4], 2).log_probs,
    "log_softmax": jaxsoft.log_softmax,
    "logsumexp": jaxsoft.logsumexp,
    "softmax": jaxsoft.softmax,
    "softmax_jacobian": jaxsoft.softmax_jacobian,
    "softmax_vjp": lambda z: jaxsoft.softmax_vjp(z, z),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_states_everything(name):
    doc = inspect.getdoc(FUNCTIONS[name]) or ""
    arguments = ("Args:",) if inspect.signature(FUNCTIONS[name]).parameters else ()
    for part in (*arguments, "Returns:", "Raises:", "Example:", ">>> "):
        assert part in doc, f"{name} has no {part!r}"
    assert doc.split("\n")[0].endswith(".")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_are_keyword_only(name):
    after_first = list(inspect.signature(FUNCTIONS[name]).parameters.values())[1:]
    by_position = {p.name for p in after_first if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert by_position <= POSITIONAL


@pytest.mark.x32
@pytest.mark.parametrize("name", CALLS)
def test_works_under_jit_and_vmap_in_default_mode(name):
    call, batch = CALLS[name], np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)
    together, one_by_one = jax.jit(lambda batch: (jax.vmap(call)(batch), jax.lax.map(call, batch)))(batch)
    assert together.dtype == one_by_one.dtype == jnp.float32
    assert np.allclose(together, one_by_one, rtol=1e-6, atol=1e-7)


@pytest.mark.x32
def test_works_under_shard_map_with_the_batch_over_two_devices():
    mesh = jax.make_mesh((2,), ("data",))
    split = PartitionSpec("data")
    logits = np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)
    labels = np.array([0, 5, 255, 2])

    def gradients(z, y):
        options = {"ignore_index": 255, "label_smoothing": 0.1, "z_loss": 0.1, "reduction": "sum"}
        normalisers = [jaxsoft.softmax, jaxsoft.log_softmax, jaxsoft.logsumexp]
        of_squares = [jax.grad(lambda z, fn=fn: jnp.sum(fn(z) ** 2))(z) for fn in normalisers]
        return *of_squares, jax.grad(lambda z: jaxsoft.cross_entropy(z, y, **options))(z)

    sharded = jax.jit(jax.shard_map(gradients, mesh=mesh, in_specs=(split, split), out_specs=split))
    placed = (jax.device_put(a, NamedSharding(mesh, split)) for a in (logits, labels))
    for found, expected in zip(sharded(*placed), jax.jit(gradients)(logits, labels), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_every_function_is_called_above():
    host_side = {"checked", "diagnose_gradient", "diagnose_loss", "init_mlp", "native_kernels"}
    host_side |= {"plan_linear_cross_entropy"}
    assert set(FUNCTIONS) == set(CALLS) | (host_side & set(FUNCTIONS))
