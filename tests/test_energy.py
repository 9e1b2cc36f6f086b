"""jaxsoft.energy: Gibbs, Hopfield, Boltzmann, restricted Boltzmann, the perceptron criterion.

The names S3.x and E3.x number the claims and the errors of a text on softmax in Caffe.
"""

import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxsoft import checked, energy

# Constants are NumPy's: JAX would round them to float32 at import.
ENERGIES = np.array([1.0, 2.0, 3.0])
LEVELS = {  # beta: probabilities, (1/beta) times the negative log-likelihood of state 0
    0.5: ((0.50648, 0.30720, 0.18632), 1.36054),
    1.0: ((0.66524, 0.24473, 0.09003), 0.40761),
    2.0: ((0.86681, 0.11731, 0.01588), 0.07147),
}
RBM = energy.RestrictedBoltzmann(
    np.array([[0.5, -1.0], [1.5, 0.3], [-0.7, 0.8]]), np.array([0.1, -0.2, 0.3]), np.array([0.4, -0.6])
)
SYMMETRIC = np.array([[0.0, -1.0], [-1.0, 0.0]])
ASYMMETRIC = np.array([[0.0, 1.0], [-1.0, 0.0]])


def rbm_weights_by_hand():
    """exp(−E) of all 8 × 4 states of RBM, one Python float at a time."""
    w, b, c = (np.asarray(part).tolist() for part in RBM)
    table = np.zeros((8, 4))
    for m, v in enumerate(itertools.product((0, 1), repeat=3)):
        for n, h in enumerate(itertools.product((0, 1), repeat=2)):
            exponent = sum(b[i] * v[i] for i in range(3)) + sum(c[j] * h[j] for j in range(2))
            exponent += sum(v[i] * w[i][j] * h[j] for i in range(3) for j in range(2))
            table[m, n] = np.exp(exponent)
    return table


def random_network(seed, units=7):
    """Symmetric couplings with a zero diagonal, a bias and a state of −1 and 1."""
    rng = np.random.default_rng(seed)
    weights = np.triu(rng.normal(size=(units, units)), 1)
    return rng.choice([-1.0, 1.0], units), weights + weights.T, rng.normal(size=units)


def hopfield_energy_by_hand(s, w, b):
    units = range(len(s))
    return -sum(s[i] * w[i, j] * s[j] for i in units for j in units) / 2 - sum(b[i] * s[i] for i in units)


def orbit(update, state, weights, length):
    """The states an update passes through, as tuples."""
    states = []
    for _ in range(length):
        states.append(tuple(np.asarray(state).tolist()))
        state = update(state, weights)
    return states


# Hopfield


def test_e3_1_hopfield_energy_is_minus_half_the_quadratic_form_minus_the_bias():
    """The energy against a double loop."""
    for seed in range(5):
        network = random_network(seed)
        np.testing.assert_allclose(energy.hopfield_energy(*network), hopfield_energy_by_hand(*network), rtol=1e-13)


def test_e3_1_a_flip_changes_the_energy_by_minus_step_times_field():
    """−Δs·field for every single flip, and the text's expression is half of it."""
    s, w, b = random_network(3)
    field = np.asarray(energy.hopfield_field(s, w, b))
    before = hopfield_energy_by_hand(s, w, b)
    for i in range(len(s)):
        flipped = s.copy()
        flipped[i] *= -1
        change = hopfield_energy_by_hand(flipped, w, b) - before
        step = flipped[i] - s[i]
        np.testing.assert_allclose(change, -step * field[i], rtol=1e-12)
        printed = -field[i] * step / 2  # −½ Wx·ΔY with the old state in the place of the label
        np.testing.assert_allclose(printed, change / 2, rtol=1e-12)


def test_hopfield_field_is_minus_the_gradient_of_the_energy():
    s, w, b = random_network(4)
    np.testing.assert_allclose(energy.hopfield_field(s, w, b), -jax.grad(energy.hopfield_energy)(s, w, b), rtol=1e-13)


def test_field_of_asymmetric_weights_sums_over_rows():
    np.testing.assert_array_equal(energy.hopfield_field(jnp.ones(2), ASYMMETRIC), [1, -1])


