"""The network, its loss through the fused head, and its training.

The network is from Y. Bengio et al., "A neural probabilistic language model" (2003).
"""

import bisect
import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from experiments._door import InputError
from experiments._runs import check_options, train
from experiments.vocabulary.corpus import UNKNOWN, Text, Words
from experiments.vocabulary.heads import temporary_bytes
from jaxsoft import Plan, apply_mlp, init_mlp, linear_cross_entropy, plan_linear_cross_entropy

COLUMNS = ("step", "loss", "tokens")
HELD_OUT_BATCHES = 32


@dataclass(frozen=True)
class Training:
    """Options of the training."""

    corpus: str = "standard-library"
    """"standard-library", the sources of this Python; "installed", these and the sources of installed packages; or a
    file or folder of text in UTF-8. A token is a run of letters, digits and underscores, or one other character."""
    vocabulary: int = 8192
    """Classes: the most frequent tokens, and one class for all others, which do not count as targets."""
    context: int = 8
    """Tokens from which the next is predicted."""
    features: int = 128
    """Width of the embedding of a token, and of the features at the head."""
    memory_budget: int = 64
    """MiB that one tile's logits and their gradient may take."""
    steps: int = 1000
    """Gradient steps, each on one batch."""
    batch_size: int = 1024
    """Tokens in a batch, each with its own context."""
    learning_rate: float = 0.002
    """Largest step size of AdamW, reached after a tenth of the steps and then falling to 0 as a cosine."""
    seed: int = 0
    """Seed for the held-out documents, the batches and the initial weights."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    resume: bool = False
    """Continue from the latest complete checkpoint in the folder of results."""
    overwrite: bool = False
    """Replace the run in the folder of results."""
    out: Path = Path("out/vocabulary")
    """Folder for metrics.csv (each training batch, before its step), summary.json, the pictures and the checkpoints."""


class Batch(NamedTuple):
    """Tokens, each with the tokens before it."""

    contexts: Int[np.ndarray, "words context"] | Int[Array, "words context"]
    targets: Int[np.ndarray, " words"] | Int[Array, " words"]


Loss = Callable[..., tuple[Float[Array, ""], Int[Array, ""]]]


def check(config: Training) -> None:
    check_options(config, "context", "features")
    if config.vocabulary < 2:
        raise InputError(f"--vocabulary: expected at least 2 classes, got {config.vocabulary}")
    # A budget that is too small on a CPU is too small on any device, and asking for the device would start JAX's.
    plan_of(config, config.vocabulary, "cpu")


def plan_of(config: Training, vocabulary: int, platform: Literal["cpu"] | None = None) -> Plan:
    """The head's plan for a batch; raises an error if the budget is too small."""

    def plan(mebibytes: int) -> Plan | None:
        budget = mebibytes * 2**20
        with contextlib.suppress(ValueError):
            return plan_linear_cross_entropy(
                config.batch_size, config.features, vocabulary, memory_budget=budget, platform=platform
            )

    found = plan(config.memory_budget)
    if found is None:
        least = bisect.bisect_left(range(2**20), True, key=lambda mebibytes: plan(mebibytes) is not None)
        raise InputError(
            f"--memory-budget: expected at least {least} MiB for {vocabulary} classes, got {config.memory_budget}"
        )
    return found


def batch_of(text: Words, positions: Int[np.ndarray, " words"], context: int) -> Batch:
    windows = text[positions[:, None] + np.arange(-context, 1)]
    return Batch(windows[:, :-1], windows[:, -1])


def training_batch(text: Text, config: Training, step: int) -> Batch:
    """Tokens drawn from (seed, step) alone, so that training can start at any step."""
    rng = np.random.default_rng((config.seed, step))
    positions = rng.integers(config.context, text.train.size, config.batch_size)
    return batch_of(text.train, positions, config.context)


