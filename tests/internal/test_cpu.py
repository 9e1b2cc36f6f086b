"""The CPU kernels: each equals the plain function that it replaces, for every shape, dtype and batch."""

import ctypes
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
import reference
from jaxsoft import _softmax
from jaxsoft._formula import losses, moments, statistics, targets
from jaxsoft._platform import cpu

pytestmark = pytest.mark.skipif(not jaxsoft.native_kernels().loaded, reason=str(jaxsoft.native_kernels()))

SEAMS = {
    "statistics": statistics._block_sums,
    "moments": moments._block_moments,
    "gradient": statistics._in_new_place,
    "gradient_in_place": statistics._in_place,
    "loss": losses._losses_and_gradient,
    "total": targets._total,
    "softmax": _softmax._probs,
    "log_softmax": _softmax._log_probs,
    "softmax_vjp": _softmax._pulled_back,
    "log_softmax_vjp": _softmax._log_pulled_back,
}
AXES = (-2,)
DTYPES = F32, F64, BF16, F16 = [jnp.dtype(name) for name in ("float32", "float64", "bfloat16", "float16")]
# (outer, classes, inner): each way in which the kernels lay positions and classes in vectors, and cut them. With each
# shape the dtypes that the default run takes: every one in each of the ways.
SHAPES = {
    # Long rows.
    (3, 1000, 1): [F32],
    (2, 3277, 1): [F64],
    (2, 50257, 1): [BF16],
    (1, 200_000, 1): [F16],
    # Short ones.
    (10_000, 2, 1): [F32],
    (3001, 10, 1): [BF16],
    (655, 128, 1): [F64],
    (77, 63, 1): [F16],
    (5, 65, 1): [F32],
    (7, 1, 1): [F64],
    # Classes apart.
    (1, 21, 1500): [F32],
    (2, 150, 4096): [BF16],
    (1, 2, 3611): [F64],
    (1, 5000, 64): [F16],
    (1, 1, 17): [F32],
    # With a last position by itself.
    (2, 10, 1025): [F32, F16],
    (1, 1100, 65): [BF16],
    (1, 2048, 129): [F64],
    # Few side by side, with so many classes that they are read where they are.
    (1, 20_000, 23): [F32],
    (3, 1700, 7): [F32],
    (2, 1301, 2): [F64],
    (2, 5000, 3): [F16],
    (1, 11_003, 3): [BF16],
    # And with fewer.
    (2, 377, 2): [F64],
    (40, 7, 5): [BF16],
    (3, 64, 63): [F16],
    (2, 513, 31): [F32],
}
# What the kernel of a loss has of its own does not depend on these: it shares the layouts with the other kernels.
MORE_SHAPES = [
    *((2, 50257, 1), (655, 128, 1), (5, 65, 1), (2, 150, 4096), (1, 5000, 64)),
    *((1, 2048, 129), (3, 64, 63), (2, 513, 31)),
]
BATCHES = {
    (4096, 2, 1): [F32],
    (4096, 10, 3): [BF16],
    (64, 1700, 3): [F32, BF16],
    (2048, 1000, 1): [F16],
    (32, 40_000, 1): [F64],
    (1024, 70, 7): [F16],
    (512, 5, 130): [F32],
}


def each_dtype(shapes):
    """Every shape with every dtype, by default with its own alone."""
    return [
        pytest.param(shape, dtype, id=f"{shape}-{dtype}", marks=() if dtype in own else pytest.mark.exhaustive)
        for shape, own in shapes.items()
        for dtype in DTYPES
    ]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def kernel(name, *arrays):
    """The program in place of the plain function."""
    run = getattr(cpu, name)(True, arrays, AXES)
    assert run is not None, name
    return run(arrays, AXES)


def plain(name, *arrays):
    return SEAMS[name].__wrapped__(arrays, AXES)


def draw(rng, shape, dtype, edges=True):
    """Logits with margins of −60 to 80; some vectors have a NaN, an infinity, a denormal, or only masked classes."""
    outer, classes, inner = shape
    z = rng.normal(size=shape) * 3
    z[:, rng.integers(classes)] += rng.uniform(-60, 80, (outer, inner))
    if edges and outer * inner >= 6:
        for edge in (np.nan, np.inf, -np.inf, -0.0, 1e-40):
            z[rng.integers(outer), rng.integers(classes), rng.integers(inner)] = edge
        z[rng.integers(outer), :, rng.integers(inner)] = -np.inf
    return z.astype(dtype)


