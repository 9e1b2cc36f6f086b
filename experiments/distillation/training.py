"""A teacher, its stored data, and students that learn from several kinds of targets."""

import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from experiments import _runs
from experiments._checkpoints import delete, steps_of
from experiments._door import InputError, check_counts
from experiments.vocabulary import training as vocabulary
from experiments.vocabulary.corpus import UNKNOWN, Text
from experiments.vocabulary.training import COLUMNS, Batch, Loss, features_of, init_network, train_step, training_batch
from jaxsoft import (
    SparseTargets,
    linear_cross_entropy,
    linear_kl_divergence,
    linear_top_k,
    plan_linear_cross_entropy,
)

TEACHER = "teacher"
Outside = Literal["tail", "renormalise", "nothing"]
Kind = Literal["labels", Outside, "tail-and-labels", "head"]
"""What a student learns from: labels; the stored top-k, by what is meant outside of it; the first of these and labels
by halves; the features before the teacher's head, and this head."""
STUDENTS: tuple[Kind, ...] = get_args(Kind)
STORED = "teacher/stored"


@dataclass(frozen=True)
class Config(vocabulary.Training):
    """Options of the teacher's training, and the differences of a student's."""

    steps: int = 800
    """Gradient steps of the teacher, each on one batch."""
    student_steps: int = 400
    """Gradient steps of each student, on the same batches as the teacher's first steps, and then on further batches."""
    student_features: int = 32
    """Features of a student: width of the embedding of a token, and of the features at the head."""
    k: int = 16
    """Classes whose teacher probabilities are stored, for every token that the students are trained on."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    out: Path = Path("out/distillation")
    """Folder for students.csv, summary.json, the picture, the teacher's stored data, and for each network a folder
    with its metrics.csv (each training batch, before its step) and checkpoints."""

    def of(self, network: str) -> "Config":
        """The options of a network's training, in its own folder."""
        mine = replace(self, out=self.out / network)
        if network == TEACHER:
            return mine
        return replace(mine, steps=self.student_steps, features=self.student_features)


class Stored(NamedTuple):
    """The teacher's stored outputs for each training batch of the students."""

    indices: Int[np.ndarray, "steps words k"]
    log_probs: Float[np.ndarray, "steps words k"]
    features: Float[np.ndarray, "steps words features"]


class Lesson(NamedTuple):
    """A batch, and its arrays in addition to labels."""

    batch: Batch
    taught: Any = ()


def check(config: Config) -> None:
    """Refuse options out of range."""
    vocabulary.check(config)
    check_counts(config, "student_steps", "student_features")
    if not 1 <= config.k <= config.vocabulary:
        raise InputError(f"--k: expected from 1 to the {config.vocabulary} classes, got {config.k}")
    try:  # a tile with the teacher's logits needs as much memory as one with distributions
        sizes = config.batch_size, config.student_features, config.vocabulary
        budget = config.memory_budget * 2**20
        plan_linear_cross_entropy(*sizes, distributions=True, memory_budget=budget, platform="cpu")
    except ValueError as error:
        raise InputError(f"--memory-budget: {str(error).removeprefix('memory_budget: ')}") from None


def loss_of(kind: Kind, memory_budget: int) -> Loss:
    """The sum of losses over the known tokens, and their number, for a network that learns from one kind of targets."""

    def loss(params, lesson: Lesson):
        head, labels = params["head"], jnp.asarray(lesson.batch.targets)
        features = features_of(params, jnp.asarray(lesson.batch.contexts))
        # An unknown token is no label. To keep the kinds comparable, none of them learns at such a position.
        options: dict[str, Any] = {"reduction": "sum", "memory_budget": memory_budget, "weights": labels != UNKNOWN}

        def of(targets):
            return linear_cross_entropy(features, head["kernel"], targets, head["bias"], **options)

        def of_top_k(outside: Outside):
            indices, log_probs = lesson.taught
            return of(SparseTargets(indices, jnp.exp(log_probs), outside))

        if kind == "labels":
            total = of(labels)
        elif kind == "head":
            of_teacher, teacher = lesson.taught
            total = linear_kl_divergence(
                features, head["kernel"], of_teacher, teacher["kernel"], head["bias"], teacher["bias"], **options
            )
        elif kind == "tail-and-labels":
            total = (of_top_k("tail") + of(labels)) / 2
        else:
            total = of_top_k(kind)
        return total, jnp.sum(labels != UNKNOWN)

    return loss


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def init(key: Array, vocabulary: int, context: int, features: int):
    """Parameters and moments, by one program for all students: the moments are the same for every schedule."""
    params = init_network(key, vocabulary, context, features)
    return params, optax.adamw(optax.constant_schedule(0)).init(params)


@functools.cache
def step_of(kind: Kind, memory_budget: int, learning_rate: float, steps: int):
    """The compiled step of a network, reused when a run continues in the same process."""
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 10, steps))
    return jax.jit(functools.partial(train_step, optimizer, loss_of(kind, memory_budget)), donate_argnums=0)


def learn(config: Config, options: dict[str, Any], kind: Kind, lesson_of: Callable[[int], Lesson]) -> tuple[Any, float]:
    """Train a network in `config.out`; returns its parameters and the seconds its steps took."""
    step = step_of(kind, config.memory_budget * 2**20, config.learning_rate, config.steps)

    def advance(state, n: int):
        state, value, count = step(state, lesson_of(n))
        return state, (float(value), int(count))

    state = init(jax.random.key(config.seed), config.vocabulary, config.context, config.features)
    (params, _), seconds = _runs.train(config, COLUMNS, options, state, advance, "token")
    return params, seconds


