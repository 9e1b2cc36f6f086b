"""Every test runs in float64 with strict promotion; those marked `x32` in JAX's default mode."""

import signal
from pathlib import Path

import jax
import pytest

# In a suite started in the background Ctrl-C is ignored, and in every process that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_num_cpu_devices", 8)

# Compiling is most of the time: share what is compiled between workers and runs.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_modifyitems(items):
    items.sort(key=is_optimized)  # for the caches to be emptied once


def is_optimized(item):
    return item.get_closest_marker("optimized") is not None


@pytest.hookimpl(tryfirst=True)  # before the fixtures of a module, which compile too
def pytest_runtest_setup(item):
    """Most of XLA's optimizations take time and change no result: only what is marked `optimized` has them."""
    unoptimized = not is_optimized(item)
    if jax.config.read("jax_disable_most_optimizations") != unoptimized:
        jax.config.update("jax_disable_most_optimizations", unoptimized)
        jax.clear_caches()  # whose keys leave it out


@pytest.fixture(autouse=True)
def precision(request):
    x32 = request.node.get_closest_marker("x32") is not None
    with jax.enable_x64(not x32), jax.numpy_dtype_promotion("standard" if x32 else "strict"):
        yield
