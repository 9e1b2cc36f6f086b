"""jaxsoft.energy: Gibbs, Hopfield, Boltzmann, restricted Boltzmann, the perceptron criterion.

IDs such as S3.1 and E3.1 number the claims and the errors of a text on softmax in Caffe.
"""

import functools
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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

asynchronous = jax.jit(energy.hopfield_asynchronous)
synchronous = jax.jit(energy.hopfield_synchronous)
hopfield_energy = jax.jit(energy.hopfield_energy)
hopfield_field = jax.jit(energy.hopfield_field)


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
    """The states that an update passes through, as tuples."""
    states = []
    for _ in range(length):
        states.append(tuple(np.asarray(state).tolist()))
        state = update(state, weights)
    return states


# Hopfield


def test_hopfield_energy_is_minus_half_the_quadratic_form_minus_the_bias():
    """E3.1: The energy against a double loop."""
    for seed in range(5):
        network = random_network(seed)
        np.testing.assert_allclose(hopfield_energy(*network), hopfield_energy_by_hand(*network), rtol=1e-13)


def test_a_flip_changes_the_energy_by_minus_step_times_field():
    """E3.1: −Δs·field for every single flip, and the text's expression is half of it."""
    s, w, b = random_network(3)
    field = np.asarray(hopfield_field(s, w, b))
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
    np.testing.assert_allclose(hopfield_field(s, w, b), -jax.jit(jax.grad(energy.hopfield_energy))(s, w, b), rtol=1e-13)


def test_field_of_asymmetric_weights_sums_over_rows():
    np.testing.assert_array_equal(hopfield_field(np.ones(2), ASYMMETRIC), [1, -1])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_asynchronous_moves_never_raise_the_energy_and_end_in_a_local_minimum(seed):
    """S3.1: Sign units lower the energy, visit by visit, until no single flip lowers it."""
    state, w, b = random_network(seed)
    energies = [hopfield_energy_by_hand(state, w, b)]
    for _ in range(20):
        before = state
        for unit in range(len(state)):
            state = np.asarray(asynchronous(state, w, b, order=np.array([unit])))
            energies.append(hopfield_energy_by_hand(state, w, b))
        if np.array_equal(before, state):
            break
    else:
        pytest.fail("20 sweeps over 7 units did not settle")
    assert np.all(np.diff(energies) <= 1e-12)
    assert np.all(state * (w @ state + b) >= 0)


@pytest.mark.parametrize("field", [-2.0, -0.3, 0.3, 2.0])
@pytest.mark.parametrize("label", [-1.0, 1.0])
def test_the_printed_energy_is_never_positive_for_sign_units(field, label):
    """S3.3: −½ Wx·ΔY with y = sign(Wx): −|Wx| where the output is wrong, 0 where it is right."""
    printed = -field * (np.sign(field) - label) / 2
    assert printed == (0 if np.sign(field) == label else -abs(field))
    np.testing.assert_array_equal(jax.jit(energy.perceptron_criterion)(field, label), -printed)


def test_the_descent_ends_in_a_local_minimum_that_is_not_global():
    """S3.4: Two couplings strong enough to hold a state of higher energy."""
    w = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    bias = np.full(3, 0.5)
    held = asynchronous(-np.ones(3), w, bias)
    np.testing.assert_array_equal(held, [-1, -1, -1])
    assert hopfield_energy(held, w, bias) == -0.5
    assert hopfield_energy(np.ones(3), w, bias) == -3.5


def test_asynchronous_units_see_the_moves_before_them():
    s, w, b = random_network(11)
    order = [5, 0, 0, 3, 6, 1]
    expected = s.copy()
    for i in order:
        expected[i] = np.sign(w[i] @ expected + b[i])
    np.testing.assert_array_equal(energy.hopfield_asynchronous(s, w, b, order=order), expected)
    for i in range(7):
        expected[i] = np.sign(w[i] @ expected + b[i])
    again = asynchronous(s, w, b, order=np.array([*order, *range(7)]))
    np.testing.assert_array_equal(again, expected)