visit = jax.jit(energy.hopfield_asynchronous)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_s3_1_asynchronous_moves_never_raise_the_energy_and_end_in_a_local_minimum(seed):
    """Sign units lower the energy, visit by visit, until no single flip lowers it."""
    state, w, b = random_network(seed)
    energies = [hopfield_energy_by_hand(state, w, b)]
    for _ in range(20):
        before = state
        for unit in range(len(state)):
            state = np.asarray(visit(state, w, b, order=np.array([unit])))
            energies.append(hopfield_energy_by_hand(state, w, b))
        if np.array_equal(before, state):
            break
    else:
        pytest.fail("20 sweeps over 7 units did not settle")
    assert np.all(np.diff(energies) <= 1e-12)
    assert np.all(state * (w @ state + b) >= 0)


@pytest.mark.parametrize("field", [-2.0, -0.3, 0.3, 2.0])
@pytest.mark.parametrize("label", [-1.0, 1.0])
def test_s3_3_the_printed_energy_is_never_positive_for_sign_units(field, label):
    """−½ Wx·ΔY with y = sign(Wx): −|Wx| where the output is wrong, 0 where it is right."""
    printed = -field * (np.sign(field) - label) / 2
    assert printed == (0 if np.sign(field) == label else -abs(field))
    np.testing.assert_array_equal(energy.perceptron_criterion(field, label), -printed)


def test_s3_4_the_descent_ends_in_a_local_minimum_that_is_not_global():
    """Two couplings strong enough to hold a state of higher energy."""
    w = jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    bias = jnp.full(3, 0.5)
    held = energy.hopfield_asynchronous(-jnp.ones(3), w, bias)
    np.testing.assert_array_equal(held, [-1, -1, -1])
    assert energy.hopfield_energy(held, w, bias) == -0.5
    assert energy.hopfield_energy(jnp.ones(3), w, bias) == -3.5


def test_asynchronous_units_see_the_moves_before_them():
    s, w, b = random_network(11)
    order = [5, 0, 0, 3, 6, 1]
    expected = s.copy()
    for i in order:
        expected[i] = np.sign(w[i] @ expected + b[i])
    np.testing.assert_array_equal(energy.hopfield_asynchronous(s, w, b, order=jnp.array(order)), expected)
    for i in range(7):
        expected[i] = np.sign(w[i] @ expected + b[i])
    again = energy.hopfield_asynchronous(s, w, b, order=jnp.array([*order, *range(7)]))
    np.testing.assert_array_equal(again, expected)


def test_e3_3_synchronous_updates_of_symmetric_weights_have_a_2_cycle():
    """[[0, −1], [−1, 0]] from (1, 1), where visiting the units in turn settles."""
    states = orbit(energy.hopfield_synchronous, jnp.ones(2), SYMMETRIC, 5)
    assert states == [(1, 1), (-1, -1), (1, 1), (-1, -1), (1, 1)]
    assert orbit(energy.hopfield_asynchronous, jnp.ones(2), SYMMETRIC, 4) == [(1, 1), (-1, 1), (-1, 1), (-1, 1)]
    both = [float(energy.hopfield_energy(jnp.array(state), SYMMETRIC)) for state in states[:2]]
    assert both == [1, 1]  # the maximum: the settled state has −1
    assert energy.hopfield_energy(jnp.array([-1.0, 1.0]), SYMMETRIC) == -1


def test_e3_3_asymmetric_weights_have_a_4_cycle():
    """[[0, 1], [−1, 0]] goes round all four states, all at once or one unit at a time."""
    round_trip = [(1, 1), (1, -1), (-1, -1), (-1, 1)]
    assert orbit(energy.hopfield_synchronous, jnp.ones(2), ASYMMETRIC, 9) == [*round_trip, *round_trip, (1, 1)]
    state, states = jnp.ones(2), [(1, 1)]
    for unit in (0, 1) * 4:
        state = energy.hopfield_asynchronous(state, ASYMMETRIC, order=jnp.array([unit]))
        moved = tuple(np.asarray(state).tolist())
        if moved != states[-1]:
            states.append(moved)
    assert states[:5] == [*round_trip, (1, 1)]


def test_a_unit_without_field_stays():
    state = jnp.array([1.0, -1.0])
    for update in (energy.hopfield_asynchronous, energy.hopfield_synchronous):
        np.testing.assert_array_equal(update(state, jnp.zeros((2, 2))), state)


