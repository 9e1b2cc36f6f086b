"""Groups of tiles, as accelerators use them: gradients and values equal those of a single tile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft._jax_internals import as_primitive, device_lowered_for
from jaxsoft._linear import tiles
from jaxsoft._linear.one_pass import one_pass
from jaxsoft._linear.plan import ALIGNED_ROWS, LEAST_ROWS, Tile, plan_tile
from jaxsoft._platform.devices import KINDS, Device, as_device

POSITIONS, WIDTH, CLASSES = 37, 8, 50
WHOLE = Tile(POSITIONS, POSITIONS, POSITIONS)
GROUPED = [Tile(8, 8, 16), Tile(8, 8, 40)]
IN_ONE_PASS = [Tile(16, 16, 16, one_pass=True), Tile(POSITIONS, POSITIONS, POSITIONS, one_pass=True)]


@pytest.fixture
def take(monkeypatch):
    """Take given tiles and a sample of so many classes, in an accelerator's loop on this machine."""
    over_tiles = tiles._over_tiles

    def in_tiles(tile, sample=1024):
        whole = tile._replace(one_pass=False)
        monkeypatch.setattr(tiles, "plan_tile", lambda *_, one_pass, **__: tile if one_pass else whole)
        monkeypatch.setattr(tiles, "_over_tiles", lambda device, *rest: over_tiles(Device("tpu"), *rest))
        monkeypatch.setattr(tiles, "SAMPLE", sample)
        jax.clear_caches()

    yield in_tiles
    jax.clear_caches()


@pytest.fixture
def gradients(take):
    """Loss and gradients for each of LABELS, in given tiles."""

    def by_tile(tile, slope=1.0, **options):
        take(tile, 16)
        rng = np.random.default_rng(0)
        x, w = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((POSITIONS, WIDTH), (WIDTH, CLASSES)))
        b = jnp.asarray(rng.normal(size=CLASSES), jnp.float32)
        w = w.at[:, -1].mul(slope)

        @jax.jit
        def run(labels):
            padded = x.at[0].set(jnp.where(labels[0] == -1, jnp.nan, x[0]))
            loss = lambda x, w, b: jaxsoft.linear_cross_entropy(x, w, labels, b, ignore_index=-1, **options)  # noqa: E731
            return jax.value_and_grad(loss, (0, 1, 2))(padded, w, b)

        return {name: run(labels) for name, labels in LABELS.items()}

    return by_tile


VALID = np.random.default_rng(1).integers(0, CLASSES, POSITIONS)
LABELS = {
    "none ignored": VALID,
    "a third ignored": np.where(np.arange(POSITIONS) % 3 == 0, -1, VALID),
    "all but the last ignored": np.where(np.arange(POSITIONS) < POSITIONS - 1, -1, VALID),
    "all ignored": np.full(POSITIONS, -1),
}


def test_groups_of_tiles_equal_one_tile(gradients):
    options = {"soft_cap": 3.0, "label_smoothing": 0.1}
    expected = gradients(WHOLE, **options)
    for tile in GROUPED:
        found = gradients(tile, **options)
        for name in LABELS:
            for ours, theirs in zip(*(jax.tree.leaves(of[name]) for of in (found, expected)), strict=True):
                assert ours.dtype == theirs.dtype
                arrays = (np.asarray(a, np.float32) for a in (ours, theirs))
                np.testing.assert_allclose(*arrays, rtol=0.01, atol=1e-5, err_msg=f"{tile}, {name}")


