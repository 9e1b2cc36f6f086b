"""Every public function in JAX's own modes: valid calls work there, and with the same result."""

import contextlib
import functools
import gc
import inspect
import itertools
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft import caffe, energy

pytestmark = pytest.mark.x32

NANS, INFS = lambda: jax.debug_nans(True), lambda: jax.debug_infs(True)
RANKS, DTYPES = lambda: jax.numpy_rank_promotion("raise"), lambda: jax.numpy_dtype_promotion("strict")
CHECKS, X64 = lambda: jax.enable_checks(True), lambda: jax.enable_x64(True)
PRECISE = lambda: jax.default_matmul_precision("highest")  # noqa: E731

# Together, since each raises on its own: what passes together passes alone.
MODES = {
    "default": (),
    "x64, rank and dtype promotion, debug_nans, debug_infs": (X64, RANKS, DTYPES, NANS, INFS),
    "disable_jit, debug_nans, debug_infs": (jax.disable_jit, NANS, INFS),
    "rank and dtype promotion, leaks, checks, precision": (RANKS, DTYPES, jax.checking_leaks, CHECKS, PRECISE),
}


EAGER, WIDE, LEAKS = (next(mode for mode in MODES if word in mode) for word in ("disable_jit", "x64", "leaks"))


@contextlib.contextmanager
def within(modes):
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode())
        yield


RNG = np.random.default_rng(0)
Z = RNG.normal(size=(4, 5)).astype(np.float32)
IMAGE = RNG.normal(size=(2, 3, 2, 2)).astype(np.float32)
X, W, B = (RNG.normal(size=shape).astype(np.float32) for shape in [(4, 3), (3, 5), (5,)])
P = RNG.dirichlet(np.ones(5), 4).astype(np.float32)
Y, IGNORED = np.array([1, 4, 0, 2], np.int32), np.array([255, 4, 0, 255], np.int32)
SPARSE = np.array([[1, 4, 0], [2, 2, 3], [4, 0, 1], [3, 1, 2]], np.int32)
PIXELS = np.array([[[0, 1], [255, 2]], [[255, 255], [1, 0]]], np.int32)
WEIGHTS, CLASS_WEIGHTS = np.array([1.0, 0, 0.5, 2], np.float32), np.array([1, 0, 2, 0.5, 3], np.float32)
MASK = np.array([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 1, 0, 1]], bool)
GAINS = np.array([[1.0, 0.2, 0.0], [0.0, 2.0, 0.5], [-0.3, 0.1, 1.0]], np.float32)
COUPLINGS = np.array([[0.0, -1.0, 0.5], [-1.0, 0.0, 0.3], [0.5, 0.3, 0.0]], np.float32)
STATES = np.array([[1.0, -1.0, 1.0], [1.0, 1.0, -1.0]], np.float32)
RBM = energy.RestrictedBoltzmann(W[:, :2], W[:, 2], B[:2])
VISIBLE, HIDDEN = (STATES + 1) / 2, np.array([[1, 0], [1, 1]], np.float32)
ORDER = np.array([2, 0, 2])
MLP = jax.tree.map(np.asarray, jaxsoft.init_mlp(jax.random.key(0), (3, 4, 2)))
TINY = 4 * 5 * 3 * 4  # bytes: more than one tile


def hessian_product(loss, z):
    """Forward over reverse."""
    return jax.jvp(jax.grad(loss), (z,), (jnp.cos(z),))[1]


dense = functools.partial(functools.partial, jaxsoft.cross_entropy)  # options first
fused = functools.partial(functools.partial, jaxsoft.linear_cross_entropy)

