"""A row of the table for each implementation of a case: compiled, and its kernels added up."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.benchmark.peers import Peer
from experiments.compile.cases import Placed, arguments, implementations
from experiments.compile.hlo import parse
from experiments.compile.targets import Target
from experiments.compile.work import Kernel, kernels

COLUMNS = [
    "case", "shape", "dtype", "mesh", "implementation", "kernels", "launches", "passes", "MB", "GFLOP",
    "temporaries MB", "collectives", "collectives in loops", "roofline ms", "over least", "Mcycles",
    "least MB", "least GFLOP", "least ms", "not compiled",
]  # fmt: skip


def measure(placed: Placed, target: Target, devices: list[Any]) -> list[dict[str, Any]]:
    """The rows of a case, jaxsoft first."""
    mesh = None
    if placed.mesh:
        names, sizes = zip(*placed.mesh, strict=True)
        mesh = Mesh(np.array(devices).reshape(sizes), names)
    least = max(placed.least_bytes / target.bandwidth, placed.least_operations / target.half)
    rows = []
    for peer in implementations(placed, mesh):
        row = {
            "case": placed.case.name, "shape": str(placed.case.shape), "dtype": placed.case.dtype,
            "mesh": placed.layout, "implementation": peer.name, "least MB": placed.least_bytes / 1e6,
            "least GFLOP": placed.least_operations / 1e9, "least ms": 1e3 * least,
        }  # fmt: skip
        rows.append(row)
        try:
            compiled = compile_for(placed, peer, devices, mesh)
        except Exception as error:
            too_large = "RESOURCE_EXHAUSTED" in str(error)
            if peer.name.startswith("jaxsoft") and not too_large:
                raise
            row["not compiled"] = "does not fit in the device's memory" if too_large else reason(error)
            continue
        text, memory = compiled.as_text(), compiled.memory_analysis()
        assert text is not None
        assert memory is not None
        row |= summary(kernels(parse(text), target.on_chip), target)
        row["temporaries MB"] = temporaries(memory) / 1e6
        row["over least"] = row["roofline ms"] / row["least ms"]
        if not placed.case.is_linear:
            logits = placed.types[0]
            row["passes"] = 1e6 * row["MB"] / (logits.size * logits.dtype.itemsize)
    return rows


def compile_for(placed: Placed, peer: Peer, devices: list[Any], mesh: Mesh | None) -> jax.stages.Compiled:
    return jax.jit(peer.fn).lower(*arguments(placed, peer, devices, mesh)).compile()


def temporaries(memory: Any) -> int:
    """Bytes that are allocated in addition to arguments and results.

    In `temp_size_in_bytes`, all that JAX 0.10 states, libtpu counts twice what the branches of a conditional in a loop
    return.
    """
    if not hasattr(memory, "total_allocation_bytes"):
        return memory.temp_size_in_bytes
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.total_allocation_bytes - held


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"


def summary(ran: list[Kernel], target: Target) -> dict[str, Any]:
    """The sums over all kernels; NaN if it is unknown how often a loop runs."""
    launched = [kernel for kernel in ran if kernel.opcode != "copy-start"]  # a TPU copies while kernels run
    cycles = [kernel.cycles * kernel.times for kernel in ran if kernel.cycles is not None]
    return {
        "kernels": len(launched),
        "launches": sum(kernel.times for kernel in launched),
        "MB": sum(kernel.nbytes * kernel.times for kernel in ran) / 1e6,
        "GFLOP": sum(kernel.operations * kernel.times for kernel in ran) / 1e9,
        "roofline ms": 1e3 * sum(seconds(kernel, target) * kernel.times for kernel in ran),
        "Mcycles": sum(cycles) / 1e6 if target.is_tpu else float("nan"),
        "collectives": collectives(kernel for kernel in ran if not kernel.loops),
        "collectives in loops": collectives(kernel for kernel in ran if kernel.loops),
    }


def seconds(kernel: Kernel, target: Target) -> float:
    """The time at the roofline: the slower of moving its bytes and computing its matmuls."""
    rates = {"bf16": target.half, "f16": target.half, "f32": target.single}
    computing = sum(count / rates[dtype] for dtype, count in kernel.products.items())
    return max(kernel.nbytes / target.bandwidth, computing)


def collectives(ran: Iterable[Kernel]) -> str:
    """Collectives as text, such as "16 × all-reduce of 8.2 kB"."""
    found = Counter()
    for kernel in ran:
        if kernel.collective:
            times = None if math.isnan(kernel.times) else kernel.times  # NaN is no key: it does not equal itself
            found[times, kernel.collective, kernel.carried] += 1
    return ", ".join(
        f"{'unknown' if times is None else f'{n * times:g}'} × {name} of {written(size)}"
        for (times, name, size), n in found.items()
    )


def written(nbytes: float) -> str:
    """Bytes in a suitable unit, as text."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} GB"
