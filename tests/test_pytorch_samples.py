"""PyTorch's own samples of softmax, log_softmax, logsumexp and the cross-entropies, with jaxsoft's functions."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import cross_entropy, linear_cross_entropy, log_softmax, logsumexp, softmax

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

pytestmark = pytest.mark.exhaustive


def operator(name):
    return next(op for op in op_db if op.name == name and not op.variant_test_name)


def module(name):
    return next(of for of in module_db if of.name == name)


def as_array(tensor):
    return jnp.asarray(tensor.detach().numpy()) if isinstance(tensor, torch.Tensor) else tensor


def compare(theirs, ours, inputs):
    """The value, and the gradients to the inputs under a random cotangent."""
    value = theirs()
    cotangent = torch.cos(torch.arange(value.numel(), dtype=value.dtype)).reshape(value.shape)
    expected = torch.autograd.grad(value, inputs, cotangent)
    found, pullback = jax.vjp(ours, *map(as_array, inputs))
    tolerance = 1e-11 if value.dtype == torch.float64 else 2e-5
    if value.isnan().all() and not found.shape:  # nothing to average, of which we say 0
        assert found == 0
        return
    np.testing.assert_allclose(found, value.detach().numpy(), rtol=tolerance, atol=tolerance)
    for got, want in zip(pullback(jnp.asarray(cotangent.numpy(), found.dtype)), expected, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("name", "ours"), [("softmax", softmax), ("log_softmax", log_softmax), ("logsumexp", logsumexp)]
)
def test_normalisers(name, ours, dtype):
    op = operator(name)
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        z, axis, options = sample.input, sample.args[0], dict(sample.kwargs)
        if len(sample.args) > 1:
            options["keepdim"] = sample.args[1]
        kept = {"keepdims": options["keepdim"]} if "keepdim" in options else {}
        if z.ndim == 0 or z.numel() == 0:
            continue  # PyTorch takes an axis of a scalar; we refuse it, as JAX does
        axis = tuple(axis) if isinstance(axis, list | tuple) else axis

        def call(z, axis=axis, kept=kept):
            return ours(z, axis if not isinstance(axis, tuple) or axis else None, **kept)

        compare(lambda: op.op(z, *sample.args, **sample.kwargs), call, [z])  # noqa: B023


def losses(dtype):
    """Logits, targets and options of the function's samples and of its module's."""
    for sample in operator("nn.functional.cross_entropy").sample_inputs("cpu", dtype, requires_grad=True):
        yield sample.input, *sample.args, sample.kwargs
    of = module("nn.CrossEntropyLoss")
    for sample in of.module_inputs_func(of, device="cpu", dtype=dtype, requires_grad=True, training=True):
        yield *sample.forward_input.args, sample.constructor_input.kwargs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("part", range(6))
def test_cross_entropy(part, dtype):
    for z, target, options in itertools.islice(losses(dtype), part, None, 6):
        ignored = options.get("ignore_index", -100) if not target.is_floating_point() else None

        def call(z, target=as_array(target), options=options, ignored=ignored):
            weight = options.get("weight")
            return cross_entropy(
                z,
                target,
                0 if z.ndim == 1 else 1,
                ignore_index=ignored,
                class_weights=None if weight is None else as_array(weight),
                label_smoothing=options.get("label_smoothing", 0.0),
                reduction=options.get("reduction", "mean"),
            )

        compare(lambda: torch.nn.functional.cross_entropy(z, target, **options), call, [z])  # noqa: B023


def layers():
    """One sample of each, whatever the size of PyTorch's chunks, whose logits are one vector a position."""
    of = module("nn.LinearCrossEntropyLoss")
    samples = of.module_inputs_func(of, device="cpu", dtype=torch.float64, requires_grad=True, training=True)
    seen = {}
    for sample in samples:
        options = {k: v for k, v in sample.constructor_input.kwargs.items() if k not in ("options", "device", "dtype")}
        shapes = [tuple(a.shape) for a in sample.forward_input.args]
        weighted = options["weight"] is not None
        key = (str(options | {"weight": weighted}), str(shapes), str(sample.forward_input.args[1].dtype))
        if not options["out_features"]:
            seen.setdefault(key, sample)
    return list(seen.values())


@pytest.mark.parametrize("part", range(4))
def test_linear_cross_entropy(part):
    for sample in itertools.islice(layers(), part, None, 4):
        arguments = sample.constructor_input
        layer = torch.nn.LinearCrossEntropyLoss(*arguments.args, **arguments.kwargs)
        x, target = sample.forward_input.args
        parameters = list(layer.parameters())
        options = arguments.kwargs
        ignored = options["ignore_index"] if not target.is_floating_point() else None

        def call(x, kernel, *bias, target=as_array(target), options=options, ignored=ignored):
            weight = options["weight"]
            return linear_cross_entropy(
                x,
                kernel,
                target,
                *bias,
                kernel_axis=0,
                ignore_index=-100 if ignored is None and jnp.issubdtype(target.dtype, jnp.integer) else ignored,
                class_weights=None if weight is None else as_array(weight),
                label_smoothing=options["label_smoothing"],
                reduction=options["reduction"],
            )

        compare(lambda: layer(x, target), call, [x, *parameters])  # noqa: B023
