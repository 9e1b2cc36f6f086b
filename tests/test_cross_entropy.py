"""cross_entropy: values, gradients, edges and errors."""

import functools
import itertools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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


def compiled(fn):
    """One program, whose results are NumPy arrays: JAX would compile another for each way of indexing them."""
    fn = jax.jit(fn)
    return lambda *arguments, **options: jax.device_get(fn(*arguments, **options))


def value_and_gradient(logits, targets, axis, **options):
    """The loss, and the gradient under a random cotangent (a sum would hide errors that cancel)."""

    @compiled
    def run(logits, targets):
        value, pullback = jax.vjp(lambda z: cross_entropy(z, targets, axis, **options), logits)
        cotangent = np.random.default_rng(1).normal(size=value.shape)
        return value, pullback(cotangent)[0], cotangent

    return run(logits, targets)


# PyTorch has no ignore_index for distributions, and neither have we (see the errors).
KINDS = [("labels", None), ("labels", 1), ("labels", -100), ("distribution", None)]
FACTORS = [False, True], KINDS, [False, True], [0.0, 0.3, 1.0], ["none", "sum", "mean"]
PAIRS = reference.covering(2, *FACTORS)
TRIPLES = [case for case in reference.covering(3, *FACTORS) if case not in PAIRS]


@functools.cache
def problem_and_result(is_spatial, kind, is_weighted, smoothing, reduction):
    """Targets of (12, ...), the options, the layout of both, and the results of cross_entropy and its gradient."""
    kind, ignore_index = kind
    targets = LABELS if kind == "labels" else DISTRIBUTION
    if ignore_index == -100:
        targets = np.where(np.arange(12) % 4 == 0, -100, LABELS)
    options = {"class_weights": CLASS_WEIGHTS if is_weighted else None, "label_smoothing": smoothing}
    options |= {"ignore_index": ignore_index, "reduction": reduction}
    arrange, axis = (spatial, 1) if is_spatial else ((lambda a: a), -1)
    return targets, options, arrange, value_and_gradient(arrange(LOGITS), arrange(targets), axis, **options)


@functools.partial(jax.jit, static_argnums=4)
def naive_gradient(z, q, weights, denominator, reduction, cotangent):
    """The gradient of the reference's losses, weighted and reduced, by automatic differentiation."""

    def naive(z):
        losses = weights * reference.losses(z, q)
        return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / denominator}[reduction]

    return jax.vjp(naive, z)[1](cotangent)[0]


@pytest.mark.parametrize(
    "case", [*PAIRS, *(pytest.param(case, marks=pytest.mark.exhaustive) for case in TRIPLES)], ids=str
)
def test_equals_pytorchs_formulas(case):
    targets, options, arrange, (value, gradient, cotangent) = problem_and_result(*case)
    ignore_index, smoothing, reduction = (options[k] for k in ("ignore_index", "label_smoothing", "reduction"))
    expected = reference.pytorch_cross_entropy(
        LOGITS, targets, **options | {"ignore_index": -(10**9) if ignore_index is None else ignore_index}
    )
    np.testing.assert_allclose(value, arrange(expected) if reduction == "none" else expected, rtol=1e-12)

    # The targets written out as q.
    is_labels = targets.dtype == int
    weight = np.ones(5) if options["class_weights"] is None else CLASS_WEIGHTS
    valid = targets != ignore_index if is_labels else np.ones(12, bool)
    t = np.eye(5)[np.where(valid, targets, 0)] if is_labels else targets
    q = weight * ((1 - smoothing) * t + smoothing / 5)
    denominator = weight[targets[valid]].sum() if is_labels else 12.0
    back = cotangent.reshape(12 if reduction == "none" else ())
    expected = naive_gradient(LOGITS, q, valid * 1.0, denominator, reduction, back)
    np.testing.assert_allclose(gradient, arrange(np.asarray(expected)), rtol=1e-10, atol=1e-13)