@pytest.mark.parametrize("visit", [2, -1])
def test_a_visit_out_of_range_changes_nothing(visit):
    state = jnp.ones(2)
    np.testing.assert_array_equal(energy.hopfield_asynchronous(state, SYMMETRIC, order=jnp.array([visit])), state)


# The perceptron criterion


def test_e3_2_descending_the_printed_expression_drives_the_field_the_wrong_way():
    """Label −1, field .7, input 1, step .5: 1.2 after one step and 3.2 after five, while the criterion turns it."""
    printed = jax.grad(lambda h: -energy.perceptron_criterion(h, -1))
    criterion = jax.grad(lambda h: energy.perceptron_criterion(h, -1))
    fields = {printed: [jnp.array(0.7)], criterion: [jnp.array(0.7)]}
    for gradient, path in fields.items():
        for _ in range(5):
            path.append(path[-1] - 0.5 * gradient(path[-1]))
    np.testing.assert_allclose([fields[printed][n] for n in (0, 1, 5)], [0.7, 1.2, 3.2], rtol=1e-14)
    np.testing.assert_allclose(jnp.stack(fields[criterion]), [0.7, 0.2, -0.3, -0.3, -0.3, -0.3], atol=1e-15)


def test_e3_2_plus_half_the_printed_product_is_the_perceptron_criterion():
    """½ Wx·(sign(Wx) − label) = max(0, −label·Wx)."""
    h, y = np.random.default_rng(0).normal(size=50), np.random.default_rng(1).choice([-1, 1], 50)
    np.testing.assert_allclose(energy.perceptron_criterion(jnp.asarray(h), jnp.asarray(y)), h * (np.sign(h) - y) / 2)


def test_perceptron_criterion_learns_from_zero_weights_and_passes_nan_on():
    gradient = jax.grad(energy.perceptron_criterion)
    assert [float(gradient(0.0, y)) for y in (-1, 1)] == [1, -1]
    assert jnp.isnan(energy.perceptron_criterion(jnp.nan, 1))
    assert jax.grad(energy.perceptron_criterion, argnums=1)(0.7, -1.0) == 0


# Boltzmann units


@pytest.mark.parametrize(
    ("temperature", "stated"), [(0.1, 0.9999546), (0.5, 0.8807971), (1.0, 0.7310586), (2.0, 0.6224593), (10.0, 0.5249792)]
)  # fmt: skip
def test_s3_8_probability_of_a_unit_at_field_one(temperature, stated):
    """1/(1 + e^(−1/T)) to the seven digits stated."""
    assert energy.boltzmann_probability(1.0, temperature=temperature) == pytest.approx(stated, abs=5.1e-8)


@pytest.mark.parametrize("low", [0, -1])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_e3_5_a_unit_is_gibbs_distributed_over_its_two_energies(low, temperature):
    """σ(h/T) for 0/1 units, σ(2h/T) for ±1 units, from e^(−E/T) with E = −h·s; also against gibbs_distribution."""
    fields = np.array([-3.0, -0.4, 0.0, 1.0, 2.5])
    up, down = np.exp(fields / temperature), np.exp(low * fields / temperature)
    ours = energy.boltzmann_probability(jnp.asarray(fields), temperature=temperature, low=low)
    np.testing.assert_allclose(ours, up / (up + down), rtol=1e-13)
    factor = {0: 1, -1: 2}[low]
    np.testing.assert_allclose(ours, 1 / (1 + np.exp(-factor * fields / temperature)), rtol=1e-13)
    energies = -jnp.asarray(fields)[:, None] * jnp.array([low, 1.0])
    np.testing.assert_allclose(ours, energy.gibbs_distribution(energies, beta=1 / temperature)[:, 1], rtol=1e-13)


def test_boltzmann_probability_saturates_without_nan():
    np.testing.assert_array_equal(energy.boltzmann_probability(jnp.array([-1e6, 0.0, 1e6])), [0, 0.5, 1])
    assert energy.boltzmann_probability(1.0, temperature=1e-300) == 1


# Restricted Boltzmann machines


