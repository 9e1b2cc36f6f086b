"""Teacher and students: what is stored, what is learnt from it, and runs that are killed."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from test_vocabulary import cache, in_bytes, parameters, write_corpus

from experiments._door import InputError
from experiments.distillation import training
from experiments.distillation.__main__ import Config, run
from experiments.distillation.training import STUDENTS, TEACHER, Lesson, loss_of, score
from experiments.vocabulary.corpus import UNKNOWN, read_text
from experiments.vocabulary.training import Batch, features_of, held_out_batches, init_network, training_batch

pytestmark = [pytest.mark.scripts, pytest.mark.x32, pytest.mark.optimized, pytest.mark.xdist_group("distillation")]

V, K, BATCH, STEPS, STUDENT_STEPS = 32, 3, 32, 7, 6
WIDTH, STUDENT_WIDTH = 16, 8


def config(corpus, out, **options):
    chosen = {
        "vocabulary": V, "context": 3, "features": WIDTH, "steps": STEPS, "batch_size": BATCH, "learning_rate": 0.01,
        "student_steps": STUDENT_STEPS, "student_features": STUDENT_WIDTH, "k": K, "checkpoint_every": 2,
    }  # fmt: skip
    return Config(**chosen | {"corpus": str(corpus), "out": out} | options)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run that was left alone."""
    out = tmp_path_factory.mktemp("whole")
    return run(config(corpus, out)), out


@pytest.fixture(scope="module")
def text(corpus):
    return read_text(str(corpus), V, context=3, seed=0)


def network(out, steps):
    """The last parameters, from the file alone."""
    found = parameters(out, steps)
    return {
        "embedding": found["0/embedding"],
        "hidden": [{"kernel": found[f"0/hidden/{n}/kernel"], "bias": found[f"0/hidden/{n}/bias"]} for n in range(2)],
        "head": {"kernel": found["0/head/kernel"], "bias": found["0/head/bias"]},
    }


def log_softmax(z):
    return z - jnp.log(jnp.sum(jnp.exp(z), -1, keepdims=True))


def log_probs_of(params, contexts):
    return log_softmax(features_of(params, contexts) @ params["head"]["kernel"] + params["head"]["bias"])


# What is stored.


def test_the_top_k_of_the_teacher_is_stored_for_every_training_word(whole, corpus, text):
    _, out = whole
    teacher = network(out / TEACHER, STEPS)
    indices, log_probs, features = (
        np.load(out / "teacher/stored" / f"{name}.npy") for name in ("indices", "log_probs", "features")
    )
    assert indices.shape == log_probs.shape == (STUDENT_STEPS, BATCH, K)
    assert features.shape == (STUDENT_STEPS, BATCH, WIDTH)
    for n in range(STUDENT_STEPS):
        contexts = training_batch(text, config(corpus, out), n + 1).contexts
        np.testing.assert_allclose(features[n], features_of(teacher, contexts), atol=1e-5)
        log_p = log_probs_of(teacher, contexts)
        np.testing.assert_allclose(log_probs[n], -np.sort(-log_p)[:, :K], atol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(log_p, indices[n], 1), log_probs[n], atol=1e-5)


def test_bytes_a_word_are_those_of_the_files(whole):
    summary, out = whole
    rows = {row["network"]: row["bytes_a_word"] for row in summary["networks"]}
    words = STUDENT_STEPS * BATCH
    head = 4 * V * (WIDTH + 1)
    assert rows == {
        "teacher": None, "labels": 4, "tail": 8 * K, "renormalise": 8 * K, "nothing": 8 * K, "tail-and-labels": 8 * K + 4, "head": 4 * WIDTH + head / words,
    }  # fmt: skip
    sizes = {
        path.stem: path.stat().st_size - 128 for path in (out / "teacher/stored").iterdir()
    }  # but for NumPy's header
    assert sizes == {"indices": 4 * K * words, "log_probs": 4 * K * words, "features": 4 * WIDTH * words}


# Losses.


