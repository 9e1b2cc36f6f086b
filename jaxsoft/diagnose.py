"""Judge arrays saved by any program: is their gradient or loss of softmax and cross-entropy right, and if not, why?

jaxsoft-diagnose FILE.npz
"""

import argparse
import io
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsoft._doctor.diagnosis import Diagnosis, diagnose_gradient
from jaxsoft._doctor.loss import diagnose_loss

NAMES = ("logits", "targets", "gradient")
OF_A_LOSS = ("logits", "targets", "loss")  # a loss may come with the gradient or in its place
WEIGHTS = ("weights", "class_weights")  # optional, for a loss


class InputError(Exception):
    """Why a file cannot be judged, in one line."""


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an NPZ file: logits, targets, a gradient or a loss or both, and weights of a loss."""
    try:
        if not zipfile.is_zipfile(path):
            path.open("rb").close()  # raises OSError if the file cannot be opened: is_zipfile is False then too
            raise InputError(f"{path}: expected an NPZ file, as numpy.savez writes, got another kind of file")
        with np.load(path, allow_pickle=False) as archive:
            names = OF_A_LOSS if "loss" in archive and "gradient" not in archive else NAMES
            for name in names:
                if name not in archive:
                    wanted = f"np.savez({path.name!r}, {', '.join(f'{n}={n}' for n in NAMES)})"
                    raise InputError(
                        f"{path}: expected array {name!r}, got {', '.join(archive) or 'none'}; write it by {wanted}"
                    )
            return {name: np.asarray(archive[name]) for name in (*NAMES, "loss", *WEIGHTS) if name in archive}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: expected an NPZ file of plain numbers: {str(error).splitlines()[0]}") from None


def judge(arrays: dict[str, np.ndarray], options: argparse.Namespace) -> list[Diagnosis]:
    """Diagnose the gradient and the loss, whichever the file has."""
    judged: list[Diagnosis] = []
    shared: dict[str, Any] = {"axis": options.axis, "ignore_index": options.ignore_index}
    logits, targets = arrays["logits"], arrays["targets"]
    if "gradient" in arrays:
        judged.append(diagnose_gradient(logits, targets, arrays["gradient"], **shared))
    if "loss" in arrays:
        position, class_weights = (arrays.get(name) for name in WEIGHTS)
        shared |= {"label_smoothing": options.label_smoothing}
        judged.append(
            diagnose_loss(logits, targets, arrays["loss"], **shared, weights=position, class_weights=class_weights)
        )
    return judged


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the verdict and its explanation; return 0 if all is right, 1 if not, 2 if it cannot be judged."""
    parser = argparse.ArgumentParser(
        prog="jaxsoft-diagnose",
        description="Is my gradient of softmax and cross-entropy right, and if not, what is wrong with it? Which "
        "convention gives my loss, and if none does, what is wrong with it? The exit status is 0 if it is right, 1 if "
        "it is wrong, and 2 if the file cannot be judged.",
    )
    parser.add_argument("file", type=Path, help="NPZ file with logits, targets, and gradient or loss")
    parser.add_argument("--axis", type=int, default=-1, help="the class axis (default: the last)")
    parser.add_argument(
        "--ignore-index",
        type=int,
        help="label of the ignored positions (default: -1, -100, 255, 65535 and -2**31, unless they are classes)",
    )
    parser.add_argument("--label-smoothing", type=float, default=0.0, help="that the loss should have (default: 0)")
    options = parser.parse_args(arguments)
    try:
        arrays = read(options.file)
        try:
            diagnoses = judge(arrays, options)
        except (TypeError, ValueError) as error:
            raise InputError(f"{options.file}: {error}") from None
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show −, τ or ∂ shows ? instead
        sys.stdout.reconfigure(errors="replace")
    print("\n\n".join(f"{diagnosis.verdict}\n\n{diagnosis}" for diagnosis in diagnoses))
    return 0 if all(diagnosis.correct for diagnosis in diagnoses) else 1


if __name__ == "__main__":
    sys.exit(main())
