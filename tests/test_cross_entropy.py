"""cross_entropy: values, gradients, edges and errors."""

import itertools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import reference
from jaxsoft import checked, cross_entropy, linear_cross_entropy, softmax

rng = np.random.default_rng(0)
LOGITS = rng.normal(size=(12, 5)) * 3
LABELS = rng.integers(0, 5, 12)
DISTRIBUTION = rng.dirichlet(np.ones(5), 12)
CLASS_WEIGHTS = rng.uniform(0.2, 2, 5)
WEIGHTS = rng.uniform(0.2, 2, 12)


def spatial(a):
    """(12, classes) as (2, classes, 3, 2), and (12,) as (2, 3, 2): the layout of images."""
    return np.moveaxis(a.reshape(2, 3, 2, -1), -1, 1) if a.ndim == 2 else a.reshape(2, 3, 2)


def value_and_gradient(logits, targets, axis, **options):
    """The loss, and the gradient under a random cotangent (a sum would hide errors that cancel)."""

    @jax.jit
    def run(logits, targets):
        value, pullback = jax.vjp(lambda z: cross_entropy(z, targets, axis, **options), logits)
        cotangent = jnp.asarray(np.random.default_rng(1).normal(size=value.shape))
        return value, pullback(cotangent)[0], cotangent

    return run(jnp.asarray(logits), jnp.asarray(targets))


def naive(logits, distribution, weights, denominator, reduction, **options):
    """The reference's losses, weighted and reduced, to be differentiated by JAX."""
    losses = weights * reference.losses(logits, distribution, **options)
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / denominator}[reduction]


# PyTorch has no ignore_index for distributions, and neither have we (see the errors).
KINDS = [("labels", None), ("labels", 1), ("labels", -100), ("distribution", None)]
OPTIONS = [None, CLASS_WEIGHTS], [0.0, 0.3, 1.0], ["none", "sum", "mean"]


@pytest.mark.parametrize(
    ("is_spatial", "kind", "class_weights", "smoothing", "reduction"),
    reference.covering(3, [False, True], KINDS, *OPTIONS),
)
def test_equals_pytorchs_formulas(is_spatial, kind, class_weights, smoothing, reduction):
    kind, ignore_index = kind
    targets = LABELS if kind == "labels" else DISTRIBUTION
    if ignore_index == -100:
        targets = np.where(np.arange(12) % 4 == 0, -100, LABELS)
    options = {"ignore_index": ignore_index, "class_weights": class_weights, "label_smoothing": smoothing}
    arrange, axis = (spatial, 1) if is_spatial else ((lambda a: a), -1)
    value, gradient, cotangent = value_and_gradient(
        arrange(LOGITS), jnp.asarray(arrange(targets)), axis, reduction=reduction, **options
    )
    expected = reference.pytorch_cross_entropy(
        LOGITS,
        targets,
        **options | {"ignore_index": -(10**9) if ignore_index is None else ignore_index},
        reduction=reduction,
    )
    np.testing.assert_allclose(value, arrange(expected) if reduction == "none" else expected, rtol=1e-12)

    # The gradient by autodiff of the naive loss, with the targets written out as q.
    weight = np.ones(5) if class_weights is None else class_weights
    valid = targets != ignore_index if kind == "labels" else np.ones(12, bool)
    t = np.eye(5)[np.where(valid, targets, 0)] if kind == "labels" else targets
    q = weight * ((1 - smoothing) * t + smoothing / 5)
    denominator = weight[targets[valid]].sum() if kind == "labels" else 12.0
    back = cotangent if reduction != "none" else jnp.asarray(np.asarray(cotangent).reshape(12))

    @jax.jit
    def expected_gradient(z, q, valid, denominator, back):
        return jax.vjp(lambda z: naive(z, q, valid, denominator, reduction), z)[1](back)[0]

    expected = expected_gradient(LOGITS, q, valid * 1.0, denominator, back)
    np.testing.assert_allclose(gradient, arrange(np.asarray(expected)), rtol=1e-10, atol=1e-13)


