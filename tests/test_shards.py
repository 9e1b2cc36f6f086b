"""A class axis laid over eight devices: everything equals the whole."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxsoft
import reference

MESHES = {"eight": ((8,), ("classes",)), "two by four": ((2, 4), ("data", "classes"))}
rng = np.random.default_rng(0)
LOGITS, COTANGENT = (jnp.asarray(rng.normal(size=(12, 40)), jnp.float32) for _ in range(2))
FEATURES, KERNEL, BIAS = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((12, 6), (6, 40), (40,)))
LABELS = jnp.asarray(rng.integers(0, 40, 12)).at[jnp.array([0, 1, 2, 3, 7])].set(-100)  # not alike on both halves
DISTRIBUTION = jnp.asarray(rng.dirichlet(np.ones(40), 12), jnp.float32)
WEIGHTS, CLASS_WEIGHTS = (jnp.asarray(rng.uniform(0.2, 2, n), jnp.float32) for n in (12, 40))
MASK = jnp.asarray(rng.random((12, 40)) < 0.7)
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


def close(actual, expected):
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
@pytest.mark.parametrize("axis", [0, 1])
def test_softmax_functions(mesh, name, axis):
    logits, cotangent = (LOGITS, COTANGENT) if axis else (LOGITS.T, COTANGENT.T)
    spec = PartitionSpec(rows(mesh), "classes") if axis else PartitionSpec("classes", rows(mesh))
    if name == "logsumexp":
        cotangent = cotangent.sum(axis)
    out = PartitionSpec(rows(mesh)) if name == "logsumexp" else spec

    def value_and_vjp(logits, cotangent, **options):
        value, pullback = jax.vjp(lambda z: getattr(jaxsoft, name)(z, axis, **options), logits)
        return value, pullback(cotangent)[0]

    sharded = over_shards(mesh, lambda z, g: value_and_vjp(z, g, axis_name="classes"), (spec, out), (out, spec))
    close(sharded(logits, cotangent), value_and_vjp(logits, cotangent))


def test_masks(mesh):
    spec, out = PartitionSpec(rows(mesh), "classes"), PartitionSpec(rows(mesh))
    labels = jnp.argmax(MASK, 1)
    options = {"label_smoothing": 0.2, "reduction": "none"}

    def losses(z, m, y, **more):
        return jaxsoft.cross_entropy(z, y, where=m, **options, **more)

    sharded = over_shards(mesh, lambda *a: losses(*a, axis_name="classes"), (spec, spec, out), out)
    close(sharded(LOGITS, MASK, labels), losses(LOGITS, MASK, labels))
    probs = over_shards(mesh, lambda z, m: jaxsoft.softmax(z, -1, m, axis_name="classes"), (spec, spec), spec)
    close(probs(LOGITS, MASK), jaxsoft.softmax(LOGITS, -1, MASK))


# Differentiated within the shard_map and around it, on one axis of a mesh and on two: not all for every option.
@pytest.mark.parametrize(
    ("case", "linear", "grad_inside", "mesh"),
    reference.covering(2, OPTIONS, [False, True], [False, True], MESHES),
    indirect=["mesh"],
)
def test_losses(case, linear, grad_inside, mesh):
    options = {"reduction": "sum"} | OPTIONS[case]
    row = rows(mesh)
    targets, target_spec = LABELS, PartitionSpec(row)
    if case == "distributions":
        targets, target_spec = DISTRIBUTION, PartitionSpec(row, "classes")
    elif "ignore_index" not in options:
        targets = jnp.maximum(LABELS, 0)
    if linear:
        variables = FEATURES, KERNEL, BIAS
        specs = PartitionSpec(row), PartitionSpec(None, "classes"), PartitionSpec("classes")
    else:
        variables, specs = (LOGITS,), (PartitionSpec(row, "classes"),)

    def loss(targets, weights, *variables, **more):
        if linear:
            features, kernel, bias = variables
            # Room for two positions a tile on a shard of 40 / 8 classes.
            losses = jaxsoft.linear_cross_entropy(
                features, kernel, targets, bias, soft_cap=5.0, weights=weights,
                memory_budget=2000 if more else 2**20, **options, **more,
            )  # fmt: skip
        else:
            losses = jaxsoft.cross_entropy(*variables, targets, weights=weights, **options, **more)
        return jnp.sum(losses)

    def whole(targets, weights, *variables):
        total = loss(targets, weights, *variables, axis_name="classes")
        return jax.lax.psum(total, row) if row else total

    of_variables = tuple(range(2, 2 + len(variables))) + ((0,) if case == "distributions" else ())
    in_specs = (target_spec, PartitionSpec(row), *specs)
    if grad_inside:
        gradient_specs = tuple(in_specs[n] for n in of_variables)
        fn = jax.value_and_grad(whole, of_variables)
        sharded = over_shards(mesh, fn, in_specs, (PartitionSpec(), gradient_specs))
    else:
        sharded = jax.jit(jax.value_and_grad(over_shards(mesh, whole, in_specs, PartitionSpec()), of_variables))
    expected = jax.jit(jax.value_and_grad(loss, of_variables))(targets, WEIGHTS, *variables)
    close(sharded(targets, WEIGHTS, *variables), expected)

    forward = over_shards(mesh, lambda *a: loss(*a, axis_name="classes")[None], in_specs, PartitionSpec(row))
    program = forward.lower(targets, WEIGHTS, *variables).compile().as_text()
    # The classes that a bias leaves to smoothing are counted once, outside of the loop.
    counted = linear and "label_smoothing" in options
    assert len(re.findall(r" all-reduce(?:-start)?\(", program)) == 2 + counted
    assert "all-gather" not in program


def test_second_order(mesh):
    spec = PartitionSpec(rows(mesh), "classes")
    labels = jnp.maximum(LABELS, 0)

    def slope(z, y, **options):
        gradient = jax.grad(lambda z: jaxsoft.cross_entropy(z, y, reduction="sum", **options))(z)
        return jnp.sum(jnp.sin(gradient))

    fn = over_shards(
        mesh,
        lambda z, y: jax.grad(lambda z: jax.lax.psum(slope(z, y, axis_name="classes"), mesh.axis_names))(z),
        (spec, PartitionSpec(rows(mesh))),
        spec,
    )
    close(fn(LOGITS, labels), jax.jit(jax.grad(slope))(LOGITS, labels))


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp", "cross_entropy"])
def test_second_order_far_below_the_leading_class(mesh, name):
    """Right to roundings of s, however small, also where the terms of a class cancel: along what is the same for all.

    They would not if one of them had exp(z_j − m) by way of the largest logit of its shard.
    """
    row, spec = rows(mesh), PartitionSpec(rows(mesh), "classes")
    arguments = (jnp.argmax(LOGITS, 1),) if name == "cross_entropy" else ()
    options = {"reduction": "none"} if arguments else {}
    cotangent = COTANGENT if "softmax" in name else COTANGENT[:, 0]
    of_positions = PartitionSpec(row)

    def bend(z, g, v, *arguments, **more):
        def gradient(z):
            return jax.vjp(lambda z: getattr(jaxsoft, name)(z, *arguments, **options, **more), z)[1](g)[0]

        return jax.vjp(gradient, z)[1](v)[0]

    logits = 30 * LOGITS
    in_specs = spec, spec if "softmax" in name else of_positions, spec, *(of_positions for _ in arguments)
    sharded = over_shards(mesh, lambda *a: bend(*a, axis_name="classes"), in_specs, spec)
    probs = np.asarray(jaxsoft.softmax(logits.astype(float)))
    largest = np.abs(cotangent.sum(1) if name == "log_softmax" else cotangent).max()
    for along in (jnp.ones_like(logits), jnp.cos(logits)):
        arrays = logits, cotangent, along
        expected = np.asarray(bend(*(a.astype(float) for a in arrays), *arguments))
        bound = 2**-20 * probs * largest + 2e-5 * np.abs(expected) + 1e-37
        assert (np.abs(np.asarray(sharded(*arrays, *arguments)) - expected) <= bound).all()


def test_a_label_beyond_the_last_shard_is_nan(mesh):
    spec = PartitionSpec(rows(mesh), "classes")
    labels = jnp.maximum(LABELS, 0).at[jnp.array([4, 9])].set(jnp.array([40, -1], LABELS.dtype))
    out = PartitionSpec(rows(mesh))
    losses = over_shards(
        mesh, lambda z, y: jaxsoft.cross_entropy(z, y, reduction="none", axis_name="classes"), (spec, out), out
    )(LOGITS, labels)
    assert np.isnan(losses).nonzero()[0].tolist() == [4, 9]


def test_second_order_of_the_linear_loss(mesh):
    specs = PartitionSpec(rows(mesh)), PartitionSpec(None, "classes"), PartitionSpec(rows(mesh))

    def loss(x, w, y, **options):
        return linear_sum(x, w, y, **options)

    def slope(fn):
        return lambda x, w: jnp.sum(jnp.sin(jax.grad(fn, 1)(x, w)))

    def whole(x, w, y):
        total = loss(x, w, y, axis_name="classes")
        return jax.lax.psum(total, rows(mesh)) if rows(mesh) else total

    sharded = jax.shard_map(whole, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    got = jax.jit(jax.grad(slope(lambda x, w: sharded(x, w, LABELS)), (0, 1)))(FEATURES, KERNEL)
    close(got, jax.jit(jax.grad(slope(lambda x, w: loss(x, w, LABELS)), (0, 1)))(FEATURES, KERNEL))


def linear_sum(features, kernel, labels, **options):
    return jaxsoft.linear_cross_entropy(features, kernel, labels, ignore_index=-100, reduction="sum", **options)


def test_classes_over_two_mesh_axes():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec(None, ("a", "b"))
    fn = over_shards(
        mesh,
        lambda z, y: jaxsoft.cross_entropy(z, y, ignore_index=-100, axis_name=["a", "b"]),
        (spec, PartitionSpec()),
        PartitionSpec(),
    )
    close(fn(LOGITS, LABELS), jaxsoft.cross_entropy(LOGITS, LABELS, ignore_index=-100))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_half_precision_kernel_has_its_gradient_summed_in_float32_over_positions(reduction):
    """Seven devices add 128.5 each: bfloat16 would round that to 128, and the sum of 899.5 to 896 in place of 900."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x, w = jnp.ones((8 * 257, 1), jnp.bfloat16).at[-257:].set(0), jnp.zeros((1, 2), jnp.bfloat16)
    labels = jnp.zeros(8 * 257, int)

    def loss(x, w, y):
        return jax.lax.psum(jnp.sum(jaxsoft.linear_cross_entropy(x, w, y, reduction=reduction)), "data")

    fn = over_shards(
        mesh, jax.grad(loss, 1), (PartitionSpec("data"), PartitionSpec(), PartitionSpec("data")), PartitionSpec()
    )
    np.testing.assert_array_equal(fn(x, w, labels).astype(float), [[-900, 900]])


