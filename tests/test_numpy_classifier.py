"""experiments.numpy_classifier and experiments.delta.

IDs such as S1.2 and E1.1 number the claims and the errors of a text by a programmer who classifies irises
in NumPy and asks how to multiply by the derivative of softmax.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from experiments import delta
from experiments import numpy_classifier as classifier
from experiments._door import ScriptError
from jaxsoft import cross_entropy, init_mlp, softmax, softmax_jacobian, softmax_vjp

# What it runs once, all tests read.
STEPS = [0, 1, 10, 100, 1000, 5000]
LOSSES = {  # mean cross-entropy at STEPS
    "A": [1.09163, 1.03426, 0.814506, 0.662065, 0.374943, 0.107506],
    "B": [1.09163, 1.07781, 0.974379, 0.75785, 0.520528, 0.236324],
    "C": [1.09163, 1.08097, 0.998501, 0.771753, 0.597641, 0.347086],
    "D": [None, None, None, 0.706426, 0.69449, 0.693416],
    "E": [1.18003, 1.15784, 1.09817, 1.05514, 0.743806, 0.248639],
    "H": [1.18003, 1.15339, 1.1004, 1.09861, 1.09861, 1.09861],
}
OUTPUT = np.array([0.1, 0.2, 0.7])
TARGET = np.array([0.0, 1.0, 0.0])

# A thousand steps take a fifth of a second.
exhaustive = pytest.mark.exhaustive
up_to_1000_and_beyond = pytest.mark.parametrize("steps", [STEPS[:-1], pytest.param(STEPS[-1:], marks=exhaustive)])


follow_once, controls_once = functools.cache(classifier.follow), functools.cache(classifier.controls)


def follow(name, steps=1000):
    return follow_once(name, steps)


def controls(name, steps=1000):
    return controls_once(name, steps)


@functools.cache
def outputs():
    return delta.network_outputs()


def test_shapes_of_weights_and_of_biases_for_100_flowers():
    """S1.2, S1.3: 4 → 5 → 4 → 3, columns are flowers."""
    assert [w.shape for w in classifier.draw_weights()] == [(5, 4), (4, 5), (3, 4)]
    assert [b.shape for b in classifier.start(classifier.SETUPS["A"])[3]] == [(5, 100), (4, 100), (3, 100)]
    layers = jax.eval_shape(lambda: init_mlp(jax.random.key(0), classifier.UNITS))
    assert [layer["kernel"].shape for layer in layers] == [(4, 5), (5, 4), (4, 3)]


def test_softmax_shifted_by_one_maximum_sums_to_one_over_axis_0():
    """S1.4: Equal to softmax column by column while the columns are close."""
    x = np.random.default_rng(0).normal(size=(3, 100)) * 5
    np.testing.assert_allclose(classifier.softmax(x), jax.jit(lambda x: softmax(x, axis=0))(x), rtol=1e-13)
    np.testing.assert_allclose(classifier.softmax(x).sum(axis=0), 1, rtol=1e-14)


def test_the_misspelt_key_drops_a_species_without_a_word():
    """S1.5, E1.1: 150 rows become 100: 50 setosa and 50 virginica; the outer merge would have told."""
    _, y = classifier.prepare()
    assert y.sum(axis=1).tolist() == [50, 0, 50]
    assert classifier.merge_report() == {"both": 100, "left_only": 50, "right_only": 1}


def test_four_measurements_in_rows_and_an_unnamed_column_of_row_numbers():
    """S1.6: The order of the measurements, against the first flower of the file."""
    x, y = classifier.prepare()
    assert x.shape == (4, 100)
    assert y.shape == (3, 100)
    assert x[:, 0].tolist() == [5.1, 3.5, 1.4, 0.2]
    assert next(iter(pd.read_csv(classifier.Iris().data))) == "Unnamed: 0"


def test_seed_42_draws_w1_w2_w3_in_that_order():
    """S1.7: The same numbers as the global generator, which is left as it was."""
    state = np.random.get_state()
    np.random.seed(42)
    expected = np.random.rand(5, 4), np.random.rand(4, 5), np.random.rand(3, 4)
    np.random.set_state(state)
    for drawn, w in zip(classifier.draw_weights(), expected, strict=True):
        np.testing.assert_array_equal(drawn, w)
    assert all((b == 1).all() for b in classifier.start(classifier.SETUPS["A"])[3])
    assert classifier.ALPHA == 0.1


def test_one_step_moves_against_the_finite_difference_gradient():
    """S1.8 to S1.10: Forward pass, δ3 = (x3 − y)/N, δ2, δ1 and the update, by central differences of the loss at step 0."""
    random = np.random.default_rng(3)
    x, y = random.normal(size=(4, 6)), np.eye(3)[:, random.integers(0, 3, 6)]
    shapes = [(5, 4), (4, 5), (3, 4), (5, 6), (4, 6), (3, 6)]
    parameters = [random.normal(size=shape) for shape in shapes]
    moved = classifier.descend(x, y, parameters[:3], parameters[3:], steps=1)
    h = 1e-5
    for n, after in enumerate([*moved.weights, *moved.biases]):
        gradient = np.zeros(shapes[n])
        for index in np.ndindex(shapes[n]):
            sides = []
            for sign in (1, -1):
                shifted = [p.copy() for p in parameters]
                shifted[n][index] += sign * h
                sides.append(classifier.descend(x, y, shifted[:3], shifted[3:], steps=0).loss[0])
            gradient[index] = (sides[0] - sides[1]) / (2 * h)
        np.testing.assert_allclose((parameters[n] - after) / 0.1, gradient, atol=1e-9)


def test_jacobian_of_the_worked_example():
    """S1.12: o = (.1, .2, .7): matrix, row sums, eigenvalues and trace, by this library and as written in the text."""
    matrix = np.asarray(softmax_jacobian(OUTPUT))
    expected = [[0.09, -0.02, -0.07], [-0.02, 0.16, -0.14], [-0.07, -0.14, 0.21]]
    np.testing.assert_allclose(matrix, expected, atol=1e-15)
    np.testing.assert_allclose(classifier.jacobians(OUTPUT[:, None])[..., 0], expected, atol=1e-15)
    np.testing.assert_allclose(matrix.sum(axis=1), 0, atol=1e-15)
    np.testing.assert_allclose(np.linalg.eigvalsh(matrix), [0, 0.125597, 0.334403], atol=5e-7)
    np.testing.assert_allclose([np.trace(matrix), 1 - OUTPUT @ OUTPUT], 0.46, rtol=1e-14)


def test_jacobian_times_the_derivative_of_cross_entropy():
    """S1.12: J(−t/o) = (.1, −.8, .7) = o − t for t = (0, 1, 0)."""
    product = np.asarray(softmax_jacobian(OUTPUT)) @ (-TARGET / OUTPUT)
    np.testing.assert_allclose(product, [0.1, -0.8, 0.7], atol=1e-15)
    np.testing.assert_allclose(softmax_vjp(OUTPUT, -TARGET / OUTPUT), [0.1, -0.8, 0.7], atol=1e-15)


def test_a_stack_of_100_jacobians_collapses_to_o_minus_y():
    """S1.13: One matrix-vector product a column, no average; J v = o∘(v − ⟨o, v⟩)."""
    o, y = outputs()
    assert np.ptp(o, axis=1).min() > 0.02  # the columns differ
    v = np.random.default_rng(0).normal(size=(3, 100))

    @jax.jit
    def run(o, v):
        return jax.vmap(softmax_jacobian, in_axes=1, out_axes=2)(o), softmax_vjp(o, v, axis=0)

    stack, unformed = map(np.asarray, run(o, v))
    assert stack.shape == (3, 3, 100)
    np.testing.assert_allclose(stack, classifier.jacobians(o), atol=1e-16)
    for n in range(100):
        np.testing.assert_allclose(stack[:, :, n] @ (-y[:, n] / o[:, n]), o[:, n] - y[:, n], atol=1e-15)
    products = np.stack([stack[:, :, n] @ v[:, n] for n in range(100)], axis=1)
    np.testing.assert_allclose(products, o * (v - (o * v).sum(axis=0)), atol=1e-15)
    np.testing.assert_allclose(products, unformed, atol=1e-15)


def test_the_elementwise_rule_is_right_for_tanh_and_wrong_for_softmax():
    """S1.14: δ = ∇C∘σ′(z) needs a diagonal Jacobian."""
    z = np.array([0.3, -0.8, 1.1])
    by_tanh, by_softmax = map(np.asarray, jax.jit(lambda z: (jax.jacrev(jnp.tanh)(z), jax.jacrev(softmax)(z)))(z))
    np.testing.assert_allclose(by_tanh, np.diag(1 - np.tanh(z) ** 2), atol=1e-15)
    assert np.abs(by_softmax - np.diag(np.diag(by_softmax))).max() > 0.1


@up_to_1000_and_beyond
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_the_runs_at_steps_0_to_5000(name, steps):
    """E1.1 to E1.5: The table of mean cross-entropies, to 1e-5 or the digits printed."""
    for step, expected in zip(STEPS, LOSSES[name], strict=True):
        if step in steps and expected is not None:
            assert follow(name, steps[-1]).loss[step] == pytest.approx(expected, rel=1e-5, abs=5e-6), step


@up_to_1000_and_beyond
def test_accuracy_of_the_loop_as_written(steps):
    """E1.1: Half of the flowers until step 10, all from step 100."""
    assert follow("A", steps[-1]).accuracy[steps].tolist() == [0.5 if step <= 10 else 1 for step in steps]


@pytest.mark.parametrize(
    ("name", "step", "loss", "accuracy"),
    [
        ("scaled", 1000, 0.0839, 0.973),
        ("both", 1000, 0.0456, 0.987),
        pytest.param("scaled", 5000, 0.0390, 0.987, marks=exhaustive),
        pytest.param("both", 5000, 0.0342, 0.987, marks=exhaustive),
    ],
)
def test_repairs_with_standardised_measurements(name, step, loss, accuracy):
    """E1.4: One bias per unit."""
    assert follow(name, step).loss[step] == pytest.approx(loss, rel=0, abs=5e-5)
    assert follow(name, step).accuracy[step] == pytest.approx(accuracy, rel=0, abs=5e-4)


@pytest.mark.parametrize(
    ("step", "loss", "accuracy"), [(1000, 0.1101, 0.96), pytest.param(5000, 0.0505, 0.98, marks=exhaustive)]
)
def test_repair_by_normal_weights_alternates(step, loss, accuracy):
    """E1.4: The stated loss is the higher of two that follow each other; rounding decides which step has it."""
    pair, correct = (values[step - 1 : step + 1] for values in follow("normal", step)[:2])
    assert pair.max() == pytest.approx(loss, rel=0.02)
    assert correct[pair.argmax()] == pytest.approx(accuracy, abs=1e-9)
    assert pair.min() < 0.95 * loss


def test_with_the_spelling_mended_the_biases_do_not_broadcast():
    """E1.2: 150 columns of measurements, 100 of biases."""
    message = r"operands could not be broadcast together with shapes \(5,150\) \(5,100\)"
    with pytest.raises(ValueError, match=message):
        classifier.forward(
            classifier.prepare("versicolor")[0], classifier.draw_weights(), classifier.constant_biases(1.0, 100)
        )
    assert "(5,150) (5,100)" in classifier.broadcast_error()


def test_1200_biases_against_52_weights():
    """E1.3: A bias for every unit and every flower."""
    *_, weights, biases = classifier.start(classifier.SETUPS["A"])
    assert sum(w.size for w in weights) == 52
    assert sum(b.size for b in biases) == 1200


@pytest.mark.parametrize("name", ["A", "E"])
def test_a_bias_for_every_flower_memorises(name):
    """E1.3: The curve needs no measurements, and shuffled labels are learned completely."""
    blank, shuffled = controls(name).values()
    np.testing.assert_allclose(blank.loss, follow(name).loss, rtol=0, atol=2e-3)
    np.testing.assert_allclose(shuffled.loss, follow(name).loss, rtol=0, atol=2e-3)
    assert shuffled.accuracy[-1] == 1


def test_a_bias_for_every_unit_does_not_memorise():
    """E1.3: Without measurements the repaired network stays at ln 3, and shuffled labels are not learned."""
    blank, shuffled = controls("both").values()
    assert blank.loss[-1] == pytest.approx(np.log(3), abs=1e-9)
    assert shuffled.accuracy[-1] < 0.6


def test_a_new_flower_cannot_be_scored():
    """E1.3: One flower gets an answer for every flower learned, and they disagree; two do not broadcast."""
    learned, flowers = follow("A"), classifier.prepare("versicolor")[0]
    answers = classifier.forward(flowers[:, :1], learned.weights, learned.biases)[-1].argmax(axis=0)
    assert np.bincount(answers).tolist() == [50, 0, 50]
    with pytest.raises(ValueError, match="broadcast"):
        classifier.forward(flowers[:, :2], learned.weights, learned.biases)


def test_the_first_layer_starts_saturated():
    """E1.4: The largest slope of its tanh units over all flowers."""
    x, _, weights, biases = classifier.start(classifier.SETUPS["A"])
    assert np.max(1 - classifier.forward(x, weights, biases)[0] ** 2) == pytest.approx(0.0402, abs=5e-5)


def test_the_error_times_the_jacobian_is_the_gradient_of_the_brier_score():
    """E1.5: J(o − y) against central differences of ½‖softmax(z) − y‖² and against its gradient by JAX."""
    o, y = outputs()
    z = np.log(o)
    found = classifier.DELTA3["jacobian"](o, y)
    gradient = jax.jit(jax.grad(lambda z: jnp.sum((softmax(z, axis=0) - y) ** 2) / 2))(z)
    np.testing.assert_allclose(found, gradient, rtol=0, atol=2e-13)
    for k in range(3):
        up, down = (z + sign * 1e-5 * np.eye(3)[:, [k]] for sign in (1, -1))
        brier_up, brier_down = (((np.exp(s) / np.exp(s).sum(axis=0) - y) ** 2).sum(axis=0) / 2 for s in (up, down))
        np.testing.assert_allclose(found[k], (brier_up - brier_down) / 2e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "symmetric"), [("cross-entropy", True), ("jacobian", True), ("hadamard", False), ("diagonal", False)]
)
def test_the_elementwise_variants_are_gradients_of_no_function(name, symmetric):
    """E1.5: ∂δ_i/∂z_j by central differences: symmetric for a gradient. Here at o = (.1, .2, .7), t = (0, 1, 0)."""
    columns = []
    for k in range(3):
        sides = []
        for sign in (1, -1):
            exponentials = OUTPUT * np.exp(sign * 1e-5 * np.eye(3)[k])
            sides.append(classifier.DELTA3[name]((exponentials / exponentials.sum())[:, None], TARGET[:, None])[:, 0])
        columns.append((sides[0] - sides[1]) / 2e-5)
    matrix = np.stack(columns, axis=1)
    skew = np.abs(matrix - matrix.T).max()
    assert (skew < 1e-9) if symmetric else (skew > 0.01)
    by_jax = jax.jit(lambda z: delta.asymmetry(delta.CANDIDATES[name], z, TARGET))(np.log(OUTPUT))
    assert by_jax == pytest.approx(skew, abs=1e-9)


@pytest.mark.parametrize("name", classifier.DELTA3)
def test_the_errors_in_numpy_and_in_jax_agree(name):
    """On the outputs of the network."""
    o, y = outputs()
    in_jax = jax.jit(jax.vmap(delta.CANDIDATES[name].delta, in_axes=1, out_axes=1))(o, y)
    np.testing.assert_allclose(classifier.DELTA3[name](o, y), in_jax, atol=1e-16)


@pytest.mark.parametrize(("dtype", "gap"), [(np.float64, 746), (np.float32, 104)])
def test_one_maximum_for_all_columns_loses_the_distant_ones(dtype, gap):
    """E1.6: NaN from this gap on, not one less; column by column nothing is lost."""
    assert delta.columns_lost(gap - 1, dtype) == 0
    assert delta.columns_lost(gap, dtype) == 1
    np.testing.assert_allclose(softmax(np.array([[0, -gap]] * 3, dtype), axis=0), 1 / 3, rtol=1e-6)


@pytest.mark.parametrize(("gap", "infinite", "nan"), [(90, 3, 0), (104, 0, 3)])
def test_the_explicit_product_breaks_in_float32_where_o_minus_y_is_exact(gap, infinite, nan):
    """E1.8: J(−y/o): infinities, then NaN."""
    explicit = delta.explicit_product(gap)
    assert explicit.dtype == np.float32
    assert (np.isinf(explicit).sum(), np.isnan(explicit).sum()) == (infinite, nan)
    gradient = jax.jit(jax.grad(cross_entropy))(np.array([0.0, -gap, -1.0], np.float32), 1)
    np.testing.assert_allclose(gradient, [0.7310585786, -1, 0.2689414214], rtol=2e-7)


@pytest.mark.parametrize("name", [pytest.param("A", marks=exhaustive), "D", "E", pytest.param("H", marks=exhaustive)])
def test_the_network_in_jax_has_the_same_losses_step_by_step(name):
    """Float64, a bias for every flower (A, E) or for every unit (D, H)."""
    losses = classifier.descend_in_jax(*classifier.start(classifier.SETUPS[name]), steps=300)
    assert losses.shape == (301,)
    assert losses.dtype == np.float64
    np.testing.assert_allclose(losses, follow(name).loss[:301], rtol=1e-13)


@pytest.mark.parametrize(
    ("steps", "delta3", "accuracy"),
    [
        (300, "cross-entropy", 0.978),
        (300, "jacobian", 0.947),
        (300, "hadamard", 0.902),
        (300, "diagonal", 0.862),
        pytest.param(3000, "cross-entropy", 0.969, marks=exhaustive),
        pytest.param(3000, "jacobian", 0.969, marks=exhaustive),
        pytest.param(3000, "hadamard", 0.978, marks=exhaustive),
        pytest.param(3000, "diagonal", 0.822, marks=exhaustive),
    ],
)
def test_held_out_accuracy_does_not_expose_a_wrong_error(steps, delta3, accuracy):
    """E1.5: Five stratified splits of 105 and 45 flowers; after 3000 steps a wrong error has the highest accuracy."""
    assert classifier.held_out_accuracy(delta3, steps) == pytest.approx(accuracy, abs=5e-4)


def test_delta_states_only_computed_numbers(tmp_path, capsys):
    """The script ends well, and leaves its table and picture."""
    numbers = delta.run(delta.Config(out=tmp_path))
    assert numbers["example: eigenvalue 3 of J"] == pytest.approx(0.334403, abs=5e-7)
    assert json.loads((tmp_path / "summary.json").read_text()) == numbers
    assert (tmp_path / "jacobian.png").stat().st_size > 10_000
    assert "differs" not in capsys.readouterr().out


@pytest.mark.parametrize("steps", [1000, pytest.param(5000, marks=exhaustive)])
def test_numpy_classifier_ends_with_an_error_if_a_number_differs(steps, tmp_path, monkeypatch, capsys):
    """With one digit of its table changed; all else comes out and both pictures are drawn."""
    monkeypatch.setattr(classifier, "follow", functools.partial(follow, steps=steps))
    monkeypatch.setattr(classifier, "controls", functools.partial(controls, steps=steps))
    for slow in ("jax_numbers", "held_out_numbers"):  # tested above
        monkeypatch.setattr(classifier, slow, lambda *_: [])
    table = classifier.TABLE.replace(".814506/.5", ".814507/.5")
    if steps < STEPS[-1]:
        table = "\n".join(row.rsplit(maxsplit=1)[0] for row in table.strip().splitlines())
        monkeypatch.setattr(classifier, "STEPS", STEPS[:-1])
        monkeypatch.setattr(classifier, "alternating_numbers", lambda *_: [])  # of step 5000 too
    monkeypatch.setattr(classifier, "TABLE", table)
    with pytest.raises(ScriptError) as caught:
        classifier.run(classifier.Config(out=tmp_path))
    assert "A: loss at step 10" in str(caught.value)
    assert str(caught.value).startswith("1 of ")
    assert capsys.readouterr().out.count("differs") == 1
    assert {path.name for path in tmp_path.glob("*.png")} == {"runs.png", "memorisation.png"}
