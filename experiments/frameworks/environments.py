"""A virtual environment for each framework under the cache folder, with the Python that it needs."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from experiments._door import ScriptError
from experiments.frameworks.frameworks import Framework

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxsoft" / "frameworks"
FINISHED = "installed.txt"  # in an environment whose packages are all there


class NotInstalled(ScriptError):
    """Why a framework cannot be run, in one line."""


def python_of(framework: Framework, cache: Path) -> Path:
    """The Python that has the framework: its environment's, or this one."""
    own = cache / framework.home
    if (own / FINISHED).exists():
        return own / "bin" / "python"
    # A package in a folder of results or of workers has no loader.
    spec = importlib.util.find_spec(framework.module)
    if spec is not None and spec.loader is not None and not framework.environment:
        return Path(sys.executable)
    raise NotInstalled(f"not installed: --install {framework.home}")


def install(framework: Framework, cache: Path) -> None:
    """Make the environment of a framework anew."""
    home = cache / framework.home
    shutil.rmtree(home, ignore_errors=True)
    home.parent.mkdir(parents=True, exist_ok=True)
    for command in (
        [find_python(framework.python), "-m", "venv", home],
        [home / "bin" / "python", "-m", "pip", "install", "-q", *framework.packages],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
            raise NotInstalled(f"cannot be installed: {lines[-1][:200]}")
    (home / FINISHED).write_text(" ".join(framework.packages) + "\n")


def find_python(version: str) -> str:
    """A Python of that version on the path or among pyenv's; this one where none is asked for."""
    if not version or sys.version.startswith(f"{version}."):
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for path in (*sorted(pyenv.glob(f"{version}.*/bin/python")), shutil.which(f"python{version}")):
        if path is not None and subprocess.run([path, "-c", "import venv"], capture_output=True).returncode == 0:
            return str(path)
    raise NotInstalled(f"needs Python {version}, which is not here")
