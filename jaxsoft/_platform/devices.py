"""The devices for which programs are compiled, and the properties of their kinds."""

from typing import Any, Literal, NamedTuple

import jax

Platform = Literal["cpu", "gpu", "tpu"]

GB = 10**9


class Kind(NamedTuple):
    """The properties of a kind of device."""

    memory: int  # bytes, by the data sheet
    rows: int  # of a tile whose matmul hides reading the kernel, by compilers' estimates
    group_rows: int  # of a group of tiles whose matmul hides most of adding to the kernel's gradient


# The keys are beginnings of JAX's names of kinds.
KINDS = {
    "TPU v5 lite": Kind(16 * GB, 512, 4096),
    "TPU v5": Kind(95 * GB, 512, 4096),
    "TPU v6 lite": Kind(32 * GB, 1024, 4096),
    "TPU7x": Kind(96 * GB, 512, 4096),  # one of the two devices of a chip
    "NVIDIA A100": Kind(40 * GB, 512, 2048),
    "NVIDIA H100": Kind(80 * GB, 512, 2048),
    "NVIDIA H200": Kind(141 * GB, 512, 2048),
    "NVIDIA B200": Kind(180 * GB, 512, 2048),
}
# For unknown kinds: the rows that lose least on all kinds of the platform, and the smallest memory of these.
UNKNOWN = {"tpu": Kind(16 * GB, 1024, 4096), "gpu": Kind(16 * GB, 512, 2048)}


class Device(NamedTuple):
    """Where a program will run."""

    platform: Platform
    kind: str = ""  # JAX's name of it; empty if unknown

    @property
    def known(self) -> Kind | None:
        return next((kind for name, kind in KINDS.items() if self.kind.startswith(name)), None)

    @property
    def traits(self) -> Kind:
        return self.known or UNKNOWN[self.platform]


def as_platform(name: str) -> Platform:
    """The platform with this name in JAX."""
    return name if name in ("cpu", "tpu") else "gpu"  # JAX's names of GPUs are gpu, cuda and rocm


def as_device(platform: str, found: Any) -> Device:
    """A device of a platform: the found one, or else the default backend's, if it is of that platform."""
    name = as_platform(platform)
    found = jax.devices()[0] if found is None else found
    return Device(name, found.device_kind if as_platform(found.platform) == name else "")


def device_of_kind(kind: str) -> Device:
    """A device by the name that JAX gives its kind."""
    return Device("tpu" if kind.startswith("TPU") else "cpu" if kind == "cpu" else "gpu", kind)