def test_synchronous_updates_of_symmetric_weights_have_a_2_cycle():
    """E3.3: [[0, −1], [−1, 0]] from (1, 1), where visiting the units in turn settles."""
    states = orbit(synchronous, np.ones(2), SYMMETRIC, 5)
    assert states == [(1, 1), (-1, -1), (1, 1), (-1, -1), (1, 1)]
    assert orbit(asynchronous, np.ones(2), SYMMETRIC, 4) == [(1, 1), (-1, 1), (-1, 1), (-1, 1)]
    both = [float(hopfield_energy(np.array(state), SYMMETRIC)) for state in states[:2]]
    assert both == [1, 1]  # the maximum: the settled state has −1
    assert hopfield_energy(np.array([-1.0, 1.0]), SYMMETRIC) == -1


def test_asymmetric_weights_have_a_4_cycle():
    """E3.3: [[0, 1], [−1, 0]] goes round all four states, all at once or one unit at a time."""
    round_trip = [(1, 1), (1, -1), (-1, -1), (-1, 1)]
    assert orbit(synchronous, np.ones(2), ASYMMETRIC, 9) == [*round_trip, *round_trip, (1, 1)]
    state, states = np.ones(2), [(1, 1)]
    for unit in (0, 1) * 4:
        state = asynchronous(state, ASYMMETRIC, order=np.array([unit]))
        moved = tuple(np.asarray(state).tolist())
        if moved != states[-1]:
            states.append(moved)
    assert states[:5] == [*round_trip, (1, 1)]


def test_a_unit_without_field_stays():
    state = np.array([1.0, -1.0])
    for update in (asynchronous, synchronous):
        np.testing.assert_array_equal(update(state, np.zeros((2, 2))), state)


@pytest.mark.parametrize("visit", [2, -1])
def test_a_visit_out_of_range_changes_nothing(visit):
    state = np.ones(2)
    np.testing.assert_array_equal(asynchronous(state, SYMMETRIC, order=np.array([visit])), state)


# The perceptron criterion


def test_descending_the_printed_expression_drives_the_field_the_wrong_way():
    """E3.2: Label −1, field .7, input 1, step .5: 1.2 after one step and 3.2 after five, while the criterion turns it."""
    gradient = jax.jit(jax.grad(lambda h: energy.perceptron_criterion(h, -1)))
    paths = {-1: [0.7], 1: [0.7]}  # along the printed expression, and along the criterion
    for sign, path in paths.items():
        for _ in range(5):
            path.append(path[-1] - 0.5 * sign * float(gradient(path[-1])))
    np.testing.assert_allclose([paths[-1][n] for n in (0, 1, 5)], [0.7, 1.2, 3.2], rtol=1e-14)
    np.testing.assert_allclose(paths[1], [0.7, 0.2, -0.3, -0.3, -0.3, -0.3], atol=1e-15)


def test_plus_half_the_printed_product_is_the_perceptron_criterion():
    """E3.2: ½ Wx·(sign(Wx) − label) = max(0, −label·Wx)."""
    h, y = np.random.default_rng(0).normal(size=50), np.random.default_rng(1).choice([-1, 1], 50)
    np.testing.assert_allclose(jax.jit(energy.perceptron_criterion)(h, y), h * (np.sign(h) - y) / 2)


def test_perceptron_criterion_learns_from_zero_weights_and_propagates_nan():
    gradients = jax.jit(jax.value_and_grad(energy.perceptron_criterion, argnums=(0, 1)))
    assert [float(gradients(0.0, y)[1][0]) for y in (-1.0, 1.0)] == [1, -1]
    assert np.isnan(gradients(np.nan, 1.0)[0])
    assert gradients(0.7, -1.0)[1][1] == 0


# Boltzmann units


@pytest.mark.parametrize(
    ("temperature", "stated"), [(0.1, 0.9999546), (0.5, 0.8807971), (1.0, 0.7310586), (2.0, 0.6224593), (10.0, 0.5249792)]
)  # fmt: skip
def test_probability_of_a_unit_at_field_one(temperature, stated):
    """S3.8: 1/(1 + e^(−1/T)) to the seven digits stated."""
    assert energy.boltzmann_probability(1.0, temperature=temperature) == pytest.approx(stated, abs=5.1e-8)