def test_equals_pytorch_itself():
    torch = pytest.importorskip("torch", reason="the optional extra 'peers' is not installed")
    for case in PAIRS:
        targets, options, arrange, (value, gradient, cotangent) = problem_and_result(*case)
        logits = torch.tensor(arrange(LOGITS), requires_grad=True)
        weight = torch.tensor(CLASS_WEIGHTS) if options["class_weights"] is not None else None
        ignore_index = -(10**9) if options["ignore_index"] is None else options["ignore_index"]
        theirs = torch.nn.functional.cross_entropy(
            logits, torch.tensor(arrange(targets)), weight=weight, ignore_index=ignore_index,
            label_smoothing=options["label_smoothing"], reduction=options["reduction"],
        )  # fmt: skip
        np.testing.assert_allclose(value, theirs.detach().numpy(), rtol=1e-12)
        theirs.backward(torch.tensor(cotangent))
        np.testing.assert_allclose(gradient, logits.grad.numpy(), rtol=1e-10, atol=1e-14)


def test_equals_optax_for_targets_that_do_not_sum_to_one():
    numbers = np.random.default_rng(1)
    targets, cotangent = numbers.uniform(0, 2, (12, 5)), numbers.normal(size=12)

    @compiled
    def both(z, t, cotangent):
        ours, pullback = jax.vjp(lambda z, t: cross_entropy(z, t, reduction="none"), z, t)
        theirs, their_pullback = jax.vjp(optax.softmax_cross_entropy, z, t)
        return (ours, *pullback(cotangent)), (theirs, *their_pullback(cotangent))

    (ours, *gradients), (theirs, *their_gradients) = both(LOGITS, targets, cotangent)
    np.testing.assert_allclose(ours, theirs, rtol=1e-13)
    for gradient, expected in zip(gradients, their_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-11, atol=1e-14)


def test_the_gradient_for_unnormalised_targets_is_tau_p_minus_t():
    # Three classes, worked by hand: τ = 1.75. Called without jit.
    logits, targets = np.array([-1.34, -0.02, 1.48]), np.array([0.5, 1.0, 0.25])
    loss, gradient = jax.value_and_grad(cross_entropy)(logits, targets)
    assert float(loss) == pytest.approx(3.345741910, abs=1e-9)
    np.testing.assert_allclose(gradient, [-0.418681325, -0.695589935, 1.114271261], atol=1e-9)


def test_float32_is_exact_at_every_margin():
    margins = np.concatenate([np.arange(-60, 81), [1e-3, 16.6, 17.5]])
    spreads = [np.random.default_rng(2).uniform(-1, 0, (margins.size, classes)) for classes in (2, 3, 10, 100, 1000)]
    spreads = [spread.astype(np.float32) for spread in spreads]
    for spread in spreads:
        spread[:, 0], spread[:, 1] = margins, 0

    @compiled
    def losses_and_gradient(logits, labels):
        losses, pullback = jax.vjp(lambda z: cross_entropy(z, labels, reduction="none"), logits)
        return losses, pullback(jnp.ones_like(losses))[0]

    for spread in spreads:
        losses, gradient = losses_and_gradient(spread, np.zeros(margins.size, int))
        assert losses.dtype == gradient.dtype == jnp.float32
        # In float64, the sum over the other classes, without any further addition or subtraction.
        others = np.exp(spread[:, 1:].astype(np.float64) - spread[:, :1].astype(np.float64)).sum(1)
        np.testing.assert_allclose(losses, np.log1p(others), rtol=1e-5)
        np.testing.assert_allclose(gradient[:, 0], -others / (1 + others), rtol=1e-5)
        scale = np.abs(gradient).sum(1)
        assert (np.abs(gradient.astype(float).sum(1)) <= 1e-6 * scale).all()


IN_A_NEW_PROCESS = """
import sys
import jax.numpy as jnp, numpy as np
from jaxsoft import cross_entropy

positions = np.arange(4096)
for classes in map(int, sys.argv[1:]):
    logits = np.random.default_rng(classes).normal(size=(classes, len(positions))).astype(np.float32)
    labels, wide = positions % classes, logits.astype(float)
    expected = np.mean(np.log(np.exp(wide).sum(0)) - wide[labels, positions])
    for z, axis in ((logits, 0), (logits.T, -1), (logits.T[None], -1)):
        loss = cross_entropy(z, labels[None] if z.ndim == 3 else labels, axis)
        np.testing.assert_allclose(loss, expected, rtol=1e-6, err_msg=f"{classes} classes along axis {axis}")
"""


