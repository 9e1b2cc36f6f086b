"""Names that JAX may remove: without any one of them the package imports with a warning, and every public function is right."""

import importlib
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import jaxsoft
from jaxsoft import _jax_internals

pytestmark = pytest.mark.x32

PRIMITIVES = [
    "jax.extend.core.Primitive",
    *(
        f"jax.interpreters.{name}"
        for name in (
            "ad.Zero",
            "ad.instantiate_zeros",
            "ad.is_undefined_primal",
            "ad.primitive_jvps",
            "ad.primitive_transposes",
            "batching.primitive_batchers",
            "mlir.lower_fun",
            "mlir.register_lowering",
        )
    ),
]
OTHERS = [
    "jax.interpreters.mlir.ShardingContext",
    "jax.interpreters.mlir.SPMDAxisContext",
    "jax.make_user_context",
    "jax.custom_derivatives.SymbolicZero",
    "jax.core.Tracer",
    "jax.core.max_dim",
    "jax.core.min_dim",
    "types' mat",
    "types' sharding",
]
rng = np.random.default_rng(0)
Z, X, W, B = (rng.normal(size=shape).astype(np.float32) for shape in [(6, 5), (6, 3), (3, 5), 5])
Y, P = np.array([1, 4, 0, 2, 255, 3]), rng.dirichlet(np.ones(5), 6).astype(np.float32)
IMAGE, PIXELS = rng.normal(size=(2, 3, 2, 2)).astype(np.float32), rng.integers(0, 3, (2, 2, 2))
ORDER = np.argsort(Z, 1)[:, :2]
STATES, COUPLINGS = np.sign(rng.normal(size=(2, 3))).astype(np.float32), np.ones((3, 3), np.float32) - np.eye(3)


class Without:
    """An object without one of its attributes."""

    def __init__(self, whole, name):
        self.whole, self.name = whole, name

    def __getattr__(self, name):
        if name == self.name:
            raise AttributeError(name)
        return getattr(self.whole, name)


@pytest.fixture
def without(monkeypatch):
    """The package, imported with a JAX that lacks a name."""

    def imported(name):
        if name.startswith("types' "):
            whole, attribute = jax.typeof, name.removeprefix("types' ")
            monkeypatch.setattr(jax, "typeof", lambda array: Without(whole(array), attribute))
        elif name:
            module, _, attribute = name.rpartition(".")
            monkeypatch.delattr(importlib.import_module(module), attribute)
        for module in [m for m in sys.modules if m.partition(".")[0] == "jaxsoft"]:
            monkeypatch.delitem(sys.modules, module)
        return importlib.import_module("jaxsoft")

    return imported


def everything(package):
    """Values and gradients of every kind of function, compiled as one program, and of `checked`."""
    key = jax.random.key(0)
    energy, caffe = package.energy, package.caffe
    rbm = energy.RestrictedBoltzmann(W[:, :2], W[:, 2], B[:2])

    def losses(x, w, z):
        sparse = package.SparseTargets(ORDER, P[:, :2] / 2)
        ignored = {"ignore_index": 255}
        z_of_image = IMAGE * z[0, 0]
        return [
            package.softmax(z, where=P > 0.1),
            package.log_softmax(z, 0),
            package.logsumexp(z),
            package.softmax_vjp(package.softmax(z), jnp.cos(z)),
            package.softmax_jacobian(package.softmax(z)),
            package.entropy(z),
            package.kl_divergence(z, Z[::-1], kind="jensen-shannon"),
            package.cross_entropy(z, Y, label_smoothing=0.1, z_loss=0.1, **ignored),
            package.cross_entropy(z, P, weights=np.arange(6), reduction="none"),
            package.cross_entropy(z, sparse),
            package.linear_cross_entropy(x, w, Y, B, **ignored, memory_budget=200),
            package.linear_cross_entropy(x, w, sparse, reduction="none"),
            jax.vmap(package.linear_cross_entropy, (0, None, 0))(x[:, None], w, Y[:, None] % 5),
            package.linear_log_probs(x, w, Y, entropy=True, **ignored)[:2],
            package.linear_top_k(x, w, 2).log_probs,
            package.linear_kl_divergence(x, w, X, W[::-1]),
            caffe.softmax_with_loss(z_of_image, PIXELS),
            caffe.infogain_loss(z_of_image, PIXELS, np.eye(3)),
            caffe.multinomial_logistic_loss(caffe.softmax(z), Y % 5),
            energy.gibbs_distribution(z, beta=0.5),
            energy.log_partition(z),
            energy.hopfield_energy(STATES * z[0, 0], COUPLINGS),
            energy.boltzmann_probability(energy.hopfield_field(STATES * z[0, 0], COUPLINGS)),
            energy.perceptron_criterion(z, np.sign(Z)),
            energy.rbm_free_energy(rbm, x),
            energy.rbm_energy(rbm, x, x[:, :2]),
            package.apply_mlp(package.init_mlp(key, (3, 4, 2)), x[0]),
        ]

    def weighed(x, w, z):
        values = losses(x, w, z)
        leaves = jax.tree.leaves(values)
        return sum(jnp.sum(leaf * (1 + jnp.arange(leaf.size).reshape(leaf.shape))) for leaf in leaves), values

    constant = [
        energy.hopfield_asynchronous(STATES, COUPLINGS),
        energy.hopfield_synchronous(STATES, COUPLINGS),
        energy.rbm_log_partition(rbm),
        energy.rbm_gibbs(key, rbm, (STATES + 1) / 2),
        energy.binary_states(3),
    ]
    with pytest.raises(ValueError, match=re.escape("targets[4] is 255: expected a label in [0, 5)")):
        package.checked(jax.jit(jax.grad(package.cross_entropy)))(Z, Y)
    package.native_kernels(), package.plan_linear_cross_entropy(6, 3, 5), package.diagnose_gradient(Z, P, Z)
    hessian = jax.hessian(lambda z: package.cross_entropy(z, Y, ignore_index=255))
    found = jax.jit(lambda *a: (jax.grad(weighed, (0, 1, 2), has_aux=True)(*a), hessian(a[2])))(X, W, Z)
    return jax.tree.map(np.asarray, (found, constant))