@pytest.mark.parametrize(
    ("slope", "options"),
    [
        (1.0, {"z_loss": 1.0}),
        (60.0, {"reduction": "sum"}),
        (60.0, {"z_loss": 1.0, "weights": np.arange(POSITIONS)}),
        (60.0, {"label_smoothing": 0.1, "where": np.arange(CLASSES) != 5, "class_weights": np.arange(CLASSES) / 9}),
        (60.0, {"soft_cap": 50.0, "temperature": 0.5}),
        (1.0, {"soft_cap": 2.0, "z_loss": 1.0}),
        (1.0, {"soft_cap": 2.0, "label_smoothing": 0.1}),  # not in one pass
        (1.0, {"temperature": 2.0, "label_smoothing": 0.1}),  # neither
    ],
    ids=str,
)
def test_one_pass_equals_one_tile(gradients, slope, options):
    """Even if a class outside the sample has such a large logit that a second attempt is needed."""
    expected = gradients(WHOLE, slope, **options)
    for tile in IN_ONE_PASS:
        found = gradients(tile, slope, **options)
        for name in LABELS:
            (value, ours), (right, theirs) = found[name], expected[name]
            np.testing.assert_allclose(value, right, rtol=1e-5, err_msg=f"{tile}, {name}")
            for one, other in zip(ours, theirs, strict=True):
                one, other = (np.asarray(a, np.float32) for a in (one, other))
                scale = np.abs(other).max()  # the exponentials are rounded, and so are their multiples
                np.testing.assert_allclose(one, other, rtol=0.02, atol=0.004 * scale, err_msg=f"{tile}, {name}")


def test_a_single_ignored_position_may_hold_anything_in_one_pass(take):
    take(Tile(1, 1, 1, one_pass=True))
    x, w = jnp.full((1, WIDTH), jnp.nan, jnp.bfloat16), jnp.ones((WIDTH, CLASSES), jnp.bfloat16)
    loss = lambda x, w: jaxsoft.linear_cross_entropy(x, w, np.array([-1]), ignore_index=-1)  # noqa: E731
    for gradient in jax.jit(jax.grad(loss, (0, 1)))(x, w):
        np.testing.assert_array_equal(np.asarray(gradient, np.float32), 0)


@pytest.mark.parametrize("slope", [1.0, 60.0])
def test_one_pass_equals_one_tile_over_shards_of_the_classes(take, slope):
    """Each shard has its own reference, and may be the only one that needs a second attempt."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((POSITIONS, WIDTH), (WIDTH, CLASSES)))
    w, labels = w.at[:, -1].mul(slope), jnp.asarray(LABELS["a third ignored"])
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",), axis_types=(AxisType.Auto,))

    def loss(x, w):
        return jaxsoft.linear_cross_entropy(x, w, labels, ignore_index=-1, axis_name="model")

    specs = P(), P(None, "model")
    both = lambda x, w: (loss(x, w), jax.value_and_grad(loss, (0, 1))(x, w))  # noqa: E731
    found = []
    for tile in (WHOLE, *IN_ONE_PASS):
        take(tile, 16)
        sharded = jax.shard_map(both, mesh=mesh, in_specs=specs, out_specs=(P(), (P(), specs)))
        found.append([np.asarray(a, np.float32) for a in jax.tree.leaves(jax.jit(sharded)(x, w))])
    for ours in found[1:]:
        for one, other in zip(ours, found[0], strict=True):
            np.testing.assert_allclose(one, other, rtol=0.02, atol=0.004 * np.abs(other).max())


def test_a_second_attempt_is_relative_to_the_largest_logit():
    """Another position of the group does not change the bits of a position."""
    z = jnp.asarray([[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 100.0, 3.0], [0.0, -jnp.inf, 500.0, 5.0]])
    labels = jnp.asarray([[3], [0], [2]])
    low = one_pass(lambda x: (z[:1] + x, None), jnp.zeros((1, 1)), z[:1, :2], labels[:1]).statistics
    assert low.max_logit == 1  # the sample's
    found = one_pass(lambda x: (z + x, None), jnp.zeros((3, 1)), z[:, :2], labels).statistics
    np.testing.assert_array_equal(found.max_logit[:, 0], [1, 100, 500])
    np.testing.assert_array_equal(found.sum_others[0], low.sum_others[0])
    np.testing.assert_allclose(found.sum_others[:, 0], [np.exp([-1.0, 0.0, 1.0]).sum(), 1, 0], rtol=1e-6, atol=1e-200)
    np.testing.assert_array_equal(found.label_logit[:, 0], [2, -100, 0])


def test_a_label_on_another_shard_needs_no_second_attempt():
    """However low this shard's logits are."""
    z = jnp.asarray([[-50.0, -60.0, -55.0]])
    found = one_pass(lambda x: (z + x, None), jnp.zeros((1, 1)), z[:, :2], jnp.asarray([[7]])).statistics
    assert (found.max_logit, found.label_logit) == (-50, 0)
    np.testing.assert_allclose(found.sum_others, 1 + np.exp(-10.0) + np.exp(-5.0), rtol=1e-12)


