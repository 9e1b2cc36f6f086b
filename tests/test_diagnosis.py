"""The gradient doctor, on fresh random problems with mistakes written in plain NumPy."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments._door import InputError
from experiments.diagnose import Config, run
from jaxsoft import cross_entropy, diagnose_gradient

SIZES = [(1, 3), (7, 3), (64, 10), (7, 50), (2, 2)]
DTYPES = [np.float32, np.float64]


def problem(n, classes, dtype=np.float64, seed=0, scale=2.0):
    """Logits, labels, probabilities and one-hot targets, the probabilities computed in the dtype."""
    rng = np.random.default_rng([seed, n, classes])
    z = (rng.normal(size=(n, classes)) * scale).astype(dtype)
    e = np.exp(z - z.max(1, keepdims=True))
    labels = rng.integers(0, classes, n)
    return z, labels, e / e.sum(1, keepdims=True), np.eye(classes, dtype=dtype)[labels]


def jacobian_times(o, v):
    return o * (v - (o * v).sum(1, keepdims=True))


MISTAKES = {
    "opposite sign": lambda z, o, t: t - o,
    "off-diagonal terms missing": lambda z, o, t: -t * (1 - o),
    "Jacobian once too often": lambda z, o, t: jacobian_times(o, o - t),
    "elementwise derivative": lambda z, o, t: (o - t) * o * (1 - o),
    "label not subtracted": lambda z, o, t: o,
    "labels shifted by one": lambda z, o, t: o - np.roll(t, 1, axis=1),
    "softmax over the wrong axis": lambda z, o, t: np.exp(z - z.max()) / np.exp(z - z.max()).sum(0) - t,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "classes"), SIZES)
def test_right_gradients_are_called_right(n, classes, dtype):
    z, labels, o, t = problem(n, classes, dtype)
    for targets in (labels, t):
        diagnosis = diagnose_gradient(z, targets, o - t)
        assert diagnosis.correct
        assert diagnosis.verdict == "correct for the sum"
        mean = diagnose_gradient(jnp.asarray(z), jnp.asarray(targets), jnp.asarray((o - t) / n))
        assert mean.correct
        assert mean.verdict == ("correct for the sum" if n == 1 else f"correct for the mean over {n} positions")
    np.testing.assert_allclose(diagnosis.true_gradient, o - t, atol=1e-6)
    np.testing.assert_allclose(diagnosis.row_sums, 0, atol=1e-6)
    assert diagnosis.error < 1e-5


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "classes"), [s for s in SIZES if s != (2, 2)])
@pytest.mark.parametrize("verdict", MISTAKES)
def test_each_mistake_is_named(verdict, n, classes, dtype, mean):
    z, labels, o, t = problem(n, classes, dtype)
    wrong = MISTAKES[verdict](z, o, t) / (n if mean else 1)
    diagnosis = diagnose_gradient(z, labels, wrong.astype(dtype))
    assert not diagnosis.correct
    assert diagnosis.verdict == verdict
    assert diagnosis.error > 1e-3


@pytest.mark.parametrize("shift", [-1, 1])
def test_labels_counted_from_one_whose_last_class_has_no_one_hot_row(shift):
    z, labels, o, _ = problem(64, 5)
    wrong = o - ((labels + shift)[:, None] == np.arange(5))
    assert diagnose_gradient(z, labels, wrong).verdict == "labels shifted by one"


def test_one_entry_at_the_label_is_not_taken_for_a_known_mistake_times_a_number():
    z, labels, _, t = problem(1, 5)
    assert diagnose_gradient(z, labels, -7 * t).verdict == "wrong"


@pytest.mark.parametrize("factor", [3.0, 0.37])
def test_a_factor_is_named(factor):
    z, labels, o, t = problem(7, 5)
    diagnosis = diagnose_gradient(z, labels, factor * (o - t))
    assert diagnosis.verdict == f"right up to a factor of {factor:g}"


def test_a_mistake_with_an_odd_factor_is_still_named():
    z, labels, o, t = problem(7, 5)
    diagnosis = diagnose_gradient(z, labels, 0.3 * MISTAKES["Jacobian once too often"](z, o, t))
    assert diagnosis.verdict == "Jacobian once too often"
    assert "multiplied by 0.3" in str(diagnosis)


@pytest.mark.parametrize(("n", "classes"), [(7, 5), (5, 5)])
def test_a_transposed_gradient(n, classes):
    z, labels, o, t = problem(n, classes)
    assert diagnose_gradient(z, labels, (o - t).T).verdict == "transposed"
    columns = diagnose_gradient(z.T, labels, o - t, 0)
    assert (columns.correct, columns.verdict) == (False, "transposed")
    assert diagnose_gradient(z.T, labels, (o - t).T, 0).correct


def test_unnormalised_targets_need_tau():
    z, _, o, t = problem(6, 4)
    t = t * np.linspace(0.5, 2, 6)[:, None] + 0.1
    tau = t.sum(1, keepdims=True)
    assert diagnose_gradient(z, t, tau * o - t).correct
    assert diagnose_gradient(z, t, (o - t) / 6).verdict == "targets do not sum to one"


@pytest.mark.parametrize("ignored", [255, -1, -100])
def test_ignored_positions(ignored):
    z, labels, o, t = problem(8, 4)
    labels[[1, 5]] = ignored
    right = np.where((labels == ignored)[:, None], 0, o - t)
    assert diagnose_gradient(z, labels, right).correct
    assert diagnose_gradient(z, labels, right / 6).verdict == "correct for the mean over the 6 positions not ignored"
    assert (
        diagnose_gradient(z, labels, right / 8).verdict == "correct for the mean over all 8 positions, ignored ones too"
    )
    not_zeroed = np.where((labels == ignored)[:, None], o, o - t)
    for wrong in (not_zeroed, not_zeroed / 6):
        assert diagnose_gradient(z, labels, wrong).verdict == "ignored positions not zeroed"
    labels[:] = ignored
    assert diagnose_gradient(z, labels, np.zeros_like(z)).correct
    assert not diagnose_gradient(z, labels, o).correct


def test_all_zero():
    z, labels, *_ = problem(3, 4)
    assert diagnose_gradient(z, labels, np.zeros_like(z)).verdict == "all zero"


def test_a_vector_that_the_model_is_sure_of_is_judged_too():
    z, labels, *_ = problem(6, 4)
    z[2] = np.where(np.arange(4) == labels[2], 16.0, 0.0)
    right = np.array(jax.grad(lambda z: cross_entropy(z, labels, reduction="sum"))(jnp.asarray(z)))
    assert diagnose_gradient(z, labels, right).correct
    for factor in (-1, 0):
        wrong = right.copy()
        wrong[2] *= factor
        assert not diagnose_gradient(z, labels, wrong).correct


@pytest.mark.parametrize(("dtype", "gap"), [(np.float32, 104), (np.float64, 746)])
def test_the_global_maximum_is_recognised(dtype, gap):
    z = np.array([[gap, gap + 1.0], [0.0, 1.0]], dtype)
    with np.errstate(all="ignore"):
        e = np.exp(z - z.max())
        diagnosis = diagnose_gradient(z, np.array([0, 1]), e / e.sum(1, keepdims=True) - np.eye(2, dtype=dtype))
    assert diagnosis.verdict == "not finite"
    assert "maximum of the whole array" in str(diagnosis)
    assert str(diagnosis).startswith("1 of 2 positions")


def test_the_division_by_o_is_recognised():
    z = np.array([[110.0, 0.0], [0.0, 1.0]], np.float32)
    t = np.array([[0, 1], [0, 1]], np.float32)
    with np.errstate(all="ignore"):
        o = np.exp(z - z.max(1, keepdims=True))
        o /= o.sum(1, keepdims=True)
        diagnosis = diagnose_gradient(z, t, jacobian_times(o, -t / o))
    assert diagnosis.verdict == "not finite"
    assert "divides by zero" in str(diagnosis)


def test_a_missing_maximum_is_recognised_and_an_unknown_cause_admitted():
    z = np.array([[200.0, 0.0], [0.0, 1.0]], np.float32)
    with np.errstate(all="ignore"):
        e = np.exp(z)
        diagnosis = diagnose_gradient(
            z, np.array([0, 0]), e / e.sum(1, keepdims=True) - np.eye(2, dtype=np.float32)[[0, 0]]
        )
    assert "no maximum was subtracted" in str(diagnosis)
    assert "none of the usual ones" in str(
        diagnose_gradient(np.zeros((2, 2)), np.array([0, 0]), np.array([[np.nan, 0], [0, 0]]))
    )


def causes(z, labels):
    """The three usual causes in JAX, which flushes the smallest numbers to zero where NumPy does not."""
    t = np.eye(z.shape[1], dtype=z.dtype)[labels]
    whole, bare = jnp.exp(z - z.max()), jnp.exp(z)
    return {
        "maximum of the whole array": whole / whole.sum(1, keepdims=True) - t,
        "no maximum was subtracted": bare / bare.sum(1, keepdims=True) - t,
        "divides by zero": jax.grad(lambda z: -jnp.sum(t * jnp.log(jax.nn.softmax(z))))(z),
    }


@pytest.mark.parametrize("gap", [95, 110])
@pytest.mark.parametrize("dtype", DTYPES)
def test_causes_are_recognised_in_float32_on_the_device_whatever_the_dtype_of_the_logits(gap, dtype):
    z = np.array([[gap, 0, 2], [gap, gap + 1, gap + 2], [0, 0, 1]], dtype)
    labels = np.array([1, 1, 2])
    for cause, gradient in causes(jnp.asarray(z, jnp.float32), labels).items():
        assert cause in str(diagnose_gradient(z, labels, gradient))


@pytest.mark.parametrize("gap", [90, 110])
def test_e3_15_the_product_with_the_explicit_jacobian(gap):
    """−inf at a gap of 90 in float32, NaN at 110."""
    z, t = np.array([[gap, 0, 1]], np.float32), np.array([0, 1, 0], np.float32)
    o = np.exp(z[0] - gap) / np.exp(z[0] - gap).sum()
    with np.errstate(all="ignore"):
        gradient = (np.diag(o) - np.outer(o, o)) @ (-t / o)
    assert "divides by zero" in str(diagnose_gradient(z, np.array([1]), gradient[None]))


def test_p_minus_one_in_float32_is_called_lost_not_right():
    z = np.array([[14.0, 0.0, 0.0], [0.0, 15.0, 0.0]], np.float32)
    e = np.exp(z - z.max(1, keepdims=True))
    labels = np.array([0, 1])
    diagnosis = diagnose_gradient(z, labels, e / e.sum(1, keepdims=True) - np.eye(3, dtype=np.float32)[labels])
    assert (diagnosis.correct, diagnosis.verdict) == (False, "lost to rounding")
    ours = jax.grad(lambda z: cross_entropy(z, labels, reduction="sum"))(jnp.asarray(z))
    assert diagnose_gradient(z, labels, ours).correct


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("margin", [16, 30, 40, 60, 80, 87, 88, 90, 104, 200])
def test_a_label_that_leads_by_far_is_judged_by_its_tail(margin, dtype, one_hot):
    """The other classes' sum, by hand: also in float64 the truth must not be p − 1."""
    z = np.array([[margin, 0, 0]], dtype)
    targets = np.eye(3)[[0]] if one_hot else np.array([0])
    p = np.exp(-float(margin)) / (1 + 2 * np.exp(-float(margin)))
    exact = np.array([[-2 * p, p, p]], dtype)
    diagnosis = diagnose_gradient(z, targets, exact)
    assert diagnosis.correct
    np.testing.assert_allclose(diagnosis.true_gradient, [[-2 * p, p, p]], rtol=1e-12)
    ours = jax.grad(lambda z: cross_entropy(z, jnp.array([0]), reduction="sum"))(jnp.asarray(z))
    assert diagnose_gradient(z, targets, ours).correct
    if margin <= 80:  # the tail is a normal number of float32
        wrong = {"lost to rounding": [[0, p, p]], "opposite sign": -exact, "right up to a factor of 3": 3 * exact, "wrong": exact[:, [1, 0, 2]], "all zero": 0 * exact}  # fmt: skip
        for verdict, gradient in wrong.items():
            diagnosis = diagnose_gradient(z, targets, np.asarray(gradient, dtype))
            assert not diagnosis.correct
            if verdict != "lost to rounding" or margin > 40:  # before, a label's zero is no rounding of float64
                assert diagnosis.verdict == verdict


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    z, labels, *_ = problem(16, 8)
    z = jnp.asarray(z).astype(dtype)
    gradient = jax.grad(lambda z: cross_entropy(z, labels))(z)
    assert gradient.dtype == dtype
    assert diagnose_gradient(z, labels, gradient).correct
    assert not diagnose_gradient(z, labels, gradient * 1.1).correct