def wide(array):
    return array if array is None or array.dtype in (np.int32, np.bool_) else np.asarray(array, float)


def assert_close(kernel, result, found, expected, roundings, scale=0.0, lost=8):
    """Equal within this many roundings in the result's dtype, relative to the expected value or to the `scale` of the sum."""
    info, dtype, shape = jnp.finfo(found.dtype if found.dtype != np.int32 else F32), found.dtype, found.shape
    found, expected, scale = (np.broadcast_to(np.asarray(a, float), shape) for a in (found, expected, scale))
    size = np.where(np.isfinite(expected), np.maximum(np.abs(expected), np.nan_to_num(scale)), 0)
    # Below the smallest normal number results may be 0, and products of two such are.
    allowed = roundings * float(info.eps) / 2 * size + lost * float(info.tiny)
    difference = np.abs(found - expected)
    right = (difference <= allowed) | (found == expected) | (np.isnan(found) & np.isnan(expected))
    if not right.all():
        excess = np.where(right, 0, np.nan_to_num(difference / allowed, nan=np.inf))
        worst = tuple(map(int, np.unravel_index(excess.argmax(), shape)))
        pytest.fail(
            f"kernel {kernel}: {result} of dtype {dtype} and shape {shape}: found {found[worst]:.17g} at {worst}, "
            f"expected {expected[worst]:.17g} within {allowed[worst]:.3g}; wrong are {(~right).sum()} of {right.size}",
            pytrace=False,
        )


def every_kernel(run, z, g, largest, rest, probs=None, total=None):
    """Every result of every kernel, by their names; of `statistics` and `gradient` with all that they may be given.

    `probs` and `total` are those that `run` finds, unless they are given.
    """
    label, of_all, of_first, factor, at_label, share, idle = rest
    found = {}

    def add(name, arrays, results="result", options=""):
        values = run(name, *arrays)
        found.update({(name + options, result): v for result, v in zip(results.split(), values, strict=True)})

    for with_spread, spread in (("", None), (" weights", of_all), (" shared weights", of_first)):
        for with_label, y in (("", None), (" label", label)):
            options = f" with{with_label}{with_spread}" if y is not None or spread is not None else ""
            results = "max_logit sum_others" + (" label_logit" if with_label else "")
            if spread is not None:
                results += (
                    " weight_sum weighted_gap" if with_label else " leader_logit weight_sum weighted_gap other_weight"
                )
            add("statistics", (z, y, spread), results, options)
            at_max = (at_label, factor) if y is None and spread is not None else (None, None)
            share_of_weights = None if spread is None else share
            if y is None and spread is not None:
                no_max = None, None, share_of_weights, None, None, spread
                add("gradient", (z, largest, factor, idle, *no_max), options=options + ", like any other class")
            targets = y, None if y is None else at_label, share_of_weights, *at_max, spread
            add("gradient", (z, largest, factor, idle, *targets), options=options)
            add("gradient_in_place", (z, largest, factor, None, *targets), options=options)
    add("moments", (z,), "max_logit sum_others leader_logit gap leader")
    add("total", (g,))
    add("softmax", (z,))
    add("log_softmax", (z,), "result max_logit total")
    add("softmax_vjp", (found["softmax", "result"] if probs is None else probs, g))
    add("log_softmax_vjp", (z, largest, found["log_softmax", "total"] if total is None else total, g))
    return found


@jax.jit
def by_kernels(*arrays):
    found = moments.block_moments(arrays[0], 1)
    return every_kernel(kernel, *arrays), (found.statistics.logsumexp, found.entropy, found.leader)


@jax.jit
def plainly(*arrays):
    return every_kernel(plain, *arrays)


