"""The processes in which cases are timed: one, or several with different environments that take turns."""

import contextlib
import multiprocessing
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from jaxsoft import native_kernels

PURE, HUGE, KEPT = " (pure)", ", huge pages", ", memory kept"
KEEP = {"MALLOC_MMAP_THRESHOLD_": 2**33, "MALLOC_TRIM_THRESHOLD_": 2**34, "MALLOC_TOP_PAD_": 2**28}
"""Thresholds in bytes with which glibc reuses the memory of large arrays instead of returning it to the system."""
ENVIRONMENTS = {
    "": {},
    PURE: {"JAXSOFT_NATIVE": "0"},
    HUGE: {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    KEPT: {name: str(size) for name, size in KEEP.items()},
}
"""Additional environment variables of a place, by the end of the names of its implementations."""
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

Ask = Callable[..., Any]
"""Calls a function with arguments in a place, and returns what it returns."""
Places = dict[str, Ask]


def here(fn: Callable[..., Any], *arguments: Any) -> Any:
    return fn(*arguments)


ALONE: Places = {"": here}


def unused() -> dict[str, str]:
    """The places that have no meaning on this machine, and why."""
    if jax.default_backend() != "cpu":
        return dict.fromkeys((PURE, HUGE, KEPT), "for a CPU")
    library, release = platform.libc_ver()
    reasons = {} if native_kernels().loaded else {PURE: "ours has no kernels as it comes"}
    if not PAGES.exists() or "[never]" in PAGES.read_text():
        reasons[HUGE] = "Linux has turned them off, or this is another system"
    elif library != "glibc" or tuple(map(int, release.split("."))) < (2, 35):
        reasons[HUGE] = f"needs glibc 2.35, got {library or 'another library'} {release}".rstrip()
    if library != "glibc":
        reasons[KEPT] = f"needs glibc, got {library or 'another library'}"
    return reasons


@contextlib.contextmanager
def open_places(suffixes: Iterable[str]) -> Iterator[Places]:
    """One process per place, also for default settings; a single place is this process."""
    suffixes = [*suffixes]
    if len(suffixes) == 1:
        yield ALONE
        return
    with contextlib.ExitStack() as stack:
        yield {suffix: stack.enter_context(process(ENVIRONMENTS[suffix])) for suffix in suffixes}


@contextlib.contextmanager
def process(environment: dict[str, str]) -> Iterator[Ask]:
    """A separate process that sleeps until it gets a request."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), attend) as pool:
        with mock.patch.dict("os.environ", environment):
            pool.submit(int).result()  # the process starts with the first request
        yield lambda fn, *arguments: pool.submit(fn, *arguments).result()


def attend() -> None:
    """Ignore Ctrl-C, which the asking process handles, and end when that process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
