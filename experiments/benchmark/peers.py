"""The implementations: jaxsoft, and every other library that is installed."""

import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsoft
from experiments.benchmark.cases import IGNORE, SMOOTHING, Z_LOSS, Case

Arrays = tuple[Any, ...]
Function = Callable[..., Any]

CLASS_LAST = ", data class-last"
"""The end of the name of an implementation whose data differ from the case's."""
PACKAGES = {"PyTorch": "torch", "jax-cce": "jax_cce", "tokamax": "tokamax", "Liger": "liger_kernel", "QuACK": "quack"}
# Kernels for NVIDIA GPUs, called from PyTorch on arrays of two axes: module and function.
LIGER = "liger_kernel.transformers.functional"
KERNELS = {
    ("Liger", "softmax"): (LIGER, "liger_softmax"),
    ("Liger", "cross-entropy"): (LIGER, "liger_cross_entropy"),
    ("Liger", "linear cross-entropy"): (LIGER, "liger_fused_linear_cross_entropy"),
    ("QuACK", "softmax"): ("quack.softmax", "softmax"),
    ("QuACK", "cross-entropy"): ("quack.cross_entropy", "cross_entropy"),
    ("QuACK", "linear cross-entropy"): ("quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
}


def same(arrays: Any) -> Any:
    return arrays


def lazily(module: str, name: str, **options: Any) -> Function:
    """Import on the first call, so that a package that cannot be imported fails alone and does not end the run."""
    return lambda *args: getattr(import_module(module), name)(*args, **options)


@dataclass(frozen=True)
class Peer:
    """One implementation of a case."""

    name: str
    fn: Function  # a function of a case's inputs: the value, and the gradients if the case has them
    before: Callable[[Arrays], Arrays] = same  # converts the inputs to its layout, outside the timed call
    after: Callable[[Arrays], Arrays] = same  # converts its results to jaxsoft's layout
    wait: Callable[[Any], Any] = jax.block_until_ready  # for a result
    by_jax: bool = True  # to be compiled


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def missing() -> dict[str, str]:
    """The libraries that are not available, and why."""
    reasons = {name: "not installed" for name, package in PACKAGES.items() if not importlib.util.find_spec(package)}
    return reasons | ({} if on_gpu() else dict.fromkeys(("Liger", "QuACK"), "needs an NVIDIA GPU"))


def peers_of(case: Case) -> Iterator[Peer]:
    """jaxsoft first, then every other library that offers the case."""
    if case.is_training:
        yield from iris_training(int(case.task.split()[1]))
        return
    absent = missing()
    yield from jax_linear(case, absent) if case.is_linear else jax_dense(case)
    if "PyTorch" not in absent and not case.swept:
        yield from torch_peers(case, absent)


# JAX.


def jax_mode(case: Case, fn: Function) -> Function:
    """`fn`, with the gradients that the case asks for."""
    if not case.gradient:
        return fn
    if case.is_loss:
        return jax.value_and_grad(fn, argnums=(0, 1) if case.is_linear else 0)

    def both(logits: jax.Array, cotangent: jax.Array):
        value, pullback = jax.vjp(fn, logits)
        return value, pullback(cotangent)[0]

    return both


def jax_dense(case: Case) -> Iterator[Peer]:
    ours = getattr(jaxsoft, case.base.replace("-", "_"))
    options: dict[str, Any] = {"label_smoothing": SMOOTHING, "z_loss": Z_LOSS} if case.smooth else {}
    options |= {"ignore_index": IGNORE} if case.ignored else {}
    yield Peer("jaxsoft", jax_mode(case, functools.partial(ours, axis=case.axis, **options)))
    if not case.is_loss:
        yield from layouts(case, "jax.nn", getattr(jax.nn, case.base))
        if case.base in FORMULAS and case.task != "softmax":  # whose formula jax.nn has as it is
            yield Peer("formula", jax_mode(case, functools.partial(FORMULAS[case.base], axis=case.axis)))
        return
    yield from layouts(case, "optax", functools.partial(optax_loss, case))
    if case.dtype == "bfloat16":
        wide = lambda z, y, axis: optax_loss(case, z.astype(jnp.float32), y, axis)  # noqa: E731
        yield from layouts(case, "optax in float32", wide)
    if case.axis == -1 and not case.ignored and not case.smooth:
        yield Peer("jax.nn.log_softmax", jax_mode(case, log_softmax_loss))


def layouts(case: Case, name: str, fn: Function) -> Iterator[Peer]:
    """The classes on the case's axis; and on the last axis, moved inside the timed call or before it."""
    yield Peer(name, jax_mode(case, functools.partial(fn, axis=case.axis)))
    if case.axis != -1 and not case.swept:
        last = functools.partial(fn, axis=-1)
        before = functools.partial(move, len(case.shape), case.axis, -1)
        after = functools.partial(move, len(case.shape), -1, case.axis)
        yield Peer(f"{name}, transposed inside", jax_mode(case, lambda *arrays: after([last(*before(arrays))])[0]))
        yield Peer(f"{name}{CLASS_LAST}", jax_mode(case, last), before, after)


def move(ndim: int, source: int, target: int, arrays: Iterable[jax.Array]) -> Arrays:
    """Move the class axis of the arrays that have one."""
    return tuple(jnp.moveaxis(x, source, target) if x.ndim == ndim else x for x in arrays)


def softmax_formula(logits: jax.Array, axis: int) -> jax.Array:
    exponentials = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis, keepdims=True)))
    return exponentials / exponentials.sum(axis, keepdims=True)


def logsumexp_formula(logits: jax.Array, axis: int) -> jax.Array:
    maximum = jax.lax.stop_gradient(logits.max(axis, keepdims=True))
    return jnp.squeeze(maximum, axis) + jnp.log(jnp.exp(logits - maximum).sum(axis))


