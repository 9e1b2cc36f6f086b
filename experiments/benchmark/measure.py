"""Time implementations: checked against jaxsoft, interleaved, and compared with the ceilings of this machine."""

import functools
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
from experiments.benchmark.places import ALONE, PURE, Places

FEWEST, MOST = 5, 401
"""Rounds of a case."""
LONGEST = 10.0
"""Seconds that a call may take."""
TURN, CALLS = 1e-2, 200
"""Seconds of an implementation's turn, in at most this many calls."""
COMPILATIONS = 2
"""Of each implementation; the faster one counts."""
KEY = ["case", "shape", "dtype", "implementation"]
COLUMNS = [
    *KEY, "median ms", "least ms", "spread", "ratio", "ratio low", "ratio high",
    "MB", "GFLOP", "GB/s", "TFLOP/s", "of ceiling", "temporaries MB", "compile ms", "compile ratio", "not timed",
]  # fmt: skip
_timers: dict[str, tuple[Function, Function]] = {}
"""The calls that this process can time: each implementation's call, and the function that awaits its result."""


@dataclass(frozen=True)
class Ceilings:
    """The machine's best rates: bytes per second, and FLOPs per second for each dtype."""

    copy: float
    gemm: dict[str, float]


def measure_ceilings(dtypes: Iterable[str]) -> Ceilings:
    """Measure a copy, counting bytes read and written, and a square matmul."""
    # Negation in place copies into existing memory: with a new array, a CPU's first access to its pages would
    # be timed.
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


def obstacle(case: Case, ceilings: Ceilings, places: int = 1) -> str:
    """The reason to leave a case out on this machine; empty if there is none."""
    stats = jax.devices()[0].memory_stats()
    total = stats["bytes_limit"] if stats else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = case.memory + (places - 1) * case.size  # each place holds the inputs
    if memory > 0.75 * total:
        return f"needs about {memory / 1e9:.0f} GB, more than 3/4 of {total / 1e9:.0f} GB"
    least = case.flops / ceilings.gemm[case.dtype]
    return f"a call takes at least {least:.0f} s" if case.is_linear and least > LONGEST else ""


def prepare(peer: Peer, sets: list[Arrays]) -> tuple[Arrays, Function, dict[str, float]]:
    """The first result in jaxsoft's layout; the call to time, on each set of inputs in turn; the compiler's numbers."""
    inputs = [peer.before(arrays) for arrays in sets]
    run, said = compile_ahead(peer.fn, inputs[0]) if peer.by_jax else (peer.fn, {})
    result = run(*inputs[0])
    peer.wait(result)
    following = itertools.cycle(inputs)
    return peer.after(tuple(jax.tree.leaves(result))), lambda: run(*next(following)), said


def compile_ahead(fn: Function, inputs: Arrays) -> tuple[Function, dict[str, float]]:
    """The function to run, the time that tracing and compiling it takes, and its temporaries."""
    # JAX would reuse the first program of the same function.
    runs, least = [jax.jit(lambda *arrays: fn(*arrays)) for _ in range(COMPILATIONS)], math.inf
    for run in runs:
        start = time.perf_counter()
        run.lower(*inputs).compile()
        least = min(least, time.perf_counter() - start)
    analysis = runs[-1].lower(*inputs).compile().memory_analysis()
    said = {"temporaries MB": analysis.temp_size_in_bytes / 1e6} if analysis else {}
    return runs[-1], said | {"compile ms": 1e3 * least}


def timed(call: Function, wait: Function, calls: int = 1) -> float:
    """Seconds per call until its result is ready; on a GPU calls are queued, and the last result is awaited."""
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
    """The allowed error relative to the largest entry; rounding passes, also in a mean of many losses."""
    if case.dtype == "bfloat16":
        return 5e-2
    if case.is_linear and on_gpu():
        return 1e-3  # matmuls of float32 are computed in tf32
    return 1e-3 if case.is_training else 1e-4


