"""What the CPU reduces otherwise than at once: class axes far apart, long or many rows, half precision."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
import reference
from jaxsoft._reductions import FAR, LONG

pytestmark = pytest.mark.optimized

EXTENT = FAR + 16  # elements from one class to the next
rng = np.random.default_rng(0)
START = rng.bit_generator.state


@pytest.fixture(autouse=True)
def numbers():
    """Of each test its own, whichever ran before."""
    rng.bit_generator.state = START


def far(*shape):
    return jnp.asarray(rng.normal(size=shape) * 2)


def value_and_vjp(module, name, logits, cotangent, *axis):
    """In one program, as a user's step has it."""

    @jax.jit
    def run(logits, cotangent):
        value, pullback = jax.vjp(lambda z: getattr(module, name)(z, *axis), logits)
        return value, pullback(cotangent)[0]

    return run(logits, cotangent)


# Around the sizes of the blocks that are folded at once: 1, 2, 16 and 32 classes and a rest.
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 7, 33, 34, 66])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_equals_the_reference(name, classes):
    logits = far(1, classes, EXTENT)
    cotangent = far(1, EXTENT) if name == "logsumexp" else far(1, classes, EXTENT)
    value, gradient = value_and_vjp(jaxsoft, name, logits, cotangent, 1)
    expected, expected_gradient = value_and_vjp(reference, name, logits, cotangent, 1)
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("classes", [2, 3, 21])
def test_cross_entropy_along_a_far_axis(classes):
    logits, labels = far(classes, EXTENT), jnp.asarray(rng.integers(0, classes, EXTENT)).at[::7].set(255)
    options = {"ignore_index": 255, "label_smoothing": 0.1, "z_loss": 0.1}
    weights = far(EXTENT)

    def of_first_and_second_order(logits, axis):
        loss = lambda z: jaxsoft.cross_entropy(z, labels, axis, **options)  # noqa: E731
        each = lambda z: jnp.sum(weights * jaxsoft.cross_entropy(z, labels, axis, reduction="none", **options))  # noqa: E731
        return *jax.value_and_grad(loss)(logits), jax.grad(lambda z: jnp.sum(jnp.sin(jax.grad(each)(z))))(logits)

    value, gradient, second = jax.jit(lambda z: of_first_and_second_order(z, 0))(logits)
    expected = jax.jit(lambda z: of_first_and_second_order(z, -1))(logits.T)
    np.testing.assert_allclose(value, expected[0], rtol=1e-12)
    np.testing.assert_allclose(gradient, expected[1].T, rtol=1e-10, atol=1e-16)
    np.testing.assert_allclose(second, expected[2].T, rtol=1e-9, atol=1e-12)
    assert (gradient[:, ::7] == 0).all()


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


# GPT-2's 50257 = 29 · 1733; an even number; a prime, which cannot be cut into equal runs. Then many rows, and a batch
# of one, which is reduced without that axis.
SHAPES = [(2, 50257), (50257,), (2, LONG + 2), (2, LONG + 3), (LONG + 2, 3), (2, LONG, 2), (LONG + 3, 2), (1, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_runs_equal_the_reference(name, shape):
    logits = far(*shape)
    cotangent = far(*shape[:-1]) if name == "logsumexp" else far(*shape)
    value, gradient = value_and_vjp(jaxsoft, name, logits, cotangent)
    expected, expected_gradient = value_and_vjp(reference, name, logits, cotangent)
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("shape", [(2 * LONG + 4, 3), (1, 4, 5), (1, 1, 2 * LONG)], ids=str)
def test_cross_entropy_of_many_rows_and_of_a_batch_of_one(shape):
    logits, labels = far(*shape), jnp.asarray(rng.integers(0, shape[-1], shape[:-1]))

    def expected(logits):
        return -jnp.take_along_axis(reference.log_softmax(logits), labels[..., None], -1).mean()

    wanted, wanted_gradient = jax.jit(jax.value_and_grad(expected))(logits)
    np.testing.assert_allclose(jaxsoft.cross_entropy(logits, labels), wanted, rtol=1e-12)
    value, gradient = jax.jit(jax.value_and_grad(jaxsoft.cross_entropy))(logits, labels)
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}], ids=["plain", "smooth"])
def test_cross_entropy_of_long_rows(options):
    """Labels at both ends of the first and the last run, and within one; alone and beside the gradient."""
    classes, run = 50257, 1733
    labels = jnp.array([0, run - 1, run, 3 * run + 5, classes - run, classes - 1, -7])
    logits = far(len(labels), classes)

    def loss(logits):
        return jaxsoft.cross_entropy(logits, labels, ignore_index=-7, reduction="sum", **options)

    def expected(logits):
        log_probs = reference.log_softmax(logits)[:-1]
        smoothing, z_loss = options.get("label_smoothing", 0), options.get("z_loss", 0)
        q = (1 - smoothing) * jax.nn.one_hot(labels[:-1], classes) + smoothing / classes
        return -jnp.sum(q * log_probs) + z_loss * jnp.sum(reference.logsumexp(logits[:-1]) ** 2)

    wanted, wanted_gradient = jax.jit(jax.value_and_grad(expected))(logits)
    np.testing.assert_allclose(loss(logits), wanted, rtol=1e-12)
    value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-9, atol=1e-15)


