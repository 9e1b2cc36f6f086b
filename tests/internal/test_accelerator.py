"""The program of GPUs and TPUs: what a CPU can tell of it. What XLA makes of it there is counted where it is compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxsoft
from jaxsoft import _accelerator, _statistics, _tiles
from jaxsoft._dtypes import compute_dtype
from jaxsoft._losses import LOSSES
from jaxsoft._platform import on
from jaxsoft._targets import Targets

MARGINS = (-60.0, -20, -5, -1, -0.1, 0, 0.1, 1, 5, 10, 17, 30, 60, 80)


def programs(logits, label, spread, axes):
    """The sums of the accelerators' program and those of the plain formula, both on this machine."""
    axes = tuple(axis % logits.ndim - logits.ndim for axis in axes)
    arrays = tuple(None if a is None else jnp.asarray(a) for a in (logits, label, spread))
    return _accelerator._block_sums(arrays, axes), _statistics._block_sums(arrays, axes)


def assert_same(actual, expected, rtol):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(one, other, rtol=rtol)


@pytest.mark.parametrize("targets", ["none", "label", "smoothing", "distribution"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [((7,), (0,)), ((1, 1), (1,)), ((5, 33), (1,)), ((33, 5), (0,)), ((2, 9, 3, 4), (1,)), ((3, 4, 5), (0, 2))],
    ids=str,
)
def test_it_is_the_plain_formula(shape, axes, dtype, targets):
    generator = np.random.default_rng(sum(shape))
    logits = jnp.asarray(generator.normal(size=shape) * 9 + 40, dtype)
    compute = compute_dtype(jnp.dtype(dtype))
    label = spread = None
    if targets in ("label", "smoothing") and len(axes) == 1:  # a label has one class axis
        positions = [1 if n == axes[0] else size for n, size in enumerate(shape)]
        label = jnp.asarray(generator.integers(-2, shape[axes[0]] + 2, positions), jnp.int32)  # outside a shard too
    if targets == "smoothing" and len(axes) == 1:
        spread = jnp.full([size if n == axes[0] else 1 for n, size in enumerate(shape)], 0.1 / shape[axes[0]], compute)
    if targets == "distribution":
        spread = jnp.asarray(generator.random(shape) * (generator.random(shape) > 0.3), compute)
    assert_same(*programs(logits, label, spread, axes), rtol=1e-13 if dtype == "float64" else 1e-5)


EDGES = np.array(
    [
        [np.nan, 1.0, 2.0, 0.5],
        [np.inf, 1.0, 2.0, -np.inf],
        [1.0, np.inf, np.inf, 0.0],
        [-np.inf, -np.inf, -np.inf, -np.inf],
        [-np.inf, 3.0, -np.inf, 2.0],
        [2.0, -np.inf, -np.inf, -np.inf],
        [-1e9, 1e9, 0.0, 1e9],
        [0.0, -0.0, 0.0, -0.0],
        [200.0, 0.0, -200.0, 199.5],
        [-104.2, -104.7, -1e4, -1e4],
    ]
)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("label", [None, 0, 1])
def test_edges(dtype, label):
    lowest, highest = (float(limit) for limit in (jnp.finfo(dtype).min, jnp.finfo(dtype).max))
    logits = jnp.asarray(np.where(np.isfinite(EDGES), np.clip(EDGES, lowest, highest), EDGES), dtype)
    logits = jnp.concatenate([logits, jnp.full((1, 4), jnp.finfo(dtype).min), jnp.full((1, 4), jnp.finfo(dtype).max)])
    labels = None if label is None else jnp.full((len(logits), 1), label, jnp.int32)
    actual, expected = programs(logits, labels, None, (1,))
    if label == 0:  # a lone +inf at the label: both losses are NaN, whatever the others' sum
        actual, expected = (
            [a.at[1].set(0) if n == 1 else a for n, a in enumerate(sums)] for sums in (actual, expected)
        )
    assert_same(actual, expected, rtol=1e-6)


def test_a_class_without_weight_costs_nothing_and_one_with_weight_at_minus_infinity_everything():
    logits = jnp.array([[-jnp.inf, 1.0, 3.0], [-jnp.inf, 3.0, 1.0], [-jnp.inf, -jnp.inf, -jnp.inf]])
    spread = jnp.array([[0.0, 0.5, 0.5], [0.2, 0.4, 0.4], [0.0, 0.0, 0.0]])
    assert_same(*programs(logits, None, spread, (1,)), rtol=1e-13)


@pytest.mark.x32
@pytest.mark.parametrize("classes", [2, 21, 1000, 4096])
@pytest.mark.parametrize("order", ["random", "ascending", "descending", "equal"])
def test_the_loss_keeps_its_digits_at_every_margin(order, classes):
    """Each at 1e-5, summed here in sequence: no accelerator takes that many turns for so few classes."""
    generator = np.random.default_rng(classes)
    rows = {
        "random": generator.normal(size=(len(MARGINS), classes)),
        "ascending": np.linspace(-1, 0, classes) * np.ones((len(MARGINS), 1)),
        "descending": np.linspace(0, -30, classes) * np.ones((len(MARGINS), 1)),
        "equal": np.full((len(MARGINS), classes), 0.3),
    }
    logits = rows[order].astype(np.float32)
    label = generator.integers(0, classes, len(MARGINS))[:, None].astype(np.int32)
    others = np.where(np.arange(classes) == label, -np.inf, logits).max(1)
    logits[np.arange(len(MARGINS)), label[:, 0]] = others + np.array(MARGINS, np.float32)
    wide = logits.astype(np.float64) - np.take_along_axis(logits, label, 1).astype(np.float64)
    expected = np.log1p(np.sum(np.where(np.arange(classes) == label, 0, np.exp(wide)), 1))

    largest, tail, of_label = in_lanes(logits, label)
    statistics = _statistics.Statistics(largest, tail, of_label - largest)
    np.testing.assert_allclose(statistics.surprise[:, 0], expected, rtol=1e-5)
    assert np.all(statistics.exp_sum >= 1)


def in_lanes(logits, label, lanes=32):
    """The program's sums of rows as a processor takes them: so many lanes in sequence each, then as a tree."""
    filled = -logits.shape[1] % lanes
    logits = jnp.pad(logits, ((0, 0), (0, filled)), constant_values=-jnp.inf)
    by_lane = logits.reshape(len(logits), -1, lanes).swapaxes(1, 2)
    place = np.arange(lanes)[None, :] + np.zeros((len(logits), 1), int)
    local = np.where(place == label % lanes, label // lanes, -1)[..., None].astype(np.int32)
    largest, tail, of_label = _accelerator._block_sums((by_lane, jnp.asarray(local), None), (-1,))
    # As the reduction does, relative to the largest rounded up.
    raised = tail * jnp.exp(largest - jnp.ceil(largest))
    sums = (largest, raised, jnp.where(local >= 0, of_label, 0))
    units = tuple(jnp.float32(unit) for unit in (jnp.finfo(jnp.float32).min, 0, 0))
    largest, raised, of_label = lax.reduce(sums, units, _accelerator._merge, (1, 2))
    return tuple(a[:, None] for a in (largest, raised / jnp.exp(largest - jnp.ceil(largest)), of_label))


@pytest.mark.x32
def test_the_largest_alone_is_one_exactly():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(512, 1)) * 30, jnp.float32)
    (_, tail), _ = programs(jnp.concatenate([z, z - 50], 1), None, None, (1,))
    np.testing.assert_array_equal(tail, 1)