@pytest.mark.parametrize("classes", ["2 3 8 15 16", pytest.param("2 3 5 8 11 15 16 21", marks=pytest.mark.exhaustive)])
def test_float32_of_few_classes_after_a_call_with_fewer(classes):
    """XLA's CPU reductions compute a float32 iota wrongly in jaxlib 0.11.2 and 0.12.0.1.

    Of fewer than 16 elements they fill only as many as an earlier program had, and leave the rest uninitialised.
    """
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, *classes.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_bfloat16_over_a_large_vocabulary():
    logits = (np.random.default_rng(3).normal(size=(8, 128_256)) * 2).astype(jnp.bfloat16)
    labels = np.random.default_rng(4).integers(0, 128_256, 8)

    @compiled
    def run(z, wide, labels):
        losses, pullback = jax.vjp(lambda z: cross_entropy(z, labels, reduction="none"), z)
        return losses, *pullback(jnp.ones_like(losses)), cross_entropy(wide, labels, reduction="none")

    wide = logits.astype(float)
    losses, gradient, exact = run(logits, wide, labels)
    naive_exact = np.log(np.exp(wide).sum(1)) - wide[np.arange(8), labels]
    np.testing.assert_allclose(exact, naive_exact, rtol=1e-12)
    np.testing.assert_allclose(losses, naive_exact, atol=2e-4)
    assert losses.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16


EVERY_OPTION = {"label_smoothing": 0.1, "z_loss": 0.1, "class_weights": CLASS_WEIGHTS}
OUT_OF_RANGE = {np.int8: [-1, 5], np.uint8: [255, 5], np.int32: [-1, 5, 255, -5]}
OUT_OF_RANGE |= {np.int64: [-1, 5, 2**32, 2**32 + 1], np.uint64: [2**63 + 1]}


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        *((dtype, {}) for dtype in OUT_OF_RANGE),
        (np.int32, EVERY_OPTION),
        *(pytest.param(dtype, EVERY_OPTION, marks=pytest.mark.exhaustive) for dtype in OUT_OF_RANGE if dtype != np.int32),
    ],
)  # fmt: skip
def test_a_label_out_of_range_is_nan_there_and_nowhere_else(dtype, options):
    @compiled
    def run(z, y):
        mean = jax.value_and_grad(lambda z: cross_entropy(z, y, **options))(z)
        return *mean, cross_entropy(z, y, reduction="none", **options)

    clean = LABELS.astype(dtype)
    expected = np.where(np.arange(12) == 3, np.nan, run(LOGITS, clean)[2])
    for label in OUT_OF_RANGE[dtype]:
        mean, gradient, each = run(LOGITS, np.where(np.arange(12) == 3, np.array(label, dtype), clean))
        assert np.isnan(mean)
        assert np.isnan(gradient[3]).all()
        assert np.isfinite(np.delete(gradient, 3, 0)).all()
        np.testing.assert_allclose(each, expected, rtol=1e-14)


def test_ignore_index_that_the_labels_dtype_cannot_hold_ignores_nothing():
    # Cut to the dtype's bits they would be classes.
    indices = {np.uint8: (-1, 256, 257), np.int32: (2**32 + 1, 2 - 2**32), np.uint32: (2**32,)}

    @compiled
    def run(z, *labels):
        return [
            (cross_entropy(z, y), [cross_entropy(z, y, ignore_index=index) for index in of_dtype])
            for y, of_dtype in zip(labels, indices.values(), strict=True)
        ]

    for expected, values in run(LOGITS, *(LABELS.astype(dtype) for dtype in indices)):
        for value in values:
            np.testing.assert_allclose(value, expected, rtol=1e-14)


def test_narrow_labels_among_many_classes():
    logits, labels = np.random.default_rng(8).normal(size=(4, 200)), np.array([0, 5, 127, 3])
    narrow = [labels.astype(dtype) for dtype in (np.int8, np.uint8, np.int16)]
    expected, *values = compiled(lambda z, *many: [cross_entropy(z, y) for y in many])(logits, labels, *narrow)
    np.testing.assert_allclose(values, [expected] * 3, rtol=1e-14)


def test_ignored_positions_do_not_count():
    labels = np.where(np.arange(12) < 7, LABELS, 255).astype(np.uint8)
    both = jax.value_and_grad(lambda z, y: cross_entropy(z, y, ignore_index=255, z_loss=0.01, label_smoothing=0.1))
    run = compiled(lambda z, y: (both(z, y), both(z[:7], y[:7])))
    (value, gradient), (expected, expected_gradient) = run(LOGITS, labels)
    np.testing.assert_allclose(value, expected, rtol=1e-14)
    np.testing.assert_allclose(gradient[:7], expected_gradient, rtol=1e-13, atol=1e-15)
    np.testing.assert_array_equal(gradient[7:], 0)