def held_out_batches(text: Text, config: Training) -> list[Batch]:
    """Held-out tokens at equal distances, or all if they are few; unknown tokens fill the last batch."""
    most = HELD_OUT_BATCHES * config.batch_size
    positions = np.arange(config.context, text.test.size)
    positions = positions[:: -(-positions.size // most)]
    whole = batch_of(text.test, positions, config.context)
    missing = -positions.size % config.batch_size
    contexts = np.pad(whole.contexts, ((0, missing), (0, 0)), constant_values=UNKNOWN)
    targets = np.pad(whole.targets, (0, missing), constant_values=UNKNOWN)
    parts = (positions.size + missing) // config.batch_size
    return [Batch(*pair) for pair in zip(np.split(contexts, parts), np.split(targets, parts), strict=True)]


def init_network(key: Array, vocabulary: int, context: int, features: int):
    table, hidden, head = jax.random.split(key, 3)
    return {
        "embedding": jax.random.normal(table, (vocabulary, features), jnp.float32),
        "hidden": init_mlp(hidden, (context * features, 4 * features, features)),
        "head": init_mlp(head, (features, vocabulary))[0],
    }


def features_of(params, contexts: Int[Array, "words context"]) -> Float[Array, "words features"]:
    words = params["embedding"][contexts]
    return jax.vmap(apply_mlp, in_axes=(None, 0))(params["hidden"], words.reshape(len(contexts), -1))


def loss_of(
    params, batch: Batch, memory_budget: int, batch_axes: str | None = None, axis_name: str | None = None
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The sum of the losses over the known targets, and the number of these.

    An unknown token is no target: the network would learn that something rare comes, which says nothing
    of what. As part of a context it is a word like any other.
    """
    head, targets = params["head"], jnp.asarray(batch.targets)
    total = linear_cross_entropy(
        features_of(params, jnp.asarray(batch.contexts)),
        head["kernel"],
        targets,
        head["bias"],
        ignore_index=UNKNOWN,
        reduction="sum",
        memory_budget=memory_budget,
        batch_axes=batch_axes,
        axis_name=axis_name,
    )
    return total, jnp.sum(targets != UNKNOWN)


def train_step(optimizer: optax.GradientTransformation, loss_of: Loss, state, batch: Batch):
    """One step; reports the mean loss before it, and over how many tokens."""

    def mean(params):
        total, count = loss_of(params, batch)
        return total / jnp.maximum(count, 1), count

    params, moments = state
    (loss, count), gradient = jax.value_and_grad(mean, has_aux=True)(params)
    updates, moments = optimizer.update(gradient, moments, params)
    return (optax.apply_updates(params, updates), moments), loss, count


class Layout(NamedTuple):
    """Where the arrays of a run are stored: by default all on one device."""

    loss_of: Loss = loss_of
    shardings: Callable[[Any], Any] = lambda state: None
    put: Callable[[Batch], Batch] = lambda batch: batch


def all_it_depends_on(config: Training, text: Text) -> dict[str, Any]:
    named = asdict(config)
    chosen = ("vocabulary", "context", "features", "memory_budget", "steps", "batch_size", "learning_rate", "seed")
    return {"corpus": text.origin} | {name: named[name] for name in chosen}


def fit(config: Training, text: Text, layout: Layout = Layout()) -> dict[str, Any]:
    """Train in `config.out` and measure on the held-out tokens."""
    schedule = optax.warmup_cosine_decay_schedule(0, config.learning_rate, config.steps // 10, config.steps)
    optimizer = optax.adamw(schedule)

    def init(key):
        params = init_network(key, config.vocabulary, config.context, config.features)
        return params, optimizer.init(params)

    loss = functools.partial(layout.loss_of, memory_budget=config.memory_budget * 2**20)
    key = jax.random.key(config.seed)
    shardings = layout.shardings(jax.eval_shape(init, key))
    state = jax.jit(init, out_shardings=shardings)(key)
    step = jax.jit(
        functools.partial(train_step, optimizer, loss),
        donate_argnums=0,
        out_shardings=None if shardings is None else (shardings, None, None),
    )
    compiled = step.lower(state, layout.put(training_batch(text, config, 1))).compile()

    def advance(state, n: int):
        state, loss, count = compiled(state, layout.put(training_batch(text, config, n)))
        return state, (float(loss), int(count))

    (params, _), seconds = train(config, COLUMNS, all_it_depends_on(config, text), state, advance, "token")
    return {
        **evaluate(params, text, held_out_batches(text, config), jax.jit(loss), layout),
        "steps": config.steps,
        "seconds": round(seconds, 3),
        "temporary_bytes": temporary_bytes(compiled),
    }


def evaluate(params, text: Text, held_out: Sequence[Batch], loss_of: Loss, layout: Layout) -> dict[str, Any]:
    """Scores on the held-out tokens, and the scores of guessing by frequency in the training documents."""
    sums = [jax.device_get(loss_of(params, layout.put(batch))) for batch in held_out]
    loss = sum(float(total) for total, _ in sums) / sum(int(count) for _, count in sums)
    targets = np.concatenate([batch.targets for batch in held_out])
    known = targets[targets != UNKNOWN]
    frequencies = text.counts[1:] / text.counts[1:].sum()
    with np.errstate(over="ignore"):  # infinite if the loss is huge
        perplexity = float(np.exp(loss))
    return {
        "loss": loss,
        "perplexity": perplexity,
        "frequency_loss": float(-np.log(frequencies[known - 1]).mean()),
        "held_out_words": int(known.size),
    }
