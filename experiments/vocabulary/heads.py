"""Memory and time of the head alone, fused and unfused, over vocabularies of several sizes."""

import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from tqdm import tqdm

from jaxsoft import cross_entropy, linear_cross_entropy

ROUNDS = 3


def temporary_bytes(compiled: jax.stages.Compiled) -> int | None:
    """A compiled function's peak temporary memory; None if the compiler does not state it."""
    return getattr(compiled.memory_analysis(), "temp_size_in_bytes", None)


def compare_heads(sizes: Sequence[int], words: int, features: int, memory_budget: int, seed: int) -> pd.DataFrame:
    """Temporary memory in bytes, and median seconds, of the loss with its gradients to features and kernel."""
    heads = {
        "fused": functools.partial(linear_cross_entropy, memory_budget=memory_budget),
        "unfused": lambda features, kernel, targets: cross_entropy(features @ kernel, targets),
    }
    rng = np.random.default_rng(seed)
    rows = []
    with tqdm(sizes, unit="vocabulary", desc="comparing heads") as bar:
        for size in bar:
            arguments = (
                jnp.asarray(rng.normal(size=(words, features)), jnp.float32),
                jnp.asarray(rng.normal(scale=features**-0.5, size=(features, size)), jnp.float32),
                jnp.asarray(rng.integers(0, size, words), jnp.int32),
            )
            compiled = {
                name: jax.jit(jax.value_and_grad(head, (0, 1))).lower(*arguments).compile()
                for name, head in heads.items()
            }
            seconds = {name: [] for name in heads}
            for n in range(1 + ROUNDS):
                for name in rng.permutation(list(heads)):
                    start = time.perf_counter()
                    jax.block_until_ready(compiled[name](*arguments))
                    if n:  # the first round warms up
                        seconds[name].append(time.perf_counter() - start)
            rows += [
                {
                    "vocabulary": size,
                    "head": name,
                    "temporary_bytes": temporary_bytes(compiled[name]),
                    "seconds": np.median(seconds[name]),
                }
                for name in heads
            ]
    return pd.DataFrame(rows)
