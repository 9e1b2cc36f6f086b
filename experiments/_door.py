"""What all scripts share: options from the command line, errors in one line, results in a folder."""

import json
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import tyro

Config = TypeVar("Config")


class ScriptError(Exception):
    """Ends a script with one line."""


class InputError(ScriptError):
    """An error that the user can correct: the message says what, where and how."""


class Training(Protocol):
    """The options of every training."""

    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def overwrite(self) -> bool: ...
    @property
    def out(self) -> Path: ...


class End(NamedTuple):
    """A script's last message, and its exit status."""

    line: str
    status: int


def enter(config: type[Config], run: Callable[[Config], object], description: str | None) -> None:
    """Run a script with options from the command line; if its input is bad, exit with one line."""
    chosen = tyro.cli(config, prog=command(), description=description)
    try:
        run(chosen)
        sys.stdout.flush()
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and is_unread():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would report the pipe again
            sys.exit(128 + signal.SIGPIPE)
        end = end_of(error, chosen)
        if end is None:
            raise
        print(end.line, file=sys.stderr)
        sys.exit(end.status)


def is_unread() -> bool:
    """Whether nobody reads stdout any more, such as after `| head`."""
    poll = select.poll()
    try:
        poll.register(sys.stdout, 0)
    except OSError:  # stdout is no file
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def command() -> str | None:
    """The command that started this program, if that was `python -m`."""
    spec = sys.modules["__main__"].__spec__
    return spec and f"python -m {spec.name.removesuffix('.__main__')}"


def end_of(error: BaseException, config: object) -> End | None:
    """How an exception ends a script; None for a bug of the script, whose traceback is shown."""
    if isinstance(error, KeyboardInterrupt):
        return End(f"interrupted{_what_resumes(config)}", 130)
    if isinstance(error, ScriptError):
        return End(f"error: {error}", 1)
    if isinstance(error, OSError):
        return End(f"error: {error.filename or 'system'}: {error.strerror or error}", 1)
    if isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and str(error).startswith("RESOURCE_EXHAUSTED: ")
    ):
        return End(f"error: not enough memory: {' '.join(str(error).split())[:200] or 'for an object of Python'}", 1)
    return None


def _what_resumes(config: object) -> str:
    """A hint about --resume after an interruption, if the script has that option."""
    if not hasattr(config, "resume") or getattr(config, "predict", ()):
        return ""
    first, out = getattr(config, "checkpoint_every", None), getattr(config, "out", Path())
    # On a cluster only process 0 has the folder of results.
    if first is None or getattr(config, "process_id", None) or any(out.glob("**/checkpoints/*")):
        return "; --resume continues"
    return f" before the first checkpoint, of step {first}; --resume begins again"


def check_counts(config: object, *names: str) -> None:
    """Refuse options that count something and are below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(config, name)}")


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed: expected an integer in [0, 2**32), got {seed}")


def check_training(config: Training, *counts: str) -> None:
    """Refuse training options out of range, before any long work; `counts` names more options that count."""
    check_counts(config, "steps", *counts)
    if not 0 < config.learning_rate < float("inf"):
        raise InputError(f"--learning-rate: expected a positive number, got {config.learning_rate}")
    check_seed(config.seed)
    if not getattr(config, "resume", False):
        keep_finished(config)


def keep_finished(config: Training) -> None:
    """Refuse to replace a finished run without --overwrite."""
    if (config.out / "summary.json").exists() and not config.overwrite:
        raise InputError(f"{config.out}: holds a finished run: replace it with --overwrite, or choose another --out")


def say_growth(config: Training, first: float, last: float) -> None:
    """Warn if the loss is higher at the end: this is not an error, but not the purpose of training."""
    if last > first:
        print(
            f"warning: --learning-rate {config.learning_rate:g}: expected the loss to fall, "
            f"got {first:.4g} at first and {last:.4g} after {config.steps} steps",
            file=sys.stderr,
        )


def make_folder(out: Path) -> Path:
    """The folder for results, created if missing, and checked to be writable before any long work."""
    if out.is_file():
        raise InputError(f"--out: expected a folder, got the file {out}")
    out.mkdir(parents=True, exist_ok=True)
    probe = out / ".writable"
    probe.touch()
    probe.unlink()
    return out


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