NOTHING = [
    (np.full(12, 255), {"ignore_index": 255}),
    (LABELS, {"weights": np.zeros(12)}),
    (DISTRIBUTION, {"weights": np.zeros(12)}),
]
SOME = reference.covering(2, range(3), (0, 0.1), (0, 0.1))
OTHERS = [case for case in itertools.product(range(3), (0, 0.1), (0, 0.1)) if case not in SOME]


@pytest.mark.parametrize("cases", [SOME, pytest.param(OTHERS, marks=pytest.mark.exhaustive)], ids=["some", "others"])
def test_every_position_ignored(cases):
    @compiled
    def run(z, targets):
        both = jax.value_and_grad(cross_entropy)
        return [both(z, targets[n], label_smoothing=e, z_loss=ζ, **NOTHING[n][1]) for n, e, ζ in cases]

    for value, gradient in run(LOGITS, [targets for targets, _ in NOTHING]):
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


def test_no_positions_at_all():
    assert cross_entropy(np.zeros((0, 5)), np.zeros(0, int)) == 0


def test_position_weights():
    @compiled
    def run(z, targets, weights, class_weights):
        each = {"class_weights": class_weights, "reduction": "none"}
        mean = cross_entropy(z, targets, weights=weights, class_weights=class_weights)
        return cross_entropy(z, targets, **each), cross_entropy(z, targets, weights=weights, **each), mean

    for targets, counted in ((LABELS, CLASS_WEIGHTS[LABELS]), (DISTRIBUTION, np.ones(12))):
        losses, weighted, mean = run(LOGITS, targets, WEIGHTS, CLASS_WEIGHTS)
        np.testing.assert_allclose(weighted, WEIGHTS * losses, rtol=1e-14)
        np.testing.assert_allclose(mean, (WEIGHTS * losses).sum() / (WEIGHTS * counted).sum(), rtol=1e-14)


def test_weights_are_constants():
    def loss(weights, class_weights, targets):
        return cross_entropy(LOGITS, targets, weights=weights, class_weights=class_weights, z_loss=0.1)

    run = compiled(lambda *weights: [jax.grad(loss, (0, 1))(*weights, y) for y in (LABELS, DISTRIBUTION)])
    for gradient in jax.tree.leaves(run(WEIGHTS, CLASS_WEIGHTS)):
        np.testing.assert_array_equal(gradient, 0)


def test_weight_zero_leaves_a_bad_label_out():
    labels, weights = np.where(np.arange(12) == 3, -1, LABELS), (np.arange(12) != 3) * 1.0

    @compiled
    def run(z, y, weights, fewer, of_fewer):
        return cross_entropy(z, y, weights=weights), cross_entropy(fewer, of_fewer)

    value, expected = run(LOGITS, labels, weights, np.delete(LOGITS, 3, 0), np.delete(LABELS, 3))
    np.testing.assert_allclose(value, expected, rtol=1e-14)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_z_loss_is_averaged_over_positions_and_not_weighted_by_class(reduction):
    options = {"weights": WEIGHTS, "class_weights": CLASS_WEIGHTS, "reduction": reduction}

    def penalty(z):
        terms = 0.3 * WEIGHTS * reference.logsumexp(z) ** 2
        return {"none": terms, "sum": terms.sum(), "mean": terms.sum() / WEIGHTS.sum()}[reduction]

    @compiled
    def run(z, cotangent):
        fns = [lambda z, ζ=ζ: cross_entropy(z, LABELS, z_loss=ζ, **options) for ζ in (0.3, 0.0)]
        pairs = [jax.vjp(fn, z) for fn in (*fns, penalty)]
        return [(value, pullback(cotangent)[0]) for value, pullback in pairs]

    cotangent = np.random.default_rng(1).normal(size=12 if reduction == "none" else ())
    (value, gradient), (plain, plain_gradient), (expected, expected_gradient) = run(LOGITS, cotangent)
    np.testing.assert_allclose(value - plain, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient - plain_gradient, expected_gradient, rtol=1e-11, atol=1e-14)


def test_z_loss_that_cancels_the_target_mass_leaves_the_target():
    # At lse = −1 and ζ = ½ the probabilities' factor τ + 2ζ·lse is exactly 0; −q is not.
    cases = (np.array([1.0]), {}), (np.array(0), {"label_smoothing": 1.0}), (np.array(0), {})
    run = compiled(lambda z: [jax.grad(cross_entropy)(z, t, z_loss=0.5, **options) for t, options in cases])
    np.testing.assert_allclose(run(np.array([-1.0])), [[-1.0]] * 3, rtol=1e-14)


