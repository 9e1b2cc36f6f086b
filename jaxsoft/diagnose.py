"""Judge arrays saved by any program: is their gradient of softmax and cross-entropy right, and if not, why?

jaxsoft-diagnose FILE.npz
"""

import argparse
import io
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxsoft._doctor.diagnosis import diagnose_gradient

NAMES = ("logits", "targets", "gradient")


class InputError(Exception):
    """Why a file cannot be judged, in one line."""


def read(path: Path) -> dict[str, np.ndarray]:
    """The three arrays of an NPZ file."""
    try:
        if not zipfile.is_zipfile(path):
            path.open("rb").close()  # is_zipfile is False for a file that cannot be opened, too
            raise InputError(f"{path}: expected an NPZ file, as numpy.savez writes it, got another kind of file")
        with np.load(path, allow_pickle=False) as archive:
            for name in NAMES:
                if name not in archive:
                    wanted = f"np.savez({path.name!r}, {', '.join(f'{n}={n}' for n in NAMES)})"
                    raise InputError(
                        f"{path}: expected array {name!r}, got {', '.join(archive) or 'none'}; write it by {wanted}"
                    )
            return {name: np.asarray(archive[name]) for name in NAMES}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: expected an NPZ file of plain numbers: {str(error).splitlines()[0]}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the verdict and its explanation; return 0 if it is right, 1 if wrong, 2 if it cannot be judged."""
    parser = argparse.ArgumentParser(
        prog="jaxsoft-diagnose",
        description="Is my gradient of softmax and cross-entropy right, and if not, what is wrong with it? "
        "The exit status is 0 when it is right, 1 when it is wrong, and 2 when the file cannot be judged.",
    )
    parser.add_argument("file", type=Path, help="NPZ file with the arrays logits, targets and gradient")
    parser.add_argument("--axis", type=int, default=-1, help="the class axis (default: the last)")
    parser.add_argument(
        "--ignore-index",
        type=int,
        help="label of the ignored positions (default: -1, -100, 255, 65535 and -2**31, unless they are classes)",
    )
    options = parser.parse_args(arguments)
    try:
        arrays = read(options.file)
        try:
            diagnosis = diagnose_gradient(**arrays, axis=options.axis, ignore_index=options.ignore_index)
        except (TypeError, ValueError) as error:
            raise InputError(f"{options.file}: {error}") from None
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without −, τ or ∂ shows ? for them
        sys.stdout.reconfigure(errors="replace")
    print(f"{diagnosis.verdict}\n\n{diagnosis}")
    return 0 if diagnosis.correct else 1


if __name__ == "__main__":
    sys.exit(main())
