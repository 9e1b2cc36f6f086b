"""A class axis sharded over eight devices: all results equal the unsharded ones."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxsoft
import reference
from jaxsoft._formula import statistics

MESHES = {"eight": ((8,), ("classes",)), "two by four": ((2, 4), ("data", "classes"))}
rng = np.random.default_rng(0)
LOGITS, COTANGENT = rng.normal(size=(2, 12, 40)).astype(np.float32)
FEATURES, KERNEL, BIAS = (rng.normal(size=s).astype(np.float32) for s in ((12, 6), (6, 40), (40,)))
LABELS = rng.integers(0, 40, 12)
LABELS[[0, 1, 2, 3, 7]] = -100  # not alike on both halves
DISTRIBUTION = rng.dirichlet(np.ones(40), 12).astype(np.float32)
WEIGHTS, CLASS_WEIGHTS = (rng.uniform(0.2, 2, n).astype(np.float32) for n in (12, 40))
MASK = rng.random((12, 40)) < 0.7
OPTIONS = {
    "plain": {},
    "ignored": {"ignore_index": -100},
    "smooth": {"ignore_index": -100, "label_smoothing": 0.2, "z_loss": 0.1, "class_weights": CLASS_WEIGHTS},
    "each": {"ignore_index": -100, "reduction": "none", "label_smoothing": 0.1},
    "distributions": {"label_smoothing": 0.2, "class_weights": CLASS_WEIGHTS},
}


@pytest.fixture(params=MESHES)
def mesh(request):
    shape, names = MESHES[request.param]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def rows(mesh):
    return "data" if "data" in mesh.axis_names else None


def over_shards(mesh, fn, in_specs, out_specs):
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def of_each_two(*factors):
    """Every two choices meet by default; all others are exhaustive."""
    chosen = reference.covering(2, *factors)
    rest = [choice for choice in itertools.product(*factors) if choice not in chosen]
    return chosen + [pytest.param(*choice, marks=pytest.mark.exhaustive) for choice in rest]


def close(actual, expected):
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * np.abs(want).max())


def value_and_vjp(name, axis, logits, cotangent, **options):
    """The value and the VJP of a softmax function; for logsumexp the cotangents of all classes are summed."""
    value, pullback = jax.vjp(lambda z: getattr(jaxsoft, name)(z, axis, **options), logits)
    return value, pullback(cotangent)[0]


SOFTMAX = ["softmax", "log_softmax", "logsumexp"]


def of_softmax(name, axis):
    logits, cotangent = (LOGITS, COTANGENT) if axis else (LOGITS.T, COTANGENT.T)
    return logits, cotangent.sum(axis) if name == "logsumexp" else cotangent


@pytest.fixture(scope="module")
def whole_softmax():
    """For each function and axis, as one program."""
    cases = [(name, axis) for name in SOFTMAX for axis in (0, 1)]
    return jax.jit(lambda: {case: value_and_vjp(*case, *of_softmax(*case)) for case in cases})()


@pytest.mark.parametrize(("name", "axis", "mesh"), of_each_two(SOFTMAX, [0, 1], MESHES), indirect=["mesh"])
def test_softmax_functions(whole_softmax, mesh, name, axis):
    spec = PartitionSpec(rows(mesh), "classes") if axis else PartitionSpec("classes", rows(mesh))
    out = PartitionSpec(rows(mesh)) if name == "logsumexp" else spec
    fn = functools.partial(value_and_vjp, name, axis, axis_name="classes")
    close(over_shards(mesh, fn, (spec, out), (out, spec))(*of_softmax(name, axis)), whole_softmax[name, axis])


def masked(z, m, y, **more):
    losses = jaxsoft.cross_entropy(z, y, where=m, label_smoothing=0.2, reduction="none", **more)
    return losses, jaxsoft.softmax(z, -1, m, **more)


@pytest.fixture(scope="module")
def whole_masked():
    return jax.jit(masked)(LOGITS, MASK, MASK.argmax(1))


@pytest.mark.parametrize("result", [0, 1], ids=["losses", "probabilities"])
def test_masks(whole_masked, mesh, result):
    spec, out = PartitionSpec(rows(mesh), "classes"), PartitionSpec(rows(mesh))
    sharded = over_shards(
        mesh, lambda *a: masked(*a, axis_name="classes")[result], (spec, spec, out), (out, spec)[result]
    )
    close(sharded(LOGITS, MASK, MASK.argmax(1)), whole_masked[result])


def of_losses(case, linear):
    """The options of a case, its targets, and the variables by which the loss is differentiated."""
    options = {"reduction": "sum"} | OPTIONS[case]
    targets = LABELS if "ignore_index" in options else np.maximum(LABELS, 0)
    return (
        options,
        DISTRIBUTION if case == "distributions" else targets,
        (FEATURES, KERNEL, BIAS) if linear else (LOGITS,),
    )


def variables_of(case, linear):
    return (*range(2, 5 if linear else 3), *((0,) if case == "distributions" else ()))


@pytest.fixture(scope="module")
def whole_losses():
    """For each case, with logits and with a linear layer whose logits are computed before, as one program."""

    def value_and_grad(case, linear):
        options, targets, variables = of_losses(case, linear)

        def loss(targets, weights, *variables):
            logits = variables[0]
            if linear:
                features, kernel, bias = variables
                logits = 5 * jnp.tanh((features @ kernel + bias) / 5)
            return jnp.sum(jaxsoft.cross_entropy(logits, targets, weights=weights, **options))

        return jax.value_and_grad(loss, variables_of(case, linear))(targets, WEIGHTS, *variables)

    return jax.jit(
        lambda: {(case, linear): value_and_grad(case, linear) for case in OPTIONS for linear in (False, True)}
    )()


# Differentiated within the shard_map and around it, on one axis of a mesh and on two: not all for every option.
@pytest.mark.parametrize(
    ("case", "linear", "grad_inside", "mesh"),
    of_each_two(OPTIONS, [False, True], [False, True], MESHES),
    indirect=["mesh"],
)
def test_losses(whole_losses, case, linear, grad_inside, mesh):
    options, targets, variables = of_losses(case, linear)
    row = rows(mesh)
    target_spec = PartitionSpec(row, "classes") if case == "distributions" else PartitionSpec(row)
    of_layer = PartitionSpec(row), PartitionSpec(None, "classes"), PartitionSpec("classes")
    in_specs = target_spec, PartitionSpec(row), *(of_layer if linear else (PartitionSpec(row, "classes"),))

    def loss(targets, weights, *variables):
        if linear:
            features, kernel, bias = variables
            # Room for two positions a tile on a shard of 40 / 8 classes.
            losses = jaxsoft.linear_cross_entropy(
                features, kernel, targets, bias, soft_cap=5.0, weights=weights, memory_budget=2000,
                axis_name="classes", **options,
            )  # fmt: skip
        else:
            losses = jaxsoft.cross_entropy(*variables, targets, weights=weights, axis_name="classes", **options)
        return jnp.sum(losses)

    def whole(*arrays):
        return jax.lax.psum(loss(*arrays), row) if row else loss(*arrays)

    arrays, of_variables = (targets, WEIGHTS, *variables), variables_of(case, linear)
    if grad_inside:
        gradient_specs = tuple(in_specs[n] for n in of_variables)
        fn = jax.value_and_grad(whole, of_variables)
        sharded = over_shards(mesh, fn, in_specs, (PartitionSpec(), gradient_specs))
    else:
        sharded = jax.jit(jax.value_and_grad(over_shards(mesh, whole, in_specs, PartitionSpec()), of_variables))
    close(sharded(*arrays), whole_losses[case, linear])

    forward = over_shards(mesh, lambda *a: loss(*a)[None], in_specs, PartitionSpec(row))
    program = forward.lower(*arrays).as_text()
    # The classes that a bias leaves to smoothing are counted once, outside of the loop.
    counted = linear and "label_smoothing" in options
    assert len(re.findall(r"stablehlo.all_reduce\b", program)) == 2 + counted
    assert "all_gather" not in program


def slope(z, y, **options):
    gradient = jax.grad(lambda z: jaxsoft.cross_entropy(z, y, reduction="sum", **options))(z)
    return jnp.sum(jnp.sin(gradient))


@pytest.fixture(scope="module")
def whole_second_order():
    """The gradients of sums of sines of gradients: for logits, and for features and kernel of a layer."""

    def of_kernel(x, w):
        def loss(w):
            return jaxsoft.cross_entropy(x @ w, LABELS, ignore_index=-100, reduction="sum")

        return jnp.sum(jnp.sin(jax.grad(loss)(w)))

    return jax.jit(lambda z, x, w: (jax.grad(slope)(z, np.maximum(LABELS, 0)), jax.grad(of_kernel, (0, 1))(x, w)))(
        LOGITS, FEATURES, KERNEL
    )


def test_second_order(whole_second_order, mesh):
    spec = PartitionSpec(rows(mesh), "classes")
    fn = over_shards(
        mesh,
        lambda z, y: jax.grad(lambda z: jax.lax.psum(slope(z, y, axis_name="classes"), mesh.axis_names))(z),
        (spec, PartitionSpec(rows(mesh))),
        spec,
    )
    close(fn(LOGITS, np.maximum(LABELS, 0)), whole_second_order[0])


FAR = 30 * LOGITS
ALONG = np.ones_like(FAR), np.cos(FAR)


def bend(name, z, g, v, *arguments, **more):
    """The gradient of the directional derivative of a cotangent's product with the result."""
    options = {"reduction": "none"} if arguments else {}

    def gradient(z):
        return jax.vjp(lambda z: getattr(jaxsoft, name)(z, *arguments, **options, **more), z)[1](g)[0]

    return jax.vjp(gradient, z)[1](v)[0]