FORMULAS = {"softmax": softmax_formula, "logsumexp": logsumexp_formula}


def optax_loss(case: Case, logits: jax.Array, labels: jax.Array, axis: int) -> jax.Array:
    taken = labels != IGNORE
    if case.ignored:
        labels = jnp.where(taken, labels, 0)
    if case.smooth:
        targets = jax.nn.one_hot(labels, logits.shape[axis], axis=axis, dtype=logits.dtype)
        losses = optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, SMOOTHING), axis=axis)
        losses += Z_LOSS * jax.nn.logsumexp(logits, axis=axis) ** 2
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels, axis=axis)
    return jnp.sum(losses, where=taken) / jnp.sum(taken) if case.ignored else losses.mean()


def log_softmax_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1).mean()


def jax_linear(case: Case, absent: dict[str, str]) -> Iterator[Peer]:
    def full(features: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        logits = jnp.dot(features, kernel, preferred_element_type=jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    yield Peer("jaxsoft", jax_mode(case, jaxsoft.linear_cross_entropy))
    yield Peer("optax, full logits", jax_mode(case, full))
    if "jax-cce" not in absent:
        yield Peer("jax-cce", jax_mode(case, lazily("jax_cce", "linear_cross_entropy")), kernel_rows, gradient_rows)
    if "tokamax" not in absent:
        options = {"reduction": "mean", "implementation": "chunked_xla"}
        chunked = lazily("tokamax", "linear_softmax_cross_entropy_loss", **options)
        yield Peer("tokamax, chunked", jax_mode(case, lambda x, w, y: chunked(x, y, w)))


def kernel_rows(inputs: Arrays) -> Arrays:
    """The kernel with one row per class, as in jax-cce and PyTorch."""
    features, kernel, labels = inputs
    return features, kernel.T, labels


def gradient_rows(results: Arrays) -> Arrays:
    return (*results[:2], *(x.T for x in results[2:]))


# PyTorch, and the kernels called from it.


def torch_peers(case: Case, absent: dict[str, str]) -> Iterator[Peer]:
    torch, gpu = import_module("torch"), on_gpu()
    if gpu:
        torch.set_float32_matmul_precision("high")  # tf32, JAX's default
    variables = 2 if case.is_linear else 1

    def before(inputs: Arrays) -> Arrays:
        tensors = [torch.from_dlpack(x) for x in (kernel_rows(inputs) if case.is_linear else inputs)]
        # On a GPU copies, because Liger writes the gradient over the logits.
        tensors = [(x.clone() if gpu else x) if x.is_floating_point() else x.long() for x in tensors]
        return tuple(x.requires_grad_(case.gradient and n < variables) for n, x in enumerate(tensors))

    def after(results: Arrays) -> Arrays:
        arrays = tuple(jnp.from_dlpack(x.contiguous()) for x in results)
        return gradient_rows(arrays) if case.is_linear else arrays

    def mode(fn: Function) -> Function:
        def both(*tensors: Any) -> Arrays:
            value = fn(*tensors) if case.is_loss else fn(tensors[0])
            gradients = torch.autograd.grad(value, tensors[:variables], None if case.is_loss else tensors[1])
            return value.detach(), *gradients

        return both if case.gradient else fn

    for name, fn in torch_functions(torch, case, absent):
        yield Peer(name, mode(fn), before, after, (lambda _: torch.cuda.synchronize()) if gpu else same, by_jax=False)


def torch_functions(torch: Any, case: Case, absent: dict[str, str]) -> Iterator[tuple[str, Function]]:
    functional = torch.nn.functional

    def plain(*tensors: Any) -> Any:
        if not case.is_loss:
            return getattr(torch, case.base)(tensors[0], case.axis)
        logits, labels = functional.linear(*tensors[:2]) if case.is_linear else tensors[0], tensors[-1]
        if case.axis == -1:  # PyTorch has the classes on the second axis
            logits, labels = logits.flatten(0, -2), labels.flatten()
        loss = functional.cross_entropy(logits, labels, label_smoothing=SMOOTHING * case.smooth)
        return loss + Z_LOSS * torch.logsumexp(logits, 1).square().mean() if case.smooth else loss

    yield "PyTorch", plain
    if on_gpu():
        torch.compiler.reset()  # it silently stops compiling a function that it has compiled for eight cases
        yield "PyTorch, compiled", torch.compile(plain)
    if case.is_linear and hasattr(functional, "linear_cross_entropy"):
        # With chunks of its own choice it is three times slower on two cores.
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=None if on_gpu() else 512)
        yield "PyTorch, chunked", functools.partial(functional.linear_cross_entropy, options=options)
    for (name, task), (module, function) in KERNELS.items():
        two_axes = case.is_linear or len(case.shape) == 2
        if name in absent or task != case.base or not two_axes or (case.smooth and name != "Liger"):
            continue
        options = {"label_smoothing": SMOOTHING, "lse_square_scale": Z_LOSS} if case.smooth else {}
        yield name, lazily(module, function, **options)


# Iris.


def iris_training(steps: int) -> Iterator[Peer]:
    """The same descent on the same flowers, each implementation measuring loss and accuracy at every step."""
    # Here, since scikit-learn and matplotlib take seconds to import, in every process that times something.
    from experiments import iris, numpy_classifier

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

    def theirs() -> float:
        return numpy_classifier.descend(features, classes, weights, biases, steps=steps - 1).loss[-1]

    yield Peer("jaxsoft", lambda: iris.train(state, split, optimizer, steps)[1]["loss"][-1], by_jax=False)
    yield Peer("NumPy", theirs, by_jax=False)
