"""The program of GPUs and TPUs, as far as a CPU can test it. `experiments.compile` counts what XLA makes of it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxsoft
import reference
from jaxsoft._arrays.dtypes import compute_dtype
from jaxsoft._formula import statistics
from jaxsoft._formula.targets import Targets
from jaxsoft._linear import args, tiles
from jaxsoft._platform import accelerator
from jaxsoft._platform.devices import Device
from jaxsoft._platform.dispatch import with_platform_impl

MARGINS = (-60.0, -20, -5, -1, -0.1, 0, 0.1, 1, 5, 10, 17, 30, 60, 80)


PLAIN = statistics._block_sums.__wrapped__


def programs(cases):
    """The accelerators' sums and the plain formula's for each (arrays, axes), from one program."""

    def both(every):
        by_end = ((arrays, tuple(axis % arrays[0].ndim - arrays[0].ndim for axis in axes)) for arrays, axes in every)
        return [(accelerator._block_sums(*case), PLAIN(*case)) for case in by_end]

    every_axes = [axes for _, axes in cases]
    return jax.jit(lambda arrays: both(zip(arrays, every_axes, strict=True)))([arrays for arrays, _ in cases])


def assert_same(actual, expected, rtol, case=""):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(one, other, rtol=rtol, err_msg=case)


DTYPES = ["float64", "float32", "bfloat16", "float16"]
TARGETS = ["none", "label", "smoothing", "distribution"]
SHAPES = [((7,), (0,)), ((1, 1), (1,)), ((5, 33), (1,)), ((33, 5), (0,)), ((2, 9, 3, 4), (1,)), ((3, 4, 5), (0, 2))]
COVERING = reference.covering(2, SHAPES, DTYPES, TARGETS)


def drawn(shape, axes, dtype, targets):
    generator = np.random.default_rng(sum(shape))
    logits = (generator.normal(size=shape) * 9 + 40).astype(dtype)
    compute = compute_dtype(jnp.dtype(dtype))
    label = spread = None
    if targets in ("label", "smoothing") and len(axes) == 1:  # a label has one class axis
        positions = [1 if n == axes[0] else size for n, size in enumerate(shape)]
        label = generator.integers(-2, shape[axes[0]] + 2, positions).astype(np.int32)  # outside a shard too
    if targets == "smoothing" and len(axes) == 1:
        spread = np.full([size if n == axes[0] else 1 for n, size in enumerate(shape)], 0.1 / shape[axes[0]], compute)
    if targets == "distribution":
        spread = (generator.random(shape) * (generator.random(shape) > 0.3)).astype(compute)
    return logits, label, spread


@pytest.mark.parametrize("chosen", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["pairs", "rest"])
@pytest.mark.parametrize(("shape", "axes"), SHAPES, ids=str)
def test_it_is_the_plain_formula(shape, axes, chosen):
    every = itertools.product(DTYPES, TARGETS)
    cases = [case for case in every if (((shape, axes), *case) in COVERING) == chosen]
    assert cases
    sums = programs([(drawn(shape, axes, *case), axes) for case in cases])
    for (dtype, targets), (actual, expected) in zip(cases, sums, strict=True):
        assert_same(actual, expected, 1e-13 if dtype == "float64" else 1e-5, f"{dtype}, {targets}")


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


def test_edges():
    """Each dtype, without a label and with each of two labels."""
    cases = list(itertools.product(DTYPES, [None, 0, 1]))

    def arrays(dtype, label):
        lowest, highest = (float(limit) for limit in (jnp.finfo(dtype).min, jnp.finfo(dtype).max))
        logits = np.where(np.isfinite(EDGES), np.clip(EDGES, lowest, highest), EDGES)
        logits = np.concatenate([logits, np.full((1, 4), lowest), np.full((1, 4), highest)]).astype(dtype)
        return logits, None if label is None else np.full((len(logits), 1), label, np.int32), None

    sums = programs([(arrays(*case), (1,)) for case in cases])
    for (dtype, label), both in zip(cases, sums, strict=True):
        actual, expected = jax.tree.map(np.array, both)
        if label == 0:  # a lone +inf at the label: both losses are NaN, whatever the others' sum
            actual[1][1] = expected[1][1] = 0
        assert_same(actual, expected, 1e-6, f"{dtype}, label {label}")


def test_at_a_logit_of_minus_infinity_a_target_of_0_adds_nothing_and_another_target_infinity():
    logits = np.array([[-np.inf, 1.0, 3.0], [-np.inf, 3.0, 1.0], [-np.inf, -np.inf, -np.inf]])
    spread = np.array([[0.0, 0.5, 0.5], [0.2, 0.4, 0.4], [0.0, 0.0, 0.0]])
    ((actual, expected),) = programs([((logits, None, spread), (1,))])
    assert_same(actual, expected, 1e-13)


@pytest.mark.x32
@pytest.mark.parametrize("classes", [2, 21, 1000, 4096])
def test_the_loss_stays_accurate_at_every_margin(classes):
    """Each at 1e-5, summed here in sequence: no accelerator takes that many turns for so few classes.

    Operation by operation, as below.
    """
    generator = np.random.default_rng(classes)
    orders = {
        "random": generator.normal(size=(len(MARGINS), classes)),
        "ascending": np.linspace(-1, 0, classes) * np.ones((len(MARGINS), 1)),
        "descending": np.linspace(0, -30, classes) * np.ones((len(MARGINS), 1)),
        "equal": np.full((len(MARGINS), classes), 0.3),
    }
    logits = np.concatenate([*orders.values()]).astype(np.float32)
    label = np.tile(generator.integers(0, classes, len(MARGINS)), len(orders))[:, None].astype(np.int32)
    others = np.where(np.arange(classes) == label, -np.inf, logits).max(1)
    logits[np.arange(len(logits)), label[:, 0]] = others + np.tile(np.array(MARGINS, np.float32), len(orders))
    wide = logits.astype(np.float64) - np.take_along_axis(logits, label, 1).astype(np.float64)
    expected = np.log1p(np.sum(np.where(np.arange(classes) == label, 0, np.exp(wide)), 1))

    largest, tail, of_label = in_lanes(logits, label)
    found = statistics.Statistics(largest, tail, of_label - largest)
    surprise = np.split(np.asarray(found.nll[:, 0]), len(orders))
    for order, got, want in zip(orders, surprise, np.split(expected, len(orders)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=order)
    assert np.all(found.exp_sum >= 1)


def in_lanes(logits, label, lanes=32):
    """The program's sums of rows in a processor's order: a few lanes in sequence, then as a tree."""
    filled = -logits.shape[1] % lanes
    logits = jnp.pad(logits, ((0, 0), (0, filled)), constant_values=-jnp.inf)
    by_lane = logits.reshape(len(logits), -1, lanes).swapaxes(1, 2)
    place = np.arange(lanes)[None, :] + np.zeros((len(logits), 1), int)
    local = np.where(place == label % lanes, label // lanes, -1)[..., None].astype(np.int32)
    largest, tail, of_label = accelerator._block_sums((by_lane, jnp.asarray(local), None), (-1,))
    # As the reduction does, relative to the largest rounded up.
    raised = tail * jnp.exp(largest - jnp.ceil(largest))
    sums = (largest, raised, jnp.where(local >= 0, of_label, 0))
    units = tuple(jnp.float32(unit) for unit in (jnp.finfo(jnp.float32).min, 0, 0))
    largest, raised, of_label = lax.reduce(sums, units, accelerator._merge, (1, 2))
    return tuple(a[:, None] for a in (largest, raised / jnp.exp(largest - jnp.ceil(largest)), of_label))


@pytest.mark.x32
def test_a_single_finite_logit_has_probability_one_exactly():
    z = (np.random.default_rng(0).normal(size=(512, 1)) * 30).astype(np.float32)
    # Operation by operation: one program for a CPU has exponentials of a vector, and others of a number by itself.
    _, tail = accelerator._block_sums((jnp.asarray(np.concatenate([z, z - 50], 1)), None, None), (-1,))
    np.testing.assert_array_equal(tail, 1)


def lowered(fn, platform, *shapes):
    return jax.export.export(jax.jit(fn), platforms=[platform])(*shapes).mlir_module()


def largest_reductions(module, classes):
    """The number of reductions over arrays with this many classes in the program."""
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
def test_a_gpu_uses_it_if_it_saves_a_pass(platform, shape, single):
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


# For explicitly sharded classes JAX cannot determine the sharding of the label's logit, nor can the plain formula.
@pytest.mark.parametrize(
    ("axis_type", "along"), [(AxisType.Auto, "rows"), (AxisType.Auto, "classes"), (AxisType.Explicit, "rows")]
)
def test_sharded_arrays_use_it_too(axis_type, along):
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
    """On a device's block, which may not contain the label, with types that vary like the logits' and labels'."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("d", None) if axis_name is None else PartitionSpec(None, "d")
    rows = PartitionSpec("d") if axis_name is None else PartitionSpec()

    def fn(z, y):
        return jaxsoft.cross_entropy(z, y, reduction="none", axis_name=axis_name, label_smoothing=0.1)

    mapped = jax.shard_map(fn, mesh=mesh, in_specs=(spec, rows), out_specs=rows)
    shapes = [jax.ShapeDtypeStruct((8, 48), jnp.float32), LOSS[1]]
    assert largest_reductions(lowered(mapped, "tpu", *shapes), 48 if axis_name is None else 12) == 1


