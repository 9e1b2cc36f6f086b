"""Every test runs in float64 with strict promotion; those marked `x32` in JAX's default mode."""

import ctypes
import gc
import os
import resource
import signal
from pathlib import Path

import jax
import pytest

# A suite that is started in the background ignores Ctrl-C, and so do all processes that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_num_cpu_devices", 8)

# Tracing makes millions of objects but few cycles, so garbage is collected only in `free`: after each file, and where
# the tests of a file take this many bytes.
gc.disable()
GROWTH = 400 * 2**20

# Compiling takes most of the time, so workers and runs share compiled programs.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Most of XLA's optimizations take time and change no result, so only tests marked `optimized` have them. Set here for
# the doctests, for which the hook below is not called.
jax.config.update("jax_disable_most_optimizations", True)


def pytest_configure(config):
    """XLA compiles as fast as it can. The exhaustive tests have what users have.

    The older emitters take a third of the time. They were removed after jaxlib 0.10, which ignores the option. Splitting
    a program into parts helps nobody where each core has a worker, and wide vectors take longer to compile than to run.
    """
    if "not exhaustive" in config.getoption("markexpr"):
        flags = (
            "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
            "--xla_cpu_parallel_codegen_split_count=1",
            "--xla_cpu_prefer_vector_width=128",
        )
        os.environ.setdefault("XLA_FLAGS", " ".join(flags))


def pytest_collection_modifyitems(items):
    items.sort(key=is_optimized)  # for the caches to be emptied once


def is_optimized(item):
    return item.get_closest_marker("optimized") is not None


def pytest_collection_finish():
    free()


def free():
    """Free what is in cycles, and leave the rest out of all later collections: to visit a million objects takes long."""
    gc.collect()
    gc.freeze()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:  # of glibc, which else keeps what was freed
        trim(0)
    global after_free
    after_free = resident()


def resident():
    """The bytes of memory of this process; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


@pytest.hookimpl(tryfirst=True)  # before the fixtures of a module, which compile too
def pytest_runtest_setup(item):
    unoptimized = not is_optimized(item)
    if jax.config.read("jax_disable_most_optimizations") != unoptimized:
        jax.config.update("jax_disable_most_optimizations", unoptimized)
        jax.clear_caches()  # whose keys leave it out


@pytest.hookimpl(trylast=True)  # after the fixtures, which may have compiled too
def pytest_runtest_teardown(item, nextitem):
    """Free compiled programs, which would take gigabytes after some thousand tests."""
    if nextitem is None or nextitem.path != item.path or resident() > after_free + GROWTH:
        jax.clear_caches()
        free()


@pytest.fixture(autouse=True)
def precision(request):
    x32 = request.node.get_closest_marker("x32") is not None
    with jax.enable_x64(not x32), jax.numpy_dtype_promotion("standard" if x32 else "strict"):
        yield
