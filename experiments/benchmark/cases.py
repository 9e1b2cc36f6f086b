"""What is timed: each case builds its inputs and one call for each implementation that is installed."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsoft
from experiments import iris, numpy_classifier

torch: Any = None  # unless the optional extra "peers" is installed
if importlib.util.find_spec("torch"):
    torch = importlib.import_module("torch")

Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Case:
    """One row group of the table."""

    name: str
    shape: tuple[int, ...]
    build: Callable[[np.random.Generator], Calls]  # must name one implementation "jaxsoft"
    tolerance: float = 1e-5


def compiled(fn: Callable[..., Any], *args: jax.Array) -> Callable[[], Any]:
    run = jax.jit(fn)
    return lambda: run(*args)


def value_and_vjp(fn: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array, jax.Array], Any]:
    def both(logits: jax.Array, cotangent: jax.Array):
        value, pullback = jax.vjp(fn, logits)
        return value, pullback(cotangent)[0]

    return both


def logits_of(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32) * 3


def softmax_forward(shape: tuple[int, ...]) -> Case:
    def build(rng: np.random.Generator) -> Calls:
        logits = logits_of(rng, shape)
        array = jnp.asarray(logits)
        calls = {"jaxsoft": compiled(jaxsoft.softmax, array), "jax.nn": compiled(jax.nn.softmax, array)}
        if torch is not None:
            tensor = torch.from_numpy(logits)
            calls["PyTorch"] = lambda: torch.softmax(tensor, -1)
        return calls

    return Case("softmax", shape, build)


def softmax_and_vjp(shape: tuple[int, ...]) -> Case:
    def build(rng: np.random.Generator) -> Calls:
        logits, cotangent = logits_of(rng, shape), logits_of(rng, shape)
        args = jnp.asarray(logits), jnp.asarray(cotangent)
        calls = {
            "jaxsoft": compiled(value_and_vjp(jaxsoft.softmax), *args),
            "jax.nn": compiled(value_and_vjp(jax.nn.softmax), *args),
        }
        if torch is not None:
            tensor = torch.from_numpy(logits).requires_grad_()
            back = torch.from_numpy(cotangent)

            def both():
                value = torch.softmax(tensor, -1)
                return value.detach(), torch.autograd.grad(value, tensor, back)[0]

            calls["PyTorch"] = both
        return calls

    return Case("softmax + VJP", shape, build)


def cross_entropy_and_gradient(shape: tuple[int, ...]) -> Case:
    def build(rng: np.random.Generator) -> Calls:
        logits, labels = logits_of(rng, shape), rng.integers(0, shape[-1], shape[:-1])
        args = jnp.asarray(logits), jnp.asarray(labels, jnp.int32)

        def theirs(z: jax.Array, y: jax.Array) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

        def by_log_softmax(z: jax.Array, y: jax.Array) -> jax.Array:
            return -jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], axis=-1).mean()

        calls = {
            "jaxsoft": compiled(jax.value_and_grad(jaxsoft.cross_entropy), *args),
            "optax": compiled(jax.value_and_grad(theirs), *args),
            "jax.nn.log_softmax": compiled(jax.value_and_grad(by_log_softmax), *args),
        }
        if torch is not None:
            tensor, target = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(labels)

            def both():
                loss = torch.nn.functional.cross_entropy(tensor, target)
                return loss.detach(), torch.autograd.grad(loss, tensor)[0]

            calls["PyTorch"] = both
        return calls

    return Case("cross-entropy + gradient", shape, build)


def iris_training(steps: int) -> Case:
    """The same descent on the same flowers, each implementation measuring loss and accuracy at every step."""

    def build(rng: np.random.Generator) -> Calls:
        split = iris.read_split(iris.Config().data, seed=42)
        weights = numpy_classifier.draw_weights(normal=True)
        biases = numpy_classifier.constant_biases(0.0, 1)
        features, classes = np.asarray(split.train_x, float).T, np.eye(3)[:, np.asarray(split.train_y)]
        optimizer = optax.sgd(numpy_classifier.ALPHA)
        params = tuple(
            {"kernel": jnp.asarray(w.T, jnp.float32), "bias": jnp.asarray(b[:, 0], jnp.float32)}
            for w, b in zip(weights, biases, strict=True)
        )
        state = params, optimizer.init(params)
        return {
            "jaxsoft": lambda: iris.train(state, split, optimizer, steps)[1]["loss"][-1],
            "NumPy": lambda: numpy_classifier.descend(features, classes, weights, biases, steps=steps - 1).loss[-1],
        }

    return Case(f"Iris, {steps} steps", (105, 4), build, tolerance=1e-3)


SHAPES = [(150, 3), (4096, 1000), (512, 32768)]
CASES = [
    *(make(shape) for make in (softmax_forward, softmax_and_vjp, cross_entropy_and_gradient) for shape in SHAPES),
    iris_training(1000),
]