def test_where_masks_classes():
    mask = np.random.default_rng(5).random((12, 5)) < 0.6
    mask[np.arange(12), LABELS] = True
    poisoned = np.where(mask, LOGITS, np.nan)
    for smoothing in (0.0, 0.2):
        options = {"where": mask, "label_smoothing": smoothing, "reduction": "none"}
        value, gradient, cotangent = value_and_gradient(poisoned, LABELS, -1, **options)
        for n in range(12):
            kept = np.flatnonzero(mask[n])
            probs = np.exp(LOGITS[n, kept]) / np.exp(LOGITS[n, kept]).sum()
            t = (1 - smoothing) * (kept == LABELS[n]) + smoothing / kept.size
            np.testing.assert_allclose(value[n], -t @ np.log(probs), rtol=1e-12)
            np.testing.assert_allclose(gradient[n, kept], cotangent[n] * (probs - t), rtol=1e-11, atol=1e-14)
        np.testing.assert_array_equal(gradient[~mask], 0)


@pytest.mark.parametrize("kind", ["labels", "distribution"])
def test_a_mask_equals_leaving_the_classes_out(kind):
    """One mask for all positions equals leaving its classes out: loss, gradient and the gradient to a distribution."""
    kept, mask = np.array([0, 2, 3]), np.array([True, False, True, True, False])
    targets = kept[LABELS % 3] if kind == "labels" else DISTRIBUTION
    of_kept = LABELS % 3 if kind == "labels" else DISTRIBUTION[:, kept]
    variables = (0,) if kind == "labels" else (0, 1)
    options = {"label_smoothing": 0.2, "z_loss": 0.1}

    def value_and_gradients(logits, targets, weights, where=None):
        loss = lambda z, t: cross_entropy(z, t, class_weights=weights, where=where, **options)  # noqa: E731
        return jax.value_and_grad(loss, variables)(logits, targets)

    @compiled
    def both(poisoned, targets, logits, of_kept):
        masked = value_and_gradients(poisoned, targets, CLASS_WEIGHTS, mask)
        return masked, value_and_gradients(logits, of_kept, CLASS_WEIGHTS[kept])

    poisoned = np.where(mask, LOGITS, np.nan)
    if kind == "distribution":
        targets = np.where(mask, targets, 0)
    (value, gradients), (expected, wanted) = both(poisoned, targets, LOGITS[:, kept], of_kept)
    np.testing.assert_allclose(value, expected, rtol=1e-13)
    for gradient, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient[:, kept], want, rtol=1e-12, atol=1e-15)
        np.testing.assert_array_equal(gradient[:, ~mask], 0)


def test_a_masked_label_has_an_infinite_loss_and_finite_gradients():
    logits, label, mask = np.array([[1.0, 2.0, 3.0]]), np.array([1]), np.array([[True, False, True]])
    run = compiled(jax.value_and_grad(cross_entropy))
    for targets in (label, np.array([[0.0, 1.0, 0.0]])):
        value, gradient = run(logits, targets, where=mask)
        assert value == np.inf
        assert np.isfinite(gradient).all()
    value, gradient = run(logits, label, where=np.zeros((1, 3), bool))  # every class masked
    assert value == np.inf
    np.testing.assert_array_equal(gradient, 0)


def test_ignored_positions_may_hold_anything():
    labels, options = np.array([0, 255]), {"ignore_index": 255, "label_smoothing": 0.1, "z_loss": 0.1}
    weights, distribution = np.array([1.0, 0.0]), np.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])

    @compiled
    def run(z, y, t, weights):
        both = jax.value_and_grad(lambda z, y: cross_entropy(z, y, **options))
        return both(z, y), both(z[:1], y[:1]), jax.grad(cross_entropy, (0, 1))(z, t, weights=weights)

    for poison in (np.nan, np.inf, -np.inf):
        logits = np.array([[1.0, 2.0, 3.0], [poison, 0.0, 0.0]])
        (value, gradient), (expected, expected_gradient), gradients = run(logits, labels, distribution, weights)
        np.testing.assert_allclose(value, expected, rtol=1e-14)
        np.testing.assert_allclose(gradient, [*expected_gradient, [0, 0, 0]], rtol=1e-13)
        for gradient in gradients:
            np.testing.assert_array_equal(gradient[1], 0)
            assert np.isfinite(gradient).all()
    checked(lambda z: cross_entropy(z, labels, ignore_index=255))(np.array([[1.0, 2.0], [np.nan, 0.0]]))


