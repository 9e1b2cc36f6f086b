"""The same losses as one would write them on all logits, in `jax.numpy` alone: what the recipes are compared with."""

import jax.numpy as jnp

from experiments.recipes.losses import IGNORED


def log_softmax(z):
    return z - jnp.log(jnp.sum(jnp.exp(z), -1, keepdims=True))


def at(log_p, labels):
    """The log-probability of each label; at ignored labels any number."""
    return jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]


def packed_loss(features, kernel, tokens, sequences, learnt):
    log_p = log_softmax(features @ kernel)
    total, count = 0.0, 0
    for row in range(len(tokens)):
        for n in range(tokens.shape[1] - 1):
            if sequences[row, n] == sequences[row, n + 1] and learnt[row, n + 1]:
                total, count = total - log_p[row, n, tokens[row, n + 1]], count + 1
    return total / count


def loss_with_metrics(features, kernel, labels, *, z_loss=1e-4):
    z, known = features @ kernel, labels != IGNORED
    lse = jnp.log(jnp.sum(jnp.exp(z), -1))
    log_p = log_softmax(z)
    metrics = {
        "cross_entropy": jnp.mean(-at(log_p, labels)[known]),
        "z_loss": z_loss * jnp.mean(lse[known] ** 2),
        "entropy": jnp.mean(-jnp.sum(jnp.exp(log_p) * log_p, -1)[known]),
        "accuracy": jnp.mean((jnp.argmax(z, -1) == labels)[known].astype(z.dtype)),
        "tokens": jnp.sum(known),
    }
    return metrics["cross_entropy"] + metrics["z_loss"], metrics


def grpo_loss(
    features, kernel, labels, old_log_probs, reference_log_probs, rewards, *, clip=0.2, kl_weight=0.04, temperature=1.0
):
    log_p = at(log_softmax(features @ kernel / temperature), labels)
    answers = []
    for group, r in enumerate(rewards):
        advantages = (r - r.mean()) / (r.std() + 1e-4)
        for n, advantage in enumerate(advantages):
            tokens = labels[group, n] != IGNORED
            new, old, ref = (a[group, n][tokens] for a in (log_p, old_log_probs, reference_log_probs))
            ratio = jnp.exp(new - old)
            clipped = jnp.where(ratio > 1 + clip, 1 + clip, jnp.where(ratio < 1 - clip, 1 - clip, ratio))
            divergence = jnp.exp(ref - new) - (ref - new) - 1
            answers.append(
                jnp.mean(kl_weight * divergence - jnp.minimum(ratio * advantage, clipped * advantage))
                if tokens.any()
                else jnp.zeros((), log_p.dtype)
            )
    return jnp.mean(jnp.stack(answers))


def dpo_loss(features, kernel, labels, reference_log_probs, *, beta=0.1):
    log_p = jnp.where(labels == IGNORED, 0, at(log_softmax(features @ kernel), labels))
    chosen, rejected = (jnp.sum(log_p, -1) - reference_log_probs).T
    return jnp.mean(jnp.log(1 + jnp.exp(-beta * (chosen - rejected))))


def stored_teacher_loss(features, kernel, indices, log_probs, *, outside="tail", temperature=1.0):
    p = jnp.exp(log_softmax(features @ kernel / temperature))
    p, q = jnp.take_along_axis(p, indices, -1), jnp.exp(log_probs)
    if outside == "renormalise":
        p, q = p / jnp.sum(p, -1, keepdims=True), q / jnp.sum(q, -1, keepdims=True)
    losses = -jnp.sum(q * jnp.log(p), -1)
    if outside == "tail":
        losses -= (1 - jnp.sum(q, -1)) * jnp.log(1 - jnp.sum(p, -1))
    return temperature**2 * jnp.mean(losses)


def teacher_loss(features, kernel, labels, teacher_features, teacher_kernel, *, temperature=2.0, share=0.9):
    known, z = labels != IGNORED, features @ kernel
    log_s, log_t = log_softmax(z / temperature), log_softmax(teacher_features @ teacher_kernel / temperature)
    divergences = jnp.sum(jnp.exp(log_t) * (log_t - log_s), -1)
    losses = share * temperature**2 * divergences - (1 - share) * at(log_softmax(z), labels)
    return jnp.mean(losses[known])


def clip_loss(images, texts, log_scale):
    x, y = (side / jnp.sqrt(jnp.sum(side**2, 1, keepdims=True)) for side in (images, texts))
    z = jnp.exp(log_scale) * x @ y.T
    return -(jnp.mean(jnp.diag(log_softmax(z))) + jnp.mean(jnp.diag(log_softmax(z.T)))) / 2


def router_loss(features, kernel, *, k=1, balance=1e-2, z_loss=1e-3):
    z = (features @ kernel).reshape(-1, kernel.shape[1])
    log_p = log_softmax(z)
    chosen = jnp.argsort(-z, -1)[:, :k]
    load = jnp.stack([jnp.mean((chosen == e).astype(z.dtype)) for e in range(z.shape[1])])
    metrics = {
        "load": load,
        "entropy": jnp.mean(-jnp.sum(jnp.exp(log_p) * log_p, -1)),
        "balance": balance * z.shape[1] * jnp.sum(load * jnp.mean(jnp.exp(log_p), 0)),
        "z_loss": z_loss * jnp.mean(jnp.log(jnp.sum(jnp.exp(z), -1)) ** 2),
    }
    return metrics["balance"] + metrics["z_loss"], metrics
