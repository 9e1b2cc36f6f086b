"""The language model: its tokens, its batches, its loss, and runs that are killed."""

import collections
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

from experiments._door import InputError, enter
from experiments.vocabulary import __main__ as vocabulary
from experiments.vocabulary import training
from experiments.vocabulary.__main__ import Config, run
from experiments.vocabulary.corpus import STRETCHES, UNKNOWN, WORD, list_files, read_text
from experiments.vocabulary.heads import compare_heads
from experiments.vocabulary.training import (
    Batch,
    batch_of,
    features_of,
    held_out_batches,
    init_network,
    loss_of,
    training_batch,
)

pytestmark = [pytest.mark.scripts, pytest.mark.x32]

STEPS = 7
NAMES = [f"word{n}" for n in range(40)]


def config(corpus, out, **options):
    chosen = {"vocabulary": 32, "context": 3, "features": 16, "steps": STEPS, "batch_size": 32, "learning_rate": 0.01}
    return Config(**chosen | {"corpus": str(corpus), "checkpoint_every": 2, "compare_sizes": (), "out": out} | options)


def write_corpus(folder):
    """Eight texts in which each of 40 words is followed by one of three."""
    rng = np.random.default_rng(0)
    after = rng.integers(len(NAMES), size=(len(NAMES), 3))
    for n in range(8):
        words = [n]
        for _ in range(300):
            words.append(rng.choice(after[words[-1]]))
        (folder / f"{n}.txt").write_text(" ".join(NAMES[word] for word in words))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run without interruption."""
    out = tmp_path_factory.mktemp("whole")
    return run(config(corpus, out)), out


@pytest.fixture
def without_pictures(monkeypatch):
    for name in ("plot_loss", "plot_heads"):
        monkeypatch.setattr(vocabulary, name, lambda *_: None)


@pytest.fixture(scope="module")
def text(corpus):
    return read_text(str(corpus), vocabulary=32, context=3, seed=0)


def environment():
    """The environment in which a process compiles as the tests do, and shares their compiled programs."""
    return {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(jax.config.read("jax_disable_most_optimizations"))),
    }


HELD = """
import runpy, sys, threading
from experiments import _runs

module, metrics, step, *sys.argv[1:] = sys.argv[1:]
append = _runs.append

def hold(path, row):
    append(path, row)
    if (str(path), str(row[0])) == (metrics, step):
        print("held", flush=True)
        threading.Event().wait()

_runs.append = hold
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
PATIENCE = 600


def end_held(module, options, metrics, step, number):
    """`python -m module` in a process of its own, which waits when it has written that row until a signal ends it.

    Returns what it said after that.
    """
    named = [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(options).items()
             if value not in (None, False, ())]  # fmt: skip
    command = [sys.executable, "-c", HELD, module, metrics, str(step), *named]
    environ = os.environ | environment() | {"JAX_NUM_CPU_DEVICES": str(jax.local_device_count())}
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        overdue = threading.Timer(PATIENCE, process.kill)
        overdue.start()
        said = []
        for line in process.stdout:
            said.append(line)
            if line.endswith("held\n"):
                process.send_signal(number)
                said = []
        overdue.cancel()
    assert process.returncode in (-number, 128 + number), said
    return "".join(said), process.returncode


def parameters(out, step=STEPS):
    """The parameters, read back by NumPy without the experiment's code."""
    assert max(int(path.name) for path in (out / "checkpoints").iterdir()) == step
    with np.load(out / "checkpoints" / str(step) / "state.npz") as state:
        return dict(state)


def in_bytes(state):
    return {name: array.tobytes() for name, array in state.items()}


# Words.


def test_words_are_runs_of_letters_and_single_marks():
    assert WORD.findall("def f_1(x):\n    return 'Größe' != 2.5") == [
        "def", "f_1", "(", "x", ")", ":", "return", "'", "Größe", "'", "!", "=", "2", ".", "5",
    ]  # fmt: skip