def test_equals_pytorch_itself():
    torch = pytest.importorskip("torch", reason="the optional extra 'peers' is not installed")
    functional = torch.nn.functional
    for (kind, ignore_index), class_weights, smoothing, reduction in reference.covering(2, KINDS, *OPTIONS):
        targets = LABELS if kind == "labels" else DISTRIBUTION
        if ignore_index == -100:
            targets = np.where(np.arange(12) % 4 == 0, -100, LABELS)
        logits = torch.tensor(spatial(LOGITS), requires_grad=True)
        theirs = functional.cross_entropy(
            logits, torch.tensor(spatial(targets)),
            weight=None if class_weights is None else torch.tensor(class_weights),
            ignore_index=-(10**9) if ignore_index is None else ignore_index,
            label_smoothing=smoothing, reduction=reduction,
        )  # fmt: skip
        value, gradient, cotangent = value_and_gradient(
            spatial(LOGITS), jnp.asarray(spatial(targets)), 1,
            class_weights=class_weights, ignore_index=ignore_index, label_smoothing=smoothing, reduction=reduction,
        )  # fmt: skip
        np.testing.assert_allclose(value, theirs.detach().numpy(), rtol=1e-12)
        theirs.backward(torch.tensor(np.asarray(cotangent)))
        np.testing.assert_allclose(gradient, logits.grad.numpy(), rtol=1e-10, atol=1e-14)


def test_equals_optax_for_targets_that_do_not_sum_to_one():
    numbers = np.random.default_rng(1)
    targets = jnp.asarray(numbers.uniform(0, 2, (12, 5)))
    cotangent = jnp.asarray(numbers.normal(size=12))
    ours, pullback = jax.vjp(lambda z, t: cross_entropy(z, t, reduction="none"), jnp.asarray(LOGITS), targets)
    theirs, their_pullback = jax.vjp(optax.softmax_cross_entropy, jnp.asarray(LOGITS), targets)
    np.testing.assert_allclose(ours, theirs, rtol=1e-13)
    for gradient, expected in zip(pullback(cotangent), their_pullback(cotangent), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-11, atol=1e-14)


def test_the_gradient_for_unnormalised_targets_is_tau_p_minus_t():
    # Three classes, worked by hand: τ = 1.75.
    logits, targets = jnp.array([-1.34, -0.02, 1.48]), jnp.array([0.5, 1.0, 0.25])
    loss, gradient = jax.value_and_grad(cross_entropy)(logits, targets)
    assert float(loss) == pytest.approx(3.345741910, abs=1e-9)
    np.testing.assert_allclose(gradient, [-0.418681325, -0.695589935, 1.114271261], atol=1e-9)


@pytest.mark.parametrize("classes", [2, 3, 10, 100, 1000])
def test_float32_is_exact_at_every_margin(classes):
    margins = np.concatenate([np.arange(-60, 81), [1e-3, 16.6, 17.5]])
    spread = np.random.default_rng(2).uniform(-1, 0, (margins.size, classes)).astype(np.float32)
    spread[:, 1] = 0
    label = np.full(margins.size, 0)
    spread[:, 0] = margins
    logits = jnp.asarray(spread)
    losses, pullback = jax.vjp(lambda z: cross_entropy(z, jnp.asarray(label), reduction="none"), logits)
    (gradient,) = pullback(jnp.ones_like(losses))
    assert losses.dtype == gradient.dtype == jnp.float32
    # In float64 the sum over the other classes, to which nothing is added and from which nothing is taken.
    others = np.exp(spread[:, 1:].astype(np.float64) - spread[:, :1].astype(np.float64)).sum(1)
    np.testing.assert_allclose(losses, np.log1p(others), rtol=1e-5)
    np.testing.assert_allclose(gradient[:, 0], -others / (1 + others), rtol=1e-5)
    scale = np.abs(np.asarray(gradient)).sum(1)
    assert (np.abs(np.asarray(gradient, np.float64).sum(1)) <= 1e-6 * scale).all()


IN_A_NEW_PROCESS = """
import jax.numpy as jnp, numpy as np
from jaxsoft import cross_entropy

positions = np.arange(4096)
for classes in (2, 3, 5, 8, 11, 15, 16, 21):
    logits = np.random.default_rng(classes).normal(size=(classes, len(positions))).astype(np.float32)
    labels, wide = positions % classes, logits.astype(float)
    expected = np.mean(np.log(np.exp(wide).sum(0)) - wide[labels, positions])
    for z, axis in ((logits, 0), (logits.T, -1), (logits.T[None], -1)):
        loss = cross_entropy(z, labels[None] if z.ndim == 3 else labels, axis)
        np.testing.assert_allclose(loss, expected, rtol=1e-6, err_msg=f"{classes} classes along axis {axis}")
"""


