"""experiments.flat_buffer and experiments.spatial: the numbers they print and the files they write."""

import json
import re

import numpy as np
import pytest

from experiments import flat_buffer, spatial
from experiments._door import InputError

pytestmark = pytest.mark.scripts

# What it runs once, all tests read.


@pytest.fixture(scope="module")
def buffer_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("flat_buffer")
    return flat_buffer.run(flat_buffer.Config(out=out)), out


@pytest.fixture(scope="module")
def spatial_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("spatial")
    return spatial.run(spatial.Config(scenes=10, out=out)), out


def test_s3_32_flat_index_of_a_pixel_s_classes(buffer_run):
    """Class c of pixel (i, j) at i·dim + c·inner + j: (2,3,2,2), pixel (1,3) → 15, 19, 23; its label at 7."""
    numbers, _ = buffer_run
    name = "(2, 3, 2, 2), axis 1, pixel (1, 3)"
    assert [numbers[f"{name}: class {c}"] for c in range(3)] == [15, 19, 23]
    assert numbers[f"{name}: label"] == 7
    assert numbers["index map: entries that differ from NumPy's, all axes"] == 0


@pytest.mark.parametrize("axis", range(4))
def test_s3_36_strided_dot_and_matrix_product_give_the_gradient_along_every_axis(buffer_run, axis):
    """Also with the output in the input's own memory."""
    assert buffer_run[0][f"axis {axis}: error of the walk"] < 1e-15
    assert buffer_run[0][f"axis {axis}: numbers that differ in place"] == 0


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("slip", ["dot at stride 1", "broadcast as [inner, classes]"])
def test_s3_39_wrong_layouts_are_wrong_where_a_pixel_has_neighbours(buffer_run, axis, slip):
    """They are off by more than .31 and .94; along the last axis they equal the right gradient."""
    error = buffer_run[0][f"axis {axis}: error of a {slip}"]
    assert error < 1e-15 if axis == 3 else error > 0.94


def test_s3_38_the_matrix_product_is_that_of_blas():
    """C ← βC + αAB in C's memory."""
    a, b, c = np.ones((3, 1)), np.array([[1.0, 2.0]]), np.arange(6.0).reshape(3, 2)
    flat_buffer.gemm(-1, a, b, 2, c)
    np.testing.assert_array_equal(c, [[-1, 0], [3, 4], [7, 8]])


def test_s3_28_an_image_is_150_000_losses(spatial_run):
    """Mean log 21 and sum 456,678.366 at zero scores; a stored Jacobian per pixel takes 264.6 MB."""
    numbers, _ = spatial_run
    assert numbers["losses of one image"] == 150_000
    assert numbers["zero scores: mean loss, log 21"] == pytest.approx(np.log(21), rel=1e-14)
    assert numbers["zero scores: sum of losses"] == pytest.approx(456_678.366, abs=5.1e-4)
    assert numbers["stored Jacobians, float32, MB"] == pytest.approx(264.6, abs=1e-9)


def test_s3_29_a_1x1_convolution_is_the_inner_product_of_each_pixel(spatial_run):
    numbers, _ = spatial_run
    assert numbers["1 × 1 convolution against one product per pixel"] < 1e-13
    assert numbers["losses of the image against pixel by pixel"] < 1e-12


def test_ignored_pixels_have_no_loss_and_no_gradient(spatial_run):
    numbers, _ = spatial_run
    assert numbers["ignored pixels"] > 1000
    assert numbers["ignored pixels: largest loss"] == numbers["ignored pixels: largest gradient"] == 0


@pytest.mark.parametrize(("sigma", "stated"), [(0, 138_890), (5, 1_123), (20, 81)])
def test_e3_13_effective_independent_pixels(spatial_run, sigma, stated):
    """The stated figures come from random images; the exact ones, 150,000, 1,286 and 86, are within their noise."""
    exact = spatial_run[0][f"effective pixels, blur σ = {sigma} px"]
    assert exact == pytest.approx({0: 150_000, 5: 1286, 20: 86}[sigma], abs=0.51)
    assert exact == pytest.approx(stated, rel=0.15)


def test_loss_correlation_against_drawn_pairs():
    """A quadrature against 400,000 pairs of pixels, in NumPy."""
    rng = np.random.default_rng(0)
    rho = np.array([0.0, 0.4, 0.9, 1.0])
    computed = spatial.loss_correlation(rho)
    for r, value in zip(rho, computed, strict=True):
        first, noise = rng.normal(size=(2, 3, 400_000))  # one field of labels, two of scores
        losses = []
        for label, *scores in (first, r * first + np.sqrt(1 - r**2) * noise):
            margin = np.where(label > 0, 1, -1) * (scores[1] - scores[0])
            losses.append(np.logaddexp(0, -margin))
        assert value == pytest.approx(np.corrcoef(*losses)[0, 1], abs=0.01)


def test_smooth_fields_correlate_as_stated(monkeypatch):
    """exp(−distance²/4σ²), and deviation 1 up to the border."""
    monkeypatch.setattr(spatial, "HEIGHT", 40)
    monkeypatch.setattr(spatial, "WIDTH", 50)
    rng = np.random.default_rng(0)
    fields = np.stack([spatial.smooth_field(rng, 3) for _ in range(100)])
    assert fields.std() == pytest.approx(1, abs=0.05)
    assert fields[:, 0, 0].std() == pytest.approx(1, abs=0.3)
    for distance in (2, 4, 8):
        computed = np.corrcoef(fields[:, distance:].ravel(), fields[:, :-distance].ravel())[0, 1]
        assert computed == pytest.approx(np.exp(-(distance**2) / 36), abs=0.05)


def test_e3_14_none_at_a_rate_is_valid_at_the_rate_times_the_pixels(spatial_run):
    """And 1e-10·187,500/(1−.99) = 1.9e-3 against 1e-4/(1−.9) = 1e-3: one scale."""
    numbers, _ = spatial_run
    assert numbers["NONE at η against VALID at η·n, 50 steps with momentum"] < 1e-13
    assert numbers["the same: how far the weights went"] > 0.1
    assert numbers["rate per loss, sum: 1e-10 · 187,500 / (1 − .99)"] == pytest.approx(1.875e-3)
    assert numbers["rate per loss, mean: 1e-4 / (1 − .9)"] == pytest.approx(1e-3)


def test_table_summary_and_pictures_are_written(buffer_run, spatial_run):
    # Requested by name, so that the scripts run in JAX's own mode and not inside the tests' strict one.
    for (numbers, out), pictures in ((buffer_run, {"layout"}), (spatial_run, {"losses", "effective_pixels"})):
        assert {path.stem for path in out.glob("*.png")} == pictures
        assert json.loads((out / "summary.json").read_text()) == numbers


@pytest.mark.parametrize(
    ("run", "config", "message"),
    [
        (spatial.run, spatial.Config(scenes=9), "--scenes: expected at least 10, got 9"),
        (spatial.run, spatial.Config(seed=-1), "--seed: expected an integer in [0, 2**32), got -1"),
        (flat_buffer.run, flat_buffer.Config(seed=-1), "--seed: expected an integer in [0, 2**32), got -1"),
    ],
)
def test_bad_options_are_refused(run, config, message):
    with pytest.raises(InputError, match=re.escape(message)):
        run(config)