DIFFERENTIABLE = {  # name: a function, its arguments. The first argument, and every float, is differentiated.
    "softmax": (jaxsoft.softmax, Z),
    "softmax of axes": (lambda z: jaxsoft.softmax(z, (1, 3)), IMAGE),
    "softmax of half precision": (lambda z: jaxsoft.softmax(z.astype(jnp.bfloat16)), Z),
    "log_softmax": (jaxsoft.log_softmax, Z),
    "log_softmax of half precision": (lambda z: jaxsoft.log_softmax(z.astype(jnp.bfloat16), 0), Z),
    "logsumexp": (jaxsoft.logsumexp, Z),
    "logsumexp of all": (lambda z: jaxsoft.logsumexp(z, None, keepdims=True), Z),
    "softmax_vjp": (jaxsoft.softmax_vjp, P, Z),
    "entropy": (jaxsoft.entropy, Z),
    "kl_divergence": (lambda z: jaxsoft.kl_divergence(z, Z[::-1], weights=WEIGHTS), Z),
    "kl_divergence, jensen-shannon": (lambda z: jaxsoft.kl_divergence(z, Z[::-1], kind="jensen-shannon"), Z),
    "kl_divergence, second derivative": (lambda z: hessian_product(lambda z: jaxsoft.kl_divergence(z, Z[::-1]), z), Z),
    "linear_log_probs": (lambda x, w: tuple(jaxsoft.linear_log_probs(x, w, Y, B, entropy=True)), X, W),
    "linear_log_probs, ignored": (
        lambda x, w: tuple(jaxsoft.linear_log_probs(x, w, IGNORED, ignore_index=255, memory_budget=TINY)[:3]),
        X,
        W,
    ),
    "linear_top_k": (lambda x, w: tuple(jaxsoft.linear_top_k(x, w, 3, B, temperature=2.0)), X, W),
    "linear_kl_divergence": (
        lambda x, w: jaxsoft.linear_kl_divergence(x, w, W[:, :4].T, W * 2, B, memory_budget=2 * TINY),
        X,
        W,
    ),
    "softmax_jacobian": (jaxsoft.softmax_jacobian, P),
    "cross_entropy": (jaxsoft.cross_entropy, Z, Y),
    "cross_entropy of a vector": (jaxsoft.cross_entropy, Z[0], Y[0]),
    "cross_entropy of half precision": (lambda z: jaxsoft.cross_entropy(z.astype(jnp.float16), Y), Z),
    "cross_entropy, ignored": (dense(ignore_index=255), Z, IGNORED),
    "cross_entropy, ignored, none": (dense(ignore_index=255, reduction="none", z_loss=0.1), Z, IGNORED),
    "cross_entropy, nothing left": (dense(ignore_index=255), Z, np.full(4, 255)),
    "cross_entropy, image": (dense(axis=1, ignore_index=255, reduction="sum"), IMAGE, PIXELS),
    "cross_entropy, weights": (dense(weights=WEIGHTS, class_weights=CLASS_WEIGHTS), Z, Y),
    "cross_entropy, smoothing": (dense(label_smoothing=0.1, z_loss=0.1, class_weights=CLASS_WEIGHTS), Z, Y),
    "cross_entropy, distributions": (jaxsoft.cross_entropy, Z, P),
    "cross_entropy, distributions, options": (
        dense(label_smoothing=0.1, weights=WEIGHTS, class_weights=CLASS_WEIGHTS, z_loss=0.1, reduction="none"),
        Z,
        P,
    ),
    "cross_entropy, second derivative": (
        lambda z: hessian_product(lambda z: jaxsoft.cross_entropy(z, IGNORED, ignore_index=255, z_loss=0.1), z),
        Z,
    ),
    "linear_cross_entropy": (jaxsoft.linear_cross_entropy, X, W, Y),
    "linear_cross_entropy, statistics": (
        lambda x, w: jaxsoft.linear_cross_entropy(x, w, Y, with_statistics=True)[1].entropy,
        X,
        W,
    ),
    "linear_cross_entropy of a vector": (jaxsoft.linear_cross_entropy, X[0], W, Y[0], B),
    "linear_cross_entropy of half precision": (
        lambda x, w: jaxsoft.linear_cross_entropy(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), Y),
        X,
        W,
    ),
    "linear_cross_entropy, ignored": (fused(ignore_index=255, memory_budget=TINY), X, W, IGNORED, B),
    "linear_cross_entropy, ignored, none": (
        fused(ignore_index=255, reduction="none", z_loss=0.1, soft_cap=2.0),
        X,
        W,
        IGNORED,
    ),
    "linear_cross_entropy, nothing left": (fused(ignore_index=255), X, W, np.full(4, 255)),
    "linear_cross_entropy, options": (
        fused(label_smoothing=0.1, z_loss=0.1, soft_cap=2.0, class_weights=CLASS_WEIGHTS, reduction="sum"),
        X,
        W,
        Y,
        B,
    ),
    "linear_cross_entropy, weights": (fused(weights=WEIGHTS), X, W, Y),
    "linear_cross_entropy, distributions": (fused(memory_budget=4 * TINY), X, W, P, B),
    "linear_cross_entropy, distributions, options": (
        fused(label_smoothing=0.1, z_loss=0.1, class_weights=CLASS_WEIGHTS, reduction="none"),
        X,
        W,
        P,
    ),
    "linear_cross_entropy, second derivative": (
        lambda w: hessian_product(lambda w: jaxsoft.linear_cross_entropy(X, w, Y, B, z_loss=0.1), w),
        W,
    ),
    "apply_mlp": (jaxsoft.apply_mlp, MLP, X[0]),
    "apply_mlp of integers": (lambda params: jaxsoft.apply_mlp(params, np.array([1, 0, 2])), MLP),
    "apply_mlp of a batch": (jax.vmap(jaxsoft.apply_mlp, (None, 0)), MLP, X),
    "caffe.softmax": (caffe.softmax, IMAGE),
    "caffe.softmax_with_loss": (caffe.softmax_with_loss, IMAGE, PIXELS % 3),
    "caffe.softmax_with_loss, ignored": (lambda z: caffe.softmax_with_loss(z, PIXELS, ignore_label=255), IMAGE),
    "caffe.softmax_with_loss, floats": (
        lambda z: caffe.softmax_with_loss(z, PIXELS.astype(np.float32), ignore_label=255, normalization="FULL"),
        IMAGE,
    ),
    "caffe.infogain_loss": (lambda z: caffe.infogain_loss(z, PIXELS % 3, GAINS), IMAGE),
    "caffe.infogain_loss, ignored": (
        lambda z, w: caffe.infogain_loss(z, PIXELS, GAINS, ignore_label=255, normalize=False, loss_weight=w),
        IMAGE,
        np.float32(0.3),
    ),
    "caffe.multinomial_logistic_loss": (lambda p: caffe.multinomial_logistic_loss(p, Y), P),
    "caffe, second derivative": (
        lambda z: hessian_product(lambda z: caffe.softmax_with_loss(z, PIXELS, ignore_label=255)[0], z),
        IMAGE,
    ),
    "energy.gibbs_distribution": (lambda e, beta: energy.gibbs_distribution(e, beta=beta), Z, np.float32(2)),
    "energy.log_partition": (lambda e, beta: energy.log_partition(e, 0, beta=beta), Z, np.float32(2)),
    "energy.hopfield_energy": (energy.hopfield_energy, STATES, COUPLINGS, B[:3]),
    "energy.hopfield_energy of integers": (lambda w: energy.hopfield_energy(STATES.astype(np.int32), w), COUPLINGS),
    "energy.hopfield_field": (energy.hopfield_field, STATES, COUPLINGS, B[:3]),
    "energy.perceptron_criterion": (lambda h: energy.perceptron_criterion(h, np.array([1, -1, -1, 1, 1])), Z),
    "energy.boltzmann_probability": (
        lambda h, t: energy.boltzmann_probability(h, temperature=t, low=-1),
        Z,
        np.float32(2),
    ),
    "energy.rbm_energy": (energy.rbm_energy, RBM, VISIBLE, HIDDEN),
    "energy.rbm_energy of a batch and one": (energy.rbm_energy, RBM, VISIBLE, HIDDEN[0]),
    "energy.rbm_free_energy": (energy.rbm_free_energy, RBM, VISIBLE),
    "energy.rbm_log_partition": (energy.rbm_log_partition, RBM),
}