def test_positions_whose_classes_are_all_masked():
    def loss(z, scale=1.0):
        return scale * cross_entropy(z, np.array([0]))

    @compiled
    def run(z):
        return [jax.value_and_grad(loss)(z, scale) for scale in (1.0, 1024.0)], jax.hessian(loss)(z)

    firsts, hessian = run(np.full((1, 3), -np.inf))
    for value, gradient in firsts:
        assert value == np.inf
        np.testing.assert_array_equal(gradient, 0)
    assert np.isfinite(hessian).all()


def test_every_option_together_for_distributions():
    mask = np.random.default_rng(6).random((12, 5)) < 0.7
    mask[:, 0] = True
    t, kept = np.where(mask, DISTRIBUTION, 0), mask * 1.0
    options = {"class_weights": CLASS_WEIGHTS, "label_smoothing": 0.2, "z_loss": 0.1, "weights": WEIGHTS, "where": mask}

    def expected(z, t):
        lse = jnp.log(jnp.sum(kept * jnp.exp(z), axis=1, keepdims=True))
        q = kept * CLASS_WEIGHTS * (0.8 * t + 0.2 / kept.sum(1, keepdims=True))
        losses = jnp.sum(q * (lse - z), axis=1) + 0.1 * lse[:, 0] ** 2
        return jnp.sum(WEIGHTS * losses) / WEIGHTS.sum()

    @compiled
    def run(z, t, cotangent):
        pairs = [jax.vjp(fn, z, t) for fn in (lambda z, t: cross_entropy(z, t, **options), expected)]
        return [(value, *pullback(cotangent)) for value, pullback in pairs]

    (value, *gradients), (wanted, *wanted_gradients) = run(LOGITS, t, np.array(1.7))
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    for actual, gradient in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(actual, gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 2**-8), (jnp.float16, 2**-10)])
def test_half_precision_gradients(dtype, tolerance):
    @compiled
    def run(z, targets, cotangent):
        losses = lambda z: cross_entropy(z, targets, reduction="none", label_smoothing=0.1)  # noqa: E731
        value, pullback = jax.vjp(losses, z)
        return value, pullback(cotangent.astype(value.dtype))[0]

    logits, cotangent = LOGITS.astype(dtype), np.random.default_rng(7).normal(size=12).astype(np.float32)
    for targets, wide in ((LABELS, LABELS), (DISTRIBUTION.astype(dtype), DISTRIBUTION.astype(dtype).astype(float))):
        value, gradient = run(logits, targets, cotangent)
        exact, expected = run(logits.astype(float), wide, cotangent)
        assert gradient.dtype == dtype
        np.testing.assert_allclose(value, exact, rtol=1e-5)
        np.testing.assert_allclose(gradient.astype(float), expected, rtol=0, atol=2 * tolerance)


def test_masked_classes_of_target_0_add_no_loss():
    one_hot, mask = np.array([0.0, 0.0, 1.0]), np.array([True, False, True])

    @compiled
    def run(z):
        both = [jax.value_and_grad(cross_entropy)(z, targets) for targets in (np.array(2), one_hot)]
        return both, jax.grad(cross_entropy, 1)(z, one_hot, where=mask)

    both, to_targets = run(np.array([1.0, -np.inf, 2.0]))
    for value, gradient in both:
        np.testing.assert_allclose(value, np.log1p(np.exp(-1)), rtol=1e-14)
        np.testing.assert_allclose(gradient, [1 / (1 + np.e), 0, -1 / (1 + np.e)], rtol=1e-13)
    assert np.isfinite(to_targets).all()


def test_a_masked_class_of_class_weight_0_has_no_gradient_to_its_target():
    def loss(targets):
        return cross_entropy(np.array([1.0, -np.inf, 2.0]), targets, class_weights=np.array([1.0, 0.0, 3.0]))

    value, gradient = compiled(jax.value_and_grad(loss))(np.array([0.25, 0.5, 0.25]))
    lse = np.log(np.exp(1) + np.exp(2))
    np.testing.assert_allclose(value, 0.25 * (lse - 1) + 0.75 * (lse - 2), rtol=1e-13)
    np.testing.assert_allclose(gradient, [lse - 1, 0, 3 * (lse - 2)], rtol=1e-13)