def test_s3_9_partition_function_by_32_states_and_by_free_energies():
    """Z = 68.62559544 both ways, and by a loop over Python floats."""
    v, h = energy.binary_states(3, dtype=float), energy.binary_states(2, dtype=float)
    energies = energy.rbm_energy(RBM, v[:, None], h)
    assert energies.shape == (8, 4)
    np.testing.assert_allclose(jnp.exp(-energies), rbm_weights_by_hand(), rtol=1e-13)
    assert rbm_weights_by_hand().sum() == pytest.approx(68.62559544, abs=5.1e-9)
    assert jnp.exp(energy.log_partition(energies, None)) == pytest.approx(68.62559544, abs=5.1e-9)
    assert jnp.sum(jnp.exp(-energy.rbm_free_energy(RBM, v))) == pytest.approx(68.62559544, abs=5.1e-9)
    assert jnp.exp(energy.rbm_log_partition(RBM)) == pytest.approx(68.62559544, abs=5.1e-9)


def test_s3_10_visible_states_are_softmax_of_minus_free_energy():
    """P(v) = softmax(−F) is the marginal of e^(−E)/Z."""
    table = rbm_weights_by_hand()
    free = energy.rbm_free_energy(RBM, energy.binary_states(3, dtype=float))
    np.testing.assert_allclose(energy.gibbs_distribution(free), table.sum(1) / table.sum(), rtol=1e-13)
    np.testing.assert_allclose(jnp.exp(-free), table.sum(1), rtol=1e-13)


def test_log_partition_enumerates_either_layer():
    """Two visible and three hidden units have the partition function of three and two."""
    exchanged = energy.RestrictedBoltzmann(np.transpose(RBM.weights), RBM.hidden_bias, RBM.visible_bias)
    np.testing.assert_allclose(energy.rbm_log_partition(exchanged), energy.rbm_log_partition(RBM), rtol=1e-14)


def test_log_partition_gradient_is_the_mean_of_the_sufficient_statistics():
    p = rbm_weights_by_hand() / rbm_weights_by_hand().sum()
    v, h = np.array(list(itertools.product((0, 1), repeat=3))), np.array(list(itertools.product((0, 1), repeat=2)))
    gradient = jax.grad(energy.rbm_log_partition)(RBM)
    np.testing.assert_allclose(gradient.weights, v.T @ p @ h, rtol=1e-12)
    np.testing.assert_allclose(gradient.visible_bias, p.sum(1) @ v, rtol=1e-12)
    np.testing.assert_allclose(gradient.hidden_bias, p.sum(0) @ h, rtol=1e-12)


def test_s3_10_gibbs_sampling_reaches_the_joint_distribution():
    """40,000 chains of 30 steps: total variation below .02 over the 8 visible and the 32 joint states."""
    v, h = energy.rbm_gibbs(jax.random.key(0), RBM, jnp.zeros((40_000, 3)), steps=30)
    rows, columns = np.asarray(v) @ [4, 2, 1], np.asarray(h) @ [2, 1]
    counts = np.zeros((8, 4))
    np.add.at(counts, (rows.astype(int), columns.astype(int)), 1 / 40_000)
    exact = rbm_weights_by_hand() / rbm_weights_by_hand().sum()
    assert np.abs(counts.sum(1) - exact.sum(1)).sum() / 2 < 0.02
    assert np.abs(counts - exact).sum() / 2 < 0.02


def test_one_gibbs_step_draws_hidden_from_visible_then_visible_from_hidden():
    """The conditionals after one step from a fixed start, within five standard errors."""
    chains, start = 40_000, np.array([1.0, 0.0, 1.0])
    v, h = energy.rbm_gibbs(jax.random.key(1), RBM, jnp.broadcast_to(jnp.asarray(start), (chains, 3)))
    w, b, c = map(np.asarray, RBM)
    within = 5 * 0.5 / chains**0.5
    np.testing.assert_allclose(np.mean(h, 0), 1 / (1 + np.exp(-(start @ w + c))), atol=within)
    for hidden in itertools.product((0, 1), repeat=2):
        chosen = np.asarray(v)[(np.asarray(h) == hidden).all(1)]
        expected = 1 / (1 + np.exp(-(w @ hidden + b)))
        np.testing.assert_allclose(chosen.mean(0), expected, atol=2.5 / len(chosen) ** 0.5)