@pytest.fixture(scope="module")
def lesson(corpus, text, tmp_path_factory):
    """A student, a batch, and a teacher's log p, with what each kind of student is told of it."""
    init = jax.jit(init_network, static_argnums=(1, 2, 3))
    student, teacher = init(jax.random.key(1), V, 3, STUDENT_WIDTH), init(jax.random.key(2), V, 3, WIDTH)
    batch = training_batch(text, config(corpus, tmp_path_factory.mktemp("lesson")), 1)
    indices, log_probs, features = training.knowledge(K, 2**20, teacher, batch.contexts)
    told = dict.fromkeys(STUDENTS, (indices, log_probs)) | {"labels": (), "head": (features, teacher["head"])}
    return student, batch, log_probs_of(teacher, batch.contexts), told


def naive_loss(kind, params, batch, log_t):
    """Written on all logits; what is among the teacher's K is found again."""
    log_p, known = log_probs_of(params, batch.contexts), batch.targets != UNKNOWN
    p, t = jnp.exp(log_p), jnp.exp(log_t)
    among = log_t >= jnp.sort(log_t, -1)[:, -K, None]
    inside, p_in, t_in = (jnp.sum(jnp.where(among, a, 0), 1) for a in (t * log_p, p, t))
    losses = {
        "labels": -log_p[np.arange(len(p)), batch.targets],
        "tail": -inside - (1 - t_in) * jnp.log(1 - p_in),
        "renormalise": -inside / t_in + jnp.log(p_in),
        "nothing": -inside,
        "head": jnp.sum(t * (log_t - log_p), 1),
    }
    losses["tail-and-labels"] = (losses["tail"] + losses["labels"]) / 2
    return jnp.sum(jnp.where(known, losses[kind], 0)), known.sum()


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_student_s_loss_is_the_sum_over_the_known_words(lesson, kind):
    params, batch, log_t, told = lesson
    loss = loss_of(kind, 2**20)
    (ours, count), gradient = jax.value_and_grad(loss, has_aux=True)(params, Lesson(batch, told[kind]))
    (naive, known), expected = jax.value_and_grad(lambda p: naive_loss(kind, p, batch, log_t), has_aux=True)(params)
    assert 0 < known < len(batch.targets)
    assert count == known
    assert float(ours) == pytest.approx(float(naive), rel=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    unknown = Batch(batch.contexts, np.full_like(batch.targets, UNKNOWN))
    for leaf in jax.tree.leaves(jax.grad(lambda p: loss(p, Lesson(unknown, told[kind]))[0])(params)):
        assert (leaf == 0).all()


def test_scores_are_those_of_the_last_parameters(whole, corpus, text):
    summary, out = whole
    assert [row["network"] for row in summary["networks"]] == [TEACHER, *STUDENTS]
    batches = held_out_batches(text, config(corpus, out))
    for row in summary["networks"]:
        params = network(out / row["network"], STEPS if row["network"] == TEACHER else STUDENT_STEPS)
        log_p = np.concatenate([log_probs_of(params, batch.contexts) for batch in batches])
        labels = np.concatenate([batch.targets for batch in batches])
        log_p, labels = log_p[labels != UNKNOWN], labels[labels != UNKNOWN]
        losses = -log_p[np.arange(len(labels)), labels]
        assert row["loss"] == pytest.approx(losses.mean(), rel=1e-5)
        assert row["perplexity"] == pytest.approx(np.exp(losses.mean()), rel=1e-4)
        assert row["entropy"] == pytest.approx(-(np.exp(log_p) * log_p).sum(1).mean(), rel=1e-5)
        assert row["accuracy"] == pytest.approx((log_p.argmax(1) == labels).mean())


def test_a_loss_beyond_measure_has_a_perplexity_all_the_same(lesson):
    params, batch, *_ = lesson
    head = {"kernel": params["head"]["kernel"] * 1e6, "bias": params["head"]["bias"]}
    assert score(params | {"head": head}, [batch], 2**20)["perplexity"] == np.inf


# Runs.


def test_students_are_alike_but_for_what_they_learn_from(whole):
    """Equal first weights, hence equal first losses of the same kind; and the table is printed from these files."""
    summary, out = whole
    table = pd.read_csv(out / "students.csv")
    assert table["network"].tolist() == [TEACHER, *STUDENTS]
    assert table["perplexity"].tolist() == [row["perplexity"] for row in summary["networks"]]
    assert {path.name for path in out.iterdir()} == {
        TEACHER, *STUDENTS, "students.csv", "summary.json", "distillation.png",
    }  # fmt: skip
    for name in STUDENTS:
        metrics = pd.read_csv(out / name / "metrics.csv")
        assert list(metrics) == ["step", "loss", "tokens"]
        assert len(metrics) == STUDENT_STEPS
    assert len({(out / name / "metrics.csv").read_bytes() for name in STUDENTS}) == len(STUDENTS)


def same(found, expected):
    """Tables, curves, parameters and what was stored, to the bit."""
    for path in ["students.csv", *(f"{name}/metrics.csv" for name in (TEACHER, *STUDENTS))]:
        assert (found / path).read_bytes() == (expected / path).read_bytes(), path
    for path in (expected / "teacher/stored").iterdir():
        assert (found / "teacher/stored" / path.name).read_bytes() == path.read_bytes(), path
    for name in (TEACHER, *STUDENTS):
        steps = STEPS if name == TEACHER else STUDENT_STEPS
        assert in_bytes(parameters(found / name, steps)) == in_bytes(parameters(expected / name, steps)), name


def test_a_killed_run_resumes_bit_for_bit(corpus, whole, tmp_path):
    options = config(corpus, tmp_path)
    named = [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(options).items()
             if name not in ("resume", "overwrite")]  # fmt: skip
    environment = os.environ | cache() | {"JAX_NUM_CPU_DEVICES": str(jax.local_device_count())}
    command = [sys.executable, "-m", "experiments.distillation", *named]
    metrics = tmp_path / "renormalise" / "metrics.csv"
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0].decode()
    assert process.returncode == -signal.SIGKILL, output
    summary = run(dataclasses.replace(options, resume=True))
    same(tmp_path, whole[1])
    assert {**summary, "seconds": {}} == {**whole[0], "seconds": {}}


