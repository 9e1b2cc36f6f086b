"""Losses of a network's features and its last linear layer, whose logits are never all stored.

Features are (…, D), the kernel is (D, V), and ℓ is the log-probability of the label among the V classes. A position
whose label is `IGNORED` is ignored. `head` are other arguments of the linear layer: bias, soft_cap, kernel_axis,
memory_budget, axis_name, batch_axes.
"""

from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsoft import (
    SparseTargets,
    cross_entropy,
    entropy,
    linear_cross_entropy,
    linear_kl_divergence,
    linear_log_probs,
    linear_top_k,
    logsumexp,
    softmax,
)

IGNORED = -1
"""The label of ignored positions: prompts, padding, the last token of a sequence."""
Outside = Literal["tail", "renormalise", "nothing"]
Metrics = dict[str, Float[Array, "..."]]


def mean_over(values: Float[Array, "..."], mask: Bool[Array, "..."], axis: int | None = None) -> Float[Array, "..."]:
    """The mean where the mask is true; 0 if it is true nowhere."""
    count = jnp.sum(mask, axis, dtype=values.dtype)
    return jnp.sum(jnp.where(mask, values, 0), axis) / jnp.maximum(count, 1)


def log_probs_of(
    features: Float[Array, "*positions D"], kernel: Float[Array, "D V"], labels: Int[Array, "*positions"], **head: Any
) -> Float[Array, "*positions"]:
    """ℓ of each label; 0 at ignored positions."""
    log_probs = linear_log_probs(features, kernel, labels, ignore_index=IGNORED, **head).label_log_prob
    assert log_probs is not None  # because there are labels
    return log_probs


# Sequences.


def packed_labels(
    tokens: Int[Array, "*rows length"], sequences: Int[Array, "*rows length"], learnt: Bool[Array, "*rows length"]
) -> Int[Array, "*rows length"]:
    """The next token of each token, if it is in the same sequence and in the loss mask; otherwise `IGNORED`.

    Args:
        tokens: rows of sequences, one after the other.
        sequences: the number of the sequence that a token belongs to; neighbouring sequences differ.
        learnt: the loss mask, False at tokens that are not targets: prompts, and padding.
    """
    follows = (sequences[..., 1:] == sequences[..., :-1]) & learnt[..., 1:]
    labels = jnp.where(follows, tokens[..., 1:], IGNORED)
    return jnp.concatenate([labels, jnp.full_like(tokens[..., :1], IGNORED)], -1)


def packed_loss(
    features: Float[Array, "*rows length D"],
    kernel: Float[Array, "D V"],
    tokens: Int[Array, "*rows length"],
    sequences: Int[Array, "*rows length"],
    learnt: Bool[Array, "*rows length"],
    **head: Any,
) -> Float[Array, ""]:
    """Supervised fine-tuning on packed sequences: the mean of −ℓ over all tokens in the loss mask.

    Each token has the same weight, however long its sequence is. The first token of a sequence is not a target of the
    sequence before it.

    Args:
        features: of the tokens; attention must not cross sequences.
        kernel: of the head.
        tokens: as in `packed_labels`.
        sequences: as in `packed_labels`.
        learnt: as in `packed_labels`.
        **head: see above.

    Source: packing, M. M. Krell et al., "Efficient sequence packing without cross-contamination" (2021).
    """
    labels = packed_labels(tokens, sequences, learnt)
    return linear_cross_entropy(features, kernel, labels, ignore_index=IGNORED, **head)


