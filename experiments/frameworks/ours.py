"""The call of jaxsoft for each call of a framework, of NumPy arrays, classes last: docs/coming-from, as code."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.frameworks.cases import Case
from jaxsoft import caffe, cross_entropy, entropy, kl_divergence, linear_cross_entropy

Ours = Callable[[Case, jax.Array], jax.Array]  # a function of a case and its logits


def value_and_gradient(ours: Ours, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The value, and its gradient, or its VJP with the case's cotangent."""
    z = jnp.asarray(case.z, jnp.float64)

    def scalar(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        value = ours(case, z)
        cotangent = np.resize(case.arrays["cotangent"], value.shape)
        return (value * cotangent).sum() if value.ndim else value, value

    gradient, value = jax.grad(scalar, has_aux=True)(z)
    return np.asarray(value), np.asarray(gradient)


def smoothing(case: Case) -> float:
    return case.options.get("smoothing", 0.0)


def over(total: jax.Array, case: Case, count: float) -> jax.Array:
    """The sum; for a mean the caller divides it by the framework's own count."""
    return total / count if case.options["reduction"] == "mean" else total


def as_pytorch(case: Case, z: jax.Array) -> jax.Array:
    """PyTorch's and MindSpore's cross-entropy, whose options have the same names."""
    return cross_entropy(
        z,
        case.targets,
        ignore_index=case.get("ignore_index") if "labels" in case.arrays else None,
        class_weights=case.get("class_weights"),
        label_smoothing=smoothing(case),
        reduction=case.options["reduction"],
    )


def batchmean(case: Case, z: jax.Array) -> jax.Array:
    return kl_divergence(z, jnp.log(case.arrays["probs"]), reduction="sum") / len(case.z)


def each(case: Case, z: jax.Array) -> jax.Array:
    """A loss for each position."""
    targets = case.targets
    return cross_entropy(z, targets, reduction="none", label_smoothing=smoothing(case))


def divergence(case: Case, z: jax.Array) -> jax.Array:
    return kl_divergence(z, jnp.log(case.arrays["probs"]), reduction="none")


def masked(case: Case, z: jax.Array) -> jax.Array:
    return cross_entropy(z, case.y, ignore_index=case.get("ignore_index"))


def over_all(case: Case, z: jax.Array) -> jax.Array:
    """Keras's and MLX's: a weighted mean divides by the number of all positions, or of valid ones."""
    count: float
    ignored, options = case.get("ignore_index"), {"weights": case.get("weights"), "label_smoothing": smoothing(case)}
    if "probs" in case.arrays:
        targets, count = case.arrays["probs"], case.z[..., 0].size
    else:
        targets, count, options = case.y, int(np.sum(case.y != ignored)), options | {"ignore_index": ignored}
    if case.options["reduction"] == "none":
        return cross_entropy(z, targets, reduction="none", **options)
    return over(cross_entropy(z, targets, reduction="sum", **options), case, count)


def over_weights(case: Case, z: jax.Array) -> jax.Array:
    """The mean divided by the weights, which is also jaxsoft's."""
    targets = case.targets
    ignored = case.get("ignore_index") if "labels" in case.arrays else None
    return cross_entropy(z, targets, ignore_index=ignored, weights=case.get("weights"), label_smoothing=smoothing(case))


def no_class(case: Case, z: jax.Array) -> jax.Array:
    """In Keras on JAX the loss at a label out of range is 0, and the mean counts it."""
    y = np.where((case.y >= 0) & (case.y < z.shape[-1]), case.y, -1)
    return cross_entropy(z, y, ignore_index=-1, reduction="sum") / y.size


def by_nonzero_weights(case: Case, z: jax.Array) -> jax.Array:
    w = case.get("weights")
    total = cross_entropy(z, case.y, weights=w, reduction="sum")
    return over(total, case, case.y.size if w is None else int(np.count_nonzero(w)))


def negative_ignored(case: Case, z: jax.Array) -> jax.Array:
    """PaddlePaddle's for an ignore_index below 0 and no weights: the mean divides by all positions."""
    if case.options["reduction"] != "mean" or "class_weights" in case.arrays:
        return as_pytorch(case, z)
    options = {"ignore_index": -100, "label_smoothing": smoothing(case)}
    return cross_entropy(z, case.y, reduction="sum", **options) / case.y.size


def all_entries(case: Case, z: jax.Array) -> jax.Array:
    """PaddlePaddle's with smoothing and an ignored label that is a class: it ignores nothing, and divides by N·C."""
    total = cross_entropy(z, case.y, label_smoothing=smoothing(case), reduction="sum")
    return total / z.size


def weight_of_row(case: Case, z: jax.Array) -> jax.Array:
    """PaddlePaddle's for distributions: each position has the weight Σ_j c_j t_j."""
    t, c = case.arrays["probs"], case.get("class_weights")
    w = None if c is None else t @ c
    return cross_entropy(z, t, weights=w, reduction=case.options["reduction"])


def of_examples(case: Case, z: jax.Array) -> jax.Array:
    """MXNet gluon's: a mean for each example, over its other axes."""
    targets = case.targets
    losses = cross_entropy(z, targets, weights=case.get("weights"), reduction="none")
    return losses.reshape(len(losses), -1).mean(1)


def output(divisor: str) -> Ours:
    """The loss whose gradient MXNet's SoftmaxOutput gives."""

    def ours(case: Case, z: jax.Array) -> jax.Array:
        classes, ignored = z.shape[-1], case.get("ignore_index")
        epsilon = smoothing(case) * classes / (classes - 1)  # ε/(C − 1) for the other classes
        total = cross_entropy(z, case.y, ignore_index=ignored, label_smoothing=epsilon, reduction="sum")
        counts = {"null": case.y[0].size, "batch": case.y.size, "valid": np.sum(case.y != ignored)}
        return total / counts[divisor]

    return ours


def chainers(case: Case, z: jax.Array) -> jax.Array:
    """Divided by the valid positions or, without normalize, by the batch size; never by class weights."""
    if "probs" in case.arrays:  # class weights have no effect
        losses = cross_entropy(z, case.arrays["probs"], reduction="none")
        return losses if case.options["reduction"] == "none" else losses.mean()
    options = {"ignore_index": case.get("ignore_index"), "class_weights": case.get("class_weights")}
    if case.options["reduction"] == "none":
        return cross_entropy(z, case.y, reduction="none", **options)
    total = cross_entropy(z, case.y, reduction="sum", **options)
    valid = np.sum(case.y != case.get("ignore_index"))
    return total / (valid if case.options["reduction"] == "mean" else len(case.z))


def tinygrads(case: Case, z: jax.Array) -> jax.Array:
    """The loss at a label of −1 is ε·mean(−log p), and the mean counts it; other ignored labels are as in PyTorch."""
    if case.get("ignore_index") != -1:
        return as_pytorch(case, z)
    epsilon = smoothing(case)
    uniform = np.full(z.shape, 1 / z.shape[-1])
    losses = cross_entropy(z, case.y, ignore_index=-1, reduction="none") * (1 - epsilon)
    losses += epsilon * cross_entropy(z, uniform, reduction="none")
    reduced = {"mean": jnp.mean, "sum": jnp.sum, "none": lambda losses: losses}[case.options["reduction"]]
    return reduced(losses)


def negatives_ignored(case: Case, z: jax.Array) -> jax.Array:
    """nnabla's, which ignores every label below 0."""
    return cross_entropy(z, np.where(case.y < 0, -1, case.y), ignore_index=-1, reduction="none")


def thincs(case: Case, z: jax.Array) -> jax.Array:
    """The loss whose gradient Thinc gives; its smoothing gives ε/(C − 1) to each other class."""
    targets = case.targets
    epsilon = smoothing(case) * z.shape[-1] / (z.shape[-1] - 1)
    total = cross_entropy(z, targets, label_smoothing=epsilon, reduction="sum")
    return over(total, case, len(targets))


def weighted_sum(case: Case, z: jax.Array) -> jax.Array:
    return cross_entropy(z, case.y, weights=case.get("weights"), reduction="sum")


def over_weights_or_sum(case: Case, z: jax.Array) -> jax.Array:
    return cross_entropy(z, case.y, weights=case.get("weights"), reduction=case.options["reduction"])


def nothing_left(case: Case, z: jax.Array) -> jax.Array:
    """The expected difference of a booster's margins by its own objective and by jaxsoft's gradient: zero."""
    return 0 * z


def caffes(normalization: caffe.Normalization) -> Ours:
    """jaxsoft's layer of the same name."""

    def ours(case: Case, z: jax.Array) -> jax.Array:
        z = jnp.moveaxis(z, -1, 1)  # the axes before the class axis are the batch
        return caffe.softmax_with_loss(z, case.y, ignore_label=case.get("ignore_index"), normalization=normalization)[0]

    return ours


def of_a_layer(case: Case, z: jax.Array) -> jax.Array:
    """PyTorch's and Liger's, with a z-loss and a soft cap, from logits or from features and a kernel."""
    cap = case.get("soft_cap")
    options = {
        "ignore_index": -100,
        "class_weights": case.get("class_weights"),
        "label_smoothing": smoothing(case),
        "z_loss": case.options.get("z_loss", 0.0),
        "reduction": case.options["reduction"],
    }
    if "kernel" not in case.arrays:
        return cross_entropy(cap * jnp.tanh(z / cap) if cap else z, case.y, **options)
    kernel, bias = (case.arrays[name].astype(np.float64) for name in ("kernel", "bias"))
    return linear_cross_entropy(z, kernel, case.y, bias, kernel_axis=0, soft_cap=cap, **options)


def log_probability(case: Case, z: jax.Array) -> jax.Array:
    return -cross_entropy(z, case.y, reduction="none")


def entropies(case: Case, z: jax.Array) -> jax.Array:
    return entropy(z)


def causal(case: Case, z: jax.Array) -> jax.Array:
    """transformers': labels are shifted by one, and the number of tokens to divide by may be given."""
    losses = {"ignore_index": -100, "reduction": case.options["reduction"]}
    return cross_entropy(z[:-1], case.y[1:], **losses) / (7 if case.options["reduction"] == "sum" else 1)