def write(folder, **documents):
    for name, content in documents.items():
        (folder / name).write_text(content)
    return str(folder)


def test_the_most_frequent_tokens_of_the_training_documents_are_classes_and_the_rest_is_unknown(tmp_path):
    folder = write(tmp_path, a="x y x z y x", b="q q q q y x", c="z new x y")
    for seed in range(5):
        found = read_text(folder, vocabulary=3, context=2, seed=seed)
        held_out = np.random.default_rng(seed).permutation(3)[0]
        documents = [(tmp_path / name).read_text().split() for name in "abc"]
        test = documents.pop(held_out)
        counts = collections.Counter(word for document in documents for word in document)
        commonest = sorted(counts, key=lambda word: (-counts[word], "xyzqnew".index(word)))[:2]  # ties as first met
        classes = {word: n for n, word in enumerate(commonest, 1)}
        assert found.classes == ("unknown", *classes)
        assert found.counts.tolist()[1:] == [counts[word] for word in classes]
        assert found.counts.sum() == counts.total()
        for words, expected in ((found.train, documents), (found.test, [test])):
            joined = [n for document in expected for n in [0, 0, *(classes.get(word, 0) for word in document)]]
            assert words.tolist() == joined


def test_every_document_is_in_training_or_held_out_and_the_seed_says_which(corpus):
    lengths = set()
    for seed in range(6):
        text = read_text(str(corpus), 32, 3, seed)
        assert text.train.size == 7 * (301 + 3)
        assert text.test.size == 301 + 3
        lengths.add(text.test.tobytes())
    assert len(lengths) > 1


def test_a_single_file_is_cut_into_stretches(tmp_path):
    words = " ".join(NAMES * 10)
    (tmp_path / "book.txt").write_text(words)
    text = read_text(str(tmp_path / "book.txt"), vocabulary=41, context=1, seed=0)
    assert text.test.size == 400 // STRETCHES + 1
    assert text.train.size == (400 // STRETCHES + 1) * (STRETCHES - 1)
    assert (text.train == UNKNOWN).sum() == STRETCHES - 1


def test_files_are_listed_by_name_without_hidden_ones(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    for name in ("z", "a", ".git/x", "b/.hidden", "b/c/y", "b/x"):
        (tmp_path / name).write_text("word")
    assert [path.relative_to(tmp_path).as_posix() for path in list_files(str(tmp_path))] == ["a", "b/c/y", "b/x", "z"]


@pytest.mark.parametrize("packages", [Path(jax.__file__).parent, pytest.param(None, marks=pytest.mark.exhaustive)])
def test_the_standard_library_is_without_the_packages_and_installed_with_them(monkeypatch, packages):
    """All packages, or JAX alone, which takes less time."""
    if packages:
        path_of = sysconfig.get_path
        monkeypatch.setattr("sysconfig.get_path", lambda name: path_of(name) if name == "stdlib" else str(packages))
    alone, all_of_them = list_files("standard-library"), list_files("installed")
    assert not [path for path in alone if "site-packages" in path.parts]
    assert {path.name for path in alone} >= {"ast.py", "typing.py"}
    assert all_of_them[: len(alone)] == alone == sorted(alone)
    assert any(path.parts[-2:] == ("jax", "__init__.py") for path in all_of_them)
    assert len(set(all_of_them)) == len(all_of_them)


def test_a_vocabulary_larger_than_the_text_is_refused_with_both_numbers(tmp_path):
    folder = write(tmp_path, a="one two", b="one two", c="one two")
    assert read_text(folder, 3, 1, 0).classes == ("unknown", "one", "two")
    with pytest.raises(InputError, match=r"--vocabulary: expected at most 3, the distinct tokens .* of .*, got 4$"):
        read_text(folder, 4, 1, 0)


def test_the_standard_library_refers_to_what_is_installed(tmp_path, monkeypatch):
    write(tmp_path, **{"a.py": "one two", "b.py": "one two"})
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match=r"got 262144; --corpus installed has more$"):
        read_text("standard-library", 262144, 1, 0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": b"one two", "b": b"gr\xfc\xdfe"}, "{folder}/b: expected text in UTF-8, got byte 0xfc at 2"),
        ({"a": b"one two", "b": b" \n"}, "{folder}: expected at least two documents with tokens, to hold one out, got 1"),
        ({}, "{folder}: expected at least two documents with tokens, to hold one out, got 0"),
        ({"a": b"one two one", "b": b"three four three"}, "--vocabulary 2: expected some of its tokens in the held-out documents of {folder}, got none"),
    ],
)  # fmt: skip
def test_bad_texts_are_one_line(tmp_path, files, message):
    folder, out = tmp_path / "texts", tmp_path / "out"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        run(config(folder, out, vocabulary=2))
    assert str(caught.value) == message.format(folder=folder)
    assert not out.exists()


