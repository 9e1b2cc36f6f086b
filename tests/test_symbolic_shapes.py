"""Every function exported with symbolic sizes, then called with actual ones."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxsoft
from jaxsoft import caffe, energy

SIZES = [{"b": 3, "h": 2, "w": 4, "n": 5, "m": 2, "k": 3}, {"b": 1, "h": 5, "w": 1, "n": 2, "m": 6, "k": 1}]
BIAS, GAINS = np.linspace(-1, 1, 10), np.eye(10) + 0.1


def dense(**options):
    return functools.partial(jaxsoft.cross_entropy, **options)


def fused(**options):
    return functools.partial(jaxsoft.linear_cross_entropy, **options)


def sparse(indices, scores, outside):
    return jaxsoft.SparseTargets(indices, jax.nn.softmax(scores) / 2, outside)


def pixels(loss):
    return functools.partial(loss, ignore_label=3)


def machine(fn):
    return lambda w, b, c, *states: fn(energy.RestrictedBoltzmann(w, b, c), *states)


LABELS = "labels: "  # in front of the shape of integers in [0, 10)
CALLS = {
    "softmax": (jaxsoft.softmax, "b, 10"),
    "softmax of symbolic classes": (jaxsoft.softmax, "b, n"),
    "softmax, axis 1": (functools.partial(jaxsoft.softmax, axis=1), "b, 10, h, w"),
    "softmax, all axes": (functools.partial(jaxsoft.softmax, axis=None), "b, 10"),
    "log_softmax": (jaxsoft.log_softmax, "b, 10"),
    "log_softmax, axis 1": (functools.partial(jaxsoft.log_softmax, axis=1), "b, 10, h, w"),
    "logsumexp": (jaxsoft.logsumexp, "b, 10"),
    "logsumexp, axis 1": (functools.partial(jaxsoft.logsumexp, axis=1), "b, 10, h, w"),
    "softmax_vjp": (jaxsoft.softmax_vjp, "b, 10", "b, 10"),
    "softmax_jacobian": (jaxsoft.softmax_jacobian, "b, 10"),
    "cross_entropy": (jaxsoft.cross_entropy, "b, 10", LABELS + "b"),
    "cross_entropy of symbolic classes": (lambda z: jaxsoft.cross_entropy(z, jnp.zeros(z.shape[:1], int)), "b, n"),
    "cross_entropy, distributions": (dense(label_smoothing=0.1), "b, 10", "b, 10"),
    "cross_entropy, axis 1": (dense(axis=1, ignore_index=3), "b, 10, h, w", LABELS + "b, h, w"),
    "cross_entropy, options": (
        dense(ignore_index=3, class_weights=np.arange(10.0), label_smoothing=0.1, z_loss=0.1, reduction="none"),
        "b, 10",
        LABELS + "b",
    ),
    **{
        f"cross_entropy, sparse targets, {outside}": (
            lambda z, y, q, outside=outside: jaxsoft.cross_entropy(z, sparse(y, q, outside)),
            "b, 10",
            LABELS + "b, 2",
            "b, 2",
        )
        for outside in ("tail", "renormalise", "nothing")
    },
    "linear_cross_entropy, sparse targets": (
        lambda x, w, y, q: jaxsoft.linear_cross_entropy(x, w, sparse(y, q, "tail")),
        "b, 6",
        "6, 10",
        LABELS + "b, k",
        "b, k",
    ),
    "linear_cross_entropy": (jaxsoft.linear_cross_entropy, "b, 6", "6, 10", LABELS + "b"),
    "linear_cross_entropy, ignored": (fused(ignore_index=3, bias=BIAS), "b, h, 6", "6, 10", LABELS + "b, h"),
    "linear_cross_entropy, none": (fused(reduction="none", z_loss=0.1), "b, 6", "6, 10", LABELS + "b"),
    "linear_cross_entropy, distributions": (fused(label_smoothing=0.1), "b, 6", "6, 10", "b, 10"),
    "linear_cross_entropy of symbolic features": (jaxsoft.linear_cross_entropy, "b, n", "n, 10", LABELS + "b"),
    "apply_mlp": (
        jax.vmap(lambda x, *kb: jaxsoft.apply_mlp([{"kernel": kb[0], "bias": kb[1]}], x), (0, None, None)),
        "b, n",
        "n, m",
        "m",
    ),
    "caffe.softmax": (caffe.softmax, "b, 10, h, w"),
    "caffe.softmax_with_loss": (pixels(caffe.softmax_with_loss), "b, 10, h, w", LABELS + "b, 1, h, w"),
    "caffe.softmax_with_loss, FULL": (
        functools.partial(caffe.softmax_with_loss, normalization="FULL"),
        "b, 10, h",
        LABELS + "b, h",
    ),
    "caffe.infogain_loss": (
        functools.partial(caffe.infogain_loss, infogain=GAINS, ignore_label=3, normalize=False),
        "b, 10, h, w",
        LABELS + "b, h, w",
    ),
    "caffe.multinomial_logistic_loss": (
        lambda z, y: caffe.multinomial_logistic_loss(jax.nn.softmax(z), y),
        "b, 2, 5",
        LABELS + "b",
    ),
    "energy.gibbs_distribution": (energy.gibbs_distribution, "b, n"),
    "energy.log_partition": (energy.log_partition, "b, n"),
    "energy.hopfield_energy": (energy.hopfield_energy, "b, n", "n, n", "n"),
    "energy.hopfield_field": (energy.hopfield_field, "b, n", "n, n"),
    "energy.hopfield_synchronous": (energy.hopfield_synchronous, "b, n", "n, n", "n"),
    "energy.hopfield_asynchronous": (energy.hopfield_asynchronous, "b, n", "n, n"),
    "energy.hopfield_asynchronous in an order": (
        lambda s, w: energy.hopfield_asynchronous(s, w, order=np.array([1, 0])),
        "b, n",
        "n, n",
    ),
    "energy.perceptron_criterion": (energy.perceptron_criterion, "b, n", "b, n"),
    "energy.boltzmann_probability": (energy.boltzmann_probability, "b, n"),
    "energy.rbm_energy": (machine(energy.rbm_energy), "n, m", "n", "m", "b, n", "b, m"),
    "energy.rbm_free_energy": (machine(energy.rbm_free_energy), "n, m", "n", "m", "b, n"),
    "energy.rbm_gibbs": (machine(functools.partial(energy.rbm_gibbs, jax.random.key(0))), "n, m", "n", "m", "b, n"),
}


# The same code with another option.
EXHAUSTIVE = {
    *("softmax, all axes", "log_softmax, axis 1", "logsumexp, axis 1", "caffe.softmax_with_loss, FULL"),
    *("cross_entropy, sparse targets, renormalise", "cross_entropy, sparse targets, nothing"),
}
FAMILIES = ["energy", "caffe", "apply_mlp", "linear_cross_entropy", "cross_entropy", "log", "softmax"]


def family(name):
    return next(family for family in FAMILIES if name.startswith(family))


def value_and_gradients(name, arrays):
    fn, *shapes = CALLS[name]
    floats = [None if shape.startswith(LABELS) else a for shape, a in zip(shapes, arrays, strict=True)]
    value, pullback = jax.vjp(
        lambda *floats: fn(*(a if f is None else f for f, a in zip(floats, arrays, strict=True))), *floats
    )
    return value, pullback(jax.tree.map(jnp.cos, value))


@functools.cache
def exported(of, exhaustive):
    """Calls of a family from one program for all platforms and sizes; their arguments, and the function itself."""
    scope = export.SymbolicScope()

    def argument(shape):
        symbolic = export.symbolic_shape(shape.removeprefix(LABELS), scope=scope)
        return jax.ShapeDtypeStruct(symbolic, np.int32 if shape.startswith(LABELS) else np.float64)

    def results(given):
        return {name: value_and_gradients(name, arrays) for name, arrays in given.items()}

    chosen = [name for name in CALLS if family(name) == of and (name in EXHAUSTIVE) == exhaustive]
    arguments = {name: list(map(argument, CALLS[name][1:])) for name in chosen}
    return export.export(jax.jit(results), platforms=("cpu", "cuda", "tpu"))(arguments), arguments, results


SLOW_TO_COMPILE = {
    "energy",
    "caffe",
    "cross_entropy",
    "linear_cross_entropy",
}  # the other sizes come from the same program


@pytest.mark.parametrize(
    ("of", "sizes", "exhaustive"),
    [
        *(
            pytest.param(of, n, False, marks=[pytest.mark.exhaustive] * (n > 0 and of in SLOW_TO_COMPILE))
            for of, n in itertools.product(FAMILIES, range(len(SIZES)))
        ),
        *(
            pytest.param(of, n, True, marks=pytest.mark.exhaustive)
            for of, n in itertools.product(sorted(set(map(family, EXHAUSTIVE))), range(len(SIZES)))
        ),
    ],
)
def test_exported_with_symbolic_shapes_it_equals_the_direct_call(of, sizes, exhaustive):
    """The value and every gradient."""
    of_any_size, arguments, results = exported(of, exhaustive)
    rng = np.random.default_rng(0)

    def concrete(argument):
        shape = tuple(SIZES[sizes].get(str(n), n) for n in argument.shape)
        return rng.integers(0, 10, shape, np.int32) if argument.dtype == np.int32 else rng.normal(size=shape)

    given = jax.tree.map(concrete, arguments)
    found, expected = of_any_size.call(given), jax.jit(results)(given)
    for name in arguments:
        assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13, err_msg=name)
        jax.tree.map(assert_close, found[name], expected[name])