@functools.partial(jax.jit, static_argnums=3)
def a_unit(fields, energies, temperature, low):
    return (
        energy.boltzmann_probability(fields, temperature=temperature, low=low),
        energy.gibbs_distribution(energies, beta=1 / temperature),
    )


@pytest.mark.parametrize("low", [0, -1])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_unit_is_gibbs_distributed_over_its_two_energies(low, temperature):
    """E3.5: σ(h/T) for 0/1 units, σ(2h/T) for ±1 units, from e^(−E/T) with E = −h·s; also against gibbs_distribution."""
    fields = np.array([-3.0, -0.4, 0.0, 1.0, 2.5])
    up, down = np.exp(fields / temperature), np.exp(low * fields / temperature)
    energies = -fields[:, None] * np.array([low, 1.0])
    ours, of_two = a_unit(fields, energies, temperature, low)
    np.testing.assert_allclose(ours, up / (up + down), rtol=1e-13)
    factor = {0: 1, -1: 2}[low]
    np.testing.assert_allclose(ours, 1 / (1 + np.exp(-factor * fields / temperature)), rtol=1e-13)
    np.testing.assert_allclose(ours, of_two[:, 1], rtol=1e-13)


def test_boltzmann_probability_saturates_without_nan():
    np.testing.assert_array_equal(energy.boltzmann_probability(np.array([-1e6, 0.0, 1e6])), [0, 0.5, 1])
    assert energy.boltzmann_probability(1.0, temperature=1e-300) == 1


# Restricted Boltzmann machines


def test_partition_function_by_32_states_and_by_free_energies():
    """S3.9: Z = 68.62559544 both ways, and by a loop over Python floats."""

    @jax.jit
    def run():
        v, h = energy.binary_states(3, dtype=float), energy.binary_states(2, dtype=float)
        energies, free = energy.rbm_energy(RBM, v[:, None], h), energy.rbm_free_energy(RBM, v)
        sums = energy.log_partition(energies, None), jax.nn.logsumexp(-free), energy.rbm_log_partition(RBM)
        return energies, [jnp.exp(log) for log in sums]

    energies, sums = run()
    assert energies.shape == (8, 4)
    np.testing.assert_allclose(np.exp(-energies), rbm_weights_by_hand(), rtol=1e-13)
    for total in (rbm_weights_by_hand().sum(), *sums):
        assert total == pytest.approx(68.62559544, abs=5.1e-9)


def test_visible_states_are_softmax_of_minus_free_energy():
    """S3.10: P(v) = softmax(−F) is the marginal of e^(−E)/Z."""
    table = rbm_weights_by_hand()

    @jax.jit
    def run():
        free = energy.rbm_free_energy(RBM, energy.binary_states(3, dtype=float))
        return free, energy.gibbs_distribution(free)

    free, distribution = run()
    np.testing.assert_allclose(distribution, table.sum(1) / table.sum(), rtol=1e-13)
    np.testing.assert_allclose(np.exp(-free), table.sum(1), rtol=1e-13)


def test_log_partition_enumerates_up_to_20_units():
    params = energy.RestrictedBoltzmann(np.zeros((20, 21)), np.zeros(20), np.zeros(21))
    assert jax.eval_shape(energy.rbm_log_partition, params).shape == ()


def test_log_partition_enumerates_either_layer():
    """Two visible and three hidden units have the partition function of three and two."""
    exchanged = energy.RestrictedBoltzmann(np.transpose(RBM.weights), RBM.hidden_bias, RBM.visible_bias)
    either = [jax.jit(energy.rbm_log_partition)(params) for params in (exchanged, RBM)]
    np.testing.assert_allclose(*either, rtol=1e-14)


def test_log_partition_gradient_is_the_mean_of_the_sufficient_statistics():
    p = rbm_weights_by_hand() / rbm_weights_by_hand().sum()
    v, h = np.array(list(itertools.product((0, 1), repeat=3))), np.array(list(itertools.product((0, 1), repeat=2)))
    gradient = jax.jit(jax.grad(energy.rbm_log_partition))(RBM)
    np.testing.assert_allclose(gradient.weights, v.T @ p @ h, rtol=1e-12)
    np.testing.assert_allclose(gradient.visible_bias, p.sum(1) @ v, rtol=1e-12)
    np.testing.assert_allclose(gradient.hidden_bias, p.sum(0) @ h, rtol=1e-12)