HOST = {  # looks at values
    "checked": (jaxsoft.checked(dense(ignore_index=255)), Z, IGNORED),
    "checked gradient": (jaxsoft.checked(jax.jit(jax.grad(jaxsoft.linear_cross_entropy))), X, W, Y, B),
    "checked caffe": (jaxsoft.checked(lambda z: caffe.softmax_with_loss(z, PIXELS, ignore_label=255)), IMAGE),
    "diagnose_gradient": (lambda z: jaxsoft.diagnose_gradient(z, Y, P - np.eye(5, dtype=np.float32)[Y]).row_sums, Z),
    "diagnose_loss": (lambda z: jaxsoft.diagnose_loss(z, Y, np.float32(1.5)).true_loss, Z),
    "plan_linear_cross_entropy": (lambda: np.array(jaxsoft.plan_linear_cross_entropy(4096, 4096, 128_256)[:-1]),),
}

OTHERS = {  # no derivative, or none that is a test
    "init_mlp": (lambda: jaxsoft.init_mlp(jax.random.key(1), (3, 4, 2)),),
    "energy.hopfield_asynchronous": (energy.hopfield_asynchronous, STATES, COUPLINGS, B[:3]),
    "energy.hopfield_asynchronous in an order": (
        lambda s: energy.hopfield_asynchronous(s, COUPLINGS, order=ORDER.astype(np.int8)),
        STATES,
    ),
    "energy.hopfield_synchronous": (energy.hopfield_synchronous, STATES, COUPLINGS, B[:3]),
    "energy.rbm_gibbs": (lambda v: energy.rbm_gibbs(jax.random.key(0), RBM, v, steps=3), VISIBLE),
    "energy.binary_states": (lambda: energy.binary_states(3),),
}

