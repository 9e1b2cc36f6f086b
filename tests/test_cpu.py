"""The CPU's kernels: each equals the plain function whose program it is, wherever it runs."""

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
from jaxsoft import _cpu, _moments, _softmax, _statistics

pytestmark = [
    pytest.mark.optimized,
    pytest.mark.skipif(not jaxsoft.native_kernels().loaded, reason=str(jaxsoft.native_kernels())),
]

SEAMS = {
    "statistics": _statistics._block_sums,
    "moments": _moments._block_moments,
    "gradient": _statistics._in_new_place,
    "gradient_in_place": _statistics._in_place,
    "softmax": _softmax._probs,
    "log_softmax": _softmax._log_probs,
    "softmax_vjp": _softmax._pulled_back,
    "log_softmax_vjp": _softmax._log_pulled_back,
}
DTYPES = [jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16]
# (outer, classes, inner): each way in which the kernels lay positions and classes in vectors, and cut them.
SHAPES = [
    *[(3, 1000, 1), (2, 3277, 1), (2, 50257, 1), (1, 200_000, 1)],  # long rows
    *[(10_000, 2, 1), (3001, 10, 1), (655, 128, 1), (77, 63, 1), (5, 65, 1), (7, 1, 1)],  # short ones
    *[(1, 21, 1500), (2, 150, 4096), (1, 2, 3611), (1, 5000, 64), (1, 1, 17)],  # classes apart
    *[(2, 10, 1025), (1, 1100, 65), (1, 2048, 129)],  # with a last position by itself
    *[(1, 20_000, 23), (2, 377, 2), (40, 7, 5), (3, 64, 63), (2, 513, 31)],  # and few beside each other
]


