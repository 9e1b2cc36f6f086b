"""Class axes whose elements lie far apart, where the CPU folds class after class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
import reference
from jaxsoft._reductions import FAR

EXTENT = FAR + 16  # elements from one class to the next
rng = np.random.default_rng(0)


def far(*shape):
    return jnp.asarray(rng.normal(size=shape) * 2)


# Around the sizes of the blocks that are folded at once: 1, 2, 16 and 32 classes and a rest.
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 7, 33, 34, 66])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_equals_the_reference(name, classes):
    logits = far(1, classes, EXTENT)
    value, pullback = jax.vjp(lambda z: getattr(jaxsoft, name)(z, 1), logits)
    expected, reference_pullback = jax.vjp(lambda z: getattr(reference, name)(z, 1), logits)
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-13)
    cotangent = jnp.asarray(rng.normal(size=value.shape))
    np.testing.assert_allclose(pullback(cotangent)[0], reference_pullback(cotangent)[0], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("classes", [2, 3, 21])
def test_cross_entropy_along_a_far_axis(classes):
    logits, labels = far(classes, EXTENT), jnp.asarray(rng.integers(0, classes, EXTENT)).at[::7].set(255)
    options = {"ignore_index": 255, "label_smoothing": 0.1, "z_loss": 0.1}
    along = jax.value_and_grad(lambda z: jaxsoft.cross_entropy(z, labels, 0, **options))(logits)
    last = jax.value_and_grad(lambda z: jaxsoft.cross_entropy(z, labels, **options))(logits.T)
    np.testing.assert_allclose(along[0], last[0], rtol=1e-12)
    np.testing.assert_allclose(along[1], last[1].T, rtol=1e-10, atol=1e-16)
    assert (along[1][:, ::7] == 0).all()

    def slope(z):
        return jnp.sum(
            jnp.sin(jax.grad(lambda z: jaxsoft.cross_entropy(z, labels, 0, reduction="none", **options).sum())(z))
        )

    def slope_last(z):
        return jnp.sum(
            jnp.sin(jax.grad(lambda z: jaxsoft.cross_entropy(z, labels, reduction="none", **options).sum())(z))
        )

    np.testing.assert_allclose(jax.grad(slope)(logits), jax.grad(slope_last)(logits.T).T, rtol=1e-9, atol=1e-12)


def test_edges_of_a_far_axis():
    logits = far(5, EXTENT).at[:, 0].set(-jnp.inf).at[2, 1].set(jnp.inf).at[1, 2].set(jnp.nan).at[0, 3].set(-jnp.inf)
    along, last = jaxsoft.softmax(logits, 0), jaxsoft.softmax(logits.T).T
    np.testing.assert_array_equal(jnp.isnan(along), jnp.isnan(last))
    np.testing.assert_allclose(along[:, 3:], last[:, 3:], rtol=1e-14)
    assert (along[:, 0] == 0).all()
    np.testing.assert_array_equal(jaxsoft.logsumexp(logits, 0)[:2], [-jnp.inf, jnp.inf])


@pytest.mark.parametrize("transform", ["vmap", "shard_map"])
def test_a_far_axis_under(transform):
    logits = far(2, 3, EXTENT)
    if transform == "vmap":
        fn = jax.vmap(lambda z: jaxsoft.softmax(z, 0))
    else:
        spec = jax.sharding.PartitionSpec("data")
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        fn = jax.jit(jax.shard_map(lambda z: jaxsoft.softmax(z, 1), mesh=mesh, in_specs=spec, out_specs=spec))
    np.testing.assert_allclose(fn(logits), reference.softmax(logits, 1), rtol=1e-12)


@pytest.mark.parametrize(("platform", "loops"), [("cpu", True), ("cuda", False), ("tpu", False)])
def test_only_the_cpu_loops(platform, loops):
    fn = jax.jit(jax.value_and_grad(lambda z, y: jaxsoft.cross_entropy(z, y, 1)))
    shapes = jax.ShapeDtypeStruct((1, 21, EXTENT), jnp.float32), jax.ShapeDtypeStruct((1, EXTENT), jnp.int32)
    program = jax.export.export(fn, platforms=[platform])(*shapes).mlir_module()
    assert ("stablehlo.while" in program) == loops