def test_a_label_and_its_block_may_vary_over_different_axes():
    mesh = jax.make_mesh((2, 2), ("rows", "classes"), axis_types=(AxisType.Auto,) * 2)
    P = PartitionSpec

    def fn(z, y):
        return statistics.block_statistics(z, 1, Targets(label=y), ("classes",)).nll

    mapped = jax.shard_map(fn, mesh=mesh, in_specs=(P(None, "classes"), P("rows", None)), out_specs=P("rows", None))
    shapes = jax.ShapeDtypeStruct((1, 48), jnp.float32), jax.ShapeDtypeStruct((2, 1), jnp.int32)
    assert largest_reductions(lowered(mapped, "tpu", *shapes), 24) == 1


def loops(platform, needs_grad, config, *arrays):
    """Each loss, their gradients, and each loss alone, by the loops that are compiled for a platform."""
    gradients, values = (fn.__wrapped__.__wrapped__ for fn in (tiles.tiled_gradients, tiles.tiled_values))
    device = Device(platform)
    return *gradients(device, arrays, (config, needs_grad)), *values(device, arrays[:2], config)


WANTED = {
    "all": args.DiffArgs(True, True, True, False),
    "features": args.DiffArgs(True, False, False, False),
    "kernel": args.DiffArgs(False, True, False, False),
}
HALF, WHOLE = jnp.dtype("bfloat16"), jnp.dtype("float32")
LAYERS = {"half": (HALF, 400, True), "narrow": (HALF, 4, True), "whole": (WHOLE, 400, False)}  # dtype, width, deferred
LOOPS = [LAYERS, WANTED, [False, True], [0, 1]]