def test_float32_of_few_classes_after_fewer():
    """XLA's CPU reductions compute a float32 iota wrongly in jaxlib 0.11.2 and 0.12.0.1.

    Of fewer than 16 elements they fill only as many as an earlier program had, and leave the rest uninitialised.
    """
    done = subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_bfloat16_over_a_large_vocabulary():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(8, 128_256)) * 2).astype(jnp.bfloat16)
    labels = jnp.asarray(np.random.default_rng(4).integers(0, 128_256, 8))
    losses, pullback = jax.vjp(lambda z: cross_entropy(z, labels, reduction="none"), logits)
    exact = cross_entropy(logits.astype(jnp.float64), labels, reduction="none")
    wide = np.asarray(logits.astype(jnp.float64))
    naive_exact = np.log(np.exp(wide).sum(1)) - wide[np.arange(8), labels]
    np.testing.assert_allclose(exact, naive_exact, rtol=1e-12)
    np.testing.assert_allclose(losses, naive_exact, atol=2e-4)
    assert losses.dtype == jnp.float32
    assert pullback(jnp.ones(8, jnp.float32))[0].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("dtype", "bad"),
    [(jnp.int8, [-1, 5]), (jnp.uint8, [255, 5]), (jnp.int32, [-1, 5, 255, -5]), (jnp.int64, [-1, 5, 2**32, 2**32 + 1]),
     (jnp.uint64, [2**63 + 1])],
)  # fmt: skip
def test_a_label_out_of_range_is_nan_there_and_nowhere_else(dtype, bad):
    logits = jnp.asarray(LOGITS)
    clean = jnp.asarray(LABELS).astype(dtype)
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.1, "class_weights": CLASS_WEIGHTS}):
        run = jax.jit(jax.value_and_grad(lambda z, y, options=options: cross_entropy(z, y, **options)))
        each = jax.jit(lambda z, y, options=options: cross_entropy(z, y, reduction="none", **options))
        expected = np.array(each(logits, clean))
        expected[3] = np.nan
        for label in bad:
            labels = clean.at[3].set(jnp.array(label, dtype))
            mean, gradient = run(logits, labels)
            assert np.isnan(mean)
            assert np.isnan(gradient[3]).all()
            assert np.isfinite(np.delete(gradient, 3, 0)).all()
            np.testing.assert_allclose(each(logits, labels), expected, rtol=1e-14)


def test_ignore_index_that_the_labels_dtype_cannot_hold_ignores_nothing():
    # Cut to the dtype's bits they would be classes.
    for dtype, indices in ((jnp.uint8, (-1, 256, 257)), (jnp.int32, (2**32 + 1, 2 - 2**32)), (jnp.uint32, (2**32,))):
        labels = jnp.asarray(LABELS).astype(dtype)
        for index in indices:
            value = cross_entropy(jnp.asarray(LOGITS), labels, ignore_index=index)
            np.testing.assert_allclose(value, cross_entropy(jnp.asarray(LOGITS), labels), rtol=1e-14)


def test_narrow_labels_among_many_classes():
    logits = jnp.asarray(np.random.default_rng(8).normal(size=(4, 200)))
    labels = jnp.array([0, 5, 127, 3])
    for dtype in (jnp.int8, jnp.uint8, jnp.int16):
        np.testing.assert_allclose(
            cross_entropy(logits, labels.astype(dtype)), cross_entropy(logits, labels), rtol=1e-14
        )


def test_ignored_positions_do_not_count():
    labels = np.where(np.arange(12) < 7, LABELS, 255).astype(np.uint8)
    run = jax.value_and_grad(lambda z, y: cross_entropy(z, y, ignore_index=255, z_loss=0.01, label_smoothing=0.1))
    value, gradient = run(jnp.asarray(LOGITS), jnp.asarray(labels))
    expected, expected_gradient = run(jnp.asarray(LOGITS[:7]), jnp.asarray(labels[:7]))
    np.testing.assert_allclose(value, expected, rtol=1e-14)
    np.testing.assert_allclose(gradient[:7], expected_gradient, rtol=1e-13, atol=1e-15)
    np.testing.assert_array_equal(gradient[7:], 0)


