"""How it is timed: checked against ours, interleaved, beside the ceilings of this machine."""

import itertools
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.cases import Case
from experiments.benchmark.peers import Arrays, Function, Peer, on_gpu, peers_of

FEWEST, MOST = 5, 401
"""Rounds of a case."""
LONGEST = 10.0
"""Seconds that a call may take."""
TURN, CALLS = 1e-2, 200
"""Seconds that an implementation has before the next one's turn, in at most so many calls."""
KEY = ["case", "shape", "dtype", "implementation"]
COLUMNS = [
    *KEY, "median ms", "least ms", "spread", "ratio", "ratio low", "ratio high",
    "MB", "GFLOP", "GB/s", "TFLOP/s", "of ceiling", "temporaries MB", "not timed",
]  # fmt: skip


@dataclass(frozen=True)
class Ceilings:
    """What this machine does at best: bytes a second, and operations a second for each dtype."""

    copy: float
    gemm: dict[str, float]


def measure_ceilings(dtypes: Iterable[str]) -> Ceilings:
    """A copy, counting what is read and written, and a square matrix product."""
    # Negation in place is a copy into memory that is already there: in a new array, a CPU would be
    # timed at touching its pages for the first time.
    arrays, negate = [jnp.ones(2**28 if on_gpu() else 2**26, jnp.float32)], jax.jit(jnp.negative, donate_argnums=0)

    def copy() -> jax.Array:
        arrays.append(negate(arrays.pop()))
        return arrays[0]

    side, gemm = 8192 if on_gpu() else 2048, {}
    for dtype in dtypes:
        matrix = jax.random.normal(jax.random.key(0), (side, side), dtype)
        _, product, _ = prepare(Peer("matrix product", jnp.matmul), [(matrix, matrix)])
        gemm[dtype] = 2 * side**3 / fastest(product)
    return Ceilings(2 * arrays[0].nbytes / fastest(copy), gemm)


def fastest(call: Function) -> float:
    return min(timed(call, jax.block_until_ready, 10) for _ in range(10))


def obstacle(case: Case, ceilings: Ceilings) -> str:
    """Why a case is left out on this machine; empty where it is not."""
    stats = jax.devices()[0].memory_stats()
    total = stats["bytes_limit"] if stats else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if case.memory > 0.75 * total:
        return f"needs about {case.memory / 1e9:.0f} GB, more than 3/4 of {total / 1e9:.0f} GB"
    least = case.flops / ceilings.gemm[case.dtype]
    return f"a call takes at least {least:.0f} s" if case.is_linear and least > LONGEST else ""


def prepare(peer: Peer, sets: list[Arrays]) -> tuple[Arrays, Function, float]:
    """The first result, laid out as ours; the call to time, on each set of inputs in turn; its temporaries in MB."""
    run: Any = jax.jit(peer.fn) if peer.by_jax else peer.fn
    inputs = [peer.before(arrays) for arrays in sets]
    result = run(*inputs[0])
    peer.wait(result)
    analysis = run.lower(*inputs[0]).compile().memory_analysis() if peer.by_jax else None
    turn = itertools.cycle(inputs)
    return (
        peer.after(tuple(jax.tree.leaves(result))),
        lambda: run(*next(turn)),
        analysis.temp_size_in_bytes / 1e6 if analysis else math.nan,
    )


def timed(call: Function, wait: Function, calls: int = 1) -> float:
    """Seconds a call until its result is ready; on a GPU, until all have been queued and the last one's is."""
    queued, start, result = on_gpu(), time.perf_counter(), None
    for _ in range(calls):
        result = call() if queued else wait(call())
    wait(result)
    return (time.perf_counter() - start) / calls


@jax.jit
def relative_error(theirs: jax.Array, ours: jax.Array) -> jax.Array:
    theirs, ours = jnp.asarray(theirs, jnp.float32), jnp.asarray(ours, jnp.float32)
    return jnp.max(jnp.abs(theirs - ours)) / jnp.max(jnp.abs(ours))


def tolerance(case: Case) -> float:
    """The largest error beside the largest entry: rounding passes, in a mean of many losses too."""
    if case.dtype == "bfloat16":
        return 5e-2
    if case.is_linear and on_gpu():
        return 1e-3  # products of float32 are taken in tf32
    return 1e-3 if case.is_training else 1e-4


def measure(case: Case, ceilings: Ceilings, seconds: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    """A row for each implementation, ours first. What agrees with ours is timed, in a new order every round."""
    # On a GPU successive calls have inputs of their own, more than the cache holds.
    count = min(64, math.ceil(2**28 / case.size)) if on_gpu() and case.size else 1
    sets = [jax.jit(case.draw)(jax.random.key(rng.integers(2**32))) for _ in range(count)]
    rows: list[dict[str, Any]] = []
    timers: dict[str, tuple[Function, Function]] = {}
    ours: Arrays = ()
    for peer in peers_of(case):
        rows.append(dict(zip(KEY, (case.name, str(case.shape), case.dtype, peer.name), strict=True)))
        try:
            results, call, rows[-1]["temporaries MB"] = prepare(peer, sets)
            error = max(float(relative_error(a, b)) for a, b in zip(results, ours or results, strict=True))
            if not error < tolerance(case):
                raise ValueError(f"differs from ours by {error:.1e}")
        except Exception as error:  # a peer may fail in any way, ours may not
            if not ours:
                raise
            rows[-1]["not timed"] = f"{str(error).strip().partition(chr(10))[0] or type(error).__name__:.80}"
            continue
        timers[peer.name], ours = (call, peer.wait), ours or results
    moved = case.size + sum(x.nbytes for x in ours) if case.size else math.nan
    results = ours = ()
    # So many calls at a time that what the implementation before left in the caches, the allocator and the threads
    # is soon forgotten, and that on a GPU starting one is hidden behind those before it.
    once = {name: min(timed(*timer) for _ in range(2)) for name, timer in timers.items()}
    calls = {name: min(CALLS, math.ceil(TURN / once[name])) for name in timers}
    rounds = int(seconds / sum(once[name] * calls[name] for name in timers))
    times = {name: np.empty(min(max(rounds, FEWEST), MOST)) for name in timers}
    for n in range(len(times["jaxsoft"])):
        for name in rng.permutation([*timers]):
            times[name][n] = timed(*timers[name], calls[name])
    for row in rows:
        if row["implementation"] in times:
            row |= summary(case, ceilings, moved, times[row["implementation"]], times["jaxsoft"])
    return rows


def summary(case: Case, ceilings: Ceilings, moved: float, taken: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    low, median, high = np.quantile(taken, (0.25, 0.5, 0.75))
    ratio_low, ratio_high = np.quantile(taken / ours, (0.25, 0.75))
    least = case.flops / ceilings.gemm[case.dtype] if case.is_linear else moved / ceilings.copy
    return {
        "median ms": 1e3 * median, "least ms": 1e3 * taken.min(), "spread": (high - low) / median,
        "ratio": median / np.median(ours), "ratio low": ratio_low, "ratio high": ratio_high,
        "MB": moved / 1e6, "GFLOP": case.flops / 1e9, "GB/s": moved / median / 1e9,
        "TFLOP/s": case.flops / median / 1e12, "of ceiling": least / median,
    }  # fmt: skip
