"""Does a network learn the next token of a vocabulary so large that its logits would not fit in memory?

python -m experiments.vocabulary --seed 0

The last tokens go through an embedding and a multilayer perceptron. The head that scores every token of the
vocabulary is fused with its loss (`jaxsoft.linear_cross_entropy`), so that at any time only as many logits
exist as --memory-budget allows. Afterwards the head is compared with a head that stores all logits. After a
kill, the same command with --resume gives the same metrics and parameters, bit for bit on a CPU, as an
uninterrupted run.
A vocabulary of 262144 needs --corpus installed, or a larger text of your own. Perplexities of different
vocabularies cannot be compared, because tokens outside a vocabulary are not targets.
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments._door import InputError, enter, make_folder, write_json
from experiments.vocabulary.corpus import Text, read_text
from experiments.vocabulary.heads import compare_heads
from experiments.vocabulary.pictures import plot_heads, plot_loss
from experiments.vocabulary.training import Training, check, fit, plan_of


@dataclass(frozen=True)
class Config(Training):
    """Options of the experiment."""

    compare_sizes: tuple[int, ...] = (2048, 8192, 32768, 131072)
    """Vocabularies for which the fused head is compared with an unfused one; none to skip this."""


def report(config: Training, text: Text, summary: dict[str, Any]) -> None:
    """Write and print the results."""
    table = pd.read_csv(config.out / "metrics.csv")
    summary["tokens"] = int(table["tokens"].to_numpy().sum())
    plot_loss(table, summary, config.out / "loss.png")
    write_json(config.out / "summary.json", summary)
    print(
        f"{config.steps} steps, {summary['tokens']} tokens: perplexity {summary['perplexity']:.1f} over "
        f"{summary['held_out_words']} held-out tokens of {len(text.classes) - 1} known; see {config.out}"
    )


def run(config: Config) -> dict[str, Any]:
    """Train, compare the heads, write the results to `config.out` and return the summary."""
    check(config)
    if any(size < 2 for size in config.compare_sizes):
        raise InputError(f"--compare-sizes: expected at least 2 classes, got {min(config.compare_sizes)}")
    for size in config.compare_sizes:
        plan_of(config, size)
    print(f"the head: {plan_of(config, config.vocabulary)}")
    text = read_text(config.corpus, config.vocabulary, config.context, config.seed)
    make_folder(config.out)
    summary = fit(config, text)
    if config.compare_sizes:
        sizes = config.batch_size, config.features, config.memory_budget * 2**20
        heads = compare_heads(config.compare_sizes, *sizes, config.seed)
        heads.to_csv(config.out / "heads.csv", index=False)
        plot_heads(heads, *sizes, config.out / "heads.png")
    report(config, text, summary)
    return summary


if __name__ == "__main__":
    enter(Config, run, __doc__)
