"""Where it is timed: one process, or several, which differ in their environment and take turns."""

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

PURE, HUGE = " (pure)", ", huge pages"
ENVIRONMENTS = {"": {}, PURE: {"JAXSOFT_NATIVE": "0"}, HUGE: {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}}
"""What the environment of a place has besides, by what the names of its implementations end in."""
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

Ask = Callable[..., Any]
"""Calls a function with arguments in a place, and returns what it returns."""
Places = dict[str, Ask]


def here(fn: Callable[..., Any], *arguments: Any) -> Any:
    return fn(*arguments)


ALONE: Places = {"": here}


def unused() -> dict[str, str]:
    """The places that say nothing on this machine, and why."""
    if jax.default_backend() != "cpu":
        return dict.fromkeys((PURE, HUGE), "for a CPU")
    library, release = platform.libc_ver()
    reasons = {} if native_kernels().loaded else {PURE: "ours has no kernels as it comes"}
    if not PAGES.exists() or "[never]" in PAGES.read_text():
        reasons[HUGE] = "Linux has turned them off, or this is another system"
    elif library != "glibc" or tuple(map(int, release.split("."))) < (2, 35):
        reasons[HUGE] = f"needs glibc 2.35, got {library or 'another library'} {release}".rstrip()
    return reasons


@contextlib.contextmanager
def open_places(suffixes: Iterable[str]) -> Iterator[Places]:
    """A process for each place, that of the implementations as they come too; one alone is this one."""
    suffixes = [*suffixes]
    if len(suffixes) == 1:
        yield ALONE
        return
    with contextlib.ExitStack() as stack:
        yield {suffix: stack.enter_context(process(ENVIRONMENTS[suffix])) for suffix in suffixes}


@contextlib.contextmanager
def process(environment: dict[str, str]) -> Iterator[Ask]:
    """A process of its own that sleeps until it is asked."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), attend) as pool:
        with mock.patch.dict("os.environ", environment):
            pool.submit(int).result()  # it starts with the first question
        yield lambda fn, *arguments: pool.submit(fn, *arguments).result()


def attend() -> None:
    """Leave Ctrl-C to the process that asks, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