def test_a_missing_corpus_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vocabulary", f"--corpus={tmp_path}/nowhere", f"--out={tmp_path}/out"])
    with pytest.raises(SystemExit) as ended:
        enter(Config, run, None)
    assert ended.value.code == 1
    assert capsys.readouterr().err.endswith(f"\nerror: {tmp_path}/nowhere: No such file or directory\n")


# Batches.


def test_a_target_follows_its_context_and_no_context_reaches_into_another_document(tmp_path):
    documents = [["start", *(f"d{n}w{m}" for m in range(1, 6))] for n in range(3)]
    folder = write(tmp_path, **{str(n): " ".join(document) for n, document in enumerate(documents)})
    text = read_text(folder, vocabulary=12, context=4, seed=0)
    batch = batch_of(text.train, np.arange(4, text.train.size), 4)
    known = batch.targets != UNKNOWN
    assert known.sum() == 12
    for context, target in zip(batch.contexts[known], batch.targets[known], strict=True):
        word = text.classes[target]
        before = next(document[: document.index(word)] for document in documents if word in document)
        assert [text.classes[n] for n in context] == (["unknown"] * 4 + before)[-4:]


def test_batches_depend_on_seed_and_step_alone(text, corpus, tmp_path):
    options = config(corpus, tmp_path)
    first = training_batch(text, options, 5)
    assert first.contexts.shape == (32, 3)
    again = training_batch(text, dataclasses.replace(options, steps=99), 5)
    np.testing.assert_array_equal(again.contexts, first.contexts)
    np.testing.assert_array_equal(again.targets, first.targets)
    assert (training_batch(text, options, 6).targets != first.targets).any()
    assert (training_batch(text, dataclasses.replace(options, seed=1), 5).targets != first.targets).any()


@pytest.mark.parametrize(("batch_size", "batches"), [(32, 10), (301, 1), (1000, 1)])
def test_each_held_out_token_is_scored_once(text, corpus, tmp_path, batch_size, batches):
    found = held_out_batches(text, config(corpus, tmp_path, batch_size=batch_size))
    assert [batch.contexts.shape for batch in found] == [(batch_size, 3)] * batches
    targets = np.concatenate([batch.targets for batch in found])
    np.testing.assert_array_equal(targets[:301], text.test[3:])
    assert (targets[301:] == UNKNOWN).all()


def test_a_long_held_out_text_is_scored_at_equal_distances(text, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "HELD_OUT_BATCHES", 5)
    found = held_out_batches(text, config(corpus, tmp_path, batch_size=30))
    targets = np.concatenate([batch.targets for batch in found])
    np.testing.assert_array_equal(targets[:101], text.test[3::3])
    assert len(found) == 4


# Loss.


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_network, static_argnums=(1, 2, 3))(jax.random.key(0), 32, 3, 16)


