# %% [markdown]
# # 150,000 losses per image
#
# A network that labels every pixel of a 300 × 500 image has 150,000 softmaxes and 150,000 losses. What do they look
# like, which are ignored, and how many independent examples are they worth?

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxsoft import cross_entropy, softmax

HEIGHT, WIDTH, CLASSES, VOID = 300, 500, 21, 255


# %% [markdown]
# The scene is synthetic: discs of several classes on a background, with a void border around each. The logits
# resemble the output of a network that is mostly right. The classes are on axis 1, as in the output of such networks.

# %%
rng = np.random.default_rng(0)
rows, columns = np.mgrid[:HEIGHT, :WIDTH]
labels = np.zeros((HEIGHT, WIDTH), np.int32)
for _ in range(8):
    y, x, radius = (
        rng.integers(HEIGHT),
        rng.integers(WIDTH),
        rng.integers(20, 60),
    )
    distance = np.hypot(rows - y, columns - x)
    labels[distance < radius + 3] = VOID
    labels[distance < radius] = rng.integers(1, CLASSES)


def blur(fields, deviation):
    """Normal fields of deviation 1, blurred over `deviation` pixels."""
    if not deviation:
        return fields
    height, width = fields.shape[-2:]
    squared = (
        np.fft.fftfreq(height)[:, None] ** 2 + np.fft.rfftfreq(width)[None] ** 2
    )
    kernel = np.exp(-2 * (np.pi * deviation) ** 2 * squared)
    smooth = np.fft.irfft2(np.fft.rfft2(fields) * kernel, (height, width))
    return smooth / smooth.std()


noise = blur(rng.normal(size=(CLASSES, HEIGHT, WIDTH)), 4)
hot = np.arange(CLASSES)[:, None, None] == labels
logits = jnp.asarray((1.2 * noise + 4 * hot)[None], jnp.float32)
labels = jnp.asarray(labels[None])
print(logits.shape, labels.shape)

# %% [markdown]
# ## One loss per pixel
#
# The class axis is an argument. `reduction="none"` gives the map of losses:

# %%
losses = jax.jit(
    lambda z: cross_entropy(z, labels, 1, ignore_index=VOID, reduction="none")
)(logits)
figure, axes = plt.subplots(1, 3, figsize=(10, 2.4), layout="constrained")
classes = {
    "cmap": "cividis",
    "vmin": 0,
    "vmax": CLASSES - 1,
    "interpolation": "nearest",
}
axes[0].imshow(np.where(labels[0] == VOID, np.nan, labels[0]), **classes)
axes[1].imshow(softmax(logits, 1)[0].argmax(0), **classes)
image = axes[2].imshow(losses[0], cmap="magma")
for ax, title in zip(
    axes,
    ("labels, void white", "most likely class", "loss in nats"),
    strict=True,
):
    ax.set(title=title, xticks=[], yticks=[])
figure.colorbar(image)
plt.show()

# %% [markdown]
# Void pixels are ignored: their loss is 0, and the mean is over all other pixels.

# %%
counted = int((labels != VOID).sum())
mean = cross_entropy(logits, labels, 1, ignore_index=VOID)
print(f"{counted:,} of {labels.size:,} pixels are not void")
print(f"their mean loss is {mean:.4f} = {losses.sum() / counted:.4f}")

# %% [markdown]
# Their gradient is 0 in all 21 classes, even where a logit is NaN:

# %%
broken = jnp.where(labels[:, None] == VOID, jnp.nan, logits)
gradient = jax.jit(
    jax.grad(lambda z: cross_entropy(z, labels, 1, ignore_index=VOID))
)(broken)
print("NaN anywhere:", bool(jnp.isnan(gradient).any()))
print(
    "largest at void pixels:",
    float(jnp.abs(jnp.where(labels[:, None] == VOID, gradient, 0)).max()),
)
print(
    "largest sum over the classes:",
    f"{float(jnp.abs(gradient.sum(1)).max()):.0e}",
)

# %% [markdown]
# ## No Jacobian is stored
#
# The Jacobians of 150,000 softmaxes with 21 classes would take 265 MB. The rule s * (g − s·g) needs only s and g:

# %%
print(
    f"Jacobians: {labels.size * CLASSES**2 * 4 / 1e6:.0f} MB, s: {logits.nbytes / 1e6:.0f} MB"
)
gradient_of_sum = jax.jit(jax.grad(lambda z: (softmax(z, 1) ** 2).sum()))
memory = gradient_of_sum.lower(logits).compile().memory_analysis()
temporary = memory.temp_size_in_bytes / 1e6
print(f"softmax and its VJP: {temporary:.0f} MB of temporary memory")

# %% [markdown]
# ## How many losses are 150,000 worth?
#
# The mean of n independent losses has the variance σ²/n. Pixels are not independent: neighbouring pixels resemble each
# other. So compute how many independent losses have a mean with the same variance: σ² divided by the variance of
# the mean. Here the images have 60 × 100 pixels and two classes, and scores are blurred over some pixels:


# %%
@jax.jit
def losses_of(scores):
    """Losses of class 0, given the difference of the two classes' scores."""
    return cross_entropy(
        jnp.stack([scores, jnp.zeros_like(scores)], 1),
        jnp.zeros(scores.shape, int),
        1,
        reduction="none",
    )


for deviation in (0, 1, 2, 5, 10):
    fields = blur(rng.normal(size=(400, 60, 100)), deviation)
    losses = losses_of(jnp.asarray(fields, jnp.float32))
    worth = losses.var() / losses.mean((1, 2)).var()
    print(
        f"blurred over {deviation:2} pixels: 6,000 losses vary like {worth:6,.0f} independent ones"
    )

# %% [markdown]
# The first line differs from 6,000 only by sampling error, since there are 400 images. A batch of 6,000 independent
# images would be worth 6,000 in every line. `python -m experiments.spatial` computes the exact number for 150,000 pixels.