@pytest.mark.parametrize(("shape", "dtype"), each_dtype(SHAPES))
@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def test_kernels_equal_the_plain_functions(shape, dtype, rng, monkeypatch):
    outer, classes, inner = shape
    one = (outer, 1, inner)
    compute = F64 if dtype == F64 else F32
    z, g = draw(rng, shape, dtype), rng.normal(size=shape).astype(dtype)
    largest = np.maximum(wide(z).max(1, keepdims=True), float(jnp.finfo(dtype).min)).astype(compute)
    largest[np.abs(largest) < jnp.finfo(compute).tiny] = 0  # which numbers below the smallest normal one are to a CPU
    label = rng.integers(-2, classes + 2, one).astype(np.int32)
    spread = (rng.uniform(size=shape) * (rng.uniform(size=shape) < 0.7)).astype(compute)
    factor, at_label, share = rng.normal(size=(3, *one)).astype(compute)
    rest = label, spread, spread[:1, :, :1], factor, at_label, share, rng.uniform(size=one) < 0.2
    found, (logsumexp, entropy, leads) = jax.tree.map(np.asarray, by_kernels(z, g, largest, rest))

    # The truth in float64 starts from the rounded shift, after which nothing may be lost.
    finite = np.isfinite(largest)
    shifted = wide(np.where(finite, z.astype(compute) - largest, z))
    probs, total = wide(found["softmax", "result"]), wide(found["log_softmax", "total"])
    monkeypatch.setattr(cpu, "_fits", lambda *_: False)  # a plain function may call another one
    right = plainly(shifted, wide(g), wide(np.where(finite, 0, largest)), [wide(a) for a in rest], probs, total)
    right = jax.tree.map(np.asarray, right)

    def agree(kernel, result, roundings, scale=0.0, lost=8, expected=None, where=True):
        expected = right[kernel, result] if expected is None else expected
        actual, expected = (np.where(where, a, np.zeros((), a.dtype)) for a in (found[kernel, result], expected))
        assert_close(kernel, result, actual, expected, roundings, scale, lost)

    left = finite & (z > -np.inf).any(1, keepdims=True)
    at_labels = np.take_along_axis(z, np.clip(label, 0, classes - 1), 1).astype(compute)
    for kernel, result in found:
        if result == "max_logit" and kernel != "moments":
            agree(kernel, result, 0, lost=0, expected=largest)
        elif kernel.startswith("statistics"):
            if result == "label_logit":
                agree(kernel, result, 0, lost=1, expected=at_labels)
            elif result == "leader_logit":
                agree(kernel, result, 0, lost=1, expected=largest, where=left)
            elif (kernel, result) in (
                ("statistics with weights", "sum_others"),
                ("statistics with shared weights", "sum_others"),
            ):
                agree(kernel, result, 16, lost=8 + classes, where=left)
            else:
                where = {"weighted_gap": ~np.isnan(largest), "other_weight": finite}  # elsewhere nothing is made of it
                agree(kernel, result, 16, where=where.get(result, True))
        elif kernel.startswith("gradient"):
            weights = spread[:1, :, :1] if "shared" in kernel else spread if "weights" in kernel else None
            scale = 0.0 if weights is None else np.abs(right[kernel, result]) + np.abs(wide(share) * weights)
            if weights is not None and "label" not in kernel:  # at classes with the largest logit
                scale += np.abs(wide(at_label)) + np.abs(wide(factor)) * weights
            agree(kernel, result, 6, scale)

    lead = wide(z).argmax(1, keepdims=True).astype(np.int32)
    # Exponentials below the smallest normal number may be 0; in the gap they are multiplied by up to 709.
    agree("moments", "sum_others", 16, lost=8 + classes, where=left)
    agree("moments", "gap", 16, lost=709 * classes, where=left)
    for result, expected in (("max_logit", largest), ("leader_logit", largest), ("leader", lead)):
        agree("moments", result, 0, lost=1 if result == "leader_logit" else 0, expected=expected, where=left)
    # At the other vectors, compare the kinds of results: NaN, infinities, 0, no class.
    assert_close(
        "moments", "logsumexp", np.where(left, 0, logsumexp), np.where(left, 0, np.where(finite, -np.inf, largest)), 0
    )
    nan = np.where(finite, 0, np.nan)
    assert_close("moments", "entropy", np.where(left, 0, entropy), np.where(left, 0, nan), 0)
    assert_close("moments", "leading class", leads, np.where(left, lead, -1), 0, lost=0)

    agree("total", "result", 16, np.abs(wide(g)).sum(1, keepdims=True))
    agree("softmax", "result", 16)
    agree("log_softmax", "total", 16, expected=np.maximum(right["log_softmax", "total"], jnp.finfo(compute).eps / 8))
    agree("log_softmax", "result", 4, 16)  # near 0 a logarithm is accurate to the rounding of 1
    of_g = np.abs(wide(g))
    agree("softmax_vjp", "result", 16, probs * (of_g + (probs * of_g).sum(1, keepdims=True)))
    agree("log_softmax_vjp", "result", 16, of_g + np.exp(shifted) / total * of_g.sum(1, keepdims=True))