REMOVED = {  # masked classes, whose infinities are intended
    "entropy, masked, of half precision": (lambda z: jaxsoft.entropy(z.astype(jnp.bfloat16), where=MASK), Z),
    "kl_divergence, reverse": (lambda z: jaxsoft.kl_divergence(z, Z[::-1], kind="reverse", where=MASK), Z),
    "cross_entropy, sparse targets": (
        lambda z, q: jaxsoft.cross_entropy(z, jaxsoft.SparseTargets(SPARSE, q[:, :3]), weights=WEIGHTS, z_loss=0.1),
        Z,
        P,
    ),
    "linear_cross_entropy, sparse targets": (
        lambda x, w, q: jaxsoft.linear_cross_entropy(x, w, jaxsoft.SparseTargets(SPARSE, q[:, :3], "renormalise")),
        X,
        W,
        P,
    ),
    "softmax, removed": (lambda z: jaxsoft.softmax(z, where=MASK), Z),
    "log_softmax, removed": (lambda z: jnp.where(MASK, jaxsoft.log_softmax(z, where=MASK), 0), Z),
    "logsumexp, removed": (lambda z: jaxsoft.logsumexp(z, where=MASK), Z),
    "cross_entropy, removed": (lambda z: jaxsoft.cross_entropy(z, Y, where=MASK, label_smoothing=0.1), Z),
    "cross_entropy, distributions, removed": (lambda z: jaxsoft.cross_entropy(z, P * MASK, where=MASK), Z),
    "linear_cross_entropy, removed": (
        lambda x, w: jaxsoft.linear_cross_entropy(x, w, Y, np.array([0, 0, 0, -np.inf, 0], np.float32), soft_cap=2.0),
        X,
        W,
    ),
    "caffe.softmax_with_loss, removed": (
        lambda z: caffe.softmax_with_loss(jnp.where(PIXELS[:, None] == 255, -jnp.inf, z), PIXELS % 5)[0],
        np.zeros_like(IMAGE),
    ),
    "energy.gibbs_distribution, forbidden": (energy.gibbs_distribution, np.where(MASK, Z, np.float32(np.inf))),
    "energy.log_partition, forbidden": (energy.log_partition, np.where(MASK, Z, np.float32(np.inf))),
}

CALLS = {**DIFFERENTIABLE, **HOST, **OTHERS, **REMOVED}
ONE_OF_EACH = list({re.split("[ ,]", name)[0]: name for name in reversed(CALLS)}.values())  # public function

OTHER_CALLS = [name for name in CALLS if name not in (*ONE_OF_EACH, *HOST, *REMOVED)]

# Many small programs without `jit`: of shapes or of dtypes that nothing else here has, of higher order.
SLOW_EAGERLY = {
    *(name for name in CALLS if "second derivative" in name or "half precision" in name or "sparse" in name),
    *("softmax of axes", "logsumexp of all", "kl_divergence, jensen-shannon", "linear_log_probs, ignored"),
    *("cross_entropy of a vector", "cross_entropy, image", "linear_cross_entropy of a vector", "apply_mlp of a batch"),
    *("energy.rbm_energy of a batch and one", "init_mlp", "checked gradient", "checked caffe", "diagnose_gradient"),
    *("linear_log_probs", "linear_top_k", "caffe.softmax_with_loss"),  # a hundred programs; others have their parts
}


def program(name):
    """A function for the result and the gradients under a random cotangent, and its floating arguments."""
    fn, *arguments = CALLS[name]
    arguments = jax.tree.map(np.asarray, arguments)
    if name in HOST or name in OTHERS:
        return fn, arguments
    is_float = [all(np.issubdtype(leaf.dtype, np.floating) for leaf in jax.tree.leaves(a)) for a in arguments]

    def of_floats(*floats):
        remaining = iter(floats)
        return fn(
            *(next(remaining) if floating else jnp.asarray(a) for a, floating in zip(arguments, is_float, strict=True))
        )

    def result_and_gradients(*floats):
        result, pullback = jax.vjp(of_floats, *floats)
        rng = np.random.default_rng(1)
        return result, pullback(jax.tree.map(lambda r: rng.normal(size=r.shape).astype(r.dtype), result))

    return result_and_gradients, [a for a, floating in zip(arguments, is_float, strict=True) if floating]


def outcome(name, compiled=True):
    fn, arguments = program(name)
    return (jax.jit(fn) if compiled and name not in HOST else fn)(*jax.tree.map(jnp.asarray, arguments))