def test_an_unknown_gradient_is_wrong_by_how_much_and_where():
    z, labels, o, t = problem(6, 4)
    wrong = o - t
    wrong[4, 2] += 0.5
    diagnosis = diagnose_gradient(z, labels, wrong)
    assert diagnosis.verdict == "wrong"
    assert "at position (4,), class 2" in str(diagnosis)
    assert "reach 0.5" in str(diagnosis)
    assert diagnosis.error == pytest.approx(0.5 / np.linalg.norm(o - t), rel=1e-6)
    assert "are zero" in str(diagnose_gradient(z, labels, o - t + np.array([0.3, -0.3, 0, 0])))


def test_class_axis():
    z, labels, o, t = problem(12, 5)
    images = [np.moveaxis(a.reshape(2, 3, 2, 5), -1, 1) for a in (z, o - t)]
    assert diagnose_gradient(images[0], labels.reshape(2, 3, 2), images[1], 1).correct
    assert diagnose_gradient(images[0], labels.reshape(2, 3, 2), -images[1], 1).verdict == "opposite sign"
    vector = diagnose_gradient(z[0], labels[0], (o - t)[0])
    assert vector.correct


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([3, 10]),
    st.sampled_from([1, 6]),
    st.floats(1e-3, 10),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_law_no_perturbed_gradient_is_called_right(seed, classes, n, size, single, narrow):
    z, labels, o, t = problem(n, classes, np.float32 if narrow else np.float64, seed)
    noise = np.random.default_rng(seed).normal(size=z.shape)
    if single:  # all of it in one vector
        noise[np.arange(n) != seed % n] = 0
    gradient = o - t
    perturbed = gradient + size * np.linalg.norm(gradient) / np.linalg.norm(noise) * noise
    assert diagnose_gradient(z, labels, gradient).correct
    assert not diagnose_gradient(z, labels, perturbed.astype(z.dtype)).correct


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z, y, g: diagnose_gradient(z, y, g[:2]), ValueError, "gradient: expected the logits' shape (4, 3), got (2, 3)"),
        (lambda z, y, g: diagnose_gradient(z, y[:2], g), ValueError, "targets: expected integer labels of shape (4,), got (2,)"),
        (lambda z, y, g: diagnose_gradient(z, y * 1.0, g), ValueError, "targets: expected the logits' shape (4, 3), got (4,)"),
        (lambda z, y, g: diagnose_gradient(z * np.nan, y, g), ValueError, "logits: expected finite numbers"),
        (lambda z, y, g: diagnose_gradient(z, y, g > 0), TypeError, "gradient: expected real numbers, got dtype bool"),
        (lambda z, y, g: diagnose_gradient(z, y, jnp.asarray(g, jnp.float8_e4m3fn)), TypeError, "gradient: expected at least the precision of bfloat16, got dtype float8_e4m3fn"),
        (lambda z, y, g: diagnose_gradient(z, y, g, 2), ValueError, "axis: expected an integer in [-2, 2), got 2"),
        (lambda z, y, g: diagnose_gradient(z[:0], y[:0], g[:0]), ValueError, "logits: expected at least one position"),
        (lambda z, y, g: jax.jit(lambda a: diagnose_gradient(a, y, g).error)(z), TypeError, "logits: expected a concrete array, got a traced one"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    z, labels, o, t = problem(4, 3)
    with pytest.raises(error, match=re.escape(message)):
        call(z, labels, o - t)


def test_the_script_ends_with_status_one_for_a_wrong_gradient_and_zero_for_a_right_one(tmp_path, capsys):
    z, labels, o, t = problem(4, 3)
    np.savez(tmp_path / "right.npz", logits=z, targets=labels, gradient=o - t)
    run(Config(tmp_path / "right.npz"))
    assert capsys.readouterr().out.startswith("correct for the sum\n\nThis is the gradient of the sum of the losses.")
    np.savez(tmp_path / "wrong.npz", logits=z, targets=labels, gradient=-t * (1 - o))
    done = subprocess.run(
        [sys.executable, "-m", "experiments.diagnose", tmp_path / "wrong.npz"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("off-diagonal terms missing\n\nThis is −t(1 − o)")


def test_files_that_cannot_be_judged(tmp_path):
    z, labels, _, t = problem(4, 3)
    path = tmp_path / "file.npz"
    cases = {
        "expected array 'gradient', got logits, targets": {"logits": z, "targets": labels},
        "gradient: expected the logits' shape (4, 3), got (3,)": {"logits": z, "targets": labels, "gradient": t[0]},
        "expected an NPZ file of plain numbers": {"logits": np.array([{}]), "targets": labels, "gradient": t},
    }
    for message, arrays in cases.items():
        np.savez(path, **arrays)
        with pytest.raises(InputError, match=re.escape(message)) as caught:
            run(Config(path))
        assert str(path) in str(caught.value)
    path.write_text("no archive")
    with pytest.raises(InputError, match="expected an NPZ file"):
        run(Config(path))
    with open(path, "wb") as file:
        np.save(file, z)
    with pytest.raises(InputError, match="expected an NPZ file of several arrays"):
        run(Config(path))
    with pytest.raises(OSError, match="No such file"):
        run(Config(tmp_path / "missing.npz"))