def test_explicit_sharding_of_the_class_axis():
    with jax.set_mesh(jax.make_mesh((8,), ("classes",))):
        placed = jax.device_put(LOGITS, PartitionSpec(None, "classes"))
        gradient = jax.jit(jax.grad(lambda z: jnp.sum(jaxsoft.softmax(z) ** 2)))(placed)
    close(gradient, jax.grad(lambda z: jnp.sum(jaxsoft.softmax(z) ** 2))(LOGITS))


def test_errors_say_where_the_name_must_come_from():
    message = r"axis_name: expected a mesh axis of an enclosing jax\.shard_map with check_vma=True, its default \(linear_cross_entropy takes that of a mesh set by jax\.set_mesh too\), got 'classes'"
    with pytest.raises(ValueError, match=message):
        jaxsoft.softmax(LOGITS, axis_name="classes")
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, "classes")
    fn = lambda z: jaxsoft.softmax(z, axis_name="classes")  # noqa: E731
    with pytest.raises(ValueError, match=message):
        jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(LOGITS)
    with pytest.raises(
        ValueError, match="logits: expected one block of the classes on each device along 'classes', got copies of all"
    ):
        jax.shard_map(fn, mesh=mesh, in_specs=PartitionSpec(), out_specs=spec)(LOGITS)