def test_nothing_to_average():
    for labels, options in (
        (np.full(12, 255), {"ignore_index": 255}),
        (LABELS, {"weights": np.zeros(12)}),
        (DISTRIBUTION, {"weights": np.zeros(12)}),
    ):
        for smoothing, z_loss in itertools.product((0, 0.1), (0, 0.1)):
            loss = lambda z, y, o=options | {"label_smoothing": smoothing, "z_loss": z_loss}: cross_entropy(z, y, **o)  # noqa: E731
            value, gradient = jax.jit(jax.value_and_grad(loss))(LOGITS, labels)
            assert value == 0
            np.testing.assert_array_equal(gradient, 0)
    assert cross_entropy(jnp.zeros((0, 5)), jnp.zeros(0, int)) == 0


def test_position_weights():
    for targets, counted in ((LABELS, CLASS_WEIGHTS[LABELS]), (DISTRIBUTION, np.ones(12))):
        options = {"class_weights": CLASS_WEIGHTS, "reduction": "none"}
        losses = np.asarray(cross_entropy(LOGITS, targets, **options))
        np.testing.assert_allclose(
            cross_entropy(LOGITS, targets, weights=WEIGHTS, **options), WEIGHTS * losses, rtol=1e-14
        )
        mean = cross_entropy(LOGITS, targets, weights=WEIGHTS, class_weights=CLASS_WEIGHTS)
        np.testing.assert_allclose(mean, (WEIGHTS * losses).sum() / (WEIGHTS * counted).sum(), rtol=1e-14)


def test_weights_are_constants():
    def loss(weights, class_weights, targets):
        return cross_entropy(jnp.asarray(LOGITS), targets, weights=weights, class_weights=class_weights, z_loss=0.1)

    for targets in (LABELS, DISTRIBUTION):
        for gradient in jax.grad(loss, argnums=(0, 1))(
            jnp.asarray(WEIGHTS), jnp.asarray(CLASS_WEIGHTS), jnp.asarray(targets)
        ):
            np.testing.assert_array_equal(gradient, 0)


def test_weight_zero_leaves_a_bad_label_out():
    labels = jnp.asarray(LABELS).at[3].set(-1)
    value = cross_entropy(jnp.asarray(LOGITS), labels, weights=jnp.ones(12).at[3].set(0))
    expected = cross_entropy(jnp.asarray(np.delete(LOGITS, 3, 0)), jnp.asarray(np.delete(LABELS, 3)))
    np.testing.assert_allclose(value, expected, rtol=1e-14)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_z_loss_is_averaged_over_positions_and_not_weighted_by_class(reduction):
    options = {"weights": WEIGHTS, "class_weights": CLASS_WEIGHTS, "reduction": reduction}
    value, gradient, cotangent = value_and_gradient(LOGITS, jnp.asarray(LABELS), -1, z_loss=0.3, **options)
    plain, plain_gradient, _ = value_and_gradient(LOGITS, jnp.asarray(LABELS), -1, **options)

    def penalty(z):
        terms = 0.3 * jnp.asarray(WEIGHTS) * reference.logsumexp(z) ** 2
        return {"none": terms, "sum": terms.sum(), "mean": terms.sum() / WEIGHTS.sum()}[reduction]

    expected, pullback = jax.vjp(penalty, jnp.asarray(LOGITS))
    np.testing.assert_allclose(value - plain, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient - plain_gradient, pullback(cotangent)[0], rtol=1e-11, atol=1e-14)


def test_z_loss_that_cancels_the_target_mass_leaves_the_target():
    # At lse = −1 and ζ = ½ the probabilities' factor τ + 2ζ·lse is exactly 0; −q is not.
    for targets, options in ((jnp.array([1.0]), {}), (jnp.array(0), {"label_smoothing": 1.0}), (jnp.array(0), {})):
        gradient = jax.grad(lambda z, t=targets, o=options: cross_entropy(z, t, z_loss=0.5, **o))(jnp.array([-1.0]))
        np.testing.assert_allclose(gradient, [-1.0], rtol=1e-14)


