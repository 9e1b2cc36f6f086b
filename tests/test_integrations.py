"""The fused head in network libraries, with arrays sharded over four devices."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsoft import cross_entropy, linear_cross_entropy

pytestmark = pytest.mark.x32

rng = np.random.default_rng(0)
WORDS, WIDTH, BATCH, STEPS = 32, 8, 16, 5
TOKENS, LABELS = rng.integers(0, WORDS, (2, STEPS, BATCH)).astype(np.int32)
LABELS[:, :5] = -1
OPTIONS = {"ignore_index": -1, "label_smoothing": 0.1}


def mean_loss(features, kernel, bias, labels, **layout):
    return linear_cross_entropy(features, kernel, labels, bias, **OPTIONS, **layout)


def drawn(types):
    """Parameters of such shapes, which take less time than a library's own initializers."""
    generator = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(leaf.dtype), types)


def plain():
    shapes = {"embedding": (WORDS, WIDTH), "kernel": (WIDTH, WORDS), "bias": (WORDS,)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return drawn(params), lambda params, tokens: (params["embedding"][tokens], params["kernel"], params["bias"])


def of_nnx():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.embed, self.head = nnx.Embed(WORDS, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WORDS, rngs=rngs)

    graph, params = nnx.split(nnx.eval_shape(lambda: Network(nnx.Rngs(0))))

    def features_and_head(params, tokens):
        network = nnx.merge(graph, params)
        return network.embed(tokens), network.head.kernel[...], network.head.bias[...]

    return drawn(params), features_and_head


def of_linen():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(WORDS, name="head")(nn.Embed(WORDS, WIDTH, name="embed")(tokens))

    params = jax.eval_shape(Network().init, jax.random.key(0), TOKENS[0])["params"]

    def features_and_head(params, tokens):
        features = nn.Embed(WORDS, WIDTH).apply({"params": params["embed"]}, tokens)
        return features, params["head"]["kernel"], params["head"]["bias"]

    return drawn(params), features_and_head


def of_equinox():
    def network(key):
        keys = jax.random.split(key)
        return {"embed": eqx.nn.Embedding(WORDS, WIDTH, key=keys[0]), "head": eqx.nn.Linear(WIDTH, WORDS, key=keys[1])}

    types = eqx.filter_eval_shape(network, jax.random.key(0))
    params, static = eqx.partition(types, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def features_and_head(params, tokens):
        network = eqx.combine(params, static)
        # Its kernel is (classes, features).
        return jax.vmap(network["embed"])(tokens), network["head"].weight.T, network["head"].bias

    return drawn(params), features_and_head


def train(params, features_and_head, losses, lay=lambda leaf: leaf, place=lambda tokens: tokens):
    """For each loss, from the same parameters: its values at each step, and the final parameters."""
    optimizer = optax.adam(0.05)

    def descend(loss, params, moments, tokens, labels):
        def of(params):
            return loss(*features_and_head(params, tokens), labels)

        value, gradient = jax.value_and_grad(of)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    @jax.jit
    def step(states, *batch):
        found = [descend(loss, *state, *batch) for loss, state in zip(losses, states, strict=True)]
        return [state for state, _ in found], [value for _, value in found]

    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(optimizer.init, params))
    states, values = [jax.tree.map(lay, (params, zeros))] * len(losses), []
    for tokens, labels in zip(TOKENS, LABELS, strict=True):
        states, now = step(states, place(tokens), place(labels))
        values.append(now)
    return np.asarray(values).T, [params for params, _ in states]


def unfused(features, kernel, bias, labels):
    return cross_entropy(features @ kernel + bias, labels, **OPTIONS)


@pytest.mark.parametrize(
    "network", [of_nnx, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (plain, of_linen, of_equinox))]
)
def test_a_network_trains_as_with_full_logits_on_four_devices_too(network):
    """The batch over two devices, also with all state sharded over them; the vocabulary over two."""
    params, features_and_head = network()
    (expected, losses), _ = train(params, features_and_head, [unfused, mean_loss])
    np.testing.assert_allclose(losses, expected, rtol=2e-5)

    mesh = jax.make_mesh((2, 2), ("data", "vocab"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])

    def lay(leaf):
        return jax.device_put(leaf, NamedSharding(mesh, P("data") if leaf.ndim > 1 else P()))

    def sharded(*arrays):
        return mean_loss(*arrays, batch_axes="data", axis_name="vocab")

    with jax.set_mesh(mesh):
        place = lambda tokens: jax.device_put(tokens, NamedSharding(mesh, P("data")))  # noqa: E731
        (losses,), (trained,) = train(params, features_and_head, [sharded], lay, place)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    kept = [leaf for leaf in jax.tree.leaves(trained) if leaf.ndim > 1]
    assert kept
    assert all(leaf.sharding.spec[0] == "data" for leaf in kept)


def test_tied_embeddings_in_half_precision_with_accumulation_and_checkpointing():
    """The embedding as the kernel, without a copy; a batch in two parts under `jax.checkpoint`."""
    params = rng.normal(size=(WORDS, WIDTH)).astype(jnp.bfloat16)
    tokens, labels = TOKENS[0].reshape(2, -1), LABELS[0].reshape(2, -1)

    def total(params, tokens, labels):
        features = jnp.tanh(params[tokens])
        return linear_cross_entropy(features, params, labels, ignore_index=-1, reduction="sum", kernel_axis=0)

    def accumulate(params):
        def part(carry, batch):
            value, gradient = jax.value_and_grad(jax.checkpoint(total))(params, *batch)
            return (carry[0] + value, carry[1] + gradient.astype(jnp.float32)), None

        start = jnp.zeros(()), jnp.zeros(params.shape)
        return jax.lax.scan(part, start, (tokens, labels))[0]

    def naive(params):
        features = jnp.tanh(params[tokens.reshape(-1)])
        return cross_entropy(features @ params.T, labels.reshape(-1), ignore_index=-1, reduction="sum")

    value, gradient = jax.jit(accumulate)(params)
    expected, expected_gradient = jax.jit(jax.value_and_grad(naive))(params.astype(np.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-2)
    np.testing.assert_allclose(gradient, expected_gradient, atol=0.05 * np.abs(expected_gradient).max())
