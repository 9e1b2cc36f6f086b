"""The CPU kernels as a user sees them: when they run, what they replace, and how to turn them off."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxsoft
import reference

pytestmark = pytest.mark.skipif(not jaxsoft.native_kernels().loaded, reason=str(jaxsoft.native_kernels()))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


THREADS = """
import os, sys
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[: int(sys.argv[1])])
import hashlib, jax, numpy as np, jaxsoft

def results(z, axis):
    fn = lambda z: jaxsoft.cross_entropy(z, z.argmax(axis) // 2, axis, label_smoothing=0.1)
    return *jax.value_and_grad(fn)(z), jaxsoft.softmax(z, axis)

digest, rng = hashlib.sha256(), np.random.default_rng(0)
axes = {(4096, 300): -1, (3, 200_000): -1, (2, 21, 40_000): 1, (200_000, 3): -1}
logits = [rng.normal(size=shape).astype(np.float32) * 5 for shape in axes]
for array in jax.tree.leaves(jax.jit(lambda logits: [*map(results, logits, axes.values())])(logits)):
    digest.update(np.asarray(array).tobytes())
print(digest.hexdigest())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are limited by Linux's affinity")
def test_the_bits_of_a_result_do_not_depend_on_threads():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core has one thread")
    runs = [subprocess.run([sys.executable, "-c", THREADS, n], capture_output=True, text=True) for n in "12"]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr + runs[1].stderr
    assert runs[0].stdout == runs[1].stdout


# Where they run.


def calls(fn, *arrays):
    return jax.jit(fn).lower(*arrays).as_text().count("custom_call @jaxsoft_")


def losses(z, y, axis=-1):
    return jaxsoft.cross_entropy(z, y, axis, reduction="none")


def test_arrays_of_any_size_take_one_kernel():
    for size in ((), (150,), (2, 3, 5)):
        z = np.zeros((*size, 3))
        assert calls(jaxsoft.softmax, z) == 1
        assert calls(jax.vmap(jaxsoft.softmax), z[None]) == 1
    assert calls(jaxsoft.softmax, np.zeros((0, 3))) == 0


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"ignore_index": 0}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_a_loss_with_its_gradient_is_one_kernel(dtype, options):
    """Half precision has two kernels, because a gradient computed before its cotangent would be rounded twice."""
    z, y = jnp.zeros((150, 300), dtype), np.zeros(150, int)

    def kernels(reduction):
        loss = functools.partial(jaxsoft.cross_entropy, targets=y, reduction=reduction, **options)
        text = jax.jit(lambda z: jax.vjp(loss, z)[1](jnp.ones_like(loss(z)))).lower(z).as_text()
        return {name for name in ("statistics", "gradient", "loss") if f"custom_call @jaxsoft_{name}(" in text}

    two = {"statistics", "gradient"}
    assert kernels("none") == two
    for reduction in ("mean", "sum"):
        assert kernels(reduction) == ({"loss"} if dtype in ("float32", "float64") else two)


@pytest.mark.parametrize("sizes", [(1, 7), pytest.param((2, 3, 4, 5, 6), marks=pytest.mark.exhaustive)], ids=str)
@pytest.mark.parametrize("shape", [(4096, 7), (4096, 100), (300, 3000), (40, 21, 130), (200, 5, 6)], ids=str)
def test_the_bits_of_a_row_do_not_depend_on_its_batch(shape, sizes, rng):
    """Alone, in small batches, and in the full batch: every dense function and its gradient."""
    axis = 1
    z = rng.normal(size=shape).astype(np.float32) * 5
    y = rng.integers(0, shape[axis], shape[:axis] + shape[axis + 1 :])

    def results(z, y):
        fns = (jaxsoft.softmax, jaxsoft.log_softmax, jaxsoft.logsumexp, jaxsoft.entropy)
        each = lambda z: jaxsoft.cross_entropy(z, y, axis, label_smoothing=0.1, reduction="none")  # noqa: E731
        total = lambda z: jaxsoft.cross_entropy(z, y, axis, z_loss=0.1, reduction="sum")  # noqa: E731
        one = lambda fn: jax.vjp(lambda z: fn(z, axis), z)  # noqa: E731
        pulled = [pull(jnp.cos(value)) for value, pull in map(one, fns)]
        return (
            [fn(z, axis) for fn in fns],
            pulled,
            jax.vjp(each, z)[1](jnp.ones(y.shape, z.dtype)),
            each(z),
            jax.grad(total)(z),
        )

    whole = jax.tree.leaves(jax.jit(results)(z, y))
    for size in sizes:
        rows = slice(-size, None)
        for few, many in zip(jax.tree.leaves(jax.jit(results)(z[rows], y[rows])), whole, strict=True):
            np.testing.assert_array_equal(few, np.asarray(many)[rows])


@pytest.mark.parametrize("axes", [(0, 2), (0, 3)], ids=str)
def test_classes_that_are_not_together_are_left_to_xla(axes, rng):
    logits = rng.normal(size=(4, 16, 8, 20))
    assert calls(lambda z: jaxsoft.softmax(z, axes), logits) == 0
    probs = jax.jit(lambda z: jaxsoft.softmax(z, axes))(logits)
    exponentials = np.exp(logits)
    np.testing.assert_allclose(probs, exponentials / exponentials.sum(axes, keepdims=True), rtol=1e-13)


def test_mixed_dtypes_are_left_to_xla():
    probs = np.full((32, 300), 1 / 300)
    assert calls(jaxsoft.softmax_vjp, probs, probs) == 1
    assert calls(jaxsoft.softmax_vjp, probs, probs.astype(np.float32)) == 0