def test_the_tail_of_a_label_that_leads_a_long_row():
    """The other classes' share is all of the loss: with the label's 1 in any sum it would be lost in float32."""
    logits = jnp.full((1, 50257), -30.0, jnp.float32).at[0, 1733].set(0)
    label = jnp.array([1733])
    np.testing.assert_allclose(jaxsoft.cross_entropy(logits, label), 50256 * np.exp(-30.0), rtol=1e-5)
    np.testing.assert_allclose(
        jax.value_and_grad(jaxsoft.cross_entropy)(logits, label)[0], 50256 * np.exp(-30.0), rtol=1e-5
    )


@pytest.mark.parametrize("shape", [(1, 0, 5), (0, 1, 5), (1, 3, 0), (0, 50257), (2 * LONG, 0)], ids=str)
def test_nothing_to_reduce(shape):
    assert jaxsoft.logsumexp(jnp.zeros(shape)).tolist() == np.full(shape[:-1], -np.inf).tolist()
    assert jaxsoft.softmax(jnp.zeros(shape)).shape == shape


def test_no_positions():
    labels = jnp.zeros((1, 0), int)
    assert jaxsoft.cross_entropy(jnp.zeros((1, 0, 50257)), labels, reduction="none").shape == (1, 0)
    assert jaxsoft.cross_entropy(jnp.zeros((1, 0, 50257)), labels) == 0


def test_no_class_axis():
    """A scalar is the one class of its vector."""
    assert (jaxsoft.softmax(2.0, None), jaxsoft.log_softmax(2.0, None), jaxsoft.logsumexp(2.0, None)) == (1, 0, 2)


def test_edges_of_long_rows():
    logits = far(4, 50257).at[0].set(-jnp.inf).at[1, 9000].set(jnp.inf).at[2, 50256].set(jnp.nan)
    np.testing.assert_array_equal(jaxsoft.logsumexp(logits)[:3], [-jnp.inf, jnp.inf, jnp.nan])
    log_probs = jaxsoft.log_softmax(logits)
    assert (log_probs[0] == -jnp.inf).all()
    assert jnp.isnan(log_probs[1:3]).any(-1).all()
    assert jnp.isfinite(log_probs[3]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(3, 50257), (2 * LONG, 3), (1, 4, 5)], ids=str)
def test_runs_of_half_precision(shape, dtype):
    logits, labels = far(*shape).astype(dtype), jnp.asarray(rng.integers(0, shape[-1], shape[:-1]))
    wide = logits.astype(float)

    def expected(logits):
        return -jnp.take_along_axis(reference.log_softmax(logits), labels[..., None], -1)[..., 0]

    def loss_and_gradient(loss, logits):
        losses, pullback = jax.vjp(loss, logits)
        return losses, pullback(jnp.ones_like(losses))[0]

    losses, gradient = jax.jit(
        lambda z: loss_and_gradient(lambda z: jaxsoft.cross_entropy(z, labels, reduction="none"), z)
    )(logits)
    wanted, wanted_gradient = jax.jit(lambda z: loss_and_gradient(expected, z))(wide)
    np.testing.assert_allclose(losses, wanted, rtol=1e-6, atol=1e-7)
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    pairs = [(gradient, wanted_gradient, tiny)]
    # Logarithms are differences of numbers rounded to float32: of sums near 1, and of two terms that may cancel.
    for name, atol in (("softmax", tiny), ("log_softmax", tiny + 1.2e-7), ("logsumexp", 1e-6)):
        pairs.append((getattr(jaxsoft, name)(logits), jax.jit(getattr(reference, name))(wide), atol))
    for found, right, atol in pairs:
        assert found.dtype == dtype
        np.testing.assert_allclose(found.astype(float), right, rtol=float(jnp.finfo(dtype).eps), atol=atol)