def lowered(fn, platform, *shapes):
    return jax.export.export(jax.jit(fn), platforms=[platform])(*shapes).mlir_module()


def largest_reductions(module, classes):
    """How many reductions over arrays with so many classes the program has."""
    return sum(f"x{classes}x" in line and "stablehlo.reduce(" in line for line in module.splitlines())


LOSS = [jax.ShapeDtypeStruct((8, 500), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)]


@pytest.mark.x32
@pytest.mark.parametrize(("platform", "single"), [("cpu", False), ("cuda", True), ("rocm", True), ("tpu", True)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_loss_is_one_reduction_over_the_logits(platform, single, smoothing):
    module = lowered(lambda z, y: jaxsoft.cross_entropy(z, y, label_smoothing=smoothing), platform, *LOSS)
    assert (largest_reductions(module, 500) == 1) == single


@pytest.mark.x32
@pytest.mark.parametrize(
    ("platform", "shape", "single"),
    [
        ("cuda", (8, 1000), False),  # one kernel of XLA's
        ("cuda", (8, 1 << 14), False),
        ("cuda", (8, 1 << 15), True),
        ("cuda", (1 << 15, 8), False),  # XLA would store what it is to reduce
        ("tpu", (8, 1000), True),
        ("tpu", (1000, 8), True),
    ],
)
def test_a_gpu_takes_it_where_it_saves_a_pass(platform, shape, single):
    module = lowered(lambda z: jaxsoft.softmax(z, np.argmax(shape)), platform, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert ("stablehlo.ceil" in module) == single


def test_a_tpu_has_no_float64():
    assert "stablehlo.ceil" not in lowered(jaxsoft.softmax, "tpu", jax.ShapeDtypeStruct((8, 1000), jnp.float64))


@pytest.mark.x32
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_sizes_that_are_not_known_yet(platform):
    shape = jax.export.symbolic_shape("n, 2*c")
    module = lowered(jaxsoft.softmax, platform, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert ("stablehlo.ceil" in module) == (platform == "tpu")


# Of explicitly sharded classes JAX cannot say where the label's logit is to lie, with the plain formula neither.
@pytest.mark.parametrize(
    ("axis_type", "along"), [(AxisType.Auto, "rows"), (AxisType.Auto, "classes"), (AxisType.Explicit, "rows")]
)
def test_sharded_arrays_take_it_too(axis_type, along):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(axis_type,))
    spec = PartitionSpec("d", None) if along == "rows" else PartitionSpec(None, "d")
    rows = PartitionSpec("d") if along == "rows" else PartitionSpec()
    shapes = [
        jax.ShapeDtypeStruct((8, 48), jnp.float32, sharding=NamedSharding(mesh, spec)),
        jax.ShapeDtypeStruct((8,), jnp.int32, sharding=NamedSharding(mesh, rows)),
    ]
    with jax.set_mesh(mesh):
        module = lowered(lambda z, y: jaxsoft.cross_entropy(z, y, reduction="none"), "tpu", *shapes)
    assert largest_reductions(module, 48) == 1


@pytest.mark.parametrize("axis_name", [None, "d"])
def test_inside_shard_map(axis_name):
    """On the block of a device, of which the label may be in none, and typed as varying as the logits and labels are."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("d", None) if axis_name is None else PartitionSpec(None, "d")
    rows = PartitionSpec("d") if axis_name is None else PartitionSpec()

    def fn(z, y):
        return jaxsoft.cross_entropy(z, y, reduction="none", axis_name=axis_name, label_smoothing=0.1)

    mapped = jax.shard_map(fn, mesh=mesh, in_specs=(spec, rows), out_specs=rows)
    shapes = [jax.ShapeDtypeStruct((8, 48), jnp.float32), LOSS[1]]
    assert largest_reductions(lowered(mapped, "tpu", *shapes), 48 if axis_name is None else 12) == 1


def test_derivatives_are_those_of_the_plain_formula(monkeypatch):
    """Of the value alone there is another program, also where it is what is compiled on this platform."""
    generator = np.random.default_rng(0)
    z, y = jnp.asarray(generator.normal(size=(6, 9))), jnp.asarray(generator.integers(0, 9, 6))

    def results(fn):
        return jax.jit(jax.value_and_grad(fn))(z), jax.jit(jax.hessian(fn))(z), jax.jit(jax.vmap(fn))(z[None])

    def fn(z):
        return jaxsoft.cross_entropy(z, y, label_smoothing=0.1, z_loss=0.1) + jnp.sum(jaxsoft.softmax(z) ** 2)

    plain = results(fn)
    monkeypatch.setattr(_statistics, "_block_sums", on(cpu=lambda *_: _accelerator._block_sums)(PLAIN))
    jax.clear_caches()
    assert "stablehlo.ceil" in jax.jit(fn).lower(z).as_text()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), results(fn), plain)
    monkeypatch.undo()
    jax.clear_caches()


PLAIN = _statistics._block_sums.__wrapped__


def test_a_label_and_its_block_may_vary_over_different_axes():
    mesh = jax.make_mesh((2, 2), ("rows", "classes"), axis_types=(AxisType.Auto,) * 2)
    P = PartitionSpec

    def fn(z, y):
        statistics = _statistics.block_statistics(z, (1,), Targets(label=y), ("classes",))
        return statistics.surprise

    mapped = jax.shard_map(fn, mesh=mesh, in_specs=(P(None, "classes"), P("rows", None)), out_specs=P("rows", None))
    shapes = jax.ShapeDtypeStruct((1, 48), jnp.float32), jax.ShapeDtypeStruct((2, 1), jnp.int32)
    assert largest_reductions(lowered(mapped, "tpu", *shapes), 24) == 1


def loops(platform, wanted, tiling, *arrays):
    """Each loss, their gradients, and each loss alone, by the loops that are compiled for a platform."""
    of = {name: getattr(_tiles, name).__wrapped__.__wrapped__ for name in ("_fold_gradients", "_fold_values")}
    return *of["_fold_gradients"](platform, arrays, (tiling, wanted)), *of["_fold_values"](platform, arrays[:2], tiling)


@pytest.mark.parametrize("class_axis", [0, 1])
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize(
    ("dtype", "width", "deferred"), [(jnp.bfloat16, 400, True), (jnp.bfloat16, 4, False), (jnp.float32, 400, False)]
)
@pytest.mark.parametrize(
    "wanted",
    [_tiles.Variables(True, True, True, False), _tiles.Variables(True, False, False, False), _tiles.Variables(False, True, False, False)],
    ids=["all", "features", "kernel"],
)  # fmt: skip
def test_the_loops_of_an_accelerator_are_those_of_a_cpu(dtype, width, deferred, wanted, skips, class_axis):
    """Several tiles and a ragged one; positions that take no part, one by a class weight of 0, hold NaN."""
    positions, classes = 700, 40
    rng = np.random.default_rng(3)
    x, w, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((positions, width), (width, classes), classes))
    label = jnp.asarray(rng.integers(0, classes, (positions, 1)), jnp.int32)
    share = jnp.ones((positions, 1), jnp.float32)
    if skips:
        share = share.at[::2].set(0)
    hot = share.at[5].set(0)  # of a class that weighs nothing
    x = jnp.where(hot == 0, jnp.nan, x).astype(dtype)
    kernel = (w if class_axis else w.T).astype(dtype)
    layer = _tiles.Layer(x, kernel, b, None, None)
    targets = Targets(label, hot, None, share)
    tiling = _tiles.Tiling(LOSSES, None, class_axis, None, skips)
    arrays = layer, targets, (jnp.asarray(rng.normal(size=(positions, 1)), jnp.float32),)
    assert _tiles._tile("gpu", tiling, layer, targets).deferred == deferred
    for platform in ("gpu", "tpu"):
        found = jax.jit(functools.partial(loops, platform, wanted, tiling))(*arrays)
        expected = jax.jit(functools.partial(loops, "cpu", wanted, tiling))(*arrays)
        for got, want in zip(found, expected, strict=True):
            want = np.asarray(want, np.float32)
            assert np.isfinite(want).all()
            # Each is a sum of products of half precision; rounded to it the features' gradients may differ by an ulp.
            half = 2.0**-7 if got.dtype == jnp.bfloat16 else 2e-6
            np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=half, atol=4e-6 * np.abs(want).max())
