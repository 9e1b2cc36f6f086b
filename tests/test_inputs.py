"""What people pass: masks, one-hot integers, schedules, transposed kernels, padded vocabularies, wide labels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import (
    SparseTargets,
    caffe,
    checked,
    cross_entropy,
    diagnose_gradient,
    diagnose_loss,
    energy,
    entropy,
    kl_divergence,
    linear_cross_entropy,
    linear_log_probs,
    log_softmax,
    logsumexp,
    softmax,
)

rng = np.random.default_rng(0)
Z = rng.normal(size=(6, 5)) * 2
LABELS = rng.integers(0, 5, 6)
X, W, B = (rng.normal(size=shape) for shape in ((6, 3), (3, 5), (5,)))
EXACTLY = {"rtol": 1e-12, "atol": 1e-14}


def dense(x, w, b, targets, **options):
    return cross_entropy(x @ w + b, targets, **options)


def linear(x, w, b, targets, **options):
    return linear_cross_entropy(x, w, targets, b, **options)


def each(*calls):
    """For each (loss, options) the loss of (x, w, b) and its gradients, from one program."""

    def results(*variables):
        losses = [functools.partial(loss, **options) for loss, options in calls]
        return [jax.value_and_grad(loss, (0, 1, 2))(*variables) for loss in losses]

    return jax.jit(results)(X, W, B)


def assert_equal(found, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or EXACTLY)), found, expected)


@pytest.mark.parametrize("loss", [dense, linear])
def test_a_boolean_mask_is_weights_of_0_and_1(loss):
    mask = np.array([True, False, True, True, False, True])
    assert_equal(*each(*[(loss, {"targets": LABELS, "weights": weights}) for weights in (mask, mask.astype(float))]))


@pytest.mark.parametrize("loss", [dense, linear])
def test_a_one_hot_of_integers_is_its_distribution(loss):
    onehot = np.eye(5)[LABELS]
    dtypes = (float, bool, np.int8, np.int32, np.uint8)
    expected, *found = each(*[(loss, {"targets": onehot.astype(dtype)}) for dtype in dtypes])
    for results in found:
        assert_equal(results, expected)


def test_entries_of_a_one_hot_other_than_0_and_1_are_no_distribution():
    counts = np.eye(5, dtype=np.int32)[LABELS] * 2
    assert np.isnan(jax.jit(lambda z: cross_entropy(z, counts, reduction="none"))(Z)).all()
    message = r"targets\[0, \d\] is 2: expected 0 or 1, or labels of the logits' shape without the class axis"
    with pytest.raises(ValueError, match=message):
        checked(jax.jit(cross_entropy))(Z, counts)


SCHEDULES = {"label_smoothing": 0.1, "z_loss": 0.01, "soft_cap": 3.0, "temperature": 0.7}
OF = [(dense, "label_smoothing"), (dense, "z_loss"), *((linear, name) for name in SCHEDULES)]


@pytest.mark.parametrize(("loss", "name"), OF)
def test_an_option_may_be_an_array_or_traced_and_is_a_constant(loss, name):
    value = SCHEDULES[name]

    @jax.jit
    def results(x, w, b, traced):
        def of(x, w, b, option):
            return loss(x, w, b, LABELS, **{name: option})

        array = jnp.asarray(value)  # concrete, inside `jit` too
        fixed = [jax.value_and_grad(functools.partial(of, option=n), (0, 1, 2))(x, w, b) for n in (value, array)]
        return *fixed, jax.value_and_grad(of, (0, 1, 2, 3))(x, w, b, traced)

    expected, of_array, (of_traced, (*gradients, to_option)) = results(X, W, B, value)
    assert_equal(of_array, expected)
    assert_equal((of_traced, tuple(gradients)), expected)
    np.testing.assert_array_equal(to_option, 0)


@pytest.mark.parametrize(("loss", "name"), OF)
def test_a_bad_option_is_an_error_when_concrete_and_under_checked_when_traced(loss, name):
    bad = np.asarray(-1.0)
    with pytest.raises(ValueError, match=f"{name}: expected"):
        loss(X, W, B, LABELS, **{name: bad})
    with pytest.raises(ValueError, match=f"{name} is -1.*: expected"):
        checked(jax.jit(lambda n: loss(X, W, B, LABELS, **{name: n})))(bad)


@pytest.mark.parametrize("name", ["ignore_index", "axis"])
def test_a_traced_option_of_the_program_names_the_remedy(name):
    with pytest.raises(TypeError, match=f"{name}: expected an integer known when .*traced.*static_argnames"):
        jax.jit(lambda n: cross_entropy(Z, LABELS, **{name: n}))(1)


def test_a_kernel_may_have_its_classes_on_the_first_axis():
    def transposed(x, w, b):
        return linear_cross_entropy(x, w.T, LABELS, b, kernel_axis=0)

    assert_equal(*each((transposed, {}), (linear, {"targets": LABELS})))


def test_a_kernel_with_its_classes_on_the_first_axis_is_not_copied():
    def loss(x, w):
        return linear_cross_entropy(x, w, LABELS, kernel_axis=0)

    arguments = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((6, 64), (4096, 64)))
    text = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).as_text()
    assert "stablehlo.dot_general" in text
    assert not [line for line in text.splitlines() if "stablehlo.transpose" in line and "4096x64" in line]


@pytest.mark.parametrize(
    ("shape", "axis", "message"),
    [
        ((5, 3), -1, r"kernel: expected shape \(3, classes\).*got \(5, 3\); for a kernel .*pass kernel_axis=0"),
        ((3, 5), 0, r"kernel: expected shape \(classes, 3\).*got \(3, 5\); for a kernel .*pass kernel_axis=-1"),
        ((4, 5), -1, r"kernel: expected shape \(3, classes\) with at least one class, got \(4, 5\)$"),
    ],
)
def test_an_error_says_that_a_kernel_is_transposed(shape, axis, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(X, np.zeros(shape), LABELS, kernel_axis=axis)


def test_a_temperature_divides_the_capped_logits():
    def plain(x, w, b):
        return cross_entropy(3 * jnp.tanh((x @ w + b) / 3) / 0.7, LABELS)

    options = {"targets": LABELS, "soft_cap": 3.0, "temperature": 0.7}
    assert_equal(*each((linear, options), (plain, {})), rtol=1e-10)


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("targets", [LABELS % 4, rng.dirichlet(np.ones(5), 6)], ids=["labels", "distributions"])
def test_smoothing_is_shared_among_the_unmasked_classes_of_a_padded_vocabulary(targets, soft_cap):
    left = np.array([True, True, True, True, False])
    options = {"label_smoothing": 0.1, "z_loss": 0.01}
    t = targets * left if targets.ndim > 1 else targets

    def plain(x, w, b):
        z = x @ w + b
        z = z if soft_cap is None else soft_cap * jnp.tanh(z / soft_cap)
        return cross_entropy(z, t, where=left, **options)

    def of_bias(x, w, b):
        return linear_cross_entropy(x, w, t, jnp.where(left, b, -jnp.inf), soft_cap=soft_cap, **options)

    removed = {"targets": t, "where": left, "soft_cap": soft_cap, **options}
    expected, *found = each((plain, {}), (linear, removed), (of_bias, {}))
    assert np.isfinite(expected[0])
    z = (X @ W + B)[:, :4]  # and all are the formula over the four classes that are left
    z = z if soft_cap is None else soft_cap * np.tanh(z / soft_cap)
    smoothed = 0.9 * (np.eye(4)[targets] if targets.ndim == 1 else targets[:, :4]) + 0.1 / 4
    lse = np.log(np.sum(np.exp(z), 1))
    formula = np.mean(np.sum(smoothed * (lse[:, None] - z), 1) + 0.01 * lse**2)
    for value, gradients in found:
        assert_equal((value, gradients), expected, rtol=1e-10, atol=1e-14)
        assert not np.any(np.asarray(gradients[1])[:, 4])
        np.testing.assert_allclose(value, formula, rtol=1e-10)


def test_a_traced_zero_is_not_above_zero():
    with pytest.raises(ValueError, match=r"soft_cap is 0\.0: expected a finite number above 0"):
        checked(jax.jit(lambda number: linear(X, W, B, LABELS, soft_cap=number)))(np.float64(0))


MASK = np.array([False, True, False, False, False, False])
MASKED, MASKED_LABELS = np.ma.masked_array(Z, Z > 1), np.ma.masked_array(LABELS, MASK)
SPARSE = np.array([[0, 1]] * 6), np.full((6, 2), 0.5)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: softmax(MASKED), "logits"),
        (lambda: cross_entropy(MASKED, LABELS), "logits"),
        (lambda: cross_entropy(Z, LABELS, where=np.ma.masked_array(Z > 0, Z > 1)), "where"),
        (lambda: cross_entropy(Z, LABELS, weights=np.ma.masked_array(np.ones(6), MASK)), "weights"),
        (lambda: cross_entropy(Z, LABELS, class_weights=np.ma.masked_array(np.ones(5))), "class_weights"),
        (lambda: cross_entropy(Z, np.ma.masked_array(softmax(Z), Z > 1)), "targets"),
        (lambda: cross_entropy(Z, SparseTargets(np.ma.masked_array(SPARSE[0]), SPARSE[1])), "targets.indices"),
        (lambda: cross_entropy(Z, SparseTargets(SPARSE[0], np.ma.masked_array(SPARSE[1]))), "targets.probs"),
        (lambda: linear_cross_entropy(X, np.ma.masked_array(W), LABELS), "kernel"),
        (lambda: linear_cross_entropy(X, W, LABELS, weights=np.ma.masked_array(np.ones(6), MASK)), "weights"),
        (lambda: linear_cross_entropy(X, W, np.ma.masked_array(softmax(Z), Z > 1)), "targets"),
        (lambda: kl_divergence(Z, MASKED), "teacher_logits"),
        (lambda: kl_divergence(Z, Z, weights=np.ma.masked_array(np.ones(6), MASK)), "weights"),
        (lambda: diagnose_gradient(Z, LABELS, MASKED), "gradient"),
        (lambda: diagnose_loss(Z, LABELS, MASKED[0]), "value"),
        (lambda: energy.hopfield_energy(MASKED, np.ones((5, 5))), "state"),
        (lambda: caffe.softmax_with_loss(MASKED, LABELS), "logits"),
    ],
)
def test_a_mask_of_numpy_is_refused(call, name):
    with pytest.raises(TypeError, match=rf"^{name}: expected an array without a mask.*: pass {name}\.filled\(\.\.\.\)"):
        call()


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(
    ("call", "name", "option"),
    [
        (lambda: cross_entropy(Z, MASKED_LABELS, ignore_index=-1), "targets", "ignore_index"),
        (lambda: linear_cross_entropy(X, W, MASKED_LABELS), "targets", "ignore_index"),
        (lambda: linear_log_probs(X, W, MASKED_LABELS), "labels", "ignore_index"),
        (lambda: caffe.softmax_with_loss(Z, MASKED_LABELS), "labels", "ignore_label"),
        (lambda: caffe.infogain_loss(Z, MASKED_LABELS, np.eye(5)), "labels", "ignore_label"),
        (lambda: diagnose_gradient(Z, MASKED_LABELS, Z), "targets", "ignore_index"),
    ],
)
def test_masked_labels_are_refused_and_the_remedy_named(call, name, option, x64):
    with (
        jax.enable_x64(x64),
        pytest.raises(TypeError, match=rf"^{name}: .*: pass {name}\.filled\(-1\) with {option}=-1"),
    ):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cross_entropy(None, LABELS), "logits: expected an array, got NoneType"),
        (lambda: cross_entropy("a", LABELS), "logits: expected an array, got str"),
        (lambda: cross_entropy(Z, None), "targets: expected an array, got NoneType"),
        (lambda: linear_cross_entropy(X, {"kernel": W}, LABELS), "kernel: expected an array, got dict"),
        (lambda: linear_cross_entropy(X, checked, LABELS), "kernel: expected an array, got function"),
        (lambda: checked(cross_entropy(Z, LABELS)), r"checked: expected a function, got \w+: write checked\(function\)\(...\)"),
    ],
)  # fmt: skip
def test_an_argument_that_is_not_an_array_is_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    ("logits", "labels", "remedy"),
    [
        (np.zeros((2, 3, 4, 5)), np.zeros((2, 4, 5), int), "; these labels fit axis=1"),
        (np.zeros((6, 5)), LABELS[:, None], r"; squeeze their last axis: targets\[..., 0\]"),
        (np.zeros((6, 5)), LABELS[:4], "(?!;)"),
    ],
)
def test_the_error_for_labels_of_another_shape_says_which_axis_fits(logits, labels, remedy):
    with pytest.raises(ValueError, match=r"got \([0-9, ]+\)" + remedy):
        cross_entropy(logits, labels)


@pytest.mark.parametrize("axis", [(0, 2), (2, 0), (-1, 0), (1, 2), None])
def test_several_class_axes_equal_a_reshaped_array(axis):
    z, other = np.random.default_rng(1).normal(size=(2, 2, 3, 4))
    where, probs = z > -1, np.array(softmax(other, axis))
    axes = sorted(n % 3 for n in range(3)) if axis is None else sorted(n % 3 for n in axis)
    kept = [n for n in range(3) if n not in axes]
    positions = tuple(z.shape[n] for n in kept)

    def flat(array):
        return np.transpose(array, (*kept, *axes)).reshape(*positions, -1)

    labels = np.random.default_rng(2).integers(0, flat(z).shape[-1], positions)
    sparse = SparseTargets(np.stack([labels, labels * 0], -1), np.full((*positions, 2), 0.25))

    @jax.jit
    def run(z):
        def several(z, flat, axis):
            losses = [cross_entropy(z, t, axis, reduction="none") for t in (labels, flat(probs), sparse)]
            masked = cross_entropy(z, flat(probs * where), axis, where=flat(where), label_smoothing=0.1)
            return *losses, masked, entropy(z, axis, flat(where)), kl_divergence(z, flat(other), axis)

        def gradient(flat, z, axis):
            values, pullback = jax.vjp(lambda z: several(flat(z), flat, axis), z)
            return values, pullback(jax.tree.map(jnp.cos, values))

        return gradient(lambda a: a, z, axis), gradient(flat_of_jax, z, -1)

    def flat_of_jax(array):
        return jnp.transpose(array, (*kept, *axes)).reshape(*positions, -1)

    assert_equal(*run(z))


def test_several_class_axes_over_shards_are_refused():
    mesh = jax.make_mesh((2,), ("classes",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("classes")
    with pytest.raises(
        ValueError, match=r"axis: expected one axis where the classes are sharded over 'classes', got \(0, 1\)"
    ):
        jax.shard_map(
            lambda z: entropy(z, (0, 1), axis_name="classes"),
            mesh=mesh,
            in_specs=spec,
            out_specs=jax.sharding.PartitionSpec(),
        )(Z)


@pytest.mark.optimized  # what is compiled is looked at
def test_labels_that_are_constants_are_not_sorted_by_the_compiler():
    """Sorting tens of thousands would take seconds."""
    labels = np.arange(4096) % 7 - 1
    loss = jax.jit(jax.grad(lambda w: linear_cross_entropy(np.ones((4096, 3)), w, labels, ignore_index=-1)))
    assert " sort(" in loss.lower(np.ones((3, 6))).compile().as_text()


OF_TARGETS = [functools.partial(cross_entropy, Z), lambda t, **options: linear(X, W, B, t, **options)]


@pytest.mark.x32
@pytest.mark.parametrize("loss", OF_TARGETS, ids=["dense", "linear"])
def test_labels_wider_than_32_bits_do_not_wrap(loss):
    wide = np.array([2**32 + 1, 0, 1, 2, 3, 4])
    for each in jax.jit(lambda: [loss(wide, reduction="none", ignore_index=index) for index in (None, -100)])():
        assert np.isnan(each).tolist() == [True] + [False] * 5
    with pytest.raises(ValueError, match=r"targets\[0\] is 4294967297: expected a label in \[0, 5\)"):
        checked(jax.jit(lambda: loss(wide)))()


@pytest.mark.x32
@pytest.mark.parametrize("loss", OF_TARGETS, ids=["dense", "linear"])
def test_a_wide_label_can_be_ignored(loss):
    wide, narrow = np.array([2**33, 0, 1, 2, 3, 4]), np.array([-100, 0, 1, 2, 3, 4])
    both = jax.jit(lambda: (loss(wide, ignore_index=2**33), loss(narrow, ignore_index=-100)))()
    np.testing.assert_array_equal(*both)
    checked(jax.jit(lambda: loss(wide, ignore_index=2**33)))()


@pytest.mark.x32
def test_a_wide_label_can_be_ignored_in_caffe():
    labels = np.array([2**33, 0, 1, 2, 3, 4])
    narrow = np.where(labels == 2**33, -100, labels)

    @jax.jit
    def losses():
        dtypes = (np.float32, np.float64, np.int64)
        found = [caffe.softmax_with_loss(Z, labels.astype(dtype), ignore_label=2**33)[0] for dtype in dtypes]
        return found, cross_entropy(Z, narrow, ignore_index=-100)

    found, expected = losses()
    np.testing.assert_array_equal(found, [expected] * 3)


FP8 = [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e4m3b11fnuz]


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("fn", [softmax, log_softmax, logsumexp, lambda z: cross_entropy(z, LABELS)])
def test_eight_bits_are_refused(fn, dtype):
    with pytest.raises(TypeError, match=r"logits: expected .*16 bits.*, got dtype float8"):
        fn(Z.astype(dtype))


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("name", ["features", "kernel"])
def test_the_argument_of_eight_bits_is_named(name, dtype):
    arrays = {"features": X.astype(jnp.bfloat16), "kernel": W.astype(jnp.bfloat16)}
    arrays[name] = arrays[name].astype(dtype)
    with pytest.raises(TypeError, match=rf"{name}: expected .*16 bits.*, got dtype float8"):
        linear_cross_entropy(targets=LABELS, **arrays)


def test_checked_sees_a_nan_bias():
    with pytest.raises(ValueError, match=r"bias\[2\] is nan: expected a number"):
        checked(jax.jit(linear))(X, W, B * np.where(np.arange(5) == 2, np.nan, 1), LABELS)


def test_checked_sees_a_nan_product():
    x = np.array([[np.inf, np.inf]])
    with pytest.raises(ValueError, match=r"logits\[0, 0\] is nan: expected numbers: features @ kernel \+ bias is none"):
        checked(jax.jit(linear_cross_entropy))(x, np.array([[1.0, 2.0], [-1.0, 1.0]]), np.array([0]))


@pytest.mark.x32
def test_wide_unsigned_labels_are_out_of_range():
    labels = np.array([2**32 - 1, 0, 1, 2, 3, 4], np.uint32)
    assert np.isnan(jax.jit(lambda: cross_entropy(Z, labels, reduction="none"))()[0])