@pytest.fixture(autouse=True)
def whatever_the_size(monkeypatch):
    monkeypatch.setattr(_cpu, "_LEAST", 0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def kernel(name, arrays, axes):
    """The program in place of the plain function."""
    run = getattr(_cpu, name)(True, arrays, axes)
    assert run is not None
    return run(arrays, axes)


def plain(name, arrays, axes):
    return SEAMS[name].__wrapped__(arrays, axes)


def draw(rng, shape, dtype, edges=True):
    """Logits in whose vectors one class leads by −60 to 80; in some a NaN, an infinity, a denormal, no class at all."""
    outer, classes, inner = shape
    z = rng.normal(size=shape) * 3
    z[:, rng.integers(classes)] += rng.uniform(-60, 80, (outer, inner))
    if edges and outer * inner >= 6:
        for edge in (np.nan, np.inf, -np.inf, -0.0, 1e-40):
            z[rng.integers(outer), rng.integers(classes), rng.integers(inner)] = edge
        z[rng.integers(outer), :, rng.integers(inner)] = -np.inf
    return jnp.asarray(z, dtype)


def wide(array):
    return None if array is None else jnp.asarray(array, jnp.float64)


def assert_close(found, truth, roundings, scale=0.0, lost=8):
    """Within so many roundings of the truth in the dtype of what was found, or of the `scale` of what was added up."""
    info = jnp.finfo(found.dtype)
    found, truth = np.asarray(found.astype(float)), np.asarray(truth)
    finite = np.isfinite(truth)
    np.testing.assert_array_equal(found[~finite], truth[~finite])
    # Below the smallest normal number results may be 0, and products of two such are.
    allowed = roundings * float(info.eps) / 2 * np.maximum(np.abs(truth), np.nan_to_num(scale)) + lost * float(
        info.tiny
    )
    excess = np.abs(found[finite] - truth[finite]) / np.broadcast_to(allowed, truth.shape)[finite]
    assert not excess.size or excess.max() <= 1, (
        excess.max(),
        found[finite][excess.argmax()],
        truth[finite][excess.argmax()],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_the_plain_functions(shape, dtype, rng):
    axes = (-2,)
    z, g = draw(rng, shape, dtype), jnp.asarray(rng.normal(size=shape), dtype)
    outer, classes, inner = shape
    one = (outer, 1, inner)
    compute = jnp.float64 if dtype == jnp.float64 else jnp.float32
    largest = plain("statistics", (z, None, None), axes)[0]
    # XLA's vector maximum may lose a NaN, which then only the sum of the exponentials has.
    largest += jnp.where(jnp.any(jnp.isnan(z), 1, keepdims=True), jnp.asarray(jnp.nan, compute), 0)
    # The truth is that of the shift as it is rounded, from which on nothing may be lost.
    with np.errstate(invalid="ignore"):
        shifted = wide(z.astype(compute) - largest)

    def both(name, of_logits, *rest):
        """The kernel's results and, in float64, the plain function's: as they stand, where the largest is not finite."""
        found = kernel(name, (z, *of_logits, *rest), axes)
        wide_rest = [a if a is None or a.dtype in (jnp.int32, jnp.bool_) else wide(a) for a in rest]
        right = plain(name, (shifted, *(jnp.zeros(one) for _ in of_logits), *wide_rest), axes)
        edges = plain(name, (z, *of_logits, *rest), axes)
        right = [jnp.where(jnp.isfinite(largest), wide(r), wide(e)) for r, e in zip(right, edges, strict=True)]
        return found, right

    label = jnp.asarray(rng.integers(-2, classes + 2, one), jnp.int32)
    of_all = jnp.asarray(rng.uniform(size=shape) * (rng.uniform(size=shape) < 0.7), compute)
    factor, at_label, share = (jnp.asarray(rng.normal(size=one), compute) for _ in range(3))
    idle = jnp.asarray(rng.uniform(size=one) < 0.2)
    for spread in (None, of_all, of_all[:1, :, :1]):
        for y in (None, label):
            found, right = both("statistics", (), y, spread)
            np.testing.assert_array_equal(found[0], largest)
            assert_close(found[1], right[1], 16)
            if y is not None:
                index = jnp.clip(label, 0, classes - 1)
                logit, tiny = jnp.take_along_axis(z, index, 1).astype(compute), float(jnp.finfo(compute).tiny)
                np.testing.assert_allclose(found[2], logit, rtol=0, atol=tiny)
            if spread is not None:
                assert_close(found[-2], right[-2], 16)
                assert_close(found[-1], jnp.where(jnp.isnan(largest), wide(found[-1]), right[-1]), 16)
            for whole, name in ((idle, "gradient"), (None, "gradient_in_place")):
                of_label, of_spread = None if y is None else at_label, None if spread is None else share
                (found,), (right,) = both(name, (largest,), factor, whole, y, of_label, of_spread, spread)
                assert_close(found, right, 6, 0.0 if spread is None else jnp.abs(right) + wide(jnp.abs(share * spread)))

    found, right = both("moments", ())
    left = jnp.isfinite(largest) & jnp.any(z > -jnp.inf, 1, keepdims=True)
    # Without what leads every other exponential may be 0 below the smallest normal number, in the gap times up to 709.
    assert_close(found[1][left], right[1][left], 16, lost=8 + classes)
    assert_close(found[3][left], right[3][left], 16, lost=709 * classes)
    np.testing.assert_array_equal(found[4][left], jnp.argmax(z, 1, keepdims=True)[left])
    # Elsewhere what is made of them: NaN, −inf, 0, no class.
    compiled, edges = jax.jit(_moments.block_moments, static_argnums=1)(z, 1), _moments.block_moments(z, 1)
    np.testing.assert_array_equal(compiled.statistics.logsumexp[~left], edges.statistics.logsumexp[~left])
    np.testing.assert_array_equal(compiled.entropy[~left], edges.entropy[~left])
    np.testing.assert_array_equal(compiled.lead, edges.lead)

    (probs,), (right,) = both("softmax", ())
    assert_close(probs, right, 16)
    (log_probs, of_kernel, total), (right, _, right_total) = both("log_softmax", ())
    np.testing.assert_array_equal(of_kernel, largest)
    assert_close(total, jnp.maximum(right_total, float(jnp.finfo(compute).eps) / 8), 16)
    assert_close(log_probs, right, 4, 16)  # near 0 a logarithm is right to rounding of 1

    summed = jnp.sum(jnp.abs(wide(g)), 1, keepdims=True)
    (product,), (right,) = both("log_softmax_vjp", (largest,), total, g)
    assert_close(product, right, 16, jnp.abs(wide(g)) + jnp.exp(shifted) / wide(total) * summed)
    (product,), s = kernel("softmax_vjp", (probs, g), axes), wide(probs)
    (right,) = plain("softmax_vjp", (s, wide(g)), axes)
    assert_close(product, right, 16, s * (jnp.abs(wide(g)) + jnp.sum(s * jnp.abs(wide(g)), 1, keepdims=True)))


def everything(z, g):
    """All results of all kernels, of a float32 or narrower z."""
    axes = (-2,)
    (s,), (log_s, largest, total) = kernel("softmax", (z,), axes), kernel("log_softmax", (z,), axes)
    y = jnp.argmax(g, 1, keepdims=True).astype(jnp.int32)
    return (
        s,
        log_s,
        *kernel("statistics", (z, y, g.astype(total.dtype)), axes),
        *kernel("moments", (z,), axes),
        *kernel("gradient", (z, largest, 1 / total, None, y, total, None, None), axes),
        *kernel("softmax_vjp", (s, g), axes),
        *kernel("log_softmax_vjp", (z, largest, total, g), axes),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(4096, 2, 1), (4096, 10, 3), (2048, 1000, 1), (32, 40_000, 1), (1024, 70, 7), (512, 5, 130)], ids=str
)
def test_the_bits_of_a_row_do_not_depend_on_its_batch(shape, dtype, rng):
    z, g = draw(rng, shape, dtype, edges=False), draw(rng, shape, dtype, edges=False)
    whole = everything(z, g)
    for size, start in ((1, 0), (1, 3), (7, shape[0] - 7)):
        part = everything(z[start : start + size], g[start : start + size])
        for few, many in zip(part, whole, strict=True):
            np.testing.assert_array_equal(few, many[start : start + size])


THREADS = """
import os, sys
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[: int(sys.argv[1])])
import hashlib, jax, numpy as np, jaxsoft
digest = hashlib.sha256()
for shape, axis in (((4096, 300), -1), ((3, 200_000), -1), ((2, 21, 40_000), 1), ((200_000, 3), -1)):
    z = np.random.default_rng(0).normal(size=shape).astype(np.float32) * 5
    fn = lambda z: jaxsoft.cross_entropy(z, z.argmax(axis) // 2, axis, label_smoothing=0.1)
    value, gradient = jax.jit(jax.value_and_grad(fn))(z)
    for array in (value, gradient, *map(jax.jit(lambda z: jaxsoft.softmax(z, axis)), (z,))):
        digest.update(np.asarray(array).tobytes())
print(digest.hexdigest())
"""


@pytest.mark.scripts
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


def test_small_arrays_are_left_to_xla(monkeypatch):
    monkeypatch.setattr(_cpu, "_LEAST", _cpu.LEAST)
    assert calls(jaxsoft.softmax, jnp.zeros((150, 3))) == 0
    assert calls(jaxsoft.softmax, jnp.zeros((150, 300))) == 1
    assert calls(jax.vmap(jaxsoft.softmax), jnp.zeros((150, 300))) == 1  # what counts is what is compiled


@pytest.mark.parametrize("axes", [(0, 2), (0, 3)], ids=str)
def test_classes_that_are_not_together_are_left_to_xla(axes, rng):
    logits = jnp.asarray(rng.normal(size=(2, 3, 4, 5)))
    assert calls(lambda z: jaxsoft.softmax(z, axes), logits) == 0
    np.testing.assert_allclose(jaxsoft.softmax(logits, axes), jax.nn.softmax(logits, axes), rtol=1e-13)


def test_a_kernel_takes_no_array_that_it_would_read_beyond():
    """Mixed dtypes and broadcast weights: it looks at neither."""
    probs = jaxsoft.softmax(jnp.zeros((4, 300)))
    assert calls(jaxsoft.softmax_vjp, probs, probs) == 1
    assert calls(jaxsoft.softmax_vjp, probs, probs.astype(jnp.float32)) == 0
    logits, one = jnp.zeros((4, 300), jnp.float32), jnp.zeros((4, 1), jnp.float32)
    for spread, taken in ((logits, True), (logits[:1], True), (logits[:2], False), (one, False)):
        assert (_cpu.statistics(True, (logits, None, spread), (-1,)) is not None) == taken
    wide = logits.astype(float)
    assert _cpu.statistics(True, (logits, None, wide), (-1,)) is None
    assert _cpu.statistics(True, (logits, one, None), (-1,)) is None


def test_a_pullback_can_be_transposed(rng):
    s, g, v = (jnp.asarray(rng.uniform(size=(4, 300))) for _ in range(3))
    (transposed,) = jax.jit(lambda v: jax.linear_transpose(lambda g: jaxsoft.softmax_vjp(s, g), g)(v))(v)
    np.testing.assert_allclose(jnp.vdot(transposed, g), jnp.vdot(v, jaxsoft.softmax_vjp(s, g)), rtol=1e-12)


def test_exported_programs_hold_no_foreign_call():
    exported = jax.export.export(jax.jit(jaxsoft.softmax))(jnp.zeros((150, 300)))
    assert "jaxsoft_" not in exported.mlir_module()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_know_nothing_of_them(platform):
    traced = jax.jit(jax.value_and_grad(jaxsoft.cross_entropy)).trace(jnp.zeros((150, 300)), jnp.zeros(150, int))
    assert "jaxsoft_" not in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("in_axes", [(0, 0), (None, 0), (0, None), (2, 1)], ids=str)
def test_under_vmap(in_axes, rng):
    shapes = [(5, 4, 7) if axis != 2 else (4, 7, 5) for axis in in_axes[:1]] + [(5, 4) if in_axes[1] == 0 else (4, 5)]
    z = jnp.asarray(rng.normal(size=(4, 7) if in_axes[0] is None else shapes[0]))
    y = jnp.asarray(rng.integers(0, 7, 4 if in_axes[1] is None else shapes[1]))
    weights = jnp.asarray(rng.uniform(size=(5, 4)))

    def of(cross_entropy):
        def total(z):
            return jnp.sum(weights * jax.vmap(cross_entropy, in_axes)(z, y))

        return jax.jit(jax.value_and_grad(total))

    def naive(z, y):
        return -jnp.take_along_axis(reference.log_softmax(z), y[:, None], -1)[:, 0]

    assert calls(jax.vmap(losses, in_axes), z, y) == 1
    for found, expected in zip(of(losses)(z), of(naive)(z), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_under_second_derivatives(rng):
    z, y = jnp.asarray(rng.normal(size=(3, 8))), jnp.asarray([1, 7, 2])
    found = jax.hessian(lambda z: jaxsoft.cross_entropy(z, y, reduction="sum"))(z)
    expected = jax.vmap(jaxsoft.softmax_jacobian)(reference.softmax(z))
    for row in range(3):
        np.testing.assert_allclose(found[row, :, row], expected[row], rtol=1e-12, atol=1e-15)


def mesh(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("axis", [1, 2])
def test_sharded_arrays_are_left_to_xla_which_gathers_none(axis, kind, rng):
    """A foreign call would make it gather them.

    One that tells XLA how to lay it has to know the devices: programs for abstract or several meshes would not compile.
    """
    shape = (8, 6, 10)
    z = jnp.asarray(rng.normal(size=shape))
    y = jnp.asarray(rng.integers(0, shape[axis], tuple(np.delete(shape, axis))))

    def loss(z, y):
        return jnp.sum(jnp.cos(losses(z, y, axis))) + jnp.sum(jnp.sin(jaxsoft.softmax(z, axis)))

    devices = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    spec = [P("data", None, "model"), P("data", "model")][axis - 1]
    step = jax.jit(jax.value_and_grad(loss))
    with jax.set_mesh(devices):
        placed, labels = jax.device_put(z, spec), jax.device_put(y, P("data", "model"))
        assert calls(step, placed, labels) == 0
        assert "all-gather" not in step.lower(placed, labels).compile().as_text()
        value, gradient = step(placed, labels)
        assert gradient.sharding.is_equivalent_to(placed.sharding, 3)
    assert calls(step, z, y) == 4
    expected = step(z, y)
    np.testing.assert_allclose(value, expected[0], rtol=1e-13)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("names", [{"data", "model"}, {"data"}], ids=["all", "some"])
def test_inside_shard_map(names, rng):
    z = jnp.asarray(rng.normal(size=(8, 10)))
    fn = jax.shard_map(
        jaxsoft.softmax, mesh=mesh(AxisType.Auto), in_specs=P("data"), out_specs=P("data"), axis_names=names
    )
    assert calls(fn, z) == (1 if len(names) == 2 else 0)  # XLA has yet to lay what a map does not
    np.testing.assert_allclose(jax.jit(fn)(z), reference.softmax(z), rtol=1e-13)


# Whether they are there.


REFUSED = """
import jax, jax.numpy as jnp
def refuse(*arguments, **options):
    raise ValueError("its version is newer")
jax.ffi.register_ffi_target = refuse
import jaxsoft
print(jaxsoft.softmax(jnp.zeros((100, 200)))[0, 0], jaxsoft.native_kernels())
"""


def printed(code, **environment):
    run = [sys.executable, "-c", code]
    result = subprocess.run(run, capture_output=True, text=True, env=os.environ | environment, check=False)
    return result.stdout or result.stderr.splitlines()[-1]


@pytest.mark.scripts
def test_the_switch():
    ask = "import jaxsoft; print(jaxsoft.native_kernels())"
    assert printed(ask, JAXSOFT_NATIVE="0") == "native CPU kernels: none, turned off by JAXSOFT_NATIVE=0\n"
    assert printed(ask, JAXSOFT_NATIVE="1").startswith("native CPU kernels: loaded from ")
    no_library = printed(ask, JAXSOFT_NATIVE=__file__)
    assert no_library.startswith(f"native CPU kernels: none, {__file__} was refused: ")
    expected = "ValueError: JAXSOFT_NATIVE: expected 0, 1, always or the file of a library, got 'yes'"
    assert printed(ask, JAXSOFT_NATIVE="yes") == expected


@pytest.mark.scripts
def test_a_library_that_is_refused_leaves_all_to_xla():
    found = printed(REFUSED, JAXSOFT_NATIVE="1")
    assert found.startswith("0.005 native CPU kernels: none, ")
    assert found.endswith("was refused: its version is newer\n")