def test_where_removes_classes():
    mask = np.random.default_rng(5).random((12, 5)) < 0.6
    mask[np.arange(12), LABELS] = True
    poisoned = np.where(mask, LOGITS, np.nan)
    for smoothing in (0.0, 0.2):
        value, gradient, cotangent = value_and_gradient(
            poisoned, jnp.asarray(LABELS), -1, where=mask, label_smoothing=smoothing, reduction="none"
        )
        for n in range(12):
            kept = np.flatnonzero(mask[n])
            t = (1 - smoothing) * (kept == LABELS[n]) + smoothing / kept.size
            expected, pullback = jax.vjp(
                lambda z, t=t: reference.losses(z, jnp.asarray(t)), jnp.asarray(LOGITS[n, kept])
            )
            np.testing.assert_allclose(value[n], expected, rtol=1e-12)
            np.testing.assert_allclose(gradient[n, kept], pullback(cotangent[n])[0], rtol=1e-11, atol=1e-14)
        np.testing.assert_array_equal(np.asarray(gradient)[~mask], 0)


@pytest.mark.parametrize("kind", ["labels", "distribution"])
def test_a_mask_is_that_of_the_classes_left(kind):
    """One mask for all positions equals leaving its classes out: loss, gradient and the gradient to a distribution."""
    kept, mask = np.array([0, 2, 3]), np.array([True, False, True, True, False])
    targets = kept[LABELS % 3] if kind == "labels" else DISTRIBUTION
    of_kept = LABELS % 3 if kind == "labels" else DISTRIBUTION[:, kept]
    variables = (0,) if kind == "labels" else (0, 1)
    options = {"label_smoothing": 0.2, "z_loss": 0.1}

    def value_and_gradients(logits, targets, weights, where=None):
        loss = lambda z, t: cross_entropy(z, t, class_weights=weights, where=where, **options)  # noqa: E731
        return jax.value_and_grad(loss, variables)(logits, targets)

    poisoned = np.where(mask, LOGITS, np.nan)
    if kind == "distribution":
        targets = np.where(mask, targets, 0)
    value, gradients = value_and_gradients(poisoned, targets, CLASS_WEIGHTS, mask)
    expected, wanted = value_and_gradients(LOGITS[:, kept], of_kept, CLASS_WEIGHTS[kept])
    np.testing.assert_allclose(value, expected, rtol=1e-13)
    for gradient, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient[:, kept], want, rtol=1e-12, atol=1e-15)
        np.testing.assert_array_equal(np.asarray(gradient)[:, ~mask], 0)


def test_a_removed_label_costs_infinity_with_finite_gradients():
    logits, mask = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[True, False, True]])
    for targets in (jnp.array([1]), jnp.array([[0.0, 1.0, 0.0]])):
        value, pullback = jax.vjp(lambda z, t=targets: cross_entropy(z, t, where=mask), logits)
        assert value == np.inf
        assert np.isfinite(pullback(jnp.ones(()))[0]).all()
    everything_removed = jnp.zeros((1, 3), bool)
    value, gradient = jax.value_and_grad(cross_entropy)(logits, jnp.array([1]), where=everything_removed)
    assert value == np.inf
    np.testing.assert_array_equal(gradient, 0)


def test_positions_that_take_no_part_may_hold_anything():
    labels, options = jnp.array([0, 255]), {"ignore_index": 255, "label_smoothing": 0.1, "z_loss": 0.1}
    for poison in (np.nan, np.inf, -np.inf):
        logits = jnp.array([[1.0, 2.0, 3.0], [poison, 0.0, 0.0]])
        value, gradient = jax.value_and_grad(cross_entropy)(logits, labels, **options)
        expected, expected_gradient = jax.value_and_grad(cross_entropy)(logits[:1], labels[:1], **options)
        np.testing.assert_allclose(value, expected, rtol=1e-14)
        np.testing.assert_allclose(gradient, [*expected_gradient, [0, 0, 0]], rtol=1e-13)
        weights = jnp.array([1.0, 0.0])
        distribution = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
        for argument in (0, 1):
            gradient = jax.grad(cross_entropy, argnums=argument)(logits, distribution, weights=weights)
            np.testing.assert_array_equal(gradient[1], 0)
            assert np.isfinite(gradient).all()
    checked(lambda z: cross_entropy(z, labels, ignore_index=255))(jnp.array([[1.0, 2.0], [jnp.nan, 0.0]]))


def test_positions_without_any_possible_class():
    logits, label = jnp.full((1, 3), -jnp.inf), jnp.array([0])
    for scale in (1.0, 1024.0):
        value, gradient = jax.value_and_grad(lambda z, k=scale: k * cross_entropy(z, label))(logits)
        assert value == np.inf
        np.testing.assert_array_equal(gradient, 0)
    assert np.isfinite(jax.hessian(lambda z: cross_entropy(z, label))(logits)).all()