def test_layers_without_couplings_are_drawn_independently():
    """As many visible as hidden units: numbers drawn from one key would agree everywhere."""
    free = energy.RestrictedBoltzmann(np.zeros((4, 4)), np.zeros(4), np.zeros(4))
    v, h = energy.rbm_gibbs(jax.random.key(2), free, jnp.zeros((5_000, 4)))
    assert np.mean(v == h) == pytest.approx(0.5, abs=0.02)


def test_sampling_is_repeatable_and_steps_differ():
    draw = lambda key, steps: energy.rbm_gibbs(jax.random.key(key), RBM, jnp.zeros((64, 3)), steps=steps)[0]  # noqa: E731
    np.testing.assert_array_equal(draw(0, 3), draw(0, 3))
    assert not np.array_equal(draw(0, 3), draw(1, 3))
    assert not np.array_equal(draw(0, 3), draw(0, 4))


def test_binary_states_count():
    np.testing.assert_array_equal(energy.binary_states(3), list(itertools.product((0, 1), repeat=3)))
    assert energy.binary_states(0).shape == (1, 0)


# The Gibbs distribution


@pytest.mark.parametrize("beta", LEVELS)
def test_s3_13_gibbs_distribution_at_inverse_temperature(beta):
    """E = (1, 2, 3): the probabilities to five digits, also as softmax of −βE written out."""
    stated, _ = LEVELS[beta]
    ours = energy.gibbs_distribution(ENERGIES, beta=beta)
    np.testing.assert_allclose(ours, stated, atol=5.1e-6)
    weights = np.exp(-beta * np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(ours, weights / weights.sum(), rtol=1e-14)
    np.testing.assert_allclose(energy.log_partition(ENERGIES, beta=beta), np.log(weights.sum()), rtol=1e-14)


@pytest.mark.parametrize("beta", LEVELS)
def test_s3_13_loss_of_a_state_and_its_gradient(beta):
    """(1/β) NLL of state 0 to five digits; its derivative by the energies is δ − P."""

    def loss(energies):
        return energies[0] + energy.log_partition(energies, beta=beta) / beta

    probabilities, stated = LEVELS[beta]
    assert loss(ENERGIES) == pytest.approx(stated, abs=5.1e-6)
    np.testing.assert_allclose(jax.grad(loss)(ENERGIES), np.array([1.0, 0, 0]) - probabilities, atol=5.1e-6)


@pytest.mark.parametrize("label", [0, 1, 2])
def test_s3_13_the_loss_tends_to_the_distance_from_the_lowest_energy(label):
    """(1/β) NLL → E_Y − min E as β grows."""
    loss = ENERGIES[label] + energy.log_partition(ENERGIES, beta=200.0) / 200
    np.testing.assert_allclose(loss, label, atol=1e-15)


def test_s3_12_beta_one_is_softmax_of_minus_the_energies():
    """β = 1 by default."""
    e = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4, 5)))
    np.testing.assert_allclose(energy.gibbs_distribution(e, 1), jax.nn.softmax(-e, axis=1), rtol=1e-13)
    np.testing.assert_allclose(
        energy.log_partition(e, (0, 2)), jax.scipy.special.logsumexp(-e, axis=(0, 2)), rtol=1e-13
    )


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_e3_6_the_printed_formula_reverses_the_ranking(beta):
    """e^(−β)·E/Σ e^(−β)·E prefers the highest energy, whatever β."""
    printed = np.exp(-beta) * np.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(printed / printed.sum(), [1 / 6, 2 / 6, 3 / 6], rtol=1e-14)
    ours = np.asarray(energy.gibbs_distribution(ENERGIES, beta=beta))
    np.testing.assert_array_equal(np.argsort(ours), np.argsort(printed)[::-1])


def test_derivatives_by_energies_and_beta():
    e = jnp.asarray(np.random.default_rng(3).normal(size=5))
    check_grads(lambda e, beta: energy.log_partition(e, beta=beta), (e, 0.7), order=2, modes=["rev"])
    check_grads(lambda e, beta: energy.gibbs_distribution(e, beta=beta), (e, 0.7), order=2, modes=["rev"])


