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
from jaxsoft._linear.plan import ALIGNED_ROWS, Tile, plan_tile
from jaxsoft._platform.devices import KINDS, Device, as_device

POSITIONS, WIDTH, CLASSES = 37, 8, 50
WHOLE = Tile(POSITIONS, POSITIONS, POSITIONS)
GROUPED = [Tile(8, 8, 16), Tile(8, 8, 40)]


@pytest.fixture
def gradients(monkeypatch):
    """Loss and gradients for each of LABELS, in given tiles, by an accelerator's loop on this machine."""
    over_tiles = tiles._over_tiles

    def by_tile(tile, **options):
        monkeypatch.setattr(tiles, "plan_tile", lambda *_, **__: tile)
        monkeypatch.setattr(tiles, "_over_tiles", lambda device, *rest: over_tiles(Device("tpu"), *rest))
        jax.clear_caches()
        rng = np.random.default_rng(0)
        x, w = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((POSITIONS, WIDTH), (WIDTH, CLASSES)))
        b = jnp.asarray(rng.normal(size=CLASSES), jnp.float32)

        @jax.jit
        def run(labels):
            padded = x.at[0].set(jnp.where(labels[0] == -1, jnp.nan, x[0]))
            loss = lambda x, w, b: jaxsoft.linear_cross_entropy(x, w, labels, b, ignore_index=-1, **options)  # noqa: E731
            return jax.value_and_grad(loss, (0, 1, 2))(padded, w, b)

        return {name: run(labels) for name, labels in LABELS.items()}

    yield by_tile
    jax.clear_caches()


VALID = np.random.default_rng(1).integers(0, CLASSES, POSITIONS)
LABELS = {
    "none ignored": VALID,
    "a third ignored": np.where(np.arange(POSITIONS) % 3 == 0, -1, VALID),
    "all but the last ignored": np.where(np.arange(POSITIONS) < POSITIONS - 1, -1, VALID),
    "all ignored": np.full(POSITIONS, -1),
}


def test_groups_of_tiles_are_one_tile(gradients):
    options = {"soft_cap": 3.0, "label_smoothing": 0.1}
    expected = gradients(WHOLE, **options)
    for tile in GROUPED:
        found = gradients(tile, **options)
        for name in LABELS:
            for ours, theirs in zip(*(jax.tree.leaves(of[name]) for of in (found, expected)), strict=True):
                assert ours.dtype == theirs.dtype
                arrays = (np.asarray(a, np.float32) for a in (ours, theirs))
                np.testing.assert_allclose(*arrays, rtol=0.01, atol=1e-5, err_msg=f"{tile}, {name}")


SHAPES = [(4096, 4096, 128_256), (8192, 2304, 256_000), (5000, 1024, 50_257), (65_536, 4096, 128_256), (3, 2, 5)]


@pytest.mark.parametrize("budget", [None, 100 * 2**20, 2**30], ids=["no budget", "100 MiB", "1 GiB"])
@pytest.mark.parametrize("kind", [*KINDS, "TPU of tomorrow"])
def test_what_is_kept_and_a_tile_are_within_the_budget(kind, budget):
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
        for narrow in (plan_tile(device, shape, jnp.dtype("float32"), False, budget),
                       plan_tile(device, shape, jnp.dtype("bfloat16"), False, budget, kernel_moves=False)):  # fmt: skip
            assert narrow.group_rows == narrow.rows <= 1024


def test_the_kind_is_that_of_the_devices_that_a_program_is_lowered_for():
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


def test_where_no_device_is_known_the_default_backends_is_taken_if_it_is_of_the_platform():
    assert as_device("cpu", None) == Device("cpu", jax.devices("cpu")[0].device_kind)
    assert as_device("tpu", jax.devices("cpu")[0]) == Device("tpu")
    assert as_device("cuda", None).platform == "gpu"
    assert Device("tpu").traits.memory == min(kind.memory for kind in KINDS.values())