def of_bend(name):
    """A cotangent for each result, and labels if the function takes any: the classes of the largest logits."""
    return COTANGENT if "softmax" in name else COTANGENT[:, 0], (LOGITS.argmax(1),) if name == "cross_entropy" else ()


BENT = [*SOFTMAX, "cross_entropy"]


@pytest.fixture(scope="module")
def whole_bend():
    """Along both axes, for each function, in float64."""

    def of_one(name):
        g, arguments = of_bend(name)
        z = FAR.astype(float)
        return [bend(name, z, g.astype(float), along.astype(float), *arguments) for along in ALONG]

    return jax.jit(lambda: {name: of_one(name) for name in BENT})()


@pytest.mark.parametrize(
    ("mesh", "name"),
    [
        pytest.param(mesh, name, marks=() if (m + n) % 2 else pytest.mark.exhaustive)
        for m, mesh in enumerate(MESHES)
        for n, name in enumerate(BENT)
    ],
    indirect=["mesh"],
)
def test_second_order_far_below_the_largest_class(whole_bend, mesh, name):
    """Accurate to the rounding of s, however small, also if the terms of a class cancel: along a constant direction.

    They would not if one of them had exp(z_j − m) by way of the largest logit of its shard.
    """
    row, spec = rows(mesh), PartitionSpec(rows(mesh), "classes")
    cotangent, arguments = of_bend(name)
    in_specs = spec, spec if "softmax" in name else PartitionSpec(row), spec, *(PartitionSpec(row) for _ in arguments)
    sharded = over_shards(mesh, functools.partial(bend, name, axis_name="classes"), in_specs, spec)
    exponentials = np.exp(FAR.astype(float))
    probs = exponentials / exponentials.sum(1, keepdims=True)
    largest = np.abs(cotangent.sum(1) if name == "log_softmax" else cotangent).max()
    for along, expected in zip(ALONG, whole_bend[name], strict=True):
        bound = 2**-20 * probs * largest + 2e-5 * np.abs(expected) + 1e-37
        assert (np.abs(np.asarray(sharded(FAR, cotangent, along, *arguments)) - expected) <= bound).all()