@pytest.mark.parametrize(("shape", "dtype"), each_dtype(SHAPES | dict.fromkeys(MORE_SHAPES, ())))
def test_a_loss_and_its_gradient_equal_the_plain_formula(shape, dtype, rng, monkeypatch):
    """In one pass. Logits are such that subtracting the largest is exact, and float64 has the truth."""
    outer, classes, inner = shape
    compute, one = F64 if dtype == F64 else F32, (outer, 1, inner)
    z = np.clip(np.rint(draw(rng, shape, F64, edges=False) * 4) / 4, -31, 31)
    label = rng.integers(0, classes, one).astype(np.int32)
    label_weight, position_weight, z_loss_weight = rng.uniform(0.1, 2, (3, *one))
    ignored = rng.uniform(size=one) < 0.2
    for weight in (label_weight, position_weight, z_loss_weight):
        weight[ignored] = 0
    label[..., :1], label_weight[..., :1] = -1, np.nan  # no class
    each, shared = rng.uniform(size=shape), rng.uniform(size=(1, classes, 1))
    scale, no = np.full((1, 1, 1), 0.37), None
    cases = {
        "label": (label, label_weight, position_weight, no, no),
        "label, z-loss": (label, label_weight, position_weight, z_loss_weight, no),
        "label, shared weights, z-loss": (label, label_weight, position_weight, z_loss_weight, shared),
        "label, weights": (label, label_weight, position_weight, no, each),
        "weights": (no, no, position_weight, no, each),
    }

    def narrow(array, kind=compute):
        return array if array is None or array.dtype == np.int32 else array.astype(kind)

    given = {name: (z.astype(dtype), *map(narrow, case), narrow(scale)) for name, case in cases.items()}
    found = jax.jit(lambda given: {name: kernel("loss", *arrays) for name, arrays in given.items()})(given)
    monkeypatch.setattr(cpu, "_fits", lambda *_: False)
    exact = jax.tree.map(wide, given, is_leaf=lambda a: a is None)
    right = jax.jit(lambda given: {name: plain("loss", *arrays) for name, arrays in given.items()})(exact)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    for name, (y, hot, share, _, weights) in cases.items():
        (loss, gradient), (expected, slope) = (jax.tree.map(np.asarray, results[name]) for results in (found, right))
        # The logarithm of a sum without a label is accurate to the rounding of 1.
        of_one = 0.0 if weights is None else share * np.broadcast_to(weights, shape).sum(1, keepdims=True)
        assert_close(f"loss of {name}", "loss", loss, expected, 32, of_one)
        size = np.abs(slope) + (0 if weights is None else 0.37 * share * weights)
        if y is not None:
            size += 0.37 * np.nan_to_num(hot) * (np.where(np.arange(classes)[:, None] == y, 1 - p, p))
        assert_close(f"loss of {name}", "gradient", gradient, slope, 16, size)
        assert np.array_equal(np.isnan(loss), np.isnan(expected))


@pytest.mark.parametrize("shape", [(40, 5, 2), (9, 70, 1)])
def test_one_of_several_equal_largest_logits_is_left_out_of_the_sum(shape, rng):
    """In the kernel of `moments`, and in the plain function that sums the largest logits separately."""
    z = np.rint(rng.normal(size=shape)).astype(F32)
    z[0], z[1, 0], z[2, 1] = -np.inf, np.nan, np.inf
    found, right = jax.jit(lambda z: (kernel("leading_sums", z), statistics._leading_sums.__wrapped__((z,), AXES)))(z)
    assert (np.sum(z == z.max(1, keepdims=True), 1) > 1).any()
    for name, got, want in zip(("max_logit", "sum_others", "leader"), found, right, strict=True):
        left = (
            np.isfinite(z).any(1, keepdims=True)
            & ~np.isnan(z).any(1, keepdims=True)
            & (z < np.inf).all(1, keepdims=True)
        )
        assert_close("leading_sums", name, np.where(left, got, 0), np.where(left, want, 0), 16)
    none = np.asarray(right[2])[0]
    assert np.isneginf(none).all()
    assert np.isneginf(np.asarray(found[2])[0]).all()