FEATURES = jax.jit(features_of)
LOSS = jax.jit(jax.value_and_grad(loss_of, has_aux=True), static_argnums=2)


def naive_losses(params, batch):
    """−log softmax of each target, and a mask of the counted ones."""
    head = jax.tree.map(lambda leaf: np.asarray(leaf, float), params["head"])
    logits = np.asarray(FEATURES(params, batch.contexts), float) @ head["kernel"] + head["bias"]
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), batch.targets]
    return losses, batch.targets != UNKNOWN


def test_loss_is_the_sum_over_the_known_targets(params, text, corpus, tmp_path):
    batch = training_batch(text, config(corpus, tmp_path), 1)
    losses, known = naive_losses(params, batch)
    assert 0 < known.sum() < known.size
    (total, count), _ = LOSS(params, batch, 2**20)
    assert float(total) == pytest.approx(losses[known].sum(), rel=1e-5)
    assert count == known.sum()


def test_features_are_the_perceptron_of_the_words_in_their_order(params):
    contexts = np.array([[1, 2, 3], [3, 2, 1]])
    first, second = params["hidden"]
    table = np.asarray(params["embedding"], float)
    for context, found in zip(contexts, FEATURES(params, contexts), strict=True):
        x = np.concatenate([table[word] for word in context])
        np.testing.assert_allclose(found, np.tanh(x @ first["kernel"]) @ second["kernel"], atol=1e-5)


def test_a_batch_of_unknown_targets_changes_no_parameter(params, text, corpus, tmp_path):
    batch = training_batch(text, config(corpus, tmp_path), 1)
    unknown = Batch(batch.contexts, np.full_like(batch.targets, UNKNOWN))
    for leaf in jax.tree.leaves(LOSS(params, unknown, 2**20)[1]):
        assert (np.asarray(leaf) == 0).all()


@pytest.mark.optimized  # whose memory is what users have
def test_heads_are_measured_at_each_size_and_the_fused_one_keeps_to_its_budget():
    table = compare_heads((64, 4096), words=256, features=4, memory_budget=2**19, seed=0)
    assert table["vocabulary"].tolist() == [64, 64, 4096, 4096]
    assert table["head"].tolist() == ["fused", "unfused"] * 2
    assert (table["seconds"] > 0).all()
    fused, unfused = table["temporary_bytes"][2:]
    assert fused < 1.5 * 2**19
    assert unfused >= 4 * 256 * 4096


# Runs.


def test_learns_and_reports_what_it_learnt(whole, corpus, text, params):
    summary, out = whole
    metrics = pd.read_csv(out / "metrics.csv")
    assert list(metrics) == ["step", "loss", "tokens"]
    assert metrics["step"].tolist() == list(range(1, STEPS + 1))
    counts = [(training_batch(text, config(corpus, out), n).targets != UNKNOWN).sum() for n in range(1, STEPS + 1)]
    assert metrics["tokens"].tolist() == counts
    losses, known = naive_losses(params, training_batch(text, config(corpus, out), 1))
    assert metrics["loss"].iloc[0] == pytest.approx(losses[known].mean(), rel=1e-5)
    assert metrics["loss"].iloc[-1] < metrics["loss"].iloc[0]
    assert json.loads((out / "summary.json").read_text()) == summary
    assert set(summary) == {
        "loss", "perplexity", "frequency_loss", "held_out_words", "steps", "seconds", "temporary_bytes", "tokens",
    }  # fmt: skip
    assert summary["tokens"] == sum(counts)
    assert summary["temporary_bytes"] > 0
    assert {path.name for path in out.glob("*.*")} == {"metrics.csv", "summary.json", "loss.png"}