@pytest.fixture(scope="module")
def expected():
    return everything(jaxsoft)


def test_every_name_of_jax_exists():
    assert _jax_internals.lacking() == []


@pytest.mark.parametrize("name", [*PRIMITIVES, *OTHERS])
def test_without_a_name_the_package_imports_and_warns(name, without):
    package = without(name)
    lacking = package._jax_internals.lacking()
    word = name.rpartition(".")[2].rpartition(" ")[2]
    says = {"mat": ["the manual axes of a type"], "sharding": ["the sharding of a type"]}.get(word, [name])
    if name in PRIMITIVES:
        (reason,) = lacking
        assert word in reason
        assert not package.native_kernels().loaded
        assert reason.startswith("primitives (ImportError: cannot import name ")
    else:
        assert lacking == says
    text = importlib.import_module("jaxsoft.__main__").installation()
    assert [f"this JAX lacks {line}: the plain formula runs instead" in text for line in lacking] == [True] * len(
        lacking
    )
    value, pullback = jax.vjp(jax.jit(lambda z: package.softmax(z, -1)), Z)
    exponentials = np.exp(Z.astype(float))
    s, g = exponentials / exponentials.sum(1, keepdims=True), np.cos(Z)
    np.testing.assert_allclose(value, s, rtol=1e-6)
    np.testing.assert_allclose(pullback(g)[0], s * (g - (s * g).sum(1, keepdims=True)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "name", [PRIMITIVES[0], *(pytest.param(n, marks=pytest.mark.exhaustive) for n in [*PRIMITIVES[1:], *OTHERS])]
)
def test_without_a_name_every_public_function_is_right(name, without, expected):
    found = everything(without(name))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_primitives_that_jax_treats_differently_are_not_used(without, monkeypatch):
    monkeypatch.setattr(jax.extend.core.Primitive, "def_abstract_eval", lambda *_: None)
    package = without("")
    assert package._jax_internals.lacking()[0].startswith("primitives (")
    np.testing.assert_allclose(jax.jit(package.softmax)(Z), jax.nn.softmax(Z), rtol=1e-6)


def test_without_manual_axes_a_sharded_head_still_runs(without):
    package = without("types' mat")
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    loss = lambda p: jax.value_and_grad(p.linear_cross_entropy, (0, 1))(X, W, Y % 5, batch_axes="d")  # noqa: E731
    with jax.set_mesh(mesh):
        found, expected = jax.jit(lambda: loss(package))(), jax.jit(lambda: loss(jaxsoft))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize("attribute", ["module_context", "lowering_parameters", "for_export", "axis_context"])
def test_a_context_without_devices_does_not_count_as_one_device(attribute):
    """Then no kernel runs."""
    seen = []

    class Context:
        def __init__(self, whole):
            self.whole = whole

        def __getattr__(self, name):
            if name == attribute:
                raise AttributeError(name)
            value = getattr(self.whole, name)
            return Context(value) if name in ("module_context", "lowering_parameters") else value

    def choose(context, types, static):
        seen.append((_jax_internals.is_on_one_device(context), _jax_internals.is_on_one_device(Context(context))))
        return lambda arrays, static: arrays

    @_jax_internals.as_primitive(lambda *_: None, {"cpu": choose})
    def same(arrays, static):
        return arrays

    jax.jit(lambda z: same((z,), ())[0])(Z)
    assert seen == [(True, False)]


def test_no_other_module_uses_such_a_name():
    unstable = re.compile(
        r"jax\.(core|extend|interpreters|custom_derivatives|_src)\b|make_user_context|jax\.typeof|\.mat\b"
        r"|lowering_parameters|axis_context"
    )
    package = Path(jaxsoft.__file__).parent
    files = [file for file in package.rglob("*.py") if file.name != Path(_jax_internals.__file__).name]
    assert len(files) > 20
    assert [file.name for file in files if unstable.search(file.read_text())] == []


def test_a_function_is_compiled_outside_traces_and_traced_as_part_of_its_caller_inside():
    seen = []

    @_jax_internals.jit_outside_traces(static_argnums=(1,))
    def double(x, factor):
        seen.append(type(x))
        return factor * x

    x = jnp.ones(3)
    double(x, 2), double(x, 2)
    assert len(seen) == 1
    assert issubclass(seen[0], jax.core.Tracer)
    assert "jit" not in str(jax.make_jaxpr(lambda x: double(x, 2))(x))