def test_one_pass_is_accurate_for_confident_predictions(take):
    """A label outside the sample, up to 40 above it, and more."""
    take(Tile(5, 5, 5, one_pass=True), 2)
    margins = np.array([5.0, 20.0, 38.0, 42.0, 60.0])
    x, w = jnp.eye(5, dtype=jnp.bfloat16), jnp.zeros((5, 4), jnp.bfloat16).at[:, 3].set(margins.astype(jnp.bfloat16))
    loss = lambda x, w: jaxsoft.linear_cross_entropy(x, w, np.full(5, 3), reduction="sum")  # noqa: E731
    value, slope = jax.jit(jax.value_and_grad(loss, 1))(x, w)
    others = 3 * np.exp(-margins)
    for found in (value, jax.jit(loss)(x, w)):
        np.testing.assert_allclose(found, np.log1p(others).sum(), rtol=1e-5)
    # Logits are products with the unit matrix, so that the kernel's gradient is the gradient to the logits.
    np.testing.assert_allclose(np.asarray(slope, float)[:, 3], -others / (1 + others), rtol=0.005)


SCALINGS = [{}, {"soft_cap": 5.0, "temperature": 0.5}]
OPTIONS = [
    {"z_loss": 0.3},
    {"where": np.arange(CLASSES) >= 16},  # nothing of the sample is left
    {"where": np.arange(CLASSES) < 1, "weights": np.arange(POSITIONS)},
    {"label_smoothing": 0.3, "class_weights": np.arange(CLASSES) / 9},
]