def test_held_out_scores_are_those_of_the_last_parameters(whole, text):
    summary, out = whole
    found = parameters(out)
    params = {
        "embedding": found["0/embedding"],
        "hidden": [{"kernel": found[f"0/hidden/{n}/kernel"], "bias": found[f"0/hidden/{n}/bias"]} for n in range(2)],
        "head": {"kernel": found["0/head/kernel"], "bias": found["0/head/bias"]},
    }
    batch = batch_of(text.test, np.arange(3, text.test.size), 3)
    losses, known = naive_losses(params, batch)
    assert summary["loss"] == pytest.approx(losses[known].mean(), rel=1e-5)
    assert summary["perplexity"] == pytest.approx(np.exp(losses[known].mean()), rel=1e-4)
    assert summary["held_out_words"] == known.sum()
    shares = text.counts[1:] / text.counts[1:].sum()
    assert summary["frequency_loss"] == pytest.approx(-np.mean(np.log(shares[batch.targets[known] - 1])))


def test_beats_guessing_by_frequency(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "plot_loss", lambda *_: None)
    summary = run(config(corpus, tmp_path, steps=150, checkpoint_every=150, compare_sizes=(16, 64)))
    assert summary["loss"] < summary["frequency_loss"] - 1
    assert len(pd.read_csv(tmp_path / "heads.csv")) == 4
    assert {path.name for path in tmp_path.glob("*.png")} == {"heads.png"}


def test_a_killed_run_resumes_bit_for_bit(corpus, whole, tmp_path, without_pictures):
    options, metrics = config(corpus, tmp_path), tmp_path / "metrics.csv"
    end_held("experiments.vocabulary", options, metrics, 5, signal.SIGKILL)
    assert metrics.read_bytes().count(b"\n") == 1 + 5
    summary = run(dataclasses.replace(options, resume=True))
    assert metrics.read_bytes() == (whole[1] / "metrics.csv").read_bytes()
    assert in_bytes(parameters(tmp_path)) == in_bytes(parameters(whole[1]))
    assert {**summary, "seconds": 0} == {**whole[0], "seconds": 0}


def test_a_loss_that_grew_gives_a_warning(corpus, tmp_path, capfd, without_pictures):
    run(config(corpus, tmp_path, learning_rate=20.0))
    losses = pd.read_csv(tmp_path / "metrics.csv")["loss"].to_numpy()
    assert losses[-1] > losses[0]
    assert (
        f"warning: --learning-rate 20: expected the loss to fall, got {losses[0]:.4g} at first and {losses[-1]:.4g} after 7"
    ) in capfd.readouterr().err


def test_resume_takes_the_same_text(corpus, whole, tmp_path):
    out, document = tmp_path / "out", corpus / "3.txt"
    shutil.copytree(whole[1], out)
    before = document.read_text()
    document.write_text("word1 " + before)
    try:
        with pytest.raises(
            InputError, match=r"--corpus: .* was written with .*, 2408 tokens, checksum .*, got .*, 2409 tokens"
        ):
            run(config(corpus, out, resume=True))
    finally:
        document.write_text(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps: expected at least 1, got 0"),
        ({"context": 0}, "--context: expected at least 1, got 0"),
        ({"features": -3}, "--features: expected at least 1, got -3"),
        ({"vocabulary": 1}, "--vocabulary: expected at least 2 classes, got 1"),
        ({"memory_budget": -1}, "--memory-budget: expected at least 1 MiB for 32 classes, got -1"),
        ({"memory_budget": 0}, "--memory-budget: expected at least 1 MiB for 32 classes, got 0"),
        ({"compare_sizes": (8, 2**24)}, "--memory-budget: expected at least 128 MiB for 16777216 classes, got 64"),
        ({"compare_sizes": (8, 1)}, "--compare-sizes: expected at least 2 classes, got 1"),
        ({"learning_rate": 1e30}, "--learning-rate 1e+30: expected a finite loss, got nan at step"),
    ],
)
def test_bad_options_are_one_line(corpus, tmp_path, options, message):
    with pytest.raises(InputError) as caught:
        run(config(corpus, tmp_path, **options))
    assert message in str(caught.value)