@pytest.mark.parametrize("linear", [False, True])
def test_sparse_targets_of_every_class_leave_nothing_to_the_others(mesh, linear):
    """Whatever they sum to: targets of all classes are a distribution, which no single device can see."""
    order = np.argsort(rng.random((12, 40)), 1)
    probs = np.take_along_axis(0.9 * DISTRIBUTION, order, 1)
    own, every, of_rows = PartitionSpec(None, "classes"), PartitionSpec(), PartitionSpec(rows(mesh))
    of_layer, names = (FEATURES, KERNEL), (("data",) if rows(mesh) else ())

    def loss(targets, *of_logits, **more):
        fn = jaxsoft.linear_cross_entropy if linear else jaxsoft.cross_entropy
        return fn(*of_logits, targets, reduction="sum", **more)

    def sharded(order, probs, *of_logits):
        def total(*of_logits):
            return loss(jaxsoft.SparseTargets(order, probs), *of_logits, axis_name="classes")

        found = jax.value_and_grad(total, tuple(range(len(of_logits))))(*of_logits)
        return jax.lax.psum(found[0], names) if names else found[0], found[1]

    given, specs = ((LOGITS,), (PartitionSpec(rows(mesh), "classes"),))
    if linear:
        given, specs = of_layer, (of_rows, own)
    mapped = over_shards(mesh, sharded, (of_rows, of_rows, *specs), (every, specs))
    whole = jax.jit(jax.value_and_grad(functools.partial(loss, 0.9 * DISTRIBUTION), tuple(range(len(given)))))
    close(mapped(order, probs, *given), whole(*given))