def fit(config: Config, text: Text) -> tuple[dict[str, Any], dict[str, float], Stored]:
    """Train the teacher, store its top-k and features, and train the students on these.

    Returns:
        The parameters and the seconds of every network by its name, and what was stored.
    """
    if config.overwrite:  # a new teacher replaces everything that was computed from the old one
        (config.out / "summary.json").unlink(missing_ok=True)
        shutil.rmtree(config.out / STORED, ignore_errors=True)
        for checkpoints in (config.of(name).out / "checkpoints" for name in (TEACHER, *STUDENTS)):
            for step in steps_of(checkpoints):
                delete(checkpoints, step)
    own = {"student_steps": config.student_steps, "student_features": config.student_features, "k": config.k}
    options = vocabulary.all_it_depends_on(config, text) | own  # of all networks, which the teacher affects
    params, seconds = {}, {}

    def teach(name: str, kind: Kind, taught: Callable[[int], Any] = lambda n: ()) -> None:
        mine = config.of(name)
        mine.out.mkdir(exist_ok=True)
        print(f"{name}: {mine.features} features, {mine.steps} steps")

        def lesson_of(n: int) -> Lesson:
            return Lesson(training_batch(text, config, n), taught(n))

        params[name], seconds[name] = learn(mine, options, kind, lesson_of)

    teach(TEACHER, "labels")
    stored = store(config, text, params[TEACHER])
    for kind in STUDENTS:
        if kind == "labels":
            teach(kind, kind)
        elif kind == "head":
            teach(kind, kind, lambda n: (stored.features[n - 1], params[TEACHER]["head"]))
        else:
            teach(kind, kind, lambda n: (stored.indices[n - 1], stored.log_probs[n - 1]))
    return params, seconds, stored


def store(config: Config, text: Text, teacher: Any) -> Stored:
    """The teacher's outputs for the students' batches, in files of `config.out` that are complete or absent."""
    folder, unfinished = config.out / STORED, config.out / f"{STORED}.unfinished"
    paths = [f"{name}.npy" for name in Stored._fields]
    if not folder.exists():
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        read = jax.jit(functools.partial(knowledge, config.k, config.memory_budget * 2**20))
        try:
            write(config, text, functools.partial(read, teacher), [unfinished / path for path in paths])
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)  # free the disk space
            raise InputError(f"{folder}: cannot store the teacher: {error.strerror or error}") from error
        unfinished.rename(folder)
    return Stored(*(np.load(folder / path, mmap_mode="r") for path in paths))


def knowledge(k: int, memory_budget: int, teacher: Any, contexts: Int[Array, "words context"]) -> tuple[Array, ...]:
    """The fields of `Stored` for one batch."""
    features = features_of(teacher, contexts)
    head = teacher["head"]
    top = linear_top_k(features, head["kernel"], k, head["bias"], memory_budget=memory_budget)
    return top.indices, top.log_probs, features


def write(config: Config, text: Text, read: Callable[..., tuple[Array, ...]], paths: Sequence[Path]) -> None:
    """Batch after batch to NumPy's files, so that no more than one is in memory."""
    files = [path.open("wb") for path in paths]
    with tqdm(total=config.student_steps * config.batch_size, unit="token", unit_scale=True, desc="storing") as bar:
        for n in range(1, config.student_steps + 1):
            arrays = [np.asarray(array) for array in read(training_batch(text, config, n).contexts)]
            for file, array in zip(files, arrays, strict=True):
                if n == 1:
                    described = np.lib.format.header_data_from_array_1_0(array)
                    described["shape"] = (config.student_steps, *array.shape)
                    np.lib.format.write_array_header_1_0(file, described)
                file.write(array.tobytes())
            bar.update(config.batch_size)
    for file in files:
        file.close()


def bytes_a_word(name: str, stored: Stored, head: Any) -> float | None:
    """The bytes stored for a student per token that it was trained on; None for the teacher."""
    steps, words, _ = stored.indices.shape
    of_label = np.dtype(np.int32).itemsize
    of_top_k = (stored.indices.nbytes + stored.log_probs.nbytes) / (steps * words)
    of_head = (stored.features.nbytes + sum(leaf.nbytes for leaf in jax.tree.leaves(head))) / (steps * words)
    special = {TEACHER: None, "labels": of_label, "tail-and-labels": of_top_k + of_label, "head": of_head}
    return special.get(name, of_top_k)


@functools.partial(jax.jit, static_argnums=2)
def sums(params: Any, batch: Batch, memory_budget: int) -> tuple[Array, ...]:
    """The loss of a batch, its entropy, the most likely tokens and the known tokens."""
    labels = jnp.asarray(batch.targets)
    loss, found = linear_cross_entropy(
        features_of(params, jnp.asarray(batch.contexts)),
        params["head"]["kernel"],
        labels,
        params["head"]["bias"],
        ignore_index=UNKNOWN,
        reduction="sum",
        with_statistics=True,
        memory_budget=memory_budget,
    )
    known = labels != UNKNOWN
    return loss, jnp.sum(found.entropy), jnp.sum(known & (found.argmax == labels)), jnp.sum(known)


def score(params: Any, held_out: Sequence[Batch], memory_budget: int) -> dict[str, float]:
    """Means over the known held-out tokens: the loss, the entropy (the loss that the network expects), the accuracy."""
    batches = (jax.device_get(sums(params, batch, memory_budget)) for batch in held_out)
    found = np.sum([[float(value) for value in batch] for batch in batches], 0)
    loss, entropy, accuracy = (found[:3] / found[3]).tolist()
    with np.errstate(over="ignore"):  # infinite where the loss is beyond measure
        return {"perplexity": float(np.exp(loss)), "loss": loss, "entropy": entropy, "accuracy": accuracy}