@functools.cache
def outcomes(names, modes):
    """{name: outcome}, from one program, which compiles as fast as a few separate ones."""
    programs = {name: program(name) for name in names}
    together = jax.jit(lambda given: {name: fn(*given[name]) for name, (fn, _) in programs.items()})
    with within(modes):
        found = together({name: arguments for name, (_, arguments) in programs.items()})
    return jax.tree.map(np.asarray, found)


def family(name):
    """The calls that are compiled together."""
    return tuple(n for n in CALLS if n not in HOST and group(n) == group(name))


def group(name):
    return f"{kind(name)}{', removed' * (name in REMOVED)}{', others' * (name in OTHER_CALLS)}"


def kind(name):
    return next((word for word in ("caffe", "energy", "linear", "cross_entropy") if name.startswith(word)), "softmax")


FAMILIES = {family(name): group(name) for name in CALLS if name not in HOST and name not in OTHER_CALLS}
STRICT = RANKS, DTYPES  # which add errors alone


def nonfinite(name):
    return () if name in REMOVED else (INFS,)


@functools.cache
def expected(name):
    """The results in the default mode; these modes only add errors."""
    if name in HOST:
        return jax.tree.map(np.asarray, outcome(name))
    return outcomes(family(name), (*STRICT, NANS, *nonfinite(name)))[name]


@pytest.fixture(autouse=True)
def _few_objects_to_collect():
    """The mode that looks for leaks collects garbage at each trace, so free the objects of earlier tests first."""
    gc.freeze()
    yield
    gc.unfreeze()


def assert_equal(name, result, expected, same_dtypes):
    tolerance = 2e-2 if "half precision" in name else 2e-6

    def compare(result, right):
        result = np.asarray(result)
        assert result.dtype == right.dtype or not same_dtypes
        result, right = result.astype(float), right.astype(float)
        np.testing.assert_allclose(result, right, rtol=tolerance, atol=tolerance, err_msg=name)

    jax.tree.map(compare, result, expected)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(names, id=of, marks=[pytest.mark.exhaustive] * (of != "cross_entropy"))
        for names, of in FAMILIES.items()
    ],
)
def test_one_call_of_each_function_has_its_result_in_float64_mode_too(names):
    """No call promotes another rank or dtype, in either width."""
    for name, result in outcomes(names, (X64, *STRICT, NANS, *nonfinite(names[0]))).items():
        assert_equal(name, result, expected(name), same_dtypes=False)


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if name not in HOST])
def test_one_call_of_each_function_passes_the_checks_of_jax_itself(name):
    fn, arguments = program(name)
    with within(MODES[LEAKS]):  # no other test has them: what JAX has traced in other modes it does not trace again
        shapes = jax.eval_shape(fn, *arguments)
    kinds = (jax.tree.map(lambda a: (a.shape, a.dtype), results) for results in (shapes, expected(name)))
    assert operator.eq(*kinds)


@pytest.mark.parametrize("name", [*OTHER_CALLS, *REMOVED])
def test_no_other_call_has_a_rank_or_a_dtype_promoted(name):
    fn, arguments = program(name)
    with within(STRICT):
        assert jax.tree.leaves(jax.eval_shape(fn, *arguments))


BY_DEFAULT = {(EAGER, name) for name in ONE_OF_EACH if name not in SLOW_EAGERLY}
BY_DEFAULT |= {(WIDE, "checked gradient"), (WIDE, "diagnose_gradient"), (LEAKS, "checked gradient")}


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        pytest.param(mode, name, marks=[pytest.mark.exhaustive] * ((mode, name) not in BY_DEFAULT))
        for mode, name in itertools.product(MODES, CALLS)
    ],
)
def test_a_valid_call_has_its_result_in_every_mode(name, mode):
    right = expected(name)
    with within(m for m in MODES[mode] if m is not INFS or name not in REMOVED):
        result = outcome(name, compiled=NANS not in MODES[mode])  # of what is compiled only results are looked at
    assert_equal(name, result, right, same_dtypes=X64 not in MODES[mode])


def test_every_public_function_is_called_here():
    called = {name.split(",")[0].split(" ")[0] for name in CALLS}
    functions = {name: fn for name in jaxsoft.__all__ if inspect.isfunction(fn := getattr(jaxsoft, name))}
    public = {name for name, fn in functions.items() if inspect.signature(fn).parameters}
    for module in (caffe, energy):
        short = module.__name__.removeprefix("jaxsoft.")
        public |= {f"{short}.{name}" for name in module.__all__ if inspect.isfunction(getattr(module, name))}
    assert public <= called
