"""The devices for which programs are compiled without having one: their speed, and their description for JAX."""

import importlib.util
import os
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.experimental import topologies

from experiments._door import InputError

CHIPS = 4
"""The number of chips over which a program may be sharded."""
ON_CHIP = frozenset({1, 2, 6})
"""Memory spaces on a TPU's chip: vector memory, semaphores, scalar memory."""


@dataclass(frozen=True)
class Target:
    """A device and the numbers of its data sheet."""

    kind: str
    bandwidth: float  # bytes per second
    half: float  # FLOP/s of dense matmuls in bfloat16
    single: float  # FLOP/s in float32, at JAX's default precision: tf32 on a GPU, bfloat16 on a TPU
    source: str

    @property
    def is_tpu(self) -> bool:
        return self.kind.startswith("TPU")

    @property
    def on_chip(self) -> frozenset[int]:
        return ON_CHIP if self.is_tpu else frozenset()


TARGETS = {
    "h100": Target("NVIDIA H100 80GB HBM3", 3.35e12, 989e12, 494e12, "NVIDIA, H100 data sheet, SXM, without sparsity"),
    "a100": Target("NVIDIA A100-SXM4-80GB", 2.039e12, 312e12, 156e12, "NVIDIA, A100 80GB data sheet, SXM"),
    "b200": Target("NVIDIA B200", 7.7e12, 2250e12, 1100e12, "NVIDIA, HGX B200 data sheet, one GPU, without sparsity"),
    "tpu-v5e": Target("TPU v5e", 0.819e12, 197e12, 197e12, "Google Cloud, TPU v5e, key chip specifications"),
    "tpu-v5p": Target("TPU v5p", 2.765e12, 459e12, 459e12, "Google Cloud, TPU v5p, key chip specifications"),
    "tpu-v6e": Target("TPU v6e", 1.64e12, 918e12, 918e12, "Google Cloud, TPU v6e, key chip specifications"),
    # A chip, of 7.37 TB/s and 2307 TFLOP/s by its data sheet, is two devices.
    "tpu7x": Target("TPU7x", 3.685e12, 1153.5e12, 1153.5e12, "Google Cloud, TPU7x, key chip specifications, halved"),
}

# What XLA asks a GPU before it compiles for it, as a protocol buffer in text. Source: the devices' own answers, as
# the OpenXLA project keeps them (openxla/xla, xla/backends/gpu/target_config/specs: h100_sxm, a100_sxm_80 and b200).
NVIDIA = """
    threads_per_warp: 32
    threads_per_block_limit: 1024  threads_per_core_limit: 2048
    thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
    block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
    registers_per_core_limit: 65536  registers_per_block_limit: 65536
    shared_memory_per_block: 49152
    device_vendor: "NVIDIA Corporation"
    driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"  dnn_version: "9.12.0"
"""
GPUS = {
    "NVIDIA H100 80GB HBM3": """
        cuda_compute_capability { major: 9  feature_extension: ACCELERATED_FEATURES }
        platform_version: "Compute Capability 9.0a"
        core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
        device_memory_size: 84942979072  memory_bandwidth: 3352320000000  l2_cache_size: 52428800
        shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
    """,
    "NVIDIA A100-SXM4-80GB": """
        cuda_compute_capability { major: 8  feature_extension: NONE }
        platform_version: "Compute Capability 8.0"
        core_count: 108  fpus_per_core: 64  clock_rate_ghz: 1.41
        device_memory_size: 85100068864  memory_bandwidth: 2039040000000  l2_cache_size: 41943040
        shared_memory_per_core: 167936  shared_memory_per_block_optin: 166912
    """,
    "NVIDIA B200": """
        cuda_compute_capability { major: 10  feature_extension: ACCELERATED_FEATURES }
        platform_version: "Compute Capability 10.0a"
        core_count: 148  fpus_per_core: 128  clock_rate_ghz: 1.965
        device_memory_size: 191514411008  memory_bandwidth: 7672320000000  l2_cache_size: 132644864
        shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
    """,
}


def with_peak(target: Target, peak: float) -> Target:
    """The device with other TFLOP/s for bfloat16 matmuls, and with proportional TFLOP/s for float32."""
    half = peak * 1e12
    source = f"bandwidth: {target.source}; matmuls: as given"
    return replace(target, half=half, single=target.single * half / target.half, source=source)


def missing(target: Target) -> str | None:
    """The missing packages that compile for a target, and the command that installs them."""
    module, extra = ("libtpu", "compile-tpu") if target.is_tpu else ("jax_plugins.xla_cuda13", "compile-gpu")
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the parent package is missing
        found = None
    return None if found else f"no compiler for {target.kind} is installed: pip install -e '.[experiments,{extra}]'"


def devices_of(target: Target) -> list[Any]:
    """Four abstract devices, each on a separate chip, which can only be compiled for."""
    if reason := missing(target):
        raise InputError(reason)
    jax.config.update("jax_platforms", "cpu")  # nothing runs: do not look for a device of this machine
    jax.devices()  # this call finds the plugins
    if not target.is_tpu:
        config = f"""
            platform_name: "CUDA"
            device_description_str: "{target.kind}"
            dnn_version_info {{ major: 9  minor: 12 }}
            gpu_device_info {{ name: "{target.kind}" {NVIDIA} {GPUS[target.kind]} }}
        """
        return topologies.get_topology_desc(platform="cuda", topology=f"1x{CHIPS}x1", target_config=config).devices
    name = "tpu7x" if target.kind == "TPU7x" else target.kind.removeprefix("TPU ")
    os.environ |= {
        "TPU_ACCELERATOR_TYPE": f"{name}-8",
        "TPU_SKIP_MDS_QUERY": "1",  # otherwise it would ask the cloud which machine this is
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # otherwise a second process would stop at the first one's lock
    }
    slice_ = "2x2" if name in ("v5e", "v6e") else "2x2x1"
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{name}:{slice_}", chips_per_host_bounds=(2, 2, 1)
    ).devices
    return [device for device in devices if device.core_on_chip == 0]