def test_a_pullback_can_be_transposed(rng):
    s, g, v = rng.uniform(size=(3, 32, 300))

    @jax.jit
    def both(g, v):
        pull = functools.partial(jaxsoft.softmax_vjp, s)
        return pull(g), *jax.linear_transpose(pull, g)(v)

    pulled, transposed = both(g, v)
    np.testing.assert_allclose(np.vdot(transposed, g), np.vdot(v, pulled), rtol=1e-12)


def test_exported_programs_hold_no_foreign_call():
    exported = jax.export.export(jax.jit(jaxsoft.softmax))(np.zeros((150, 300)))
    assert "jaxsoft_" not in exported.mlir_module()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_programs_for_accelerators_contain_no_cpu_kernel(platform):
    traced = jax.jit(jax.value_and_grad(jaxsoft.cross_entropy)).trace(np.zeros((150, 300)), np.zeros(150, int))
    assert "jaxsoft_" not in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("in_axes", [(0, 0), (None, 0), (0, None), (2, 1)], ids=str)
def test_under_vmap(in_axes, rng):
    """Five examples of four positions, or arrays that all examples share."""
    of_z, of_y = in_axes
    z = rng.normal(size={None: (4, 420), 0: (5, 4, 420), 2: (4, 420, 5)}[of_z])
    y = rng.integers(0, 420, {None: 4, 0: (5, 4), 1: (4, 5)}[of_y])
    weights = rng.uniform(size=(5, 4))

    def naive(z, y):
        return reference.losses(z, jax.nn.one_hot(y, 420))

    def of(cross_entropy):
        return jax.value_and_grad(lambda z: jnp.sum(weights * jax.vmap(cross_entropy, in_axes)(z, y)))

    assert calls(jax.vmap(losses, in_axes), z, y) == 1
    assert calls(of(losses), z) == 2
    found, expected = jax.jit(lambda z: (of(losses)(z), of(naive)(z)))(z)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), found, expected)


@pytest.mark.optimized  # what is compiled is looked at
@pytest.mark.parametrize(
    ("axis", "kind"), [(1, AxisType.Auto), (1, AxisType.Explicit), (2, AxisType.Auto), (2, AxisType.Explicit)]
)
def test_sharded_arrays_are_left_to_xla_without_gathering(axis, kind, rng):
    """A foreign call would make it gather them.

    One that tells XLA how to lay it has to know the devices: programs for abstract or several meshes would not compile.
    """
    shape = (8, 24, 48)
    z, y = rng.normal(size=shape), rng.integers(0, shape[axis], tuple(np.delete(shape, axis)))

    def loss(z, y):
        return jnp.sum(jnp.cos(losses(z, y, axis))) + jnp.sum(jnp.sin(jaxsoft.softmax(z, axis)))

    spec = [P("data", None, "model"), P("data", "model")][axis - 1]
    step = jax.jit(jax.value_and_grad(loss))
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))):
        placed, labels = jax.device_put(z, spec), jax.device_put(y, P("data", "model"))
        lowered = step.lower(placed, labels)
        assert "custom_call @jaxsoft_" not in lowered.as_text()
        compiled = lowered.compile()
        assert "all-gather" not in compiled.as_text()
        value, gradient = compiled(placed, labels)
        assert gradient.sharding.is_equivalent_to(placed.sharding, 3)
    assert calls(step, z, y) == 4
    expected = step(z, y)
    np.testing.assert_allclose(value, expected[0], rtol=1e-13)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("names", [{"data", "model"}, {"data"}], ids=["all", "some"])
def test_inside_shard_map(names, rng):
    z = rng.normal(size=(8, 4100))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    fn = jax.shard_map(jaxsoft.softmax, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names=names)
    assert calls(fn, z) == (1 if len(names) == 2 else 0)  # XLA must still shard the axes that are not manual
    exponentials = np.exp(z)
    np.testing.assert_allclose(jax.jit(fn)(z), exponentials / exponentials.sum(1, keepdims=True), rtol=1e-13)


# Whether kernels are loaded. The switch is read when jaxsoft is imported, so each test imports it again.

SWITCHED = """
import os, sys
import jax, numpy as np

def imported(switch):
    for name in [name for name in sys.modules if name.split(".")[0] == "jaxsoft"]:
        del sys.modules[name]
    os.environ["JAXSOFT_NATIVE"] = switch
    import jaxsoft
    return jaxsoft

def calls(jaxsoft):
    return jax.jit(jaxsoft.softmax).lower(np.zeros((100, 200))).as_text().count("custom_call @jaxsoft_")

def refuse(*arguments, **options):
    raise ValueError("its version is newer")

for switch in sys.argv[1:]:
    try:
        print(imported(switch).native_kernels(), calls(imported(switch)))
    except ValueError as error:
        print("ValueError:", error)
jax.ffi.register_ffi_target = refuse
jaxsoft = imported("1")
print(jaxsoft.softmax(np.zeros((100, 200)))[0, 0], jaxsoft.native_kernels())
"""


def test_the_environment_variable_and_a_refused_library():
    switches = "0", "1", __file__, "yes"
    run = subprocess.run([sys.executable, "-c", SWITCHED, *switches], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    off, on, no_library, neither, refused = run.stdout.splitlines()
    assert off == "native CPU kernels: none, turned off by JAXSOFT_NATIVE=0 0"
    assert on.startswith("native CPU kernels: loaded from ")
    assert on.endswith(" 1")
    assert no_library.startswith(f"native CPU kernels: none, {__file__} was refused: ")
    assert no_library.endswith(" 0")
    assert neither == "ValueError: JAXSOFT_NATIVE: expected 0, 1 or the file of a library, got 'yes'"
    assert refused.startswith("0.005 native CPU kernels: none, ")  # all is left to XLA
    assert refused.endswith("was refused: its version is newer")
