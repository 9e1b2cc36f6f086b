# %% [markdown]
# # A vocabulary that does not fit
#
# The last layer of a language model scores every token of its vocabulary at every position. How much memory does that
# take, how much does `linear_cross_entropy` take, and is it the same loss? The compiler reports the memory, so the large
# programs need not run.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxsoft import (
    cross_entropy,
    linear_cross_entropy,
    plan_linear_cross_entropy,
)

POSITIONS, FEATURES = 4096, 64


# %% [markdown]
# There are two ways to compute the same loss: a matmul followed by a loss of its logits, or both in one call.


# %%
def unfused(features, kernel, labels):
    return cross_entropy(features @ kernel, labels, ignore_index=-100)


fused = functools.partial(linear_cross_entropy, ignore_index=-100)


def draw(positions, classes, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    features = jax.random.normal(keys[0], (positions, FEATURES))
    kernel = jax.random.normal(keys[1], (FEATURES, classes)) / 8
    labels = jax.random.randint(keys[2], (positions,), 0, classes)
    return (
        features,
        kernel,
        jnp.where(
            jax.random.bernoulli(keys[3], 0.3, (positions,)), -100, labels
        ),
    )


# %% [markdown]
# At a size where both fit in memory, losses and gradients agree:

# %%
inputs = draw(512, 8192)
results = [
    jax.jit(jax.value_and_grad(loss, (0, 1)))(*inputs)
    for loss in (unfused, fused)
]
(loss, gradients), (fused_loss, fused_gradients) = results
print(f"losses {loss:.6f} and {fused_loss:.6f}")
for name, a, b in zip(
    ("features", "kernel"), gradients, fused_gradients, strict=True
):
    print(
        f"gradient with respect to the {name}: {jnp.abs(a - b).max() / jnp.abs(a).max():.0e} apart"
    )

# %% [markdown]
# ## Temporary memory
#
# The compiler reports the temporary memory of loss and gradients, here for vocabularies of up to 262,144 tokens. Nothing
# is allocated: compiling needs only shapes.


# %%
def temporaries(loss, classes):
    shapes = jax.eval_shape(lambda: draw(POSITIONS, classes))
    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
    return program.memory_analysis().temp_size_in_bytes / 2**20


VOCABULARIES = (16384, 65536, 262144)
BUDGET = 32 * 2**20
ways = {
    "logits of all positions": unfused,
    "linear_cross_entropy": fused,
    "linear_cross_entropy, 32 MiB per tile": functools.partial(
        fused, memory_budget=BUDGET
    ),
}
measured = {
    name: [temporaries(loss, classes) for classes in VOCABULARIES]
    for name, loss in ways.items()
}
figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
for name, numbers in measured.items():
    ax.loglog(VOCABULARIES, numbers, marker="o", label=name)
ax.set(
    xlabel="tokens in the vocabulary",
    ylabel="temporary memory (MiB)",
    xticks=VOCABULARIES,
    xticklabels=[f"{v:,}" for v in VOCABULARIES],
)
ax.minorticks_off()
ax.legend()
plt.show()
for name, numbers in measured.items():
    print(
        f"{name:36}" + "".join(f"{number:10,.0f}" for number in numbers), "MiB"
    )

# %% [markdown]
# With the small budget the remaining memory is one tile and the kernel's gradient in float32, which grows with the
# vocabulary in any case.

# %% [markdown]
# ## Planning the cost
#
# `plan_linear_cross_entropy` states the cost beforehand, here for a model with 2304 features and 256,000 tokens on an
# accelerator, without and with a budget:

# %%
size = 8192, 2304, 256_000, "bfloat16"
for budget in (None, 500 * 2**20):
    print(
        plan_linear_cross_entropy(*size, platform="gpu", memory_budget=budget),
        end="\n\n",
    )

# %% [markdown]
# ## It trains
#
# The data are random token pairs: each token is followed by one of four tokens, so no model can reach a loss below
# ln 4 = 1.386. The model is an embedding table and the fused head.

# %%
TOKENS = 1024
follows = jax.random.randint(jax.random.key(1), (TOKENS, 4), 0, TOKENS)


def loss_of(params, key):
    key, choice = jax.random.split(key)
    tokens = jax.random.randint(key, (512,), 0, TOKENS)
    following = follows[tokens, jax.random.randint(choice, tokens.shape, 0, 4)]
    return linear_cross_entropy(
        params["features"][tokens], params["kernel"], following
    )


@jax.jit
def step(params, moments, key, n):
    """Adam, written out."""
    loss, gradients = jax.value_and_grad(loss_of)(params, key)
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], gradients)
    second = jax.tree.map(
        lambda v, g: 0.99 * v + 0.01 * g**2, moments[1], gradients
    )
    rate = 0.03 * jnp.sqrt(1 - 0.99**n) / (1 - 0.9**n)
    params = jax.tree.map(
        lambda p, m, v: p - rate * m / (jnp.sqrt(v) + 1e-8),
        params,
        first,
        second,
    )
    return params, (first, second), loss


scale = 0.1
params = {
    "features": scale
    * jax.random.normal(jax.random.key(2), (TOKENS, FEATURES)),
    "kernel": scale * jax.random.normal(jax.random.key(3), (FEATURES, TOKENS)),
}
moments = (jax.tree.map(jnp.zeros_like, params),) * 2
losses = []
for n, key in enumerate(jax.random.split(jax.random.key(4), 150), 1):
    params, moments, loss = step(params, moments, key, n)
    losses.append(float(loss))
print(f"at first {losses[0]:.2f}, where ln {TOKENS:,} is {np.log(TOKENS):.2f}")
print(f"at the end {np.mean(losses[-10:]):.2f}, where at best it is 1.39")
