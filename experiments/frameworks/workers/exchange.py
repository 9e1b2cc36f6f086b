"""Run a framework's calls on the cases of a folder, in that framework's own Python: 3.6 and newer, with NumPy only.

python of_NAME.py FOLDER

The folder has cases.json, [{"variant": ..., "options": {...}}, ...], and the arrays of case n in n.npz. Each result is
written to n.out.npz, or why there is none to n.out.txt, as soon as it is there: a crash loses one case, and the
others are computed when this is started again. Each line printed is the number of a case.
"""

import json
import os
import sys

import numpy as np


class Case:
    """The arrays, classes last, and the options of one case."""

    def __init__(self, arrays, options):
        self.arrays, self.options = arrays, options

    def __getattr__(self, name):
        """An array, an option, or None."""
        if name in ("arrays", "options") or name.startswith("__"):  # copying asks for attributes before they exist
            raise AttributeError(name)
        return self.arrays[name] if name in self.arrays else self.options.get(name)

    @property
    def classes_first(self):
        """The logits with the classes on axis 1."""
        return np.moveaxis(self.logits, -1, 1)


def work(calls, version):
    """Run every case; `calls` has a function of a case for each variant, which returns value and gradient."""
    folder = sys.argv[1]
    with open(os.path.join(folder, "version.txt"), "w") as file:
        file.write(version)
    with open(os.path.join(folder, "cases.json")) as file:
        cases = json.load(file)
    for n, described in enumerate(cases):
        path, out = os.path.join(folder, f"{n}.npz"), os.path.join(folder, f"{n}.out")
        if os.path.exists(out + ".npz") or os.path.exists(out + ".txt"):
            continue  # left by an earlier process, which this case may have crashed
        with np.load(path) as archive:
            case = Case({name: archive[name] for name in archive.files}, described["options"])
        try:
            value, gradient = calls[described["variant"]](case)
        except Exception as error:
            with open(out + ".txt", "w") as file:
                file.write("{}: {}".format(type(error).__name__, (str(error).strip() or "-").splitlines()[0][:200]))
        else:
            results = {"value": value, "gradient": gradient}
            np.savez(out, **{name: np.asarray(array) for name, array in results.items() if array is not None})
        print(n, flush=True)
