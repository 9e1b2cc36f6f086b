"""Is my gradient of softmax and cross-entropy right, and if not, what is wrong with it?

python -m experiments.diagnose FILE.npz

The file holds the arrays logits, targets and gradient, as `numpy.savez` writes them. The exit status
is 0 when the gradient is right and 1 when it is wrong or the file cannot be judged.
"""

import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from experiments._door import InputError, enter
from jaxsoft import Diagnosis, diagnose_gradient

NAMES = ("logits", "targets", "gradient")


@dataclass(frozen=True)
class Config:
    """Options of the doctor."""

    file: tyro.conf.Positional[Path]
    """NPZ file with the arrays logits, targets and gradient."""
    axis: int = -1
    """The class axis."""


def read(path: Path) -> dict[str, np.ndarray]:
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise InputError(f"{path}: expected an NPZ file of several arrays, got one array")
        with archive:
            missing = [name for name in NAMES if name not in archive]
            if missing:
                raise InputError(f"{path}: expected array {missing[0]!r}, got {', '.join(archive) or 'none'}")
            return {name: archive[name] for name in NAMES}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: expected an NPZ file of plain numbers: {str(error).splitlines()[0]}") from None


def run(config: Config) -> Diagnosis:
    """Print the diagnosis."""
    arrays = read(config.file)
    try:
        diagnosis = diagnose_gradient(arrays["logits"], arrays["targets"], arrays["gradient"], config.axis)
    except (TypeError, ValueError) as error:
        raise InputError(f"{config.file}: {error}") from None
    print(f"{diagnosis.verdict}\n\n{diagnosis}")
    return diagnosis


def main(config: Config) -> None:
    sys.exit(0 if run(config).correct else 1)


if __name__ == "__main__":
    enter(Config, main, __doc__)