@pytest.mark.parametrize("linear", [False, True])
def test_the_tangent_of_the_value_where_a_whole_block_has_targets_of_0(linear):
    """One-hot rows: of eight blocks seven weigh nothing, and their targets move all the same."""
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))
    targets = jnp.eye(40, dtype=jnp.float32)[jnp.arange(12) * 3]
    x = FEATURES if linear else LOGITS
    tangents = jnp.cos(x), jnp.asarray(np.random.default_rng(7).normal(size=targets.shape), jnp.float32)

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
    np.testing.assert_allclose(sharded(*arrays), tangent_of_the_value(*arrays), rtol=2e-5)


def test_a_block_of_removed_classes_far_below_the_others_costs_nothing():
    """The lowest number, relative to which a block without classes is summed, less 1e32 is −∞ in float32."""
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))
    logits = jnp.full((1, 16), -jnp.inf, jnp.float32).at[0, :2].set(jnp.array([1e32, 0], jnp.float32))
    targets = jnp.zeros((1, 16), jnp.float32).at[0, 0].set(1)

    def loss(logits, targets):
        return jaxsoft.cross_entropy(logits, targets, axis_name="classes")

    blocks = PartitionSpec(None, "classes")
    assert over_shards(mesh, loss, (blocks, blocks), PartitionSpec())(logits, targets) == 0


@pytest.mark.parametrize("other", [np.inf, 0.0])
def test_a_logit_that_is_nan_in_one_block_is_not_passed_over_in_another(other):
    """XLA's CPU takes the larger for the maximum of a number and NaN, in some order of the devices."""
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, "classes")
    lse = over_shards(mesh, lambda z: jaxsoft.logsumexp(z, axis_name="classes"), spec, PartitionSpec())
    for block in range(8):
        logits = jnp.zeros((1, 16)).at[0, 5].set(other).at[0, 2 * block].set(jnp.nan)
        assert np.isnan(lse(logits)).all(), block
