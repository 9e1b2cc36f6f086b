"""A small example of each recipe, in float64."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.recipes import losses, naive
from experiments.recipes.losses import IGNORED

D, V = 6, 23
WIDER = 9

Outcome = tuple[dict[str, jax.Array], tuple[jax.Array, ...]]
"""The loss, with its metrics if it has any, and the loss's gradients."""


class Example(NamedTuple):
    """A recipe with its arguments; the first few arguments are differentiated."""

    recipe: Callable[..., Any]
    arguments: tuple[jax.Array, ...]
    options: Mapping[str, Any] = MappingProxyType({})
    moving: int = 2

    @property
    def naive(self) -> Callable[..., Any]:
        return getattr(naive, self.recipe.__name__)

    @property
    def title(self) -> str:
        return " ".join([self.recipe.__name__, *(f"{name}={value}" for name, value in self.options.items())])

    def program(self) -> Callable[..., tuple[Outcome, Outcome]]:
        """The results of the recipe and of its naive form, compiled together."""
        still = tuple(map(np.asarray, self.arguments[self.moving :]))  # the naive losses look at their values

        def outcome(loss: Callable[..., Any], moving: tuple[jax.Array, ...], others: tuple[Any, ...]) -> Outcome:
            def value(*moving: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
                found = loss(*moving, *others, **self.options)
                total, metrics = found if isinstance(found, tuple) else (found, {})
                return total, {"loss": total, **metrics}

            (_, values), gradients = jax.value_and_grad(value, range(self.moving), has_aux=True)(*moving)
            return values, gradients

        @jax.jit
        def run(moving: tuple[jax.Array, ...], others: tuple[jax.Array, ...]) -> tuple[Outcome, Outcome]:
            return outcome(self.recipe, moving, others), outcome(self.naive, moving, still)

        return lambda *arguments: run(arguments[: self.moving], arguments[self.moving :])


def examples(seed: int) -> list[Example]:
    """At least one example of every recipe."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape))

    def layer(*positions: int) -> tuple[jax.Array, jax.Array]:
        return normal(*positions, D), normal(D, V)

    def labels(*shape: int) -> jax.Array:
        """Labels, about a fourth of them ignored."""
        return jnp.asarray(np.where(rng.random(shape) < 0.25, IGNORED, rng.integers(V, size=shape)))

    exact = jax.jit(lambda x, w, y: naive.at(naive.log_softmax(x @ w), y))

    def log_probs(x: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
        """Log-probabilities near the layer's, on either side of the clip."""
        return exact(x, w, y) + 0.2 * normal(*y.shape)

    x, w = layer(2, 4, 5)
    y = labels(2, 4, 5)
    answers = x, w, y, log_probs(x, w, y), log_probs(x, w, y), normal(2, 4)
    pair_x, pair_w = layer(3, 2, 5)
    pair_y = labels(3, 2, 5)
    pairs = pair_x, pair_w, pair_y, jnp.sum(log_probs(pair_x, pair_w, pair_y), -1)
    sequences = jnp.asarray(np.sort(rng.integers(4, size=(2, 12))))
    packed = (
        *layer(2, 12),
        jnp.asarray(rng.integers(V, size=(2, 12))),
        sequences,
        jnp.asarray(rng.random((2, 12)) < 0.7),
    )
    teacher = normal(3, 7, WIDER), normal(WIDER, V)
    stored = jax.jit(lambda x, w: losses.store_top_k(x, w, 5, temperature=1.5))(*teacher)
    return [
        Example(losses.packed_loss, packed),
        Example(losses.loss_with_metrics, (*layer(3, 7), labels(3, 7)), {"z_loss": 0.01}),
        Example(losses.grpo_loss, answers),
        Example(losses.grpo_loss, answers, {"clip": 0.1, "kl_weight": 0.3, "temperature": 0.8}),
        Example(losses.dpo_loss, pairs, {"beta": 0.5}),
        *(
            Example(losses.stored_teacher_loss, (*layer(3, 7), *stored), {"outside": outside, "temperature": 1.5})
            for outside in ("tail", "renormalise", "nothing")
        ),
        Example(losses.teacher_loss, (*layer(3, 7), labels(3, 7), *teacher)),
        Example(losses.clip_loss, (normal(11, D), normal(11, D), normal()), moving=3),
        Example(losses.router_loss, (normal(4, 8, D), normal(D, 6)), {"k": 2, "z_loss": 0.1}),
    ]