@pytest.mark.parametrize("shape", [(4, 3, LONG + 2), (4, LONG + 2, 3)], ids=["long", "many"])
def test_runs_under_vmap_and_on_a_mesh(shape):
    logits = far(*shape)
    expected = reference.logsumexp(logits)
    np.testing.assert_allclose(jax.vmap(jaxsoft.logsumexp)(logits), expected, rtol=1e-12, atol=1e-14)
    across = jax.vmap(jaxsoft.logsumexp, in_axes=2)(logits.transpose(0, 2, 1))
    np.testing.assert_allclose(across, expected.T, rtol=1e-12, atol=1e-14)
    spec = jax.sharding.PartitionSpec("data")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    fn = jax.jit(jax.shard_map(jaxsoft.logsumexp, mesh=mesh, in_specs=spec, out_specs=spec))
    np.testing.assert_allclose(fn(logits), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("spec", [("data",), (None, "data"), (None, None, "data")], ids=str)
@pytest.mark.parametrize("shape", [(4, 2, LONG + 4), (4, LONG + 4, 2)], ids=["long", "many"])
def test_runs_of_explicitly_sharded_arrays(shape, spec):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    logits = far(*shape)
    with jax.set_mesh(mesh):
        placed = jax.device_put(logits, jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
        np.testing.assert_allclose(jaxsoft.logsumexp(placed), reference.logsumexp(logits), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("platform", "cuts"), [("cpu", True), ("cuda", False), ("tpu", False)])
def test_only_the_cpu_cuts_long_rows(platform, cuts):
    """Into 29 runs of 1733, with a barrier behind their reductions; accelerators fuse it all as it is."""
    shapes = jax.ShapeDtypeStruct((4, 50257), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)
    program = jax.export.export(jax.jit(jaxsoft.cross_entropy), platforms=[platform])(*shapes).mlir_module()
    assert [word in program for word in ("4x29x1733x", "optimization_barrier")] == [cuts, cuts]


def compiled(fn, *shapes):
    return jax.jit(fn).lower(*shapes).compile()


@pytest.mark.x32
@pytest.mark.parametrize(
    ("shape", "smoothing", "widened"),
    [((32, 50257), 0.0, 0), ((256, 4096), 0.1, 2), ((256, 4096), None, 0), ((64, 32768), None, 0)],
    ids=str,
)
def test_half_precision_is_stored_widened_no_more_often_than(shape, smoothing, widened):
    """Arrays of float32 as large as the logits: for the loss alone (None: no gradient) and for long rows none.

    Smoothing with its gradient may have two, the exponentials and what the select makes of the logits.
    """
    options = {} if smoothing is None else {"label_smoothing": smoothing}

    def loss(logits, labels):
        return jaxsoft.cross_entropy(logits, labels, **options)

    fn = loss if smoothing is None else jax.value_and_grad(loss)
    program = compiled(fn, jax.ShapeDtypeStruct(shape, jnp.bfloat16), jax.ShapeDtypeStruct(shape[:1], jnp.int32))
    copies = program.memory_analysis().temp_size_in_bytes / (4 * shape[0] * shape[1])
    assert copies < widened + 0.1


@pytest.mark.x32
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((64, 100), -1), ((2, 8, 100), 1), ((16, 1000, 1024), 1), ((2, 3, 21), -1), ((2, 40000), -1)],
    ids=str,
)
def test_no_float_iota_within_a_reduction(shape, axis):
    """XLA's CPU kernel for one leaves some of it unwritten; see `test_float32_of_few_classes_after_fewer`."""
    logits = jax.ShapeDtypeStruct(shape, jnp.float32)
    labels = jax.ShapeDtypeStruct(tuple(np.delete(shape, axis)), jnp.int32)

    def loss(logits, labels):
        return jaxsoft.cross_entropy(logits, labels, axis)

    programs = [compiled(loss, logits, labels), compiled(jax.value_and_grad(loss), logits, labels)]
    if axis == -1:
        features, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*shape[:-1], 8), (8, shape[-1])))
        programs += [
            compiled(jaxsoft.linear_cross_entropy, features, kernel, labels),
            compiled(jax.vmap(loss), logits, labels),
        ]
    for program in programs:
        for computation in program.as_text().split("\n\n"):
            assert not (" reduce(" in computation and re.search(r"f32\[[\d,]*\]\S* iota\(", computation))


@pytest.mark.x32
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "roundings"), [(jnp.float32, 16), (jnp.bfloat16, 2)])
@pytest.mark.parametrize("shape", [(2, 50257), (4, 5)], ids=str)
def test_second_derivatives_of_long_and_short_rows(shape, dtype, roundings, smoothing):
    logits, labels = far(*shape).astype(dtype), jnp.asarray(rng.integers(0, shape[-1], shape[:-1]))
    direction = far(*shape).astype(dtype)

    def product(loss, logits, direction):
        return jax.jit(jax.grad(lambda z, d: jnp.vdot(jax.grad(loss)(z), d)))(logits, direction)

    def expected(logits):
        q = (1 - smoothing) * jax.nn.one_hot(labels, shape[-1]) + smoothing / shape[-1]
        return -jnp.mean(jnp.sum(q * reference.log_softmax(logits), -1))

    found = product(lambda z: jaxsoft.cross_entropy(z, labels, label_smoothing=smoothing), logits, direction)
    with jax.enable_x64(True):
        right = product(expected, logits.astype(float), direction.astype(float))
    assert found.dtype == dtype
    atol = roundings * float(jnp.finfo(dtype).eps) * np.abs(right).max()
    np.testing.assert_allclose(found.astype(jnp.float32), right, rtol=0, atol=atol)