def test_every_option_together_for_distributions():
    mask = np.random.default_rng(6).random((12, 5)) < 0.7
    mask[:, 0] = True
    t = np.where(mask, DISTRIBUTION, 0)
    options = {"class_weights": CLASS_WEIGHTS, "label_smoothing": 0.2, "z_loss": 0.1, "weights": WEIGHTS, "where": mask}
    value, pullback = jax.vjp(lambda z, t: cross_entropy(z, t, **options), jnp.asarray(LOGITS), jnp.asarray(t))
    to_logits, to_targets = pullback(jnp.array(1.7))

    def expected(z, t):
        total = 0.0
        for n in range(12):
            kept = np.flatnonzero(mask[n])
            q = CLASS_WEIGHTS[kept] * (0.8 * t[n, kept] + 0.2 / kept.size)
            total += WEIGHTS[n] * reference.losses(z[n, kept], q, 0.1)
        return total / WEIGHTS.sum()

    wanted, wanted_pullback = jax.vjp(expected, jnp.asarray(LOGITS), jnp.asarray(t))
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    for actual, gradient in zip((to_logits, to_targets), wanted_pullback(jnp.array(1.7)), strict=True):
        np.testing.assert_allclose(actual, gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 2**-8), (jnp.float16, 2**-10)])
def test_half_precision_gradients(dtype, tolerance):
    logits = jnp.asarray(LOGITS).astype(dtype)
    for targets in (jnp.asarray(LABELS), jnp.asarray(DISTRIBUTION).astype(dtype)):
        value, pullback = jax.vjp(
            lambda z, t=targets: cross_entropy(z, t, reduction="none", label_smoothing=0.1), logits
        )
        cotangent = np.random.default_rng(7).normal(size=12).astype(np.float32)
        (gradient,) = pullback(jnp.asarray(cotangent))
        wide = targets if targets.dtype == jnp.asarray(LABELS).dtype else targets.astype(jnp.float64)
        exact = jax.vjp(
            lambda z, t=wide: cross_entropy(z, t, reduction="none", label_smoothing=0.1), logits.astype(jnp.float64)
        )
        np.testing.assert_allclose(value, exact[0], rtol=1e-5)
        expected = exact[1](jnp.asarray(cotangent, jnp.float64))[0]
        np.testing.assert_allclose(gradient.astype(jnp.float64), expected, rtol=0, atol=2 * tolerance)


def test_impossible_classes_without_target_weight_cost_nothing():
    logits = jnp.array([1.0, -jnp.inf, 2.0])
    for targets in (jnp.array(2), jnp.array([0.0, 0.0, 1.0])):
        value, gradient = jax.value_and_grad(cross_entropy)(logits, targets)
        np.testing.assert_allclose(value, np.log1p(np.exp(-1)), rtol=1e-14)
        np.testing.assert_allclose(gradient, [1 / (1 + np.e), 0, -1 / (1 + np.e)], rtol=1e-13)
    to_targets = jax.grad(cross_entropy, argnums=1)(
        logits, jnp.array([0.0, 0.0, 1.0]), where=jnp.array([True, False, True])
    )
    assert np.isfinite(to_targets).all()


def test_an_impossible_class_of_class_weight_0_has_no_gradient_to_its_target():
    def loss(targets):
        return cross_entropy(jnp.array([1.0, -jnp.inf, 2.0]), targets, class_weights=jnp.array([1.0, 0.0, 3.0]))

    value, gradient = jax.value_and_grad(loss)(jnp.array([0.25, 0.5, 0.25]))
    lse = np.log(np.exp(1) + np.exp(2))
    np.testing.assert_allclose(value, 0.25 * (lse - 1) + 0.75 * (lse - 2), rtol=1e-13)
    np.testing.assert_allclose(gradient, [lse - 1, 0, 3 * (lse - 2)], rtol=1e-13)


def test_a_huge_common_offset_changes_nothing():
    value, gradient = jax.value_and_grad(cross_entropy)(jnp.array([1e6, 1e6 + 1.0]), jnp.array(0))
    np.testing.assert_allclose(value, np.log1p(np.e), rtol=1e-12)
    np.testing.assert_allclose(gradient, [-np.e / (1 + np.e), np.e / (1 + np.e)], rtol=1e-12)