def test_forbidden_states_have_no_probability_and_no_gradient_at_any_beta():
    e = jnp.array([1.0, jnp.inf, 2.0])
    for beta in (0.0, 1.0):
        p = energy.gibbs_distribution(e, beta=beta)
        np.testing.assert_allclose(p, np.insert(energy.gibbs_distribution(jnp.array([1.0, 2.0]), beta=beta), 1, 0.0))
        by_energy, by_beta = jax.grad(lambda e, b: energy.log_partition(e, beta=b), argnums=(0, 1))(e, beta)
        np.testing.assert_allclose(by_energy, -beta * np.asarray(p))
        np.testing.assert_allclose(by_beta, -(p[0] * 1 + p[2] * 2))
    assert jnp.isnan(energy.gibbs_distribution(jnp.array([1.0, jnp.nan]))).all()


def test_forbidden_states_pass_nothing_on_and_take_nothing():
    """A cotangent at one, NaN as that of p log p, does not reach the others; an infinite one does not reach it."""
    e = jnp.array([1.0, jnp.inf, 2.0])
    (through,) = jax.vjp(energy.gibbs_distribution, e)[1](jnp.array([1.0, jnp.nan, 3.0]))
    p = np.exp([-1.0, -2.0]) / np.exp([-1.0, -2.0]).sum()
    np.testing.assert_allclose(through, np.insert(2 * p[0] * p[1] * np.array([1.0, -1.0]), 1, 0), rtol=1e-13)
    (gradient,) = jax.vjp(energy.log_partition, e)[1](jnp.array(jnp.inf))
    np.testing.assert_array_equal(gradient, [-np.inf, 0, -np.inf])


# The interface

S, W, B = random_network(5)


def machine(dtype):
    return jax.tree.map(lambda part: part.astype(dtype), RBM)


CALLS = {  # each of one batch row of seven numbers
    "boltzmann_probability": lambda x: energy.boltzmann_probability(x, temperature=2.0, low=-1),
    "gibbs_distribution": lambda x: energy.gibbs_distribution(x, beta=2.0),
    "hopfield_asynchronous": lambda x: energy.hopfield_asynchronous(jnp.sign(x), W.astype(x.dtype)),
    "hopfield_energy": lambda x: energy.hopfield_energy(x, W.astype(x.dtype), B.astype(x.dtype)),
    "hopfield_field": lambda x: energy.hopfield_field(x, W.astype(x.dtype), B.astype(x.dtype)),
    "hopfield_synchronous": lambda x: energy.hopfield_synchronous(jnp.sign(x), W.astype(x.dtype)),
    "log_partition": lambda x: energy.log_partition(x, beta=2.0),
    "perceptron_criterion": lambda x: energy.perceptron_criterion(x, 1),
    "rbm_energy": lambda x: energy.rbm_energy(machine(x.dtype), x[:3], x[3:5]),
    "rbm_free_energy": lambda x: energy.rbm_free_energy(machine(x.dtype), x[:3]),
    "rbm_gibbs": lambda x: energy.rbm_gibbs(jax.random.key(0), machine(x.dtype), x[:3], steps=2)[0],
    "rbm_log_partition": lambda x: energy.rbm_log_partition(machine(x.dtype)._replace(visible_bias=x[:3])),
}


FUNCTIONS = {name: fn for name in energy.__all__ if inspect.isfunction(fn := getattr(energy, name))}


def test_every_function_is_called_here():
    assert set(FUNCTIONS) == {*CALLS, "binary_states"}


@pytest.mark.parametrize("states", [np.array([1, -1, 1, 1, -1, 1, 1]), np.ones(7, np.int8)])
def test_integer_states_take_the_dtype_of_the_weights(states):
    """Where a default dtype would have them promoted."""
    w = W.astype(np.float32)
    for result in (energy.hopfield_energy(states, w), energy.hopfield_asynchronous(states, w)):
        assert result.dtype == np.float32
    for result in (energy.rbm_energy(machine(np.float32), states[:3], states[:2]), *energy.rbm_gibbs(jax.random.key(0), machine(np.float32), states[:3])):  # fmt: skip
        assert result.dtype == np.float32
    np.testing.assert_allclose(energy.hopfield_energy(states, w), hopfield_energy_by_hand(states, W, 0 * B), rtol=1e-6)
    assert energy.hopfield_energy(states, np.sign(W).astype(int)).dtype == np.float64


