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
OF_A_LOSS = ("logits", "targets", "loss")  # beside these, or in place of the gradient
WEIGHTS = ("weights", "class_weights")  # a loss may have them


class InputError(Exception):
    """Why a file cannot be judged, in one line."""


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an NPZ file: three, or with a loss perhaps its weights."""
    try:
        if not zipfile.is_zipfile(path):
            path.open("rb").close()  # is_zipfile is False for a file that cannot be opened, too
            raise InputError(f"{path}: expected an NPZ file, as numpy.savez writes it, got another kind of file")
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
    """What the doctor says of the gradient, and of the loss."""
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
    """Print the verdict and its explanation; return 0 if it is right, 1 if wrong, 2 if it cannot be judged."""
    parser = argparse.ArgumentParser(
        prog="jaxsoft-diagnose",
        description="Is my gradient of softmax and cross-entropy right, and if not, what is wrong with it? Or which "
        "convention gives my loss, and if none, what is wrong with it? The exit status is 0 when it is right, 1 when "
        "it is wrong, and 2 when the file cannot be judged.",
    )
    parser.add_argument("file", type=Path, help="NPZ file with logits, targets, and gradient or loss")
    parser.add_argument("--axis", type=int, default=-1, help="the class axis (default: the last)")
    parser.add_argument(
        "--ignore-index",
        type=int,
        help="label of the ignored positions (default: -1, -100, 255, 65535 and -2**31, unless they are classes)",
    )
    parser.add_argument("--label-smoothing", type=float, default=0.0, help="that the loss was to have (default: 0)")
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
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without −, τ or ∂ shows ? for them
        sys.stdout.reconfigure(errors="replace")
    print("\n\n".join(f"{diagnosis.verdict}\n\n{diagnosis}" for diagnosis in diagnoses))
    return 0 if all(diagnosis.correct for diagnosis in diagnoses) else 1


if __name__ == "__main__":
    sys.exit(main())