SECOND_ORDER = {
    "labels": (np.array(2), {}, np.eye(5)[2]),
    "every option": (
        np.array(2),
        {"class_weights": CLASS_WEIGHTS, "label_smoothing": 0.2, "z_loss": 0.1},
        CLASS_WEIGHTS * (0.8 * np.eye(5)[2] + 0.2 / 5),
    ),
    "distribution": (DISTRIBUTION[0], {"z_loss": 0.1}, DISTRIBUTION[0]),
}


@pytest.mark.parametrize(("targets", "options", "q"), SECOND_ORDER.values(), ids=SECOND_ORDER)
def test_derivatives_of_second_order(targets, options, q):
    logits, direction = jnp.asarray(LOGITS[0]), jnp.asarray(LOGITS[1])

    def ours(z):
        return cross_entropy(z, targets, reduction="sum", **options)

    def expected(z):
        return reference.losses(z, jnp.asarray(q), options.get("z_loss", 0.0))

    @jax.jit
    def matrices(z):
        return jax.hessian(ours)(z), jax.jacrev(jax.grad(ours))(z), jax.hessian(expected)(z)

    *found, matrix = matrices(logits)
    product = jax.jit(lambda *at: jax.jvp(jax.grad(ours), at[:1], at[1:])[1])(logits, direction)
    for actual, wanted in ((found[0], matrix), (found[1], matrix), (product, matrix @ direction)):
        np.testing.assert_allclose(actual, wanted, rtol=1e-10, atol=1e-13)
    check_grads(jax.jit(jax.checkpoint(ours)), (logits,), order=2, modes=["rev"])


def test_mixed_second_derivatives_of_logits_and_targets():
    def ours(z, t):
        return cross_entropy(z, t)

    logits, targets = jnp.asarray(LOGITS[0]), jnp.asarray(DISTRIBUTION[0])
    actual = jax.jit(jax.jacrev(jax.grad(ours, argnums=1), argnums=0))(logits, targets)
    expected = jax.jit(jax.jacfwd(jax.grad(reference.losses, argnums=1), argnums=0))(logits, targets)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("loss", [cross_entropy, lambda z, y: linear_cross_entropy(z, jnp.eye(3, dtype=z.dtype), y)])
def test_the_values_tangent_where_the_label_leads(loss, dtype):
    """Σ_j p_j (ż_j − ż_label), also where the others' sum is 0: a maximum there has half a derivative on each side."""
    tangent = np.array([1.0, -0.5, 2.0])

    @jax.jit
    def forward_over_reverse(z):
        return jax.jvp(lambda z: jax.value_and_grad(loss)(z, jnp.array(0))[0], (z,), (jnp.asarray(tangent, dtype),))[1]

    for lead in (0.0, 3.0, 17.0, 40.0, 200.0, 800.0):
        probs = np.exp([0, -lead, -lead - 1]) / np.exp([0, -lead, -lead - 1]).sum()
        expected = probs[1:] @ (tangent[1:] - tangent[0])
        actual = forward_over_reverse(jnp.array([lead, 0, -1], dtype))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=4 * float(jnp.finfo(dtype).eps))


def test_vmap_over_a_batch_of_problems():
    logits, labels = jnp.asarray(spatial(LOGITS)), jnp.asarray(spatial(LABELS))
    mapped = jax.vmap(lambda z, y: cross_entropy(z, y, axis=0, reduction="none"))(logits, labels)
    np.testing.assert_allclose(mapped, cross_entropy(logits, labels, axis=1, reduction="none"), rtol=1e-14)


def test_only_the_logits_and_a_few_numbers_a_position_are_saved():
    logits, labels = jnp.zeros((64, 1000), jnp.float32), jnp.zeros(64, jnp.int32)
    for smoothing in (0.0, 0.1):
        _, pullback = jax.vjp(
            lambda z, e=smoothing: cross_entropy(z, labels, label_smoothing=e, ignore_index=3), logits
        )
        saved = sum(leaf.nbytes for leaf in jax.tree.leaves(pullback) if isinstance(leaf, jax.Array))
        assert saved <= logits.nbytes + 64 * 4 * 16 + 1000 * 4