def test_a_label_beyond_the_last_shard_is_nan(mesh):
    spec = PartitionSpec(rows(mesh), "classes")
    labels = np.maximum(LABELS, 0)
    labels[[4, 9]] = 40, -1
    out = PartitionSpec(rows(mesh))
    losses = over_shards(
        mesh, lambda z, y: jaxsoft.cross_entropy(z, y, reduction="none", axis_name="classes"), (spec, out), out
    )(LOGITS, labels)
    assert np.isnan(losses).nonzero()[0].tolist() == [4, 9]


def test_second_order_of_the_linear_loss(whole_second_order, mesh):
    specs = PartitionSpec(rows(mesh)), PartitionSpec(None, "classes"), PartitionSpec(rows(mesh))

    def whole(x, w, y):
        total = jaxsoft.linear_cross_entropy(x, w, y, ignore_index=-100, reduction="sum", axis_name="classes")
        return jax.lax.psum(total, rows(mesh)) if rows(mesh) else total

    sharded = jax.shard_map(whole, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    of_kernel = jax.grad(lambda x, w: sharded(x, w, LABELS), 1)
    got = jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(of_kernel(x, w))), (0, 1)))(FEATURES, KERNEL)
    close(got, whole_second_order[1])


def test_classes_over_two_mesh_axes():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec(None, ("a", "b"))
    fn = over_shards(
        mesh,
        lambda z, y: jaxsoft.cross_entropy(z, y, ignore_index=-100, axis_name=["a", "b"]),
        (spec, PartitionSpec()),
        PartitionSpec(),
    )
    close(fn(LOGITS, LABELS), jax.jit(lambda z: jaxsoft.cross_entropy(z, LABELS, ignore_index=-100))(LOGITS))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_half_precision_kernel_has_its_gradient_summed_in_float32_over_positions(reduction):
    """Seven devices add 128.5 each: bfloat16 would round that to 128, and the sum of 899.5 to 896 in place of 900."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x, w = np.ones((8 * 257, 1), jnp.bfloat16), np.zeros((1, 2), jnp.bfloat16)
    x[-257:] = 0
    labels = np.zeros(8 * 257, int)

    def loss(x, w, y):
        return jax.lax.psum(jnp.sum(jaxsoft.linear_cross_entropy(x, w, y, reduction=reduction)), "data")

    fn = over_shards(
        mesh, jax.grad(loss, 1), (PartitionSpec("data"), PartitionSpec(), PartitionSpec("data")), PartitionSpec()
    )
    np.testing.assert_array_equal(np.asarray(fn(x, w, labels), float), [[-900, 900]])


def test_explicit_sharding_of_the_class_axis():
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(jaxsoft.softmax(z) ** 2)))
    expected = gradient(LOGITS)
    with jax.set_mesh(jax.make_mesh((8,), ("classes",))):
        close(gradient(jax.device_put(LOGITS, PartitionSpec(None, "classes"))), expected)


def test_errors_say_where_the_name_must_come_from():
    message = r"axis_name: expected a mesh axis of an enclosing jax\.shard_map with check_vma=True, its default \(linear_cross_entropy also takes an axis of a mesh set by jax\.set_mesh\), got 'classes'"
    with pytest.raises(ValueError, match=message):
        jaxsoft.softmax(LOGITS, axis_name="classes")
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, "classes")
    fn = lambda z: jaxsoft.softmax(z, axis_name="classes")  # noqa: E731
    with pytest.raises(ValueError, match=message):
        jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(LOGITS)
    with pytest.raises(
        ValueError, match="logits: expected one block of the classes on each device along 'classes', got copies of all"
    ):
        over_shards(mesh, fn, PartitionSpec(), spec)(LOGITS)


@pytest.mark.parametrize("linear", [False, True])
def test_the_tangent_of_the_value_if_a_whole_block_has_targets_of_0(linear):
    """One-hot rows: seven of eight blocks have weight 0, but their targets have tangents."""
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))
    targets = np.eye(40, dtype=np.float32)[np.arange(12) * 3]
    x = FEATURES if linear else LOGITS
    tangents = np.cos(x), np.random.default_rng(7).normal(size=targets.shape).astype(np.float32)

    def tangent_of_the_value(x, kernel, targets, of_x, of_targets, axis_name=None):
        def loss(x, targets):
            if linear:
                return jaxsoft.linear_cross_entropy(x, kernel, targets, axis_name=axis_name)
            return jaxsoft.cross_entropy(x, targets, axis_name=axis_name)

        return jax.jvp(jax.value_and_grad(loss, (0, 1)), (x, targets), (of_x, of_targets))[1][0]

    blocks = PartitionSpec(None, "classes")
    specs = PartitionSpec() if linear else blocks, blocks, blocks, PartitionSpec() if linear else blocks, blocks
    sharded = over_shards(mesh, lambda *a: tangent_of_the_value(*a, axis_name="classes"), specs, PartitionSpec())
    arrays = x, KERNEL, targets, *tangents
    np.testing.assert_allclose(sharded(*arrays), jax.jit(tangent_of_the_value)(*arrays), rtol=2e-5)


def test_a_block_of_masked_classes_far_below_the_others_adds_no_loss():
    """The lowest number, relative to which a block without classes is summed, minus 1e32 is −∞ in float32."""
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))
    logits, targets = np.full((1, 16), -np.inf, np.float32), np.zeros((1, 16), np.float32)
    logits[0, :2], targets[0, 0] = (1e32, 0), 1

    def loss(logits, targets):
        return jaxsoft.cross_entropy(logits, targets, axis_name="classes")

    blocks = PartitionSpec(None, "classes")
    assert over_shards(mesh, loss, (blocks, blocks), PartitionSpec())(logits, targets) == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_maximum_that_is_rounded_differently_when_it_is_read_again_counts_once(monkeypatch, temperature):
    """XLA may compute logits once for their maximum and again for the sum; then no exponential is exactly 1."""
    monkeypatch.setattr(statistics, "_leads", jnp.zeros_like)
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))

    def loss(features, kernel, targets, **options):
        options |= {"reduction": "none", "z_loss": 0.5, "temperature": temperature}
        return jaxsoft.linear_cross_entropy(features, kernel, targets, **options)

    whole, columns = PartitionSpec(), PartitionSpec(None, "classes")
    sharded = over_shards(mesh, functools.partial(loss, axis_name="classes"), (whole, columns, columns), whole)
    got = sharded(FEATURES, KERNEL, DISTRIBUTION)
    logits = (FEATURES.astype(float) @ KERNEL) / temperature
    lse = np.log(np.exp(logits).sum(1))
    want = lse - (DISTRIBUTION * logits).sum(1) + 0.5 * lse**2
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_position_whose_classes_are_all_masked_has_no_second_derivative():
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))
    whole = PartitionSpec(None, "classes")
    logsumexp = over_shards(mesh, functools.partial(jaxsoft.logsumexp, axis_name="classes"), whole, PartitionSpec())
    z = np.full((1, 40), -np.inf, np.float32)
    gradient = jax.grad(lambda z: jnp.sum(logsumexp(z) * 0))
    for found in jax.jit(lambda z: jax.jvp(gradient, (z,), (COTANGENT[:1],)))(z):
        np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("other", [np.inf, 0.0])
def test_a_nan_logit_in_one_block_reaches_the_other_blocks(other):
    """For some orders of the devices, XLA's CPU takes the number as the maximum of a number and NaN."""
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, "classes")
    lse = over_shards(mesh, lambda z: jaxsoft.logsumexp(z, axis_name="classes"), spec, PartitionSpec())
    for block in range(8):
        logits = np.zeros((1, 16))
        logits[0, 5], logits[0, 2 * block] = other, np.nan
        assert np.isnan(lse(logits)).all(), block
