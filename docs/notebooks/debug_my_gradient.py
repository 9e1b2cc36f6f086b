# %% [markdown]
# # Debug my softmax gradient
#
# This is a classifier in NumPy, with a gradient written by hand. It trains, its accuracy is fine, and its gradient is
# wrong. How do you find out, and what is wrong with it?

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

from jaxsoft import cross_entropy, diagnose_gradient

# %% [markdown]
# Three clouds of points in the plane, and a linear layer with softmax.

# %%
rng = np.random.default_rng(0)
labels = np.arange(150) % 3
centres = np.array([[0.0, 2.0], [-2.0, -1.0], [2.0, -1.0]])
points = centres[labels] + rng.normal(size=(150, 2))
targets = np.eye(3)[labels]


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


# %% [markdown]
# Here are three versions of the error at the output. The first is what many people write: the textbook says to multiply
# by the derivative of the activation, and o(1 − o) is the derivative of a softmax output with respect to its own input.
# The second multiplies by the whole Jacobian, since every output depends on every input. The third multiplies by
# nothing.


# %%
def elementwise(o, t):
    return (o - t) * o * (1 - o)


def times_jacobian(o, t):
    v = o - t
    return o * (v - (o * v).sum(1, keepdims=True))


def difference(o, t):
    return o - t


ATTEMPTS = {
    "(o − t)∘o(1 − o)": elementwise,
    "J(o − t)": times_jacobian,
    "o − t": difference,
}


# %%
def train(error, steps=200, rate=0.5):
    kernel, bias = np.zeros((2, 3)), np.zeros(3)
    losses = []
    for _ in range(steps):
        o = softmax(points @ kernel + bias)
        losses.append(-np.log(o[np.arange(150), labels]).mean())
        delta = error(o, targets) / 150
        kernel -= rate * points.T @ delta
        bias -= rate * delta.sum(0)
    return losses, (o.argmax(1) == labels).mean()


figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
for (name, error), line in zip(ATTEMPTS.items(), ("-", "--", ":"), strict=True):
    losses, accuracy = train(error)
    ax.plot(losses, line, label=f"{name}: {accuracy:.0%} of the points")
ax.set(xlabel="step", ylabel="cross-entropy")
ax.legend()
plt.show()

# %% [markdown]
# All three learn, and their accuracies do not show which gradient is right. The doctor does. It takes the logits, the
# targets and the gradient that was computed from them:

# %%
logits = rng.normal(size=(150, 3))
o = softmax(logits)
for name, error in ATTEMPTS.items():
    diagnosis = diagnose_gradient(logits, labels, error(o, targets) / 150)
    print(f"{name}: {diagnosis.verdict}\n\n{diagnosis}\n")

# %% [markdown]
# ## What the diagnosis contains
#
# The diagnosis holds the true gradient, how far the given one is from it, and the sums over the classes. These are 0 for
# every right gradient, because softmax does not change when a constant is added to all logits. The sums of the second
# attempt are 0 too: it is the gradient of another loss, half the Brier score.

# %%
for name, error in ATTEMPTS.items():
    diagnosis = diagnose_gradient(logits, labels, error(o, targets) / 150)
    largest = np.abs(diagnosis.row_sums).max()
    print(f"{name:18} error {diagnosis.error:8.1e}   largest sum {largest:.1e}")

# %% [markdown]
# ## Two more common mistakes
#
# Labels may count from 1, or the gradient may include positions that should be ignored:

# %%
shifted = np.eye(4)[labels + 1][:, 1:]
print(diagnose_gradient(logits, labels + 1, (o - shifted) / 150).verdict)

padded = np.where(np.arange(150) < 100, labels, -100)
print(diagnose_gradient(logits, padded, (o - targets) / 100).verdict)

# %% [markdown]
# ## When the formula is right, but rounding is not
#
# In float32, at a margin of 17, the probability of the label rounds to 1. The formula is right, but the label's entry
# p − 1 is 0:

# %%
sure = np.array([[20.0, 0.0, 0.0]], np.float32)
p = np.exp(sure - sure.max()) / np.exp(sure - sure.max()).sum()
lost = diagnose_gradient(
    sure, np.array([0]), p - np.eye(3, dtype=np.float32)[:1]
)
print(f"{lost.verdict}\n\n{lost}")

# %% [markdown]
# `jaxsoft.cross_entropy` computes that entry from the other classes, and stays accurate:

# %%
print(jax.grad(cross_entropy)(sure, np.array([0])))
