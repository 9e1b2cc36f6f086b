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
FINISHED = "installed.txt"  # written last into a complete environment; names its packages
WORKERS = Path(__file__).parent / "workers"


class NotInstalled(ScriptError):
    """Why a framework cannot be run, in one line."""


def python_of(framework: Framework, cache: Path) -> Path:
    """The Python that has the framework: its environment's, or the running one."""
    own = cache / framework.home
    python = own / "bin" / "python"
    if (own / FINISHED).exists() and python.exists():
        return python
    # A package in a folder of results or of workers has no loader.
    spec = importlib.util.find_spec(framework.module)
    if spec is not None and spec.loader is not None and not framework.build:
        return Path(sys.executable)
    raise NotInstalled(f"not installed: --install {framework.home}")


def install(framework: Framework, cache: Path) -> None:
    """Create the environment of a framework, unless it exists with these packages."""
    home = cache / framework.home
    python, finished = home / "bin" / "python", home / FINISHED
    names = " ".join([*framework.packages, framework.build]).strip() + "\n"
    if python.exists() and finished.exists() and finished.read_text() == names:
        return
    commands = [
        [find_python(framework.python), "-m", "venv", home],
        [python, "-m", "pip", "install", "-q", *framework.packages],
        *([[python, WORKERS / framework.build]] if framework.build else []),
    ]
    shutil.rmtree(home, ignore_errors=True)
    home.parent.mkdir(parents=True, exist_ok=True)
    for command in commands:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
            errors = [line for line in said if line.startswith("ERROR")] or said
            raise NotInstalled(f"cannot be installed: {errors[-1][:200]}")
    finished.write_text(names)


def find_python(version: str) -> str:
    """A Python of this version on PATH or among pyenv's; the running one if no version is given."""
    if not version or sys.version.startswith(f"{version}."):
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for path in (*sorted(pyenv.glob(f"{version}.*/bin/python")), shutil.which(f"python{version}")):
        if path is not None and subprocess.run([path, "-c", "import venv"], capture_output=True).returncode == 0:
            return str(path)
    raise NotInstalled(f"needs Python {version}, which was not found")