@pytest.mark.x32
@pytest.mark.parametrize(
    "order",
    [[2**32 + 1], [1 - 2**32], np.array([2**63 + 1], np.uint64), np.array([3], np.uint8), jnp.array([3], jnp.int8)],
)
def test_a_visit_to_no_unit_changes_nothing_in_any_dtype(order):
    """Its lower bits are a unit that would move."""
    state = np.ones(2, np.float32)
    assert energy.hopfield_asynchronous(state, SYMMETRIC, order=[1])[1] == -1
    np.testing.assert_array_equal(energy.hopfield_asynchronous(state, SYMMETRIC, order=order), state)
    with pytest.raises(ValueError, match=re.escape("expected a unit in [0, 2)")):
        checked(lambda s: energy.hopfield_asynchronous(s, SYMMETRIC, order=order))(state)


def test_visits_wider_and_narrower_than_32_bits():
    """2³² + 1 is not unit 1, nor is a dtype too narrow that cannot count the units."""
    state = np.ones(2)
    far = jnp.array([2**32 + 1])
    np.testing.assert_array_equal(energy.hopfield_asynchronous(state, SYMMETRIC, order=far), state)
    down = energy.hopfield_asynchronous(
        np.ones(200), np.zeros((200, 200)), -np.ones(200), order=jnp.array([3], jnp.int8)
    )
    np.testing.assert_array_equal(down, np.where(np.arange(200) == 3, -1, 1))


@pytest.mark.parametrize("name", CALLS)
def test_works_under_jit_and_vmap_and_keeps_the_dtype(name):
    call, batch = CALLS[name], jnp.asarray(np.random.default_rng(6).normal(size=(4, 7)))
    one_by_one = jnp.stack([call(row) for row in batch])
    np.testing.assert_allclose(jax.jit(jax.vmap(call))(batch), one_by_one, rtol=1e-12)
    assert one_by_one.dtype == jnp.float64
    for dtype in (jnp.float32, jnp.float64):
        assert jax.eval_shape(jax.vmap(call), batch.astype(dtype)).dtype == dtype


@pytest.mark.x32
@pytest.mark.parametrize("name", CALLS)
def test_works_in_default_mode(name):
    assert CALLS[name](jnp.linspace(-1, 1, 7)).dtype == jnp.float32


@pytest.mark.parametrize(
    "call",
    [
        lambda x: energy.hopfield_energy(x, W, B),
        lambda x: energy.hopfield_field(x, W, B),
        lambda x: energy.hopfield_asynchronous(jnp.sign(x), W, B),
        lambda x: energy.hopfield_synchronous(jnp.sign(x), W, B),
        lambda x: energy.rbm_energy(RBM, x[..., :3], x[..., 3:5]),
        lambda x: energy.rbm_free_energy(RBM, x[..., :3]),
    ],
    ids=["energy", "field", "asynchronous", "synchronous", "rbm_energy", "rbm_free_energy"],
)
def test_leading_axes_are_a_batch(call):
    batch = jnp.asarray(np.random.default_rng(7).normal(size=(2, 3, 7)))
    np.testing.assert_allclose(call(batch), jax.vmap(jax.vmap(call))(batch), rtol=1e-13)


