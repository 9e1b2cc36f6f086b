"""The door of every script: options from the command line, bad input as one line, results in a folder."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tyro

Config = TypeVar("Config")


class ScriptError(Exception):
    """Ends a script with one line."""


class InputError(ScriptError):
    """Something the person running the script can mend: the message says what, where and how."""


def enter(config: type[Config], run: Callable[[Config], object], description: str | None) -> None:
    """Run a script with options from the command line; exit with one line where its input is bad."""
    chosen = tyro.cli(config, description=description)
    try:
        run(chosen)
    except ScriptError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or 'system'}: {error.strerror or error}")


def make_folder(out: Path) -> Path:
    """The folder for results, created where missing and shown to be writable before any long work."""
    out.mkdir(parents=True, exist_ok=True)
    probe = out / ".writable"
    probe.touch()
    probe.unlink()
    return out


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