def test_a_huge_common_offset_changes_nothing():
    value, gradient = compiled(jax.value_and_grad(cross_entropy))(np.array([1e6, 1e6 + 1.0]), np.array(0))
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


ORDERS = {
    "hessian": jax.hessian,
    "reverse twice": lambda fn: jax.jacrev(jax.grad(fn)),
    "rematerialised": lambda fn: jax.jacrev(jax.grad(jax.jit(jax.checkpoint(fn)))),
    "product": lambda fn: lambda z: jax.jvp(jax.grad(fn), (z,), (LOGITS[1],))[1],
}


@pytest.mark.parametrize(
    ("case", "orders"),
    [
        ("labels", tuple(ORDERS)),
        *((case, ("hessian", "reverse twice")) for case in ("every option", "distribution")),
        *(
            pytest.param(case, ("rematerialised", "product"), marks=pytest.mark.exhaustive)
            for case in ("every option", "distribution")
        ),
    ],
    ids=str,
)
def test_derivatives_of_second_order(case, orders):
    targets, options, q = SECOND_ORDER[case]

    @compiled
    def run(z):
        ours = lambda z: cross_entropy(z, targets, reduction="sum", **options)  # noqa: E731
        expected = lambda z: reference.losses(z, q, options.get("z_loss", 0.0))  # noqa: E731
        return [ORDERS[order](ours)(z) for order in orders], jax.hessian(expected)(z)

    found, matrix = run(LOGITS[0])
    for actual in found:
        wanted = matrix if actual.ndim == 2 else matrix @ LOGITS[1]
        np.testing.assert_allclose(actual, wanted, rtol=1e-10, atol=1e-13)


def test_mixed_second_derivatives_of_logits_and_targets():
    ours = jax.jacrev(jax.grad(lambda z, t: cross_entropy(z, t), 1), 0)
    naive = jax.jacfwd(jax.grad(reference.losses, 1), 0)
    actual, expected = compiled(lambda *at: (ours(*at), naive(*at)))(LOGITS[0], DISTRIBUTION[0])
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss", [cross_entropy, lambda z, y: linear_cross_entropy(z, np.eye(3, dtype=z.dtype), y)])
def test_the_loss_tangent_at_a_confident_prediction(loss):
    """Σ_j p_j (ż_j − ż_label), also if the others' sum is 0, where a maximum would halve the derivative."""
    tangent = np.array([1.0, -0.5, 2.0])

    @compiled
    def forward_over_reverse(*logits):
        value = lambda z: jax.value_and_grad(loss)(z, np.array(0))[0]  # noqa: E731
        return [jax.jvp(value, (z,), (tangent.astype(z.dtype),))[1] for z in logits]

    for lead in (0.0, 3.0, 17.0, 40.0, 200.0, 800.0):
        probs = np.exp([0, -lead, -lead - 1]) / np.exp([0, -lead, -lead - 1]).sum()
        expected = probs[1:] @ (tangent[1:] - tangent[0])
        logits = [np.array([lead, 0, -1], dtype) for dtype in (np.float32, np.float64)]
        for actual, z in zip(forward_over_reverse(*logits), logits, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=0, atol=4 * np.finfo(z.dtype).eps)


def test_vmap_over_a_batch_of_problems():
    @compiled
    def run(z, y):
        mapped = jax.vmap(lambda z, y: cross_entropy(z, y, axis=0, reduction="none"))(z, y)
        return mapped, cross_entropy(z, y, axis=1, reduction="none")

    mapped, expected = run(spatial(LOGITS), spatial(LABELS))
    np.testing.assert_allclose(mapped, expected, rtol=1e-14)


