"""Arrays sharded over eight devices outside `shard_map`, by their types or automatically: everything equals one device's."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsoft
import reference
from jaxsoft import cross_entropy, linear_cross_entropy

KINDS = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}
POSITIONS, WIDTH, CLASSES = 64, 8, 48
rng = np.random.default_rng(0)


def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)


LOGITS, OF_LOGITS = normal(16, 8, 24), normal(16, 8, 24)
FEATURES, KERNEL, BIAS = normal(POSITIONS, WIDTH), normal(WIDTH, CLASSES), normal(CLASSES)
OF_FEATURES, OF_KERNEL = normal(POSITIONS, WIDTH), normal(WIDTH, CLASSES)


def of_targets(positions, classes):
    """Labels, most of them ignored at one end; a distribution, weights, class weights, and a mask without any of their classes."""
    labels = rng.integers(0, classes - 4, positions).astype(np.int32)
    labels.reshape(-1)[: labels.size // 3] = -1
    mask = np.arange(classes) != classes - 2
    shares = rng.dirichlet(np.ones(classes), positions) * mask
    weights = rng.uniform(0.2, 2, positions)
    return {
        "labels": labels,
        "distribution": shares.astype(np.float32),
        "weights": weights.astype(np.float32),
        "class_weights": rng.uniform(0.2, 2, classes).astype(np.float32),
        "where": mask,
    }


DENSE, LINEAR = of_targets((16, 8), 24), of_targets((POSITIONS,), CLASSES)
TARGETS, REDUCTIONS = ("labels", "distributions"), ("none", "mean")
OPTIONS = {
    "plain": {},
    "class weights": {"class_weights"},
    "everything": {"class_weights", "weights", "where", "label_smoothing", "z_loss"},
}


def each_loss(loss, targets):
    """Functions that compute losses with all options, by name, for labels and for distributions."""
    numbers = {"label_smoothing": 0.1, "z_loss": 0.05}
    losses = {}
    for kind, name, reduction in itertools.product(TARGETS, OPTIONS, REDUCTIONS):
        options = {key: numbers.get(key, targets.get(key)) for key in OPTIONS[name]} | {"reduction": reduction}
        given = (
            {"labels": targets["labels"], "ignore_index": -1}
            if kind == "labels"
            else {"labels": targets["distribution"]}
        )
        losses[f"{kind}, {name}, {reduction}"] = functools.partial(loss, **given, **options)
    return losses


def derivative(functions, name, arrays, primals, tangents):
    """For one of `functions(*arrays)` the value, gradients under a random cotangent, and the tangents of these."""

    def weighed(*primals):
        value = functions(*arrays)[name](*primals)
        cotangent = jnp.cos(jnp.arange(value.size, dtype=value.dtype)).reshape(value.shape)
        sharding = jax.typeof(value).sharding
        if AxisType.Explicit in sharding.mesh.axis_types:
            cotangent = jax.sharding.reshard(cotangent, sharding)
        return jnp.sum(cotangent * value), value

    def gradients(*primals):
        return jax.grad(weighed, tuple(range(len(primals))), has_aux=True)(*primals)

    return jax.jvp(gradients, primals, tangents, has_aux=True)


def derivatives(functions, names, arrays, primals, tangents):
    """Those of each, by name.

    One program after another: XLA's CPU has a thread wait in each collective, and waits forever where one program has
    more of them side by side than threads.
    """
    run = jax.jit(functools.partial(derivative, functions), static_argnums=0)
    return {name: jax.block_until_ready(run(name, arrays, primals, tangents)) for name in names}


def of_one_device(functions, *arrays):
    """All of them as one program: nothing waits in it."""
    names = tuple(functions(*arrays[0]))
    return jax.jit(lambda *arrays: {name: derivative(functions, name, *arrays) for name in names})(*arrays)


def setups(others, *factors):
    """Each combination of `factors`, and names of functions: by default few, and the rest.

    Of the `others` each meets every choice, and of the losses every kind of target and reduction, each option in turn.
    """
    covering = reference.covering(2, TARGETS, REDUCTIONS, *factors)
    chosen = [
        (f"{of}, {option}, {r}", *setup)
        for (of, r, *setup), option in zip(covering, itertools.cycle(OPTIONS), strict=False)
    ]
    chosen += reference.covering(2, others, *factors) if others else []
    names = [*others, *map(", ".join, itertools.product(TARGETS, OPTIONS, REDUCTIONS))]
    cases = []
    for setup in itertools.product(*factors):
        some = [name for name in names if (name, *setup) in chosen]
        cases += [pytest.param(*setup, some, id="-".join(map(str, setup)))] if some else []
        rest = [name for name in names if name not in some]
        cases.append(pytest.param(*setup, rest, id="-".join((*map(str, setup), "rest")), marks=pytest.mark.exhaustive))
    return cases


def place(mesh, array, spec):
    return jax.device_put(array, NamedSharding(mesh, spec))


def make_mesh(kind, shape):
    names = ("data", "model")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def close(actual, expected):
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        message = jax.tree_util.keystr(path)
        assert np.isfinite(want).all(), message
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * np.abs(want).max(), err_msg=message)


# ---- Dense functions.


def dense(targets, cotangent):
    def loss(logits, *, labels, **options):
        return cross_entropy(logits, labels, **options)

    return {
        "softmax": jaxsoft.softmax,
        "softmax, masked": functools.partial(jaxsoft.softmax, where=targets["where"]),
        "softmax, positions": functools.partial(jaxsoft.softmax, axis=0),
        "log_softmax": jaxsoft.log_softmax,
        "logsumexp": jaxsoft.logsumexp,
        "logsumexp, all": functools.partial(jaxsoft.logsumexp, axis=None),
        "softmax_vjp": lambda probs: jaxsoft.softmax_vjp(probs, cotangent),
        **each_loss(loss, targets),
    }


@pytest.fixture(scope="module")
def dense_of_one_device():
    return of_one_device(dense, (DENSE, OF_LOGITS), (LOGITS,), (OF_LOGITS,))


DENSE_LAYOUTS = {
    "positions": ((8,), P("data")),
    "both": ((4, 2), P("data", None, "model")),
    "classes": ((8,), P(None, None, "data")),
}
OTHERS = [name for name in dense(DENSE, None) if ", none" not in name and ", mean" not in name]


@pytest.mark.parametrize(("kind", "layout", "replicated", "names"), setups(OTHERS, KINDS, DENSE_LAYOUTS, [False, True]))
def test_dense_functions(dense_of_one_device, kind, layout, replicated, names):
    """Targets that are sharded like the logits, or replicated."""
    shape, spec = DENSE_LAYOUTS[layout]
    mesh = make_mesh(KINDS[kind], shape)
    rows = P() if replicated else P(*spec[:2])
    specs = dict.fromkeys(DENSE, P()) | {"labels": rows, "weights": rows, "distribution": P() if replicated else spec}
    with jax.set_mesh(mesh):
        targets = {name: place(mesh, array, specs[name]) for name, array in DENSE.items()}
        other = place(mesh, OF_LOGITS, P() if replicated else spec)
        logits, tangent = place(mesh, LOGITS, spec), place(mesh, OF_LOGITS, spec)
        found = derivatives(dense, names, (targets, other), (logits,), (tangent,))
    close(found, {name: dense_of_one_device[name] for name in names})


# ---- The fused head.


def unfused(targets, bias):
    def loss(features, kernel, *, labels, **options):
        return cross_entropy(features @ kernel + bias, labels, **options)

    return each_loss(loss, targets)


def linear(targets, bias, **layout):
    def loss(features, kernel, *, labels, **options):
        options |= {"memory_budget": 4 * 4 * CLASSES * 5, **layout}
        return linear_cross_entropy(features, kernel, labels, bias, **options)

    return each_loss(loss, targets)


@pytest.fixture(scope="module")
def head_of_one_device():
    """From logits that are computed before."""
    return of_one_device(unfused, (LINEAR, BIAS), (FEATURES, KERNEL), (OF_FEATURES, OF_KERNEL))


LAYOUTS = {  # of positions, kernel, bias
    "positions": ((8,), P("data"), P(), P()),
    "fsdp": ((8,), P("data"), P("data"), P()),
    "fsdp over classes": ((8,), P("data"), P(None, "data"), P()),
    "vocabulary": ((4, 2), P(), P(None, "model"), P("model")),
    "both": ((4, 2), P("data"), P(None, "model"), P("model")),
    "fsdp and vocabulary": ((4, 2), P("data"), P("data", "model"), P("model")),
    "positions over both": ((4, 2), P(("data", "model")), P("model", "data"), P()),
    "width": ((4, 2), P("data"), P("model"), P()),
}


def place_head(mesh, rows, of_kernel, of_bias):
    specs = dict.fromkeys(LINEAR, P()) | {
        "labels": rows,
        "weights": rows,
        "distribution": P(*(rows or (None,)), *of_bias),
    }
    targets = {name: place(mesh, array, specs[name]) for name, array in LINEAR.items()}
    primals = place(mesh, FEATURES, rows), place(mesh, KERNEL, of_kernel), place(mesh, BIAS, of_bias)
    return targets, primals, (place(mesh, OF_FEATURES, rows), place(mesh, OF_KERNEL, of_kernel))


def automatic(kind, rows, of_kernel):
    """The arguments that name axes which types do not state."""
    if kind == AxisType.Explicit:
        return {}
    by_class = "model" if of_kernel[1:] == ("model",) else None
    return {"batch_axes": rows[0] if rows else None, "axis_name": by_class}


@pytest.mark.parametrize(("kind", "layout", "names"), setups([], KINDS, LAYOUTS))
def test_the_fused_head(head_of_one_device, kind, layout, names):
    """Also the mean if one device ignores all of its positions and another none."""
    shape, rows, of_kernel, of_bias = LAYOUTS[layout]
    mesh = make_mesh(KINDS[kind], shape)
    with jax.set_mesh(mesh):
        fn = functools.partial(linear, **automatic(KINDS[kind], rows, of_kernel))
        targets, (features, kernel, bias), tangents = place_head(mesh, rows, of_kernel, of_bias)
        found = derivatives(fn, names, (targets, bias), (features, kernel), tangents)
    close(found, {name: head_of_one_device[name] for name in names})


def mean_loss(*arrays, **layout):
    return linear_cross_entropy(*arrays, ignore_index=-1, **layout)


PLAIN = FEATURES, KERNEL, LINEAR["labels"]


@pytest.fixture(scope="module")
def plain_of_one_device():
    """The mean with its gradients, and each loss."""
    fn = jax.jit(lambda *a: (jax.value_and_grad(mean_loss, (0, 1))(*a), mean_loss(*a, reduction="none")))
    return fn(*PLAIN)


@pytest.mark.parametrize("of_kernel", [P(), P("data"), P(None, "model")])
def test_the_fused_head_without_arguments_on_automatic_axes(plain_of_one_device, of_kernel):
    mesh = make_mesh(AxisType.Auto, (4, 2))
    specs = P("data"), of_kernel, P("data")
    placed = (place(mesh, a, s) for a, s in zip(PLAIN, specs, strict=True))
    close(jax.jit(jax.value_and_grad(mean_loss, (0, 1)))(*placed), plain_of_one_device[0])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_inside_a_shard_map_an_unreduced_axis_is_one_line(kind):
    mesh = make_mesh(kind, (4, 2))
    more = {} if kind == AxisType.Explicit else {"batch_axes": "model"}

    def of_device(x, w, y):
        return jax.lax.psum(linear_cross_entropy(x, w, y, reduction="sum", **more), "data")

    specs = P("data"), P(None, "model"), P("data")
    with jax.set_mesh(mesh):
        fn = jax.shard_map(of_device, in_specs=(P("data"), P(), P("data")), out_specs=P(), axis_names={"data"})
        placed = (place(mesh, a, s) for a, s in zip(PLAIN, specs, strict=True))
        with pytest.raises(ValueError, match=r"got \['model'\]: name these in its axis_names too"):
            jax.jit(fn)(*placed)


SEQUENCES = FEATURES.reshape(8, 8, WIDTH), KERNEL, LINEAR["labels"].reshape(8, 8)


def of_sequences(features, kernel, labels, **more):
    def loss(x, y):
        return linear_cross_entropy(x, kernel, y, ignore_index=-1, **more)

    return jnp.sum(jnp.sin(jnp.arange(8, dtype=jnp.float32)) * jax.vmap(loss)(features, labels))


@pytest.fixture(scope="module")
def sequences_of_one_device():
    return jax.jit(jax.value_and_grad(of_sequences, (0, 1)))(*SEQUENCES)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_mapped_over_sequences(sequences_of_one_device, kind):
    """Sequences over one mesh axis, their positions over another."""
    spec, more = (P("data", "model"), {}) if kind == AxisType.Explicit else (P(None, "data"), {"batch_axes": "data"})
    mesh = make_mesh(kind, (4, 2))
    with jax.set_mesh(mesh):
        placed = (place(mesh, a, s) for a, s in zip(SEQUENCES, (spec, P(), spec), strict=True))
        found = jax.jit(jax.value_and_grad(functools.partial(of_sequences, **more), (0, 1)))(*placed)
    close(found, sequences_of_one_device)


def test_mapped_over_the_axis_that_is_sharded():
    """Class weights for each example; the other axes are not sharded."""
    weights = LINEAR["class_weights"] * np.arange(1, 9, dtype=np.float32)[:, None]
    arrays = FEATURES[:8], np.abs(LINEAR["labels"][:8]), weights

    def loss(features, label, weights):
        return linear_cross_entropy(features, KERNEL, label, class_weights=weights, reduction="sum")

    losses, mesh = jax.jit(jax.vmap(loss)), make_mesh(AxisType.Explicit, (8,))
    expected = losses(*arrays)
    with jax.set_mesh(mesh):
        close(losses(*(place(mesh, array, P("data")) for array in arrays)), expected)


def test_batch_axes_are_added_to_the_axes_in_the_types(plain_of_one_device):
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Explicit, AxisType.Auto))
    with jax.set_mesh(mesh):
        placed = [place(mesh, a, s) for a, s in zip(PLAIN, (P("data"), P(), P("data")), strict=True)]
        lowered = jax.jit(functools.partial(mean_loss, batch_axes="fsdp")).lower(*placed)
        close(lowered.compile()(*placed), plain_of_one_device[0][0])
    of_device = lowered.as_text()
    assert f"tensor<{POSITIONS // 8}x{WIDTH}xf32>" in of_device
    assert f"tensor<{POSITIONS // 4}x{WIDTH}xf32>" not in of_device


def test_an_axis_that_does_not_divide_is_an_error():
    with jax.set_mesh(make_mesh(AxisType.Auto, (8,))):
        loss = functools.partial(linear_cross_entropy, kernel=KERNEL, batch_axes=P(None, "data"))
        assert np.isfinite(loss(FEATURES[:24].reshape(3, 8, -1), targets=LINEAR["labels"][:24].reshape(3, 8) * 0))
        with pytest.raises(
            ValueError, match="features: axis 1 of 3 positions cannot be split evenly over the 8 devices of 'data'"
        ):
            loss(FEATURES[:24].reshape(8, 3, -1), targets=LINEAR["labels"][:24].reshape(8, 3))


def test_a_spec_shards_each_axis_of_the_positions(plain_of_one_device):
    with jax.set_mesh(make_mesh(AxisType.Auto, (4, 2))):
        losses = jax.jit(functools.partial(mean_loss, reduction="none", batch_axes=P("data", "model")))(*SEQUENCES)
    close(losses, plain_of_one_device[1].reshape(8, 8))
    assert losses.sharding.spec == P("data", "model")


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_checked_names_what_is_wrong_on_a_mesh(kind):
    mesh = make_mesh(kind, (8,))
    more = {} if kind == AxisType.Explicit else {"batch_axes": "data"}
    with jax.set_mesh(mesh):
        placed = (
            place(mesh, FEATURES, P("data")),
            place(mesh, KERNEL, P()),
            place(mesh, np.full(POSITIONS, 99), P("data")),
        )
        with pytest.raises(ValueError, match=r"is 99: expected a label in \[0, 48\)"):
            jaxsoft.checked(jax.jit(functools.partial(linear_cross_entropy, **more)))(*placed)


# ---- What is compiled.

BIG = {"positions": 512, "width": 64, "classes": 1024}


def compiled(kind, shape, rows, of_kernel):
    positions, width, classes = BIG.values()
    mesh = make_mesh(kind, shape)
    shapes = (
        ((positions, width), jnp.float32, rows),
        ((width, classes), jnp.float32, of_kernel),
        ((positions,), jnp.int32, rows),
    )
    with jax.set_mesh(mesh):
        arrays = (jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, spec)) for s, d, spec in shapes)

        def loss(x, w, y):
            budget = classes * 4 * 2 * 16
            return linear_cross_entropy(x, w, y, memory_budget=budget, **automatic(kind, rows, of_kernel))

        return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays).compile().as_text()


def collectives(text):
    """(operation, elements, whether it is inside a loop) of each."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    found, computation = [], ""
    for line in text.splitlines():
        if begins := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = begins[1]
        if op := re.search(
            r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", line
        ):
            sizes = [
                int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\[([\d,]*)\]", op[1])
            ]
            found.append((op[2], max(sizes), computation in bodies))
    return found


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *itertools.product(
            KINDS.values(), ["fsdp", "fsdp and vocabulary"]
        ),  # which differ in what is left of a gradient
        (AxisType.Explicit, "positions"),
        (AxisType.Auto, "both"),
        pytest.param(AxisType.Auto, "positions", marks=pytest.mark.exhaustive),
        pytest.param(AxisType.Explicit, "both", marks=pytest.mark.exhaustive),
    ],
)
def test_devices_share_the_work_and_exchange_no_more_than_needed(kind, layout):
    shape, of_positions, of_kernel, _ = LAYOUTS[layout]
    found = collectives(compiled(kind, shape, of_positions, of_kernel))
    positions, width, classes = BIG.values()
    block = classes // (shape[1] if "model" in str(of_kernel) else 1)
    rows = 16 * classes // block  # of a tile, of each of which there are two numbers
    assert all(size <= 2 * rows for _, size, in_loop in found if in_loop), found
    gathered = [size for op, size, _ in found if op == "all-gather"]
    assert gathered == ([width * block] if "fsdp" in layout else []), found
    # In addition the kernel's gradient, the features' where classes are sharded, and small ones.
    reduced = sorted(size for op, size, _ in found if op != "all-gather" and size > 64)
    of_features = [positions // shape[0] * width] if block < classes else []
    of_gradient = [width * block // (shape[0] if "fsdp" in layout and kind == AxisType.Explicit else 1)]
    assert reduced == sorted(of_features + of_gradient), found


# ---- Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_axes": "rows"}, "batch_axes: expected axes of the mesh set by jax.set_mesh that no enclosing shard_map has, here 'data', 'model', got 'rows'"),
        ({"batch_axes": ("data", "rows")}, "batch_axes: expected axes of the mesh"),
        ({"batch_axes": 0}, "batch_axes: expected different names of mesh axes, got 0"),
        ({"batch_axes": ("data", "data")}, r"batch_axes: expected different names of mesh axes, got \('data', 'data'\)"),
        ({"batch_axes": "data", "axis_name": "data"}, "axis_name: expected no axis that batch_axes names, got"),
        ({"axis_name": "rows"}, r"linear_cross_entropy also takes an axis of a mesh set by jax.set_mesh\), got 'rows'"),
        ({"axis_name": ("data", "model"), "kernel": KERNEL[:, :46]}, r"kernel: 46 classes cannot be split evenly over the 8 devices of \('data', 'model'\)"),
        ({"batch_axes": P("data", "model")}, "batch_axes: expected names for at most 1 axes of positions"),
        ({"batch_axes": ("data", "model")}, r"features: axis 0 of 12 positions cannot be split evenly over the 8 devices of \('data', 'model'\)"),
    ],
)  # fmt: skip
def test_bad_axes_are_one_line(options, message):
    kernel = options.get("kernel", KERNEL)
    options = {name: value for name, value in options.items() if name != "kernel"}
    with jax.set_mesh(make_mesh(AxisType.Auto, (4, 2))), pytest.raises(ValueError, match=message):
        linear_cross_entropy(FEATURES[:12], kernel, LINEAR["labels"][:12], **options)


def test_batch_axes_without_a_mesh_are_one_line():
    with pytest.raises(
        ValueError,
        match=r"batch_axes: expected axes of the mesh .*, and no mesh is set: call inside `with jax.set_mesh\(mesh\):`, got 'data'",
    ):
        linear_cross_entropy(*PLAIN, batch_axes="data")