def loss_with_metrics(
    features: Float[Array, "*positions D"],
    kernel: Float[Array, "D V"],
    labels: Int[Array, "*positions"],
    *,
    z_loss: float = 1e-4,
    **head: Any,
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy with a z-loss, and from the same logits its two terms and other metrics to log.

    loss = mean −ℓ + ζ·mean lse²,  lse = log Σ_j exp(z_j)

    The z-loss keeps lse near 0, where half precision is accurate.

    Args:
        features: inputs of the head.
        kernel: of the head.
        labels: classes, or `IGNORED`.
        z_loss: ζ.
        **head: see above.

    Returns:
        The loss, and constants: "cross_entropy", "z_loss", "entropy" (−Σ_j p_j log p_j), "accuracy", means over the
        positions that are not ignored, and "tokens", their number.

    Source: A. Chowdhery et al., "PaLM" (2022) for the z-loss.
    """
    loss, found = linear_cross_entropy(
        features, kernel, labels, ignore_index=IGNORED, z_loss=z_loss, with_statistics=True, **head
    )
    known = labels != IGNORED
    each = {
        "cross_entropy": -found.label_log_prob,
        "z_loss": z_loss * found.logsumexp**2,
        "entropy": found.entropy,
        "accuracy": (found.argmax == labels.astype(found.argmax.dtype)).astype(loss.dtype),
    }
    metrics = {name: mean_over(values, known) for name, values in each.items()}
    return loss, metrics | {"tokens": jnp.sum(known, dtype=loss.dtype)}


# Rewards and preferences.


def grpo_loss(
    features: Float[Array, "groups samples tokens D"],
    kernel: Float[Array, "D V"],
    labels: Int[Array, "groups samples tokens"],
    old_log_probs: Float[Array, "groups samples tokens"],
    reference_log_probs: Float[Array, "groups samples tokens"],
    rewards: Float[Array, "groups samples"],
    *,
    clip: float = 0.2,
    kl_weight: float = 0.04,
    temperature: float = 1.0,
    **head: Any,
) -> Float[Array, ""]:
    """Group relative policy optimisation: a clipped policy gradient whose baseline is the mean of a group of answers.

    A = (r − mean r)/(std r + 1e-4) in the group,  ρ = exp(ℓ − ℓ_old),  d = ℓ_ref − ℓ
    loss = mean over answers of the mean over tokens of  β·(e^d − 1 − d) − min(ρA, clip(ρ, 1 − ε, 1 + ε)·A)

    The first term is never negative, and its mean over samples of the policy is KL(policy‖reference).

    Args:
        features: of the policy, at each token before the label: `samples` answers to each of `groups` questions.
        kernel: of the policy's head.
        labels: the tokens of the answers, else `IGNORED`.
        old_log_probs: ℓ of the policy that sampled the answers.
        reference_log_probs: ℓ of the reference policy.
        rewards: r of each answer.
        clip: ε.
        kl_weight: β.
        temperature: the temperature at which the answers were sampled; all log-probabilities are at this temperature.
        **head: see above.

    Source: Z. Shao et al., "DeepSeekMath" (2024); the clip, J. Schulman et al., "Proximal policy optimization
    algorithms" (2017); the estimate of the divergence ("k3"), J. Schulman, "Approximating KL divergence" (2020).
    """
    log_probs = log_probs_of(features, kernel, labels, temperature=temperature, **head)
    answered = labels != IGNORED
    deviation = jnp.std(rewards, -1, keepdims=True) + 1e-4  # equal rewards have a deviation of 0, up to rounding
    advantages = ((rewards - jnp.mean(rewards, -1, keepdims=True)) / deviation)[..., None]
    ratio = jnp.exp(jnp.where(answered, log_probs - old_log_probs, 0))
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages)
    below = jnp.where(answered, reference_log_probs - log_probs, 0)
    divergence = jnp.expm1(below) - below
    return jnp.mean(mean_over(kl_weight * divergence - gain, answered, -1))


def dpo_loss(
    features: Float[Array, "pairs 2 tokens D"],
    kernel: Float[Array, "D V"],
    labels: Int[Array, "pairs 2 tokens"],
    reference_log_probs: Float[Array, "pairs 2"],
    *,
    beta: float = 0.1,
    **head: Any,
) -> Float[Array, ""]:
    """Direct preference optimisation: a softmax over the two answers of a pair, whose label is the chosen one.

    loss = mean −log σ(β·(Σ_t ℓ − ℓ_ref of the chosen) − β·(Σ_t ℓ − ℓ_ref of the rejected))

    Args:
        features: at each token before the label, of the chosen answer first and the rejected answer second.
        kernel: of the head.
        labels: the tokens of the answers, else `IGNORED`.
        reference_log_probs: ℓ_ref, the reference model's sum over each answer's tokens.
        beta: β, the reward per nat.
        **head: see above.

    Source: R. Rafailov et al., "Direct preference optimization: your language model is secretly a reward model" (2023).
    """
    log_probs = jnp.sum(log_probs_of(features, kernel, labels, **head), -1)
    rewards = beta * (log_probs - reference_log_probs)
    return cross_entropy(rewards, jnp.zeros(len(rewards), int))


# Teachers.


def store_top_k(
    teacher_features: Float[Array, "*positions D"],
    teacher_kernel: Float[Array, "D V"],
    k: int,
    *,
    temperature: float = 1.0,
    **head: Any,
) -> tuple[Int[Array, "*positions k"], Float[Array, "*positions k"]]:
    """A teacher's k most likely classes and their log p, to store for `stored_teacher_loss`."""
    top = linear_top_k(teacher_features, teacher_kernel, k, temperature=temperature, **head)
    return top.indices, top.log_probs


def stored_teacher_loss(
    features: Float[Array, "*positions D"],
    kernel: Float[Array, "D V"],
    indices: Int[Array, "*positions k"],
    log_probs: Float[Array, "*positions k"],
    *,
    outside: Outside = "tail",
    temperature: float = 1.0,
    **head: Any,
) -> Float[Array, ""]:
    """Distillation from a teacher's stored top-k.

    tail: loss = −T²·mean (Σ_k q_k log p_k + (1 − Σ_k q_k) log(1 − Σ_k p_k)),  q = exp(log_probs);
    for the other two see `SparseTargets`.

    Args:
        features: inputs of the student's head.
        kernel: of the student's head.
        indices: from `store_top_k`.
        log_probs: from `store_top_k`, at the same temperature.
        outside: how to treat all other classes.
        temperature: T.
        **head: see above; also weights or a mask of the positions.

    Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the knowledge in a neural network" (2015).
    """
    targets = SparseTargets(indices, jnp.exp(log_probs), outside)
    return temperature**2 * linear_cross_entropy(features, kernel, targets, temperature=temperature, **head)


def teacher_loss(
    features: Float[Array, "*positions D"],
    kernel: Float[Array, "D V"],
    labels: Int[Array, "*positions"],
    teacher_features: Float[Array, "*positions E"],
    teacher_kernel: Float[Array, "E V"],
    *,
    temperature: float = 2.0,
    share: float = 0.9,
    **head: Any,
) -> Float[Array, ""]:
    """Distillation from a teacher's head together with the loss of the labels; no logits are stored.

    loss = α·T²·mean KL(t‖s) + (1 − α)·mean −ℓ,  s and t the student's and the teacher's softmax of logits/T

    Args:
        features: inputs of the student's head.
        kernel: of the student's head.
        labels: classes, or `IGNORED`.
        teacher_features: inputs of the teacher's head, of any width.
        teacher_kernel: of the teacher's head, for the same classes.
        temperature: T. Gradients of the divergence shrink as 1/T², which the factor T² compensates.
        share: α.
        **head: see above, for options that both losses have.

    Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the knowledge in a neural network" (2015).
    """
    divergence = linear_kl_divergence(
        features,
        kernel,
        teacher_features,
        teacher_kernel,
        weights=labels != IGNORED,
        temperature=temperature,
        **head,
    )
    of_labels = linear_cross_entropy(features, kernel, labels, ignore_index=IGNORED, **head)
    return share * temperature**2 * divergence + (1 - share) * of_labels


# Pairs and experts.


def clip_loss(
    images: Float[Array, "N D"], texts: Float[Array, "N D"], log_scale: Float[Array, ""], **head: Any
) -> Float[Array, ""]:
    """Contrastive language-image pre-training: which of the N texts of a batch belongs to which image, and the reverse.

    z = e^τ·⟨x_i/‖x_i‖, y_j/‖y_j‖⟩;  loss = ½ mean_i (lse_j z_ij − z_ii) + ½ mean_j (lse_i z_ij − z_jj)

    One side is the features and the other the kernel of a head with N classes, so the N × N matrix is never stored.

    Args:
        images: x, one per row.
        texts: y, in the same order.
        log_scale: τ, which is learnt; `temperature` would be a constant.
        **head: memory_budget, axis_name, batch_axes.

    Source: A. Radford et al., "Learning transferable visual models from natural language supervision" (2021).
    """
    x, y = (side / jnp.linalg.norm(side, axis=-1, keepdims=True) for side in (images, texts))
    labels, scale = jnp.arange(len(images)), jnp.exp(log_scale)
    of_images = linear_cross_entropy(scale * x, y, labels, kernel_axis=0, **head)
    of_texts = linear_cross_entropy(scale * y, x, labels, kernel_axis=0, **head)
    return (of_images + of_texts) / 2


def router_loss(
    features: Float[Array, "*tokens D"],
    kernel: Float[Array, "D experts"],
    *,
    k: int = 1,
    balance: float = 1e-2,
    z_loss: float = 1e-3,
) -> tuple[Float[Array, ""], Metrics]:
    """The auxiliary loss of a mixture of E experts: it balances the experts, and keeps the router's logits small.

    loss = α·E·Σ_e f_e P_e + ζ·mean lse²;  f_e the share of the choices that are e,  P_e = mean p_e

    Args:
        features: of the tokens.
        kernel: of the router, whose logits are few enough to store.
        k: to how many experts a token is sent.
        balance: α; its term is α if all experts have the same load.
        z_loss: ζ.

    Returns:
        The loss, and constants: "load" (f), "entropy" (mean −Σ_e p_e log p_e), "balance" and "z_loss", its two terms.

    Source: W. Fedus, B. Zoph, N. Shazeer, "Switch transformers" (2021) for the balance; B. Zoph et al., "ST-MoE"
    (2022) for the z-loss.
    """
    logits = (features @ kernel).reshape(-1, kernel.shape[-1])
    experts = logits.shape[-1]
    chosen = lax.top_k(logits, k)[1]
    load = jnp.bincount(chosen.ravel(), length=experts).astype(logits.dtype) / chosen.size
    even = balance * experts * jnp.sum(load * jnp.mean(softmax(logits), 0))
    small = z_loss * jnp.mean(logsumexp(logits) ** 2)
    metrics = {"load": load, "entropy": jnp.mean(entropy(logits)), "balance": even, "z_loss": small}
    return even + small, {name: lax.stop_gradient(value) for name, value in metrics.items()}
