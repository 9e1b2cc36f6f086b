"""Textbook definitions, deliberately naive: the only other copy of the formulas.

Plain `jnp` without shifts, rules or tricks, to be differentiated by JAX, and NumPy transcriptions of
documented formulas. Use them in float64 with moderate logits.
"""

import itertools

import jax.numpy as jnp
import numpy as np


def softmax(logits, axis=-1):
    exponentials = jnp.exp(logits)
    return exponentials / jnp.sum(exponentials, axis=axis, keepdims=True)


def log_softmax(logits, axis=-1):
    return jnp.log(softmax(logits, axis))


def logsumexp(logits, axis=-1):
    return jnp.log(jnp.sum(jnp.exp(logits), axis=axis))


def jacobian(probs):
    return np.diag(probs) - np.outer(probs, probs)


def losses(logits, distribution, z_loss=0.0):
    """−Σ_j q_j log softmax(z)_j + ζ·lse² along the last axis."""
    return -jnp.sum(distribution * log_softmax(logits), axis=-1) + z_loss * logsumexp(logits) ** 2


def pytorch_cross_entropy(
    logits, targets, *, class_weights=None, ignore_index=-100, label_smoothing=0.0, reduction="mean"
):
    """The formulas in the documentation of torch.nn.CrossEntropyLoss, classes along the last axis."""
    classes = logits.shape[-1]
    weight = np.ones(classes) if class_weights is None else class_weights
    log_probs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    if np.issubdtype(targets.dtype, np.integer):
        loss = np.zeros(targets.shape)
        denominator = 0.0
        for n, y in np.ndenumerate(targets):
            if y == ignore_index:
                continue
            loss[n] = -(1 - label_smoothing) * weight[y] * log_probs[n][y]
            loss[n] -= label_smoothing / classes * np.sum(weight * log_probs[n])
            denominator += weight[y]
    else:
        smooth = (1 - label_smoothing) * targets + label_smoothing / classes
        loss = -np.sum(weight * smooth * log_probs, axis=-1)
        denominator = loss.size
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / max(denominator, 1e-300)}[reduction]


def covering(strength, *factors):
    """A small set of choices, found greedily, in which every `strength` options of different factors occur together."""
    factors = [list(options) for options in factors]
    choices = list(itertools.product(*(range(len(options)) for options in factors)))
    meetings = {choice: set(itertools.combinations(enumerate(choice), strength)) for choice in choices}
    chosen, missing = [], set().union(*meetings.values())
    while missing:
        best = max(choices, key=lambda choice: len(meetings[choice] & missing))
        missing -= meetings[best]
        chosen.append(tuple(options[n] for options, n in zip(factors, best, strict=True)))
    return chosen
