"""The cases to compile: the benchmark's, at an accelerator's sizes, on one device or sharded over four."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxsoft
from experiments.benchmark.cases import BOTH, Case, cases
from experiments.benchmark.peers import Peer, jax_dense, jax_linear, jax_mode, missing

PEERS = "jaxsoft", "jax.nn", "optax", "optax in float32", "optax, full logits", "jax-cce", "tokamax, chunked"
"""The benchmark's implementations that are compiled."""


@dataclass(frozen=True)
class Placed:
    """A case, and the mesh over which its arrays are sharded: positions over "data", classes over "model"."""

    case: Case
    mesh: tuple[tuple[str, int], ...] = ()

    @property
    def layout(self) -> str:
        return " × ".join(f"{name} {size}" for name, size in self.mesh)

    @property
    def label(self) -> str:
        return " on ".join(filter(None, (self.case.label, self.layout)))

    @property
    def specs(self) -> tuple[P, P, P]:
        """The shapes of features, kernel and labels."""
        return P("data"), P(None, "model") if "model" in dict(self.mesh) else P(), P("data")

    @property
    def types(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return jax.eval_shape(self.case.draw, jax.random.key(0))

    @property
    def least_bytes(self) -> float:
        """The bytes that one device must move: each input read once, each result written once."""
        inputs = [array.size * array.dtype.itemsize / self.parts(n) for n, array in enumerate(self.types)]
        results = 0 if self.case.is_loss else inputs[0]
        gradients = inputs[: 2 if self.case.is_linear else 1] if self.case.gradient else []
        return sum(inputs) + results + sum(gradients)

    def parts(self, argument: int) -> int:
        """The number of parts into which an argument is sharded."""
        sizes = dict(self.mesh)
        parts = 1
        for name in filter(None, self.specs[argument] if self.mesh else ()):
            parts *= sizes[name]
        return parts

    @property
    def least_operations(self) -> float:
        """The FLOPs that one device must compute."""
        return self.case.flops / (self.parts(0) * self.parts(1) if self.mesh else 1)


def implementations(placed: Placed, mesh: Mesh | None) -> Iterator[Peer]:
    """jaxsoft first, then every other library that offers the case."""
    case = placed.case
    if mesh is not None:
        yield Peer("jaxsoft", jax_mode(case, over_mesh(mesh)))
        yield Peer("optax, full logits", jax_mode(case, functools.partial(full_logits, jnp.float32)))
        return
    found = jax_linear(case, missing()) if case.is_linear else jax_dense(case)
    yield from (peer for peer in found if peer.name in PEERS)
    if case.is_linear and case.dtype != "float32":
        yield Peer(f"optax, full logits in {case.dtype}", jax_mode(case, functools.partial(full_logits, None)))


def full_logits(dtype, features: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """The head that stores all logits, summed in float32 and stored in `dtype`, by default the features' dtype."""
    logits = jnp.dot(features, kernel, preferred_element_type=dtype)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def over_mesh(mesh: Mesh):
    """Each device has its own positions, and its own block of classes if the classes are sharded."""
    by_class = "model" if "model" in mesh.shape else None

    def loss(features: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jaxsoft.linear_cross_entropy(features, kernel, labels, batch_axes="data", axis_name=by_class)

    return loss


def arguments(placed: Placed, peer: Peer, devices: list[Any], mesh: Mesh | None) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The arguments of the implementation, as types of arrays on the devices."""
    types = jax.eval_shape(peer.before, placed.types)
    alone = SingleDeviceSharding(devices[0])
    places = [NamedSharding(mesh, spec) for spec in placed.specs] if mesh else [alone] * len(types)
    return tuple(
        jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        for array, sharding in zip(types, places, strict=True)
    )


DENSE = [
    {"task": "softmax"},
    {"task": "softmax + VJP"},
    {"task": "log_softmax + VJP"},
    {"task": "cross-entropy"},
    {"task": "cross-entropy + gradient"},
]
HEAD = [{"task": "linear cross-entropy"}, {"task": "linear cross-entropy + gradient"}]
MESHES = (("data", 4),), (("data", 2), ("model", 2))
SUITES = {
    "small": [
        *map(Placed, cases(DENSE, [(1024, 32768)], BOTH[:1])),
        *map(Placed, cases(HEAD[1:], [(8192, 512, 32768)], BOTH[1:])),
        *(Placed(Case("linear cross-entropy + gradient", (8192, 512, 32768), "bfloat16"), mesh) for mesh in MESHES),
    ],
    "full": [
        *map(Placed, cases(DENSE, [(8192, 32768), (8192, 1000), (8192, 4096)], BOTH)),
        *map(Placed, cases([kind | {"axis": 1} for kind in DENSE], [(8, 21, 512, 512)], BOTH)),
        *map(Placed, cases(HEAD, [(4096, 4096, 128256), (8192, 2304, 256000)], BOTH[1:])),
        *(Placed(Case("linear cross-entropy + gradient", (8192, 4096, 128256), "bfloat16"), mesh) for mesh in MESHES),
    ],
}