@functools.partial(jax.jit, static_argnums=3)
def rbm_gibbs(seed, params, visible, steps=1):
    return energy.rbm_gibbs(jax.random.key(seed), params, visible, steps=steps)


def test_gibbs_sampling_reaches_the_joint_distribution():
    """S3.10: 40,000 chains of 30 steps: total variation below .02 over the 8 visible and the 32 joint states."""
    v, h = rbm_gibbs(0, RBM, np.zeros((40_000, 3)), 30)
    rows, columns = np.asarray(v) @ [4, 2, 1], np.asarray(h) @ [2, 1]
    counts = np.zeros((8, 4))
    np.add.at(counts, (rows.astype(int), columns.astype(int)), 1 / 40_000)
    exact = rbm_weights_by_hand() / rbm_weights_by_hand().sum()
    assert np.abs(counts.sum(1) - exact.sum(1)).sum() / 2 < 0.02
    assert np.abs(counts - exact).sum() / 2 < 0.02


def test_one_gibbs_step_draws_hidden_from_visible_then_visible_from_hidden():
    """The conditionals after one step from a fixed start, within five standard errors."""
    chains, start = 40_000, np.array([1.0, 0.0, 1.0])
    v, h = rbm_gibbs(1, RBM, np.broadcast_to(start, (chains, 3)))
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
    v, h = rbm_gibbs(2, free, np.zeros((5_000, 4)))
    assert np.mean(np.asarray(v) == np.asarray(h)) == pytest.approx(0.5, abs=0.02)


def test_sampling_is_repeatable_and_steps_differ():
    first, again, other, more = (
        rbm_gibbs(seed, RBM, np.zeros((40_000, 3)), steps)[0] for seed, steps in ((0, 1), (0, 1), (1, 1), (0, 30))
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, more)


def test_binary_states_count():
    np.testing.assert_array_equal(energy.binary_states(3), list(itertools.product((0, 1), repeat=3)))
    assert energy.binary_states(0).shape == (1, 0)


# The Gibbs distribution


@functools.cache
def at_levels():
    """For each β the probabilities, log Z, (1/β) NLL of state 0 and its gradient."""

    def at(energies, beta):
        def loss(energies):
            log_z = energy.log_partition(energies, beta=beta)
            return energies[0] + log_z / beta, log_z

        (value, log_z), gradient = jax.value_and_grad(loss, has_aux=True)(energies)
        return energy.gibbs_distribution(energies, beta=beta), log_z, value, gradient

    return jax.jit(lambda energies: {beta: at(energies, beta) for beta in (*LEVELS, 200.0)})(ENERGIES)