def measure(
    case: Case, ceilings: Ceilings, seconds: float, rng: np.random.Generator, places: Places = ALONE
) -> list[dict[str, Any]]:
    """A row for each implementation in each place, jaxsoft first. Implementations that agree with jaxsoft are timed, in
    a new order every round: one at a time, in its own place, while the others sleep.
    """
    # On a GPU successive calls have different inputs, more than the cache holds.
    count = min(64, math.ceil(2**28 / case.size)) if on_gpu() and case.size else 1
    seeds = [int(rng.integers(2**32)) for _ in range(count)]
    rows: list[dict[str, Any]] = []
    turns: dict[str, Function] = {}
    moved = math.nan
    for suffix, ask in places.items():
        ready, moved = ask(make_ready, case, seeds, suffix == PURE)
        for name, said in ready.items():
            key = case.name, str(case.shape), case.dtype, name + suffix
            rows.append(dict(zip(KEY, key, strict=True)) | said)
            if "not timed" not in said:
                turns[name + suffix] = functools.partial(ask, turn, name)
    # So many calls per turn that the previous implementation's state of caches, allocator and threads hardly matters,
    # and that on a GPU starting a call is hidden behind the calls before it.
    once = {name: min(turns[name](1) for _ in range(2)) for name in turns}
    calls = {name: min(CALLS, math.ceil(TURN / once[name])) for name in turns}
    rounds = int(seconds / sum(once[name] * calls[name] for name in turns))
    times = {name: np.empty(min(max(rounds, FEWEST), MOST)) for name in turns}
    for n in range(len(times["jaxsoft"])):
        for name in rng.permutation([*turns]):
            times[name][n] = turns[name](calls[name])
    for row in rows:
        if "compile ms" in row:
            row["compile ratio"] = row["compile ms"] / rows[0]["compile ms"]
        if row["implementation"] in times:
            row |= summary(case, ceilings, moved, times[row["implementation"]], times["jaxsoft"])
    return rows


def make_ready(case: Case, seeds: list[int], ours_alone: bool) -> tuple[dict[str, dict[str, Any]], float]:
    """Compile the implementations in this process, and compare them with jaxsoft: the findings for each by name,
    and how many bytes the case moves.
    """
    _timers.clear()
    sets = [jax.jit(case.draw)(jax.random.key(seed)) for seed in seeds]
    said: dict[str, dict[str, Any]] = {}
    ours: Arrays = ()
    for peer in itertools.islice(peers_of(case), 1 if ours_alone else None):
        try:
            results, call, said[peer.name] = prepare(peer, sets)
            error = max(float(relative_error(a, b)) for a, b in zip(results, ours or results, strict=True))
            if not error < tolerance(case):
                raise ValueError(f"differs from ours by {error:.1e}")
        except Exception as error:  # another library may fail in any way, jaxsoft may not
            if not ours:
                raise
            reason = f"{str(error).strip().partition(chr(10))[0] or type(error).__name__:.80}"
            said[peer.name] = said.get(peer.name, {}) | {"not timed": reason}
            continue
        _timers[peer.name], ours = (call, peer.wait), ours or results
    return said, case.size + sum(x.nbytes for x in ours) if case.size else math.nan


def turn(name: str, calls: int) -> float:
    """Seconds per call, after a first one that wakes the threads and fills the caches, if a turn has several."""
    if calls > 1:
        timed(*_timers[name])
    return timed(*_timers[name], calls)


def summary(case: Case, ceilings: Ceilings, moved: float, taken: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    low, median, high = np.quantile(taken, (0.25, 0.5, 0.75))
    ratio_low, ratio, ratio_high = np.quantile(taken / ours, (0.25, 0.5, 0.75))
    least = case.flops / ceilings.gemm[case.dtype] if case.is_linear else moved / ceilings.copy
    return {
        "median ms": 1e3 * median, "least ms": 1e3 * taken.min(), "spread": (high - low) / median,
        "ratio": ratio, "ratio low": ratio_low, "ratio high": ratio_high,
        "MB": moved / 1e6, "GFLOP": case.flops / 1e9, "GB/s": moved / median / 1e9,
        "TFLOP/s": case.flops / median / 1e12, "of ceiling": least / median,
    }  # fmt: skip