def test_a_run_killed_while_it_stored_stores_again(corpus, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[1], out)
    (out / "teacher/stored").rename(out / "teacher/stored.unfinished")
    (out / "teacher/stored.unfinished/indices.npy").write_bytes(b"half")
    for name in STUDENTS:
        shutil.rmtree(out / name)
    run(config(corpus, out, resume=True))
    same(out, whole[1])


def test_a_replaced_run_keeps_nothing_of_the_one_before(corpus, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[1], out)
    run(config(corpus, out, student_steps=2, k=1, overwrite=True))
    assert {name: len(pd.read_csv(out / name / "metrics.csv")) for name in STUDENTS} == dict.fromkeys(STUDENTS, 2)
    assert np.load(out / "teacher/stored/indices.npy").shape == (2, BATCH, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_steps": 0}, "--student-steps: expected at least 1, got 0"),
        ({"student_features": -1}, "--student-features: expected at least 1, got -1"),
        ({"steps": 0}, "--steps: expected at least 1, got 0"),
        ({"k": 0}, "--k: expected from 1 to the 32 classes, got 0"),
        ({"k": 33}, "--k: expected from 1 to the 32 classes, got 33"),
        ({"memory_budget": 0}, "--memory-budget: expected at least 1 MiB for 32 classes, got 0"),
        (
            {"memory_budget": 1, "vocabulary": 2**17},
            "--memory-budget: expected at least 2097152 bytes, one position's logits and gradient, got 1048576",
        ),
        (
            {"resume": True, "overwrite": True},
            "--overwrite: expected without --resume, which goes on with what is there",
        ),
    ],
)
def test_bad_options_are_one_line(corpus, tmp_path, options, message):
    with pytest.raises(InputError) as caught:
        run(config(corpus, tmp_path, **options))
    assert str(caught.value) == message


def test_resume_takes_the_same_options(corpus, whole):
    with pytest.raises(InputError, match=r"--k: .*teacher/checkpoints was written with 3, got 2"):
        run(config(corpus, whole[1], k=2, resume=True))


def test_a_finished_or_unfinished_run_is_kept(corpus, whole, tmp_path):
    with pytest.raises(InputError, match="holds a finished run: replace it with --overwrite"):
        run(config(corpus, whole[1]))
    shutil.copytree(whole[1] / TEACHER, tmp_path / TEACHER)
    with pytest.raises(InputError, match="teacher: holds an unfinished run: go on with --resume"):
        run(config(corpus, tmp_path))
