"""optax."""

import jax
import jax.numpy as jnp
import optax
from exchange import work

jax.config.update("jax_enable_x64", True)


def differentiated(case, loss):
    def scalar(z):
        value = loss(z)
        return (value * case.cotangent).sum() if value.ndim else value

    z = jnp.asarray(case.logits)
    return loss(z), jax.grad(scalar)(z)


def labels(case):
    return differentiated(case, lambda z: optax.softmax_cross_entropy_with_integer_labels(z, case.labels))


def labels_on_axis_1(case):
    def loss(z):
        return optax.softmax_cross_entropy_with_integer_labels(jnp.moveaxis(z, -1, 1), case.labels, axis=1)

    return differentiated(case, loss)


def probabilities(case):
    return differentiated(case, lambda z: optax.softmax_cross_entropy(z, case.probs))


def smoothed(case):
    t = optax.smooth_labels(jax.nn.one_hot(case.labels, case.logits.shape[-1]), case.smoothing)
    return differentiated(case, lambda z: optax.softmax_cross_entropy(z, t))


def masked(case):
    mask = case.labels != case.ignore_index

    def loss(z):
        losses = optax.softmax_cross_entropy_with_integer_labels(z, jnp.where(mask, case.labels, 0))
        return jnp.where(mask, losses, 0).sum() / mask.sum()

    return differentiated(case, loss)


def divergence(case):
    return differentiated(case, lambda z: optax.kl_divergence(jax.nn.log_softmax(z), case.probs))


def safe(case):
    return differentiated(case, lambda z: optax.safe_softmax_cross_entropy(z, case.probs))


def divergence_of_logs(case):
    logs = jnp.log(case.probs)
    return differentiated(case, lambda z: optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(z), logs))


CALLS = {
    "integer labels": labels,
    "integer labels, axis=1": labels_on_axis_1,
    "probabilities": probabilities,
    "smooth_labels": smoothed,
    "a mask, where(mask, loss, 0).sum() / mask.sum()": masked,
    "kl_divergence of log_softmax": divergence,
    "safe_softmax_cross_entropy": safe,
    "kl_divergence_with_log_targets of log_softmax": divergence_of_logs,
}
work(CALLS, "optax " + optax.__version__ + ", jax " + jax.__version__)