@pytest.mark.parametrize(("shape", "dtype"), each_dtype(BATCHES))
def test_the_bits_of_a_row_do_not_depend_on_its_batch(shape, dtype, rng):
    """The first row, the fourth and the last seven, each alone."""
    z, g = (draw(rng, shape, dtype, edges=False) for _ in range(2))
    y = wide(g).argmax(1, keepdims=True).astype(np.int32)
    batches = [slice(None), slice(0, 1), slice(3, 4), slice(-7, None)]

    @jax.jit
    def of_each(batches):
        def of_one(z, g, y):
            (s,), (log_s, largest, total) = kernel("softmax", z), kernel("log_softmax", z)
            of_logits, wide_g = (z, largest, total), g.astype(total.dtype)
            return {
                "softmax": s,
                "log_softmax": (log_s, largest, total),
                "statistics": kernel("statistics", z, y, g.astype(total.dtype)),
                "moments": kernel("moments", z),
                "total": kernel("total", z),
                "gradient": kernel("gradient", z, largest, 1 / total, None, y, total, *(None,) * 4),
                "gradient with weights": kernel(
                    "gradient", z, largest, 1 / total, None, None, None, total, total, total, wide_g
                ),
                "statistics with weights": kernel("statistics", z, None, wide_g),
                "loss": kernel(
                    "loss", z, y, total, total, total, g.astype(total.dtype), jnp.ones((1, 1, 1), total.dtype)
                ),
                "softmax_vjp": kernel("softmax_vjp", s, g),
                "log_softmax_vjp": kernel("log_softmax_vjp", *of_logits, g),
            }

        return [of_one(*batch) for batch in batches]

    whole, *parts = of_each([(z[rows], g[rows], y[rows]) for rows in batches])
    for rows, part in zip(batches[1:], parts, strict=True):
        for (path, few), many in zip(jax.tree.leaves_with_path(part), jax.tree.leaves(whole), strict=True):
            named = f"{jax.tree_util.keystr(path)} of {dtype}{list(shape)}, rows {rows}"
            np.testing.assert_array_equal(few, np.asarray(many)[rows], named)


@pytest.mark.parametrize(("classes", "inner"), [(3, 1), (100, 1), (1000, 1), (1700, 7), (10, 7), (21, 40)])
def test_weights_that_the_positions_of_an_example_share_are_those_of_each(classes, inner, rng):
    z = rng.normal(size=(2, 3, classes, inner)).astype(np.float32)
    shared = rng.uniform(size=(2, 1, classes, 1)).astype(np.float32)

    @jax.jit
    def both(z, shared):
        return kernel("statistics", z, None, shared), kernel("statistics", z, None, jnp.broadcast_to(shared, z.shape))

    for few, each in zip(*both(z, shared), strict=True):
        np.testing.assert_array_equal(few, each)


def test_a_kernel_refuses_arrays_that_it_would_read_out_of_bounds():
    """Mixed dtypes and broadcast weights, which the kernel does not check."""
    logits, one = np.zeros((4, 300), np.float32), np.zeros((4, 1), np.float32)
    for spread, taken in ((logits, True), (logits[:1], True), (logits[:2], False), (one, False), (wide(logits), False)):
        assert (cpu.statistics(True, (logits, None, spread), (-1,)) is not None) == taken
    assert cpu.statistics(True, (logits, one, None), (-1,)) is None


def test_under_second_derivatives(rng):
    z, y = rng.normal(size=(3, 8)), np.array([1, 7, 2])
    found = jax.jit(jax.hessian(lambda z: jaxsoft.cross_entropy(z, y, reduction="sum")))(z)
    for row, probs in enumerate(np.exp(z) / np.exp(z).sum(1, keepdims=True)):
        np.testing.assert_allclose(found[row, :, row], reference.jacobian(probs), rtol=1e-12, atol=1e-15)


def test_a_library_built_from_other_sources_is_refused(tmp_path):
    library = ctypes.CDLL(jaxsoft.native_kernels().detail)
    cpu._check_sources(library, tmp_path)  # as in an installed wheel, which has no sources
    for file in Path(cpu.__file__).parents[1].joinpath("native").glob("*.*"):
        shutil.copy(file, tmp_path)
    cpu._check_sources(library, tmp_path)
    with (tmp_path / "kernels.h").open("a") as file:
        file.write("\n")
    with pytest.raises(ImportError, match="has changed since it was built; install again"):
        cpu._check_sources(library, tmp_path)