@pytest.mark.parametrize("slope", [1.0, 60.0])
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_loss_alone_in_one_pass(take, options, scaling, slope):
    """It may have a bias, a cap, a temperature and masked classes; labels are in the sample and outside."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((POSITIONS, WIDTH), (WIDTH, CLASSES)))
    w, b = w.at[:, -1].mul(slope), jnp.asarray(rng.normal(size=CLASSES), jnp.float32)
    z = np.asarray(x, float) @ np.asarray(w, float) + np.asarray(b, float)
    z = z if not scaling else 5 * np.tanh(z / 5) / 0.5
    options = {"ignore_index": -1, "reduction": "none"} | options
    for tile in IN_ONE_PASS:
        take(tile, 16)
        run = jax.jit(lambda x, labels: jaxsoft.linear_cross_entropy(x, w, labels, b, **scaling, **options))
        for name, labels in (LABELS | {"out of range": np.full(POSITIONS, CLASSES)}).items():
            found = run(jnp.where((labels == -1)[:, None], jnp.nan, x), labels)
            expected = jaxsoft.cross_entropy(z, labels, **options)
            np.testing.assert_allclose(found, expected, 2e-6, 2e-6, err_msg=f"{tile}, {name}")


@pytest.mark.parametrize("at", [0, 30], ids=["in the sample", "outside"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38, -3e38])
def test_extreme_logits_in_one_pass(take, value, at):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((2, WIDTH), (WIDTH, CLASSES)))
    b = jnp.zeros(CLASSES, jnp.float32).at[at].set(value)
    loss = lambda w: jaxsoft.linear_cross_entropy(x, w, np.array([at, 5]), b, reduction="none")  # noqa: E731
    both = []
    for tile in (Tile(2, 2, 2), Tile(2, 2, 2, one_pass=True)):
        take(tile, 16)
        gradient = jax.jit(jax.grad(lambda w: jnp.sum(loss(w))))(w)
        both.append((np.asarray(jax.jit(loss)(w)), np.asarray(gradient, np.float32)))
    for ours, theirs in zip(*both, strict=True):
        np.testing.assert_allclose(ours, theirs, 2e-6 if ours.ndim == 1 else 0.02, 0.004)


SHAPES = [(4096, 4096, 128_256), (8192, 2304, 256_000), (5000, 1024, 50_257), (65_536, 4096, 128_256), (3, 2, 5)]


@pytest.mark.parametrize("budget", [None, 100 * 2**20, 2**30], ids=["no budget", "100 MiB", "1 GiB"])
@pytest.mark.parametrize("kind", [*KINDS, "TPU of tomorrow"])
def test_stored_gradients_and_a_tile_are_within_the_budget(kind, budget):
    device = Device("tpu" if kind.startswith("TPU") else "gpu", kind)
    for shape in SHAPES:
        positions, features, classes = shape
        tile = plan_tile(device, shape, jnp.dtype("bfloat16"), False, budget)
        keeps = tile.group_rows > tile.rows
        limit = device.traits.memory // 3 if budget is None else budget
        assert tile.rows * classes * 8 + keeps * tile.group_rows * classes * 2 <= limit
        assert tile.group_rows % tile.rows == 0
        assert not keeps or tile.rows % ALIGNED_ROWS == 0
        assert tile.group_rows < positions + max(tile.rows, 1)
        assert not keeps or tile.group_rows <= device.traits.group_rows + 2 * features + tile.rows
        alone = plan_tile(device, shape, jnp.dtype("bfloat16"), False, budget, one_pass=True)
        fits = limit // (2 * classes) >= min(LEAST_ROWS, positions)
        assert alone.one_pass == (device.platform == "tpu" and fits)
        assert not alone.one_pass or alone.rows == alone.group_rows <= limit / (2 * classes)
        frozen = plan_tile(device, shape, jnp.dtype("bfloat16"), False, budget, kernel_moves=False, one_pass=True)
        assert frozen.rows <= max(device.traits.group_rows, 1024)
        assert frozen.one_pass == alone.one_pass
        for narrow in (plan_tile(device, shape, jnp.dtype("float32"), False, budget),
                       plan_tile(device, shape, jnp.dtype("bfloat16"), False, budget, kernel_moves=False)):  # fmt: skip
            assert narrow.group_rows == narrow.rows <= 1024


def test_the_kind_comes_from_the_devices_that_a_program_is_lowered_for():
    seen = []

    def choose(context, types, static):
        seen.append(device_lowered_for(context))
        return lambda arrays, static: arrays

    seam = as_primitive(lambda *_: None, {"cpu": choose}, needs_devices=True)(lambda arrays, static: arrays)
    ones = jnp.ones((4, 2))
    one = lambda x: seam((x,), None)[0]  # noqa: E731
    jax.jit(one).lower(ones)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    placed = jax.ShapeDtypeStruct(ones.shape, ones.dtype, sharding=NamedSharding(mesh, P("data")))
    jax.jit(jax.shard_map(one, mesh=mesh, in_specs=P("data"), out_specs=P("data"))).lower(placed)
    kind = jax.devices()[0].device_kind
    assert [found.device_kind for found in seen] == [kind, kind]
    seen.clear()
    jax.export.export(jax.jit(one), platforms=["cpu"])(ones)
    assert seen == [None]


def test_without_a_known_device_the_default_backend_s_is_used_if_it_is_of_the_platform():
    assert as_device("cpu", None) == Device("cpu", jax.devices("cpu")[0].device_kind)
    assert as_device("tpu", jax.devices("cpu")[0]) == Device("tpu")
    assert as_device("cuda", None).platform == "gpu"
    assert Device("tpu").traits.memory == min(kind.memory for kind in KINDS.values())
