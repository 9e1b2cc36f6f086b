"""What does a small language model learn from a few stored probabilities of a larger one, and does it matter how
the rest is treated?

python -m experiments.distillation --seed 0

A teacher is trained on the tokens of `experiments.vocabulary`, and its top-k and the features before its head are
stored for the students' batches. Students of the same size and initial weights then learn from labels; from the top-k,
with the rest of the vocabulary as one class ("tail"), ignored ("renormalise") or with target 0 ("nothing"); from "tail"
and labels, half and half; and from the teacher's head. A network is calibrated if its entropy equals its loss. A top-k
does not tell which of the other tokens are likely: while these have much of the probability, labels are needed too.
After a kill, the same command with --resume gives the same table, bit for bit on a CPU, as an uninterrupted run.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments._door import enter, make_folder, write_json
from experiments.distillation.pictures import plot_students
from experiments.distillation.training import TEACHER, Config, bytes_a_word, check, fit, score
from experiments.vocabulary.corpus import read_text
from experiments.vocabulary.training import held_out_batches


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table as printed."""
    lines = [
        "| learnt from | bytes per token | perplexity | loss | entropy | accuracy |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        stored = "" if row["bytes_a_word"] is None else f"{row['bytes_a_word']:,.0f}"
        lines.append(
            f"| {row['network']} | {stored} | {row['perplexity']:,.1f} | {row['loss']:.3f} | {row['entropy']:.3f} "
            f"| {100 * row['accuracy']:.1f} % |"
        )
    return "\n".join(lines)


def run(config: Config) -> dict[str, Any]:
    """Train all networks, write the results to `config.out` and return the summary."""
    check(config)
    text = read_text(config.corpus, config.vocabulary, config.context, config.seed)
    out = make_folder(config.out)
    params, seconds, stored = fit(config, text)
    held_out = held_out_batches(text, config)
    budget = config.memory_budget * 2**20
    head = params[TEACHER]["head"]
    rows = [
        {"network": name, "bytes_a_word": bytes_a_word(name, stored, head), **score(network, held_out, budget)}
        for name, network in params.items()
    ]
    table = pd.DataFrame(rows)
    table.to_csv(out / "students.csv", index=False)
    plot_students(table, out / "distillation.png")
    summary = {
        "networks": rows,
        "words": config.student_steps * config.batch_size,
        "bytes_a_word_of_all_logits": 4 * config.vocabulary,
        "stored_probability": float(np.exp(stored.log_probs).sum(-1).mean()),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    write_json(out / "summary.json", summary)
    print(markdown(rows))
    print(f"of the teacher's probability {100 * summary['stored_probability']:.1f} % is stored; see {out}")
    return summary


if __name__ == "__main__":
    enter(Config, run, __doc__)
