"""Random cases of the options that a framework's call takes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Few shapes and numbers of classes, because each one compiles a program here.
POSITIONS, IMAGES, CLASSES = (12,), (3, 2, 3), 5
OUT_OF_THE_WAY = 255  # a label that is no class


@dataclass(frozen=True)
class Case:
    """The inputs of both libraries: arrays with the classes last, and options that JSON can hold."""

    variant: str
    arrays: dict[str, np.ndarray]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def z(self) -> np.ndarray:
        return self.arrays["logits"]

    @property
    def y(self) -> np.ndarray:
        return self.arrays["labels"]

    @property
    def targets(self) -> np.ndarray:
        """Probabilities, or labels."""
        return self.arrays["probs" if "probs" in self.arrays else "labels"]

    def get(self, name: str) -> Any:
        """An option, an array, or None."""
        return self.options.get(name, self.arrays.get(name))


def draw(rng: np.random.Generator, variant: str, takes: Sequence[str], dtype: str) -> Case:
    """A case with half of the options that the call takes, each at random; "name!" is always included."""
    chosen = {name.rstrip("!") for name in takes if name.endswith("!") or rng.random() < 0.5}
    shape = IMAGES if "images" in chosen else POSITIONS
    z = (rng.normal(size=(*shape, CLASSES)) * rng.choice([1, 3] if "small" in chosen else [1, 3, 8])).astype(dtype)
    if "far" in chosen:
        z[..., 0] = 100
    arrays, options = {"logits": z}, {}
    if "soft" in chosen or "sums" in chosen:
        t = rng.dirichlet(np.ones(CLASSES), shape)
        if "sums" in chosen:
            t = t * rng.uniform(0.5, 1.5, (*shape, 1))
        arrays["probs"] = t.astype(dtype)
    else:
        arrays["labels"] = y = rng.integers(0, CLASSES, shape)
        if "every" in chosen:
            y.flat[:CLASSES] = rng.permutation(CLASSES)
        for name, mark in (("minus_100", -100), ("minus_1", -1), ("mark", OUT_OF_THE_WAY), ("class", 1)):
            if name in chosen and "ignore_index" not in options:
                options["ignore_index"] = mark
                y[rng.random(shape) < 0.3] = mark
                y.flat[:2] = mark, 0  # at least one position of each kind
    if "class_weights" in chosen:
        arrays["class_weights"] = rng.uniform(0.2, 3, CLASSES).astype(dtype)
    if "weights" in chosen:
        arrays["weights"] = rng.uniform(0.2, 3, shape).astype(dtype)
    if "zeros" in chosen:
        arrays["weights"] = (rng.uniform(0.2, 3, shape) * (rng.random(shape) < 0.7)).astype(dtype)
        arrays["weights"].flat[0] = 1
    if "smoothing" in chosen:
        options["smoothing"] = float(rng.choice([0.05, 0.1, 0.3]))
    if "z_loss" in chosen:
        options["z_loss"] = 0.01
    if "soft_cap" in chosen:
        options["soft_cap"] = 5.0
    if "linear" in chosen:  # the logits are then features
        arrays["kernel"] = rng.normal(size=(CLASSES, CLASSES)).astype(dtype)
        arrays["bias"] = rng.normal(size=CLASSES).astype(dtype)
    reductions = [name for name in ("mean", "sum", "none") if name in takes]
    options["reduction"] = str(rng.choice(reductions)) if reductions else "mean"
    arrays["cotangent"] = rng.normal(size=shape).astype(dtype)  # for losses that are not reduced
    return Case(variant, arrays, options)