def test_temperature_and_beta_may_be_traced():
    scalars = jnp.array([0.5, 1.0, 2.0])
    warm = jax.jit(jax.vmap(lambda t: energy.boltzmann_probability(1.0, temperature=t)))(scalars)
    np.testing.assert_allclose(warm, [0.8807971, 0.7310586, 0.6224593], atol=5.1e-8)
    rows = jax.jit(jax.vmap(lambda beta: energy.gibbs_distribution(ENERGIES, beta=beta)))(scalars)
    np.testing.assert_allclose(rows, [LEVELS[beta][0] for beta in LEVELS], atol=5.1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_states_everything_and_options_are_keyword_only(name):
    doc = inspect.getdoc(FUNCTIONS[name]) or ""
    for part in ("Args:", "Returns:", "Edges:", "Raises:", "Example:", ">>> "):
        assert part in doc, f"{name} has no {part!r}"
    options = {"beta", "temperature", "low", "order", "steps", "dtype"}
    for parameter in inspect.signature(FUNCTIONS[name]).parameters.values():
        assert (parameter.name in options) == (parameter.kind is parameter.KEYWORD_ONLY)


BAD_RBM = energy.RestrictedBoltzmann(np.ones((3, 2)), np.ones(2), np.ones(2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: energy.gibbs_distribution(ENERGIES, beta=jnp.ones(2)), ValueError, "beta: expected a scalar, got shape (2,); map over it with jax.vmap"),
        (lambda: energy.gibbs_distribution(ENERGIES > 1), TypeError, "energies: expected real numbers, got dtype bool"),
        (lambda: energy.log_partition(ENERGIES, 1), ValueError, "axis: expected an integer in [-1, 1), got 1"),
        (lambda: energy.hopfield_energy(S, W[:3]), ValueError, "weights: expected a square matrix, got shape (3, 7)"),
        (lambda: energy.hopfield_energy(S[:3], W), ValueError, "state: expected 7 units along the last axis, got shape (3,)"),
        (lambda: energy.hopfield_field(S, W, B[:1]), ValueError, "bias: expected shape (7,), got (1,)"),
        (lambda: energy.hopfield_synchronous(1.0, W), ValueError, "state: expected 7 units along the last axis, got shape ()"),
        (lambda: energy.hopfield_asynchronous(S, W, order=jnp.ones((1, 1), int)), ValueError, "order: expected one dimension, got shape (1, 1)"),
        (lambda: energy.hopfield_asynchronous(S, W, order=jnp.ones(1)), TypeError, "order: expected integers, got dtype float64"),
        (lambda: energy.perceptron_criterion(S, S[:3]), ValueError, "labels: expected a shape that broadcasts to (7,), got (3,)"),
        (lambda: energy.boltzmann_probability(S, temperature=S), ValueError, "temperature: expected a scalar, got shape (7,)"),
        (lambda: energy.boltzmann_probability(S, temperature=0), ValueError, "temperature: expected a number that is positive in float64, got 0"),
        (lambda: energy.boltzmann_probability(S, temperature=float("nan")), ValueError, "temperature: expected a number that is positive in float64, got nan"),
        (lambda: energy.boltzmann_probability(S, low=1), ValueError, "low: expected 0 or -1, got 1"),  # pyright: ignore[reportArgumentType]
        (lambda: energy.rbm_free_energy(RBM, S), ValueError, "visible: expected 3 units along the last axis, got shape (7,)"),
        (lambda: energy.rbm_energy(RBM, S[:3], S[:3]), ValueError, "hidden: expected 2 units along the last axis, got shape (3,)"),
        (lambda: energy.rbm_energy(RBM, jnp.ones((4, 3)), jnp.ones((5, 2))), ValueError, "hidden: expected batch axes that broadcast with (4,), got (5,)"),
        (lambda: energy.rbm_log_partition(BAD_RBM), ValueError, "visible_bias: expected shape (3,), got (2,)"),
        (lambda: energy.rbm_free_energy(BAD_RBM._replace(weights=jnp.ones(3)), S), ValueError, "weights: expected shape (visible, hidden), got (3,)"),
        (lambda: energy.rbm_log_partition(energy.RestrictedBoltzmann(jnp.ones((21, 22)), jnp.ones(21), jnp.ones(22))), ValueError, "params: expected a layer of at most 20 units to enumerate, got weights (21, 22)"),
        (lambda: energy.rbm_gibbs(jax.random.key(0), RBM, jnp.ones(3), steps=0), ValueError, "steps: expected at least 1, got 0"),
        (lambda: energy.binary_states(21), ValueError, "units: expected an integer in [0, 20], got 21"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: checked(energy.hopfield_synchronous)(jnp.array([1.0, 0.0]), SYMMETRIC), "state[1] is 0.0: expected -1 or 1"),
        (lambda: checked(lambda s: energy.hopfield_asynchronous(s, SYMMETRIC, order=jnp.array([0, 2])))(jnp.ones(2)), "order[1] is 2: expected a unit in [0, 2)"),
        (lambda: checked(energy.perceptron_criterion)(jnp.ones(2), jnp.array([1, 0])), "labels[1] is 0.0: expected -1 or 1"),
        (lambda: checked(lambda t: energy.boltzmann_probability(1.0, temperature=t))(jnp.array(-1.0)), "temperature is -1.0: expected a positive number"),
    ],
)  # fmt: skip
def test_checked_looks_at_values(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