@pytest.mark.parametrize(
    "function", [softmax, lambda z: cross_entropy(z, jnp.zeros(4, jnp.int32), ignore_index=1, label_smoothing=0.1)]
)
def test_lowers_for_every_platform(function):
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(function(z) ** 2)))
    exported = jax.export.export(gradient, platforms=("cpu", "cuda", "tpu"))(jnp.zeros((4, 8), jnp.float32))
    assert exported.platforms == ("cpu", "cuda", "tpu")


N5 = np.zeros((4, 5))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cross_entropy(N5, np.zeros(3, int)), ValueError, "targets: expected integer labels of shape (4,), the logits' (4, 5) without axis 1, got (3,)"),
        (lambda: cross_entropy(N5[:, :1], np.zeros((4, 1), int)), ValueError, "targets: expected integer labels of shape (4,)"),
        (lambda: cross_entropy(N5, np.zeros(4)), ValueError, "targets: expected a distribution of the logits' shape (4, 5), got (4,); labels must have an integer dtype"),
        (lambda: cross_entropy(N5, np.zeros(4, bool)), TypeError, "targets: expected integer labels or a distribution, got dtype bool"),
        (lambda: cross_entropy(N5 > 0, np.zeros(4, int)), TypeError, "logits: expected real numbers, got dtype bool"),
        (lambda: cross_entropy(N5, np.zeros(4, int), axis=2), ValueError, "axis: expected an integer in [-2, 2), got 2"),
        (lambda: cross_entropy(np.zeros(()), np.zeros((), int)), ValueError, "axis: expected an array with at least one axis, the classes, got a scalar"),
        (lambda: cross_entropy(np.zeros((4, 0)), np.zeros(4, int)), ValueError, "logits: expected at least one class along axis 1, got shape (4, 0)"),
        (lambda: cross_entropy(N5, np.zeros(4, int), reduction="avg"), ValueError, "reduction: expected 'none', 'sum' or 'mean', got 'avg'"),
        (lambda: cross_entropy(N5, np.zeros(4, int), label_smoothing=1.1), ValueError, "label_smoothing: expected a finite number in [0, 1], got 1.1"),
        (lambda: cross_entropy(N5, np.zeros(4, int), label_smoothing=-0.1), ValueError, "label_smoothing: expected a finite number in [0, 1], got -0.1"),
        (lambda: cross_entropy(N5, np.zeros(4, int), label_smoothing="a"), TypeError, "label_smoothing: expected a number or a scalar array, got str"),
        (lambda: cross_entropy(N5, np.zeros(4, int), z_loss=np.nan), ValueError, "z_loss: expected a finite number at least 0, got nan"),
        (lambda: cross_entropy(N5, np.zeros(4, int), class_weights=np.ones(4)), ValueError, "class_weights: expected shape (5,), one weight a class, got (4,)"),
        (lambda: cross_entropy(N5, np.zeros(4, int), weights=np.ones(5)), ValueError, "weights: expected a shape that broadcasts to (4,), got (5,)"),
        (lambda: cross_entropy(N5, np.zeros(4, int), z_loss=np.zeros(2)), TypeError, "z_loss: expected a real scalar, got shape (2,) and dtype float64"),
        (lambda: cross_entropy(N5, np.zeros(4, int), weights=np.ones(4, complex)), TypeError, "weights: expected real numbers or booleans, got dtype complex128"),
        (lambda: cross_entropy(N5, np.zeros(4, int), class_weights=np.ones(5, bool)), TypeError, "class_weights: expected real numbers, got dtype bool"),
        (lambda: cross_entropy(N5, np.eye(5, dtype=int)[:4], ignore_index=1), ValueError, "ignore_index: expected None with distributions, which have no index; use weights"),
        (lambda: cross_entropy(jnp.zeros((4, 5), jnp.float8_e4m3fn), np.zeros(4, int)), TypeError, "logits: expected at least 16 bits, got dtype float8_e4m3fn: convert to bfloat16 first"),
        (lambda: cross_entropy(N5, np.zeros(4, int), where=np.ones(4, bool)), ValueError, "where: expected a shape that broadcasts to (4, 5), got (4,)"),
        (lambda: cross_entropy(N5, np.zeros(4, int), ignore_index=255.0), TypeError, "ignore_index: expected an integer, got 255.0"),
        (lambda: cross_entropy(N5, N5, ignore_index=0), ValueError, "ignore_index: expected None with distributions"),
    ],
)  # fmt: skip
def test_errors_name_argument_expected_and_actual(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