@pytest.mark.parametrize("beta", LEVELS)
def test_gibbs_distribution_at_inverse_temperature(beta):
    """S3.13: E = (1, 2, 3): the probabilities to five digits, also as softmax of −βE written out."""
    stated, _ = LEVELS[beta]
    ours, log_z, *_ = at_levels()[beta]
    np.testing.assert_allclose(ours, stated, atol=5.1e-6)
    weights = np.exp(-beta * np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(ours, weights / weights.sum(), rtol=1e-14)
    np.testing.assert_allclose(log_z, np.log(weights.sum()), rtol=1e-14)


@pytest.mark.parametrize("beta", LEVELS)
def test_loss_of_a_state_and_its_gradient(beta):
    """S3.13: (1/β) NLL of state 0 to five digits; its derivative by the energies is δ − P."""
    probabilities, stated = LEVELS[beta]
    *_, loss, gradient = at_levels()[beta]
    assert loss == pytest.approx(stated, abs=5.1e-6)
    np.testing.assert_allclose(gradient, np.array([1.0, 0, 0]) - probabilities, atol=5.1e-6)


@pytest.mark.parametrize("label", [0, 1, 2])
def test_the_loss_tends_to_the_distance_from_the_lowest_energy(label):
    """S3.13: (1/β) NLL → E_Y − min E as β grows."""
    loss = ENERGIES[label] + at_levels()[200.0][1] / 200
    np.testing.assert_allclose(loss, label, atol=1e-15)


def test_beta_one_is_softmax_of_minus_the_energies():
    """S3.12: β = 1 by default."""
    e = np.random.default_rng(2).normal(size=(3, 4, 5))
    distribution, log_z = jax.jit(lambda e: (energy.gibbs_distribution(e, 1), energy.log_partition(e, (0, 2))))(e)
    np.testing.assert_allclose(distribution, np.exp(-e) / np.exp(-e).sum(1, keepdims=True), rtol=1e-13)
    np.testing.assert_allclose(log_z, np.log(np.exp(-e).sum((0, 2))), rtol=1e-13)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_the_printed_formula_reverses_the_ranking(beta):
    """E3.6: e^(−β)·E/Σ e^(−β)·E prefers the highest energy, whatever β."""
    printed = np.exp(-beta) * np.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(printed / printed.sum(), [1 / 6, 2 / 6, 3 / 6], rtol=1e-14)
    ours = np.asarray(at_levels()[beta][0])
    np.testing.assert_array_equal(np.argsort(ours), np.argsort(printed)[::-1])


def test_derivatives_by_energies_and_beta():
    """First and second derivatives along a random direction, against differences."""
    random = np.random.default_rng(3)
    cotangent, h = random.normal(size=5), 1e-4

    def log_z(x):
        return energy.log_partition(x[:5], beta=x[5])

    def probability(x):
        return jnp.vdot(energy.gibbs_distribution(x[:5], beta=x[5]), cotangent)

    def along(fn, x, v):
        around = jax.vmap(jax.value_and_grad(fn))(x + h * v * jnp.array([[-1.0], [0], [1]]))
        return *around, jax.grad(lambda x: jnp.vdot(jax.grad(fn)(x), v))(x)

    x, v = np.append(random.normal(size=5), 0.7), random.normal(size=6)
    for values, gradients, second in jax.jit(lambda x: [along(fn, x, v) for fn in (log_z, probability)])(x):
        np.testing.assert_allclose(np.vdot(gradients[1], v), (values[2] - values[0]) / (2 * h), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(second, (gradients[2] - gradients[0]) / (2 * h), rtol=1e-6, atol=1e-6)


def test_forbidden_states_have_no_probability_and_no_gradient_at_any_beta():
    @jax.jit
    def run(e, beta):
        log_z = jax.grad(lambda e, b: energy.log_partition(e, beta=b), argnums=(0, 1))
        allowed = energy.gibbs_distribution(e[jnp.array([0, 2])], beta=beta)
        return energy.gibbs_distribution(e, beta=beta), allowed, *log_z(e, beta)

    for beta in (0.0, 1.0):
        p, allowed, by_energy, by_beta = run(np.array([1.0, np.inf, 2.0]), beta)
        np.testing.assert_allclose(p, np.insert(allowed, 1, 0.0))
        np.testing.assert_allclose(by_energy, -beta * np.asarray(p))
        np.testing.assert_allclose(by_beta, -(p[0] * 1 + p[2] * 2))
    assert np.isnan(run(np.array([1.0, np.nan, 2.0]), 1.0)[0]).all()


def test_forbidden_states_neither_send_nor_receive_a_gradient():
    """A NaN cotangent at a forbidden state, as from p log p, does not reach the others, and an infinite one does not reach it."""

    @jax.jit
    def run(e):
        cotangent = jnp.array([1.0, jnp.nan, 3.0])
        (through,), (gradient,) = (
            jax.vjp(fn, e)[1](c) for fn, c in ((energy.gibbs_distribution, cotangent), (energy.log_partition, jnp.inf))
        )
        return through, gradient

    through, gradient = run(np.array([1.0, np.inf, 2.0]))
    p = np.exp([-1.0, -2.0]) / np.exp([-1.0, -2.0]).sum()
    np.testing.assert_allclose(through, np.insert(2 * p[0] * p[1] * np.array([1.0, -1.0]), 1, 0), rtol=1e-13)
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
    """A default dtype would promote them."""
    w = W.astype(np.float32)

    @jax.jit
    def run(states):
        layers = machine(np.float32)
        narrow = energy.hopfield_energy(states, w), energy.hopfield_asynchronous(states, w)
        joint = energy.rbm_energy(layers, states[:3], states[:2])
        drawn = energy.rbm_gibbs(jax.random.key(0), layers, states[:3])
        return (*narrow, joint, *drawn), energy.hopfield_energy(states, np.sign(W).astype(int))

    narrow, of_integers = run(states)
    assert {result.dtype for result in narrow} == {np.dtype(np.float32)}
    np.testing.assert_allclose(narrow[0], hopfield_energy_by_hand(states, W, 0 * B), rtol=1e-6)
    assert of_integers.dtype == np.float64


@pytest.mark.x32
def test_a_visit_to_no_unit_changes_nothing_in_any_dtype():
    """Its lower bits are the number of a unit that would move."""
    state = np.ones(2, np.float32)
    orders = [2**32 + 1], [1 - 2**32], np.array([2**63 + 1], np.uint64), np.array([3], np.uint8), jnp.array([3], jnp.int8)  # fmt: skip
    visit = lambda s, order: energy.hopfield_asynchronous(s, SYMMETRIC, order=order)  # noqa: E731
    moved, *stayed = jax.jit(lambda s: [visit(s, order) for order in ([1], *orders)])(state)
    assert moved[1] == -1
    for order, after in zip(orders, stayed, strict=True):
        np.testing.assert_array_equal(after, state, err_msg=str(order))
        with pytest.raises(ValueError, match=re.escape("expected a unit in [0, 2)")):
            checked(jax.jit(functools.partial(visit, order=order)))(state)


def test_visits_wider_and_narrower_than_32_bits():
    """2³² + 1 is not unit 1, and a dtype that cannot count the units is not too narrow."""
    state = np.ones(2)
    np.testing.assert_array_equal(asynchronous(state, SYMMETRIC, order=np.array([2**32 + 1])), state)
    down = asynchronous(np.ones(200), np.zeros((200, 200)), -np.ones(200), order=np.array([3], np.int8))
    np.testing.assert_array_equal(down, np.where(np.arange(200) == 3, -1, 1))


def every_call(x):
    return {name: call(x) for name, call in CALLS.items()}


def test_works_under_jit_and_vmap_and_keeps_the_dtype():
    batch, one = np.random.default_rng(6).normal(size=(4, 7)), jax.jit(every_call)
    one_by_one, together = [one(row) for row in batch], jax.jit(jax.vmap(every_call))(batch)
    narrow = jax.eval_shape(jax.vmap(every_call), jax.ShapeDtypeStruct(batch.shape, jnp.float32))
    for name, found in together.items():
        np.testing.assert_allclose(found, np.stack([row[name] for row in one_by_one]), rtol=1e-12, err_msg=name)
        assert (found.dtype, narrow[name].dtype) == (jnp.float64, jnp.float32), name


@pytest.mark.x32
def test_works_in_default_mode():
    for name, found in jax.jit(every_call)(np.linspace(-1, 1, 7)).items():
        assert found.dtype == jnp.float32, name


def test_leading_axes_are_a_batch():
    calls = {
        "energy": lambda x: energy.hopfield_energy(x, W, B),
        "field": lambda x: energy.hopfield_field(x, W, B),
        "asynchronous": lambda x: energy.hopfield_asynchronous(jnp.sign(x), W, B),
        "synchronous": lambda x: energy.hopfield_synchronous(jnp.sign(x), W, B),
        "rbm_energy": lambda x: energy.rbm_energy(RBM, x[..., :3], x[..., 3:5]),
        "rbm_free_energy": lambda x: energy.rbm_free_energy(RBM, x[..., :3]),
    }

    @jax.jit
    def run(x):
        return {name: (call(x), jax.vmap(jax.vmap(call))(x)) for name, call in calls.items()}

    for name, results in run(np.random.default_rng(7).normal(size=(2, 3, 7))).items():
        np.testing.assert_allclose(*results, rtol=1e-13, err_msg=name)


def test_temperature_and_beta_may_be_traced():
    @jax.jit
    @jax.vmap
    def run(scalar):
        return energy.boltzmann_probability(1.0, temperature=scalar), energy.gibbs_distribution(ENERGIES, beta=scalar)

    warm, rows = run(np.array([0.5, 1.0, 2.0]))
    np.testing.assert_allclose(warm, [0.8807971, 0.7310586, 0.6224593], atol=5.1e-8)
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
        (lambda: energy.gibbs_distribution(ENERGIES, beta=np.ones(2)), ValueError, "beta: expected a scalar, got shape (2,); map over it with jax.vmap"),
        (lambda: energy.gibbs_distribution(ENERGIES > 1), TypeError, "energies: expected real numbers, got dtype bool"),
        (lambda: energy.log_partition(ENERGIES, 1), ValueError, "axis: expected an integer in [-1, 1), got 1"),
        (lambda: energy.hopfield_energy(S, W[:3]), ValueError, "weights: expected a square matrix, got shape (3, 7)"),
        (lambda: energy.hopfield_energy(S[:3], W), ValueError, "state: expected 7 units along the last axis, got shape (3,)"),
        (lambda: energy.hopfield_field(S, W, B[:1]), ValueError, "bias: expected shape (7,), got (1,)"),
        (lambda: energy.hopfield_synchronous(1.0, W), ValueError, "state: expected 7 units along the last axis, got shape ()"),
        (lambda: energy.hopfield_asynchronous(S, W, order=np.ones((1, 1), int)), ValueError, "order: expected one dimension, got shape (1, 1)"),
        (lambda: energy.hopfield_asynchronous(S, W, order=np.ones(1)), TypeError, "order: expected integers, got dtype float64"),
        (lambda: energy.perceptron_criterion(S, S[:3]), ValueError, "labels: expected a shape that broadcasts to (7,), got (3,)"),
        (lambda: energy.boltzmann_probability(S, temperature=S), ValueError, "temperature: expected a scalar, got shape (7,)"),
        (lambda: energy.boltzmann_probability(S, temperature=0), ValueError, "temperature: expected a number that is positive in float64, got 0"),
        (lambda: energy.boltzmann_probability(S, temperature=float("nan")), ValueError, "temperature: expected a number that is positive in float64, got nan"),
        (lambda: energy.boltzmann_probability(S, low=1), ValueError, "low: expected 0 or -1, got 1"),  # pyright: ignore[reportArgumentType]
        (lambda: energy.rbm_free_energy(RBM, S), ValueError, "visible: expected 3 units along the last axis, got shape (7,)"),
        (lambda: energy.rbm_energy(RBM, S[:3], S[:3]), ValueError, "hidden: expected 2 units along the last axis, got shape (3,)"),
        (lambda: energy.rbm_energy(RBM, np.ones((4, 3)), np.ones((5, 2))), ValueError, "hidden: expected batch axes that broadcast with (4,), got (5,)"),
        (lambda: energy.rbm_log_partition(BAD_RBM), ValueError, "visible_bias: expected shape (3,), got (2,)"),
        (lambda: energy.rbm_free_energy(BAD_RBM._replace(weights=np.ones(3)), S), ValueError, "weights: expected shape (visible, hidden), got (3,)"),
        (lambda: energy.rbm_log_partition(energy.RestrictedBoltzmann(np.ones((21, 22)), np.ones(21), np.ones(22))), ValueError, "params: expected a layer of at most 20 units to enumerate, got weights (21, 22)"),
        (lambda: energy.rbm_gibbs(jax.random.key(0), RBM, np.ones(3), steps=0), ValueError, "steps: expected at least 1, got 0"),
        (lambda: energy.binary_states(21), ValueError, "units: expected an integer in [0, 20], got 21"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: checked(synchronous)(np.array([1.0, 0.0]), SYMMETRIC), "state[1] is 0.0: expected -1 or 1"),
        (lambda: checked(asynchronous)(np.ones(2), SYMMETRIC, order=np.array([0, 2])), "order[1] is 2: expected a unit in [0, 2)"),
        (lambda: checked(jax.jit(energy.perceptron_criterion))(np.ones(2), np.array([1, 0])), "labels[1] is 0.0: expected -1 or 1"),
        (lambda: checked(jax.jit(lambda t: energy.boltzmann_probability(1.0, temperature=t)))(np.array(-1.0)), "temperature is -1.0: expected a positive number"),
    ],
)  # fmt: skip
def test_checked_looks_at_values(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