@pytest.mark.parametrize(
    ("of", "wanted", "skips", "class_axis"),
    [
        pytest.param(*case, marks=() if case in reference.covering(2, *LOOPS) else pytest.mark.exhaustive)
        for case in itertools.product(*LOOPS)
    ],
)
def test_loops_for_accelerators_give_the_results_of_a_cpu(of, wanted, skips, class_axis):
    """Several tiles and a ragged one; positions that are ignored, one by a class weight of 0, hold NaN."""
    dtype, width, deferred = LAYERS[of]
    positions, classes = 700, 40
    rng = np.random.default_rng(3)
    x, w, b = (rng.normal(size=s).astype(np.float32) for s in ((positions, width), (width, classes), classes))
    label = rng.integers(0, classes, (positions, 1)).astype(np.int32)
    share = np.ones((positions, 1), np.float32)
    if skips:
        share[::2] = 0
    hot = share.copy()
    hot[5] = 0  # of a class that weighs nothing
    x = np.where(hot == 0, np.float32(np.nan), x).astype(dtype)
    layer = args.LinearParams(x, (w if class_axis else w.T).astype(dtype), b, None, None)
    targets = Targets(label, hot, share)
    config = args.HeadConfig(class_axis, None, None, None, (), may_ignore=skips)
    arrays = layer, targets, (rng.normal(size=(positions, 1)).astype(np.float32),)
    tile = tiles._tile(Device("gpu"), layer, targets, config)
    assert (tile.group_rows > tile.rows) == deferred
    passes_once = tiles._tile(Device("tpu"), layer, targets, config, WANTED[wanted]).one_pass
    assert passes_once == deferred
    platforms = "gpu", "tpu", "cpu"
    *found, expected = jax.jit(lambda *a: [loops(platform, WANTED[wanted], config, *a) for platform in platforms])(
        *arrays
    )
    for platform, results in zip(platforms, found, strict=False):
        for n, (got, want) in enumerate(zip(results, expected, strict=True)):
            want = np.asarray(want, np.float32)
            assert np.isfinite(want).all()
            # Each is a sum of products in half precision; rounded, the features' gradients may differ by an ulp.
            half = 2.0**-7 if got.dtype == jnp.bfloat16 else 2e-6
            # One pass rounds exponentials before it multiplies them.
            rounded = 2.0**-9 if passes_once and platform == "tpu" and got.shape[1:] != (1,) else 4e-6
            np.testing.assert_allclose(
                np.asarray(got, np.float32), want, half, rounded * np.abs(want).max(), err_msg=f"{platform}, result {n}"
            )


# Last, since it empties the caches.
def test_derivatives_equal_the_plain_formula_s(monkeypatch):
    """Only the value has another program, also if that program is compiled for this platform."""
    generator = np.random.default_rng(0)
    z, y = generator.normal(size=(6, 9)), generator.integers(0, 9, 6)

    def fn(z):
        return jaxsoft.cross_entropy(z, y, label_smoothing=0.1, z_loss=0.1) + jnp.sum(jaxsoft.softmax(z) ** 2)

    def results():
        return jax.jit(lambda z: (jax.value_and_grad(fn)(z), jax.hessian(fn)(z), jax.vmap(fn)(z[None])))(z)

    plain = results()
    monkeypatch.setattr(statistics, "_block_sums", with_platform_impl(cpu=lambda *_: accelerator._block_sums)(PLAIN))
    jax.clear_caches()
    assert "stablehlo.ceil" in jax.jit(fn).lower(z).as_text()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), results(), plain)
    monkeypatch.undo()
    jax.clear_caches()