def test_only_the_logits_and_a_few_numbers_per_position_are_saved():
    logits, labels = np.zeros((64, 1000), np.float32), np.zeros(64, np.int32)
    for smoothing in (0.0, 0.1):
        loss = lambda z, y, e=smoothing: cross_entropy(z, y, label_smoothing=e, ignore_index=3)  # noqa: E731
        pullback = jax.eval_shape(lambda z, y, loss=loss: jax.vjp(lambda z: loss(z, y), z)[1], logits, labels)
        saved = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))
        assert logits.nbytes <= saved <= logits.nbytes + 64 * 4 * 16 + 1000 * 4


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
        (lambda: cross_entropy(N5, np.array(["a", "b", "a", "c"])), TypeError, "targets: expected an array of numbers, got strings; number the classes: names, labels = numpy.unique("),
        (lambda: cross_entropy(N5, np.array(["a", "b", "a", "c"], object)), TypeError, "targets: expected an array of numbers, got strings; number the classes"),
        (lambda: cross_entropy(N5, ["a", "b", "a", "c"]), TypeError, "targets: expected an array of numbers, got strings; number the classes"),
        (lambda: cross_entropy(np.array(["0.5", "1"]), 0), TypeError, "logits: expected an array of numbers, got strings"),
        (lambda: cross_entropy(N5 > 0, np.zeros(4, int)), TypeError, "logits: expected real numbers, got dtype bool"),
        (lambda: cross_entropy(N5, np.zeros(4, int), axis=2), ValueError, "axis: expected an integer in [-2, 2), got 2"),
        (lambda: cross_entropy(np.zeros(()), np.zeros((), int)), ValueError, "axis: expected an array with at least one axis, the classes, got a scalar"),
        (lambda: cross_entropy(np.zeros((4, 0)), np.zeros(4, int)), ValueError, "logits: expected at least one class along axis 1, got shape (4, 0)"),
        (lambda: cross_entropy(N5, np.zeros(4, int), reduction="avg"), ValueError, "reduction: expected 'none', 'sum' or 'mean', got 'avg'"),
        (lambda: cross_entropy(N5, np.zeros(4, int), label_smoothing=1.1), ValueError, "label_smoothing: expected a finite number in [0, 1], got 1.1"),
        (lambda: cross_entropy(N5, np.zeros(4, int), label_smoothing=-0.1), ValueError, "label_smoothing: expected a finite number in [0, 1], got -0.1"),
        (lambda: cross_entropy(N5, np.zeros(4, int), label_smoothing="a"), TypeError, "label_smoothing: expected a number or a scalar array, got str"),
        (lambda: cross_entropy(N5, np.zeros(4, int), z_loss=np.nan), ValueError, "z_loss: expected a finite number at least 0, got nan"),
        (lambda: cross_entropy(N5, np.zeros(4, int), class_weights=np.ones(4)), ValueError, "class_weights: expected shape (5,), one weight per class, got (4,)"),
        (lambda: cross_entropy(N5, np.zeros(4, int), weights=np.ones(5)), ValueError, "weights: expected a shape that broadcasts to (4,), got (5,)"),
        (lambda: cross_entropy(N5, np.zeros(4, int), z_loss=np.zeros(2)), TypeError, "z_loss: expected a real scalar, got shape (2,) and dtype float64"),
        (lambda: cross_entropy(N5, np.zeros(4, int), weights=np.ones(4, complex)), TypeError, "weights: expected real numbers or booleans, got dtype complex128"),
        (lambda: cross_entropy(N5, np.zeros(4, int), class_weights=np.ones(5, bool)), TypeError, "class_weights: expected real numbers, got dtype bool"),
        (lambda: cross_entropy(N5, np.eye(5, dtype=int)[:4], ignore_index=1), ValueError, "ignore_index: expected None with distributions and one-hot targets (of the logits' shape), which have no index; use weights, or labels"),
        (lambda: cross_entropy(jnp.zeros((4, 5), jnp.float8_e4m3fn), np.zeros(4, int)), TypeError, "logits: expected at least 16 bits, got dtype float8_e4m3fn: convert to bfloat16 first"),
        (lambda: cross_entropy(N5, np.zeros(4, int), where=np.ones(4, bool)), ValueError, "where: expected a shape that broadcasts to (4, 5), got (4,)"),
        (lambda: cross_entropy(N5, np.zeros(4, int), ignore_index=255.0), TypeError, "ignore_index: expected an integer, got 255.0"),
        (lambda: cross_entropy(N5, N5, ignore_index=0), ValueError, "ignore_index: expected None with distributions"),
    ],
)  # fmt: skip
def test_errors_name_argument_expected_and_actual(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_no_positions_have_one_loss_per_example(reduction):
    fn = jax.vmap(lambda z: cross_entropy(z, np.zeros(0, int), reduction=reduction))
    value, pullback = jax.vjp(fn, np.zeros((8, 0, 3)))
    assert (value.shape, pullback(np.ones(8))[0].shape) == ((8,), (8, 0, 3))
