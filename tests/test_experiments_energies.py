"""experiments.energies and experiments.logistic: the numbers they print and the files they write."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import energies, logistic
from experiments._door import InputError, ScriptError

pytestmark = pytest.mark.scripts

# What it runs once, all tests read.


@pytest.fixture(scope="module")
def energy_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("energies")
    return energies.run(energies.Config(steps=6, out=out)), out


@pytest.fixture(scope="module")
def logistic_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("logistic")
    return logistic.run(logistic.Config(out=out)), out


def test_e3_3_descent_never_rises_and_the_cycles_have_length_two_and_four(energy_run):
    """Asynchronous visits lower the energy; a 2-cycle and a 4-cycle when all units move at once."""
    numbers, _ = energy_run
    assert numbers["Hopfield: largest rise of the energy at a visit"] <= 1e-12
    assert numbers["Hopfield: energy change against −Δs·field"] <= 1e-12
    assert numbers["Hopfield: cycle length, symmetric, all at once"] == 2
    assert numbers["Hopfield: cycle length, symmetric, one by one"] == 1
    assert numbers["Hopfield: cycle length, asymmetric, all at once"] == 4


def test_damaged_patterns_are_recalled_and_other_minima_exist(energy_run):
    numbers, _ = energy_run
    assert numbers["Hopfield: damaged patterns recalled"] == 4
    assert numbers["Hopfield: highest minus lowest final energy: minima are local"] > 1


@pytest.mark.parametrize(
    ("temperature", "stated"), [("0.1", 0.9999546), ("0.5", 0.8807971), ("1", 0.7310586), ("2", 0.6224593), ("10", 0.5249792)]
)  # fmt: skip
def test_s3_8_temperature_sweep(energy_run, temperature, stated):
    """A 0/1 unit at field 1."""
    assert energy_run[0][f"P(1) of a 0/1 unit, field 1, T = {temperature}"] == pytest.approx(stated, abs=5.1e-8)


def test_e3_5_a_signed_unit_is_a_binary_one_at_half_the_temperature(energy_run):
    """σ(2) at field 1 and T = 1."""
    assert energy_run[0]["P(1) of a ±1 unit, field 1, T = 1"] == pytest.approx(0.8807971, abs=5.1e-8)


@pytest.mark.parametrize("way", ["Z over 32 states", "Z from free energies", "Z from rbm_log_partition"])
def test_s3_10_partition_function(energy_run, way):
    """Z = 68.62559544 however it is summed."""
    assert energy_run[0][f"RBM: {way}"] == pytest.approx(68.62559544, abs=5.1e-9)


@pytest.mark.parametrize("which", ["visible", "joint"])
def test_s3_10_gibbs_samples_are_within_two_percent_of_the_exact_distribution(energy_run, which):
    """Total variation below .02, and not exactly 0: these are samples."""
    assert 0 < energy_run[0][f"RBM: total variation of the {which} samples"] < 0.02


@pytest.mark.parametrize(
    ("beta", "stated"),
    [
        ("0.5", (0.50648, 0.30720, 0.18632, 1.36054)),
        ("1", (0.66524, 0.24473, 0.09003, 0.40761)),
        ("2", (0.86681, 0.11731, 0.01588, 0.07147)),
    ],
)
def test_s3_13_beta_sweep(energy_run, beta, stated):
    """Probabilities and (1/β)·NLL of the first of the energies (1, 2, 3), and the gradient δ − P."""
    numbers, _ = energy_run
    computed = [numbers[f"Gibbs: {name} at β = {beta}"] for name in ("P(0)", "P(1)", "P(2)", "NLL/β of 0")]
    np.testing.assert_allclose(computed, stated, atol=5.1e-6)
    assert numbers[f"Gibbs: d(NLL/β)/dE against δ − P at β = {beta}"] < 1e-14


@pytest.mark.parametrize("label", [0, 1, 2])
def test_s3_13_loss_at_large_beta_is_the_distance_from_the_lowest_energy(energy_run, label):
    """E − min E of the energies (1, 2, 3)."""
    assert energy_run[0][f"Gibbs: NLL/β of {label} at β = 100: E − min E"] == pytest.approx(label, abs=1e-12)


def test_s3_13_maximum_likelihood_overfits_and_a_prior_generalises(energy_run):
    """Lower training loss, higher held-out loss than with a Gaussian prior."""
    numbers, _ = energy_run
    assert numbers["training loss: maximum likelihood over unit Gaussian prior"] < 0.5
    assert numbers["held-out loss: unit Gaussian prior over maximum likelihood"] < 0.5
    assert 1 < numbers["held-out loss: unit Gaussian prior over true classes"] < 2


def test_prior_fits_are_at_the_maximum_of_the_posterior():
    """The gradient of the log-likelihood, written out in NumPy, equals precision times the weights."""
    points, labels = energies.draw_points(np.random.default_rng(1), 45)
    features = energies.polynomials(points)
    assert features.shape == (45, 21)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        weights = np.asarray(energies.fit(features, labels, jnp.array(1.0)))
    scores = np.exp(np.asarray(features) @ weights)
    residuals = np.eye(3)[np.asarray(labels)] - scores / scores.sum(1, keepdims=True)
    np.testing.assert_allclose(np.asarray(features).T @ residuals, weights, atol=1e-12)


@pytest.mark.parametrize(("states", "length"), [("AAAA", 1), ("ABAB", 2), ("ABCDABCD", 4), ("ABBB", 1)])
def test_cycle_length(states, length):
    assert energies.cycle_length(np.array([[ord(state)] for state in states])) == length


def test_s3_15_two_class_softmax_at_x_seven_tenths(logistic_run):
    """σ(.7) = .66818777, the losses .40318605 and 1.10318605, the gradients σ − 1 and σ."""
    numbers, _ = logistic_run
    stated = {
        "sigmoid": 0.66818777,
        "loss of label 1": 0.40318605,
        "loss of label 0": 1.10318605,
        "gradient of label 1": 0.66818777 - 1,
        "gradient of label 0": 0.66818777,
    }
    for name, value in stated.items():
        assert numbers[f"{name} at x = 0.7"] == pytest.approx(value, abs=5.1e-9)


def test_s3_15_two_class_softmax_is_the_sigmoid_up_to_800(logistic_run):
    """Value, losses and gradients to 1e-12; the usual −log(1 − σ) is infinite from 53·log 2 on."""
    numbers, _ = logistic_run
    errors = [value for name, value in numbers.items() if name.endswith("|x| to 800")]
    assert len(errors) == 6
    assert max(errors) < 1e-12
    assert numbers["−log(1 − σ) is infinite from x ="] == pytest.approx(53 * np.log(2), abs=0.05)


def test_the_logistic_reference_is_right_in_arbitrary_precision():
    """The NumPy side of the comparison against 60-digit decimals."""
    from decimal import Decimal, localcontext

    inputs = [-700.0, -36.8, -3.0, 0.0, 0.7, 36.8, 700.0]
    curves = logistic.logistic(np.array(inputs))
    with localcontext(prec=700):
        for n, x in enumerate(inputs):
            one = 1 / (1 + (-Decimal(x)).exp())
            zero = 1 - one
            expected = (one, one * zero, -one.ln(), -zero.ln(), -zero, one)
            np.testing.assert_allclose([curve[n] for curve in curves], [float(e) for e in expected], rtol=1e-13)


def test_table_summary_and_pictures_are_written(energy_run, logistic_run):
    # Requested by name, so that the scripts run in JAX's own mode and not inside the tests' strict one.
    for (numbers, out), pictures in (
        (energy_run, {"hopfield", "temperature", "gibbs_sampling", "inverse_temperature", "prior"}),
        (logistic_run, {"logistic"}),
    ):
        assert {path.stem for path in out.glob("*.png")} == pictures
        assert json.loads((out / "summary.json").read_text()) == numbers


def test_a_number_that_does_not_match_ends_in_an_error_after_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logistic, "SIGMOID", "0.66818778")
    with pytest.raises(ScriptError, match=r"do not match: sigmoid at x = 0.7; gradient of label 1 at x = 0.7"):
        logistic.run(logistic.Config(largest=40, out=tmp_path))
    assert "sigmoid at x = 0.7" in capsys.readouterr().out
    assert (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    ("run", "config", "message"),
    [
        (energies.run, energies.Config(chains=0), "--chains: expected at least 1, got 0"),
        (energies.run, energies.Config(steps=0), "--steps: expected at least 1, got 0"),
        (energies.run, energies.Config(seed=-1), "--seed: expected an integer in [0, 2**32), got -1"),
        (logistic.run, logistic.Config(largest=float("nan")), "--largest: expected a number in (0, 1e6], got nan"),
        (logistic.run, logistic.Config(step=0), "--step: expected a number in [0.0008, 800], got 0"),
    ],
)
def test_bad_options_are_refused(run, config, message):
    with pytest.raises(InputError, match=re.escape(message)):
        run(config)
