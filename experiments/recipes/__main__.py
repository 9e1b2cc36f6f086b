"""Do a few lines over heads that store no logits compute the losses of today's trainers, as from all logits?

python -m experiments.recipes

Supervised fine-tuning on packed sequences, logged metrics, GRPO, DPO, distillation from a stored top-k and from a
teacher's head, CLIP, and a router of experts: for a small example each value is computed from all logits and by the
recipe, in float64, and printed with the largest difference of a gradient. The recipes, for you to copy, are in
experiments/recipes/losses.py.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from experiments._door import check_seed, enter, make_folder
from experiments._numbers import Number, each, report
from experiments.recipes.examples import Example, examples


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    seed: int = 0
    """Seed for the examples."""
    out: Path = Path("out/recipes")
    """Folder for summary.json."""


def compare(example: Example) -> list[Number]:
    """Every value as on all logits and as by the recipe, and how far their gradients are apart."""
    (found, gradients), (expected, expected_gradients) = example.program()(*example.arguments)
    numbers = []
    for name in sorted(expected, key=lambda name: (name != "loss", name)):
        value = expected[name]
        quantity = f"{example.title}: {name}"
        if value.ndim:
            numbers += each(quantity, np.asarray(value).tolist(), found[name], 10)
        else:
            numbers.append(Number(quantity, f"{float(value):.10f}", found[name]))
    pairs = zip(expected_gradients, gradients, strict=True)
    apart = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)
    return [*numbers, Number(f"{example.title}: gradients", "<1e-12", apart)]


def run(config: Config) -> dict[str, float]:
    """Compare every recipe with its naive form, and write the table."""
    check_seed(config.seed)
    out = make_folder(config.out)
    with jax.enable_x64(True):
        return report([number for example in examples(config.seed) for number in compare(example)], out)


if __name__ == "__main__":
    enter(Config, run, __doc__)
