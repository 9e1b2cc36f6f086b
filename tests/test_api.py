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
}

CALLS = {
    "apply_mlp": lambda z: jaxsoft.apply_mlp(jaxsoft.init_mlp(jax.random.key(0), (6, 2)), z),
    "cross_entropy": lambda z: jaxsoft.cross_entropy(z, jnp.array(1)),
    "linear_cross_entropy": lambda z: jaxsoft.linear_cross_entropy(z, jnp.eye(6)[:, :4], jnp.array(1)),
    "entropy": jaxsoft.entropy,
    "kl_divergence": lambda z: jaxsoft.kl_divergence(z, jnp.arange(6.0)),
    "linear_kl_divergence": lambda z: jaxsoft.linear_kl_divergence(z, jnp.eye(6)[:, :4], z[:3], jnp.eye(3, 4)),
    "linear_log_probs": lambda z: jaxsoft.linear_log_probs(z, jnp.eye(6)[:, :4], jnp.array(1)).label,
    "linear_top_k": lambda z: jaxsoft.linear_top_k(z, jnp.eye(6)[:, :4], 2).log_probs,
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
    call, batch = CALLS[name], jnp.linspace(-1, 1, 24).reshape(4, 6)
    one_by_one = jnp.stack([call(row) for row in batch])
    together = jax.jit(jax.vmap(call))(batch)
    assert together.dtype == one_by_one.dtype == jnp.float32
    assert jnp.allclose(together, one_by_one, rtol=1e-6, atol=1e-7)


@pytest.mark.x32
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp", "cross_entropy"])
def test_works_under_shard_map_with_the_batch_over_two_devices(name):
    mesh = jax.make_mesh((2,), ("data",))
    split = PartitionSpec("data")
    logits = jnp.linspace(-1, 1, 24).reshape(4, 6)
    labels = jnp.array([0, 5, 255, 2])

    def gradient(z, y):
        if name == "cross_entropy":
            options = {"ignore_index": 255, "label_smoothing": 0.1, "z_loss": 0.1, "reduction": "sum"}
            return jax.grad(lambda z: jaxsoft.cross_entropy(z, y, **options))(z)
        return jax.grad(lambda z: jnp.sum(getattr(jaxsoft, name)(z) ** 2))(z)

    sharded = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=(split, split), out_specs=split))
    placed = (jax.device_put(a, NamedSharding(mesh, split)) for a in (logits, labels))
    np.testing.assert_allclose(sharded(*placed), gradient(logits, labels), rtol=1e-5, atol=1e-7)


def test_every_function_is_called_above():
    host_side = {"checked", "diagnose_gradient", "init_mlp", "native_kernels", "plan_linear_cross_entropy"}
    assert set(FUNCTIONS) == set(CALLS) | (host_side & set(FUNCTIONS))
