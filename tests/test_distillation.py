"""Teacher and students: what is stored, what is learnt from it, and runs that are killed."""

import dataclasses
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from test_vocabulary import end_held, in_bytes, parameters, write_corpus

from experiments import _runs
from experiments._door import InputError
from experiments.distillation import __main__ as distillation
from experiments.distillation import training
from experiments.distillation.__main__ import Config, run
from experiments.distillation.training import STUDENTS, TEACHER, Lesson, loss_of, score
from experiments.vocabulary.corpus import UNKNOWN, read_text
from experiments.vocabulary.training import Batch, features_of, held_out_batches, init_network, training_batch

pytestmark = [pytest.mark.scripts, pytest.mark.x32]

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


@pytest.fixture(
    scope="module", params=[("labels", "tail", "head"), pytest.param(STUDENTS, marks=pytest.mark.exhaustive)]
)
def students(request):
    """The students to train: all, or one per kind of stored outputs, since each takes seconds to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "STUDENTS", request.param)
        yield request.param


@pytest.fixture(scope="module")
def whole(corpus, students, tmp_path_factory):
    """A run without interruption."""
    out = tmp_path_factory.mktemp("whole")
    return run(config(corpus, out)), out


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """No pictures, except from the fixture `whole`, whose run comes before."""
    monkeypatch.setattr(distillation, "plot_students", lambda *_: None)


@pytest.fixture(scope="module")
def text(corpus):
    return read_text(str(corpus), V, context=3, seed=0)


def network(out, steps):
    """The last parameters, read from the file only."""
    found = parameters(out, steps)
    return {
        "embedding": found["0/embedding"],
        "hidden": [{"kernel": found[f"0/hidden/{n}/kernel"], "bias": found[f"0/hidden/{n}/bias"]} for n in range(2)],
        "head": {"kernel": found["0/head/kernel"], "bias": found["0/head/bias"]},
    }


FEATURES = jax.jit(features_of)


def log_softmax(z):
    return z - jnp.log(jnp.sum(jnp.exp(z), -1, keepdims=True))


@jax.jit
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
        np.testing.assert_allclose(features[n], FEATURES(teacher, contexts), atol=1e-5)
        log_p = np.asarray(log_probs_of(teacher, contexts))
        np.testing.assert_allclose(log_probs[n], -np.sort(-log_p)[:, :K], atol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(log_p, indices[n], 1), log_probs[n], atol=1e-5)


def test_bytes_per_token_are_the_sizes_of_the_files(whole, students):
    summary, out = whole
    words = STUDENT_STEPS * BATCH
    head = 4 * V * (WIDTH + 1)
    expected = {
        "teacher": None, "labels": 4, "tail": 8 * K, "renormalise": 8 * K, "nothing": 8 * K, "tail-and-labels": 8 * K + 4, "head": 4 * WIDTH + head / words,
    }  # fmt: skip
    rows = {row["network"]: row["bytes_a_word"] for row in summary["networks"]}
    assert rows == {name: expected[name] for name in (TEACHER, *students)}
    stored = training.Stored(*(np.load(out / f"teacher/stored/{name}.npy") for name in training.Stored._fields))
    of_teacher = network(out / TEACHER, STEPS)["head"]
    assert {name: training.bytes_a_word(name, stored, of_teacher) for name in (TEACHER, *STUDENTS)} == expected
    sizes = {
        path.stem: path.stat().st_size - 128 for path in (out / "teacher/stored").iterdir()
    }  # but for NumPy's header
    assert sizes == {"indices": 4 * K * words, "log_probs": 4 * K * words, "features": 4 * WIDTH * words}


# Losses.


@pytest.fixture(scope="module")
def lesson(corpus, text, tmp_path_factory):
    """A student, a batch, a teacher's log p, and the targets that each kind of student gets from it."""
    init = jax.jit(init_network, static_argnums=(1, 2, 3))
    student, teacher = init(jax.random.key(1), V, 3, STUDENT_WIDTH), init(jax.random.key(2), V, 3, WIDTH)
    batch = training_batch(text, config(corpus, tmp_path_factory.mktemp("lesson")), 1)
    read = jax.jit(training.knowledge, static_argnums=(0, 1))
    indices, log_probs, features = read(K, 2**20, teacher, batch.contexts)
    told = dict.fromkeys(STUDENTS, (indices, log_probs)) | {"labels": (), "head": (features, teacher["head"])}
    return student, batch, log_probs_of(teacher, batch.contexts), told


def naive_losses(params, batch, log_t):
    """The losses of every kind, written with all logits; the teacher's K classes are computed again."""
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
    return {kind: jnp.sum(jnp.where(known, loss, 0)) for kind, loss in losses.items()}


@pytest.fixture(scope="module")
def naive(lesson):
    """The losses of every kind and their gradients."""
    params, batch, log_t, _ = lesson
    return jax.device_get(
        jax.jit(lambda p: (naive_losses(p, batch, log_t), jax.jacrev(naive_losses)(p, batch, log_t)))(params)
    )


@pytest.fixture(scope="module")
def ours(lesson):
    """For every kind the loss, the count and the gradient of a batch, and of a batch without known tokens: one program."""
    params, batch, _, told = lesson
    unknown = Batch(batch.contexts, np.full_like(batch.targets, UNKNOWN))

    @jax.jit
    def of(params, batch, told):
        return {
            kind: jax.value_and_grad(loss_of(kind, 2**20), has_aux=True)(params, Lesson(batch, taught))
            for kind, taught in told.items()
        }

    return jax.device_get([of(params, words, told) for words in (batch, unknown)])


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_student_s_loss_is_the_sum_over_the_known_words(lesson, naive, ours, kind):
    _, batch, *_ = lesson
    (loss, count), gradient = ours[0][kind]
    assert 0 < count < len(batch.targets)
    assert count == (batch.targets != UNKNOWN).sum()
    assert float(loss) == pytest.approx(float(naive[0][kind]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(naive[1][kind]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    _, of_unknown = ours[1][kind]
    for leaf in jax.tree.leaves(of_unknown):
        assert (leaf == 0).all()


def test_scores_are_those_of_the_last_parameters(whole, students, corpus, text):
    summary, out = whole
    assert [row["network"] for row in summary["networks"]] == [TEACHER, *students]
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


def test_a_huge_loss_has_an_infinite_perplexity(lesson):
    params, batch, *_ = lesson
    head = {"kernel": params["head"]["kernel"] * 1e6, "bias": params["head"]["bias"]}
    assert score(params | {"head": head}, [batch], 2**20)["perplexity"] == np.inf


# Runs.


def test_students_differ_only_in_their_targets(whole, students):
    """Equal first weights, hence equal first losses of the same kind; and the table is printed from these files."""
    summary, out = whole
    table = pd.read_csv(out / "students.csv")
    assert table["network"].tolist() == [TEACHER, *students]
    assert table["perplexity"].tolist() == [row["perplexity"] for row in summary["networks"]]
    assert {path.name for path in out.iterdir()} == {
        TEACHER, *students, "students.csv", "summary.json", "distillation.png",
    }  # fmt: skip
    for name in students:
        metrics = pd.read_csv(out / name / "metrics.csv")
        assert list(metrics) == ["step", "loss", "tokens"]
        assert len(metrics) == STUDENT_STEPS
    assert len({(out / name / "metrics.csv").read_bytes() for name in students}) == len(students)


def assert_same(found, expected, students):
    """Tables, curves, parameters and stored outputs of the teacher and these students are equal to the bit."""
    (summary, out), (known, whole) = found, expected
    names = (TEACHER, *students)
    rows = (whole / "students.csv").read_text().splitlines()
    assert (out / "students.csv").read_text().splitlines() == [
        row for row in rows if row.split(",")[0] in ("network", *names)
    ]
    for path in (whole / "teacher/stored").iterdir():
        assert (out / "teacher/stored" / path.name).read_bytes() == path.read_bytes(), path
    for name in names:
        steps = STEPS if name == TEACHER else STUDENT_STEPS
        assert (out / name / "metrics.csv").read_bytes() == (whole / name / "metrics.csv").read_bytes(), name
        assert in_bytes(parameters(out / name, steps)) == in_bytes(parameters(whole / name, steps)), name
    networks = [row for row in known["networks"] if row["network"] in names]
    assert {**summary, "seconds": {}} == {**known, "seconds": {}, "networks": networks}


class Stopped(Exception):
    pass


def stopped_at(monkeypatch, options, network, step):
    """Run a network and stop, as if killed, after it wrote this row."""
    append = _runs.append

    def stop(path, row):
        append(path, row)
        if (path.parent.name, row[0]) == (network, step):
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(_runs, "append", stop)
        with pytest.raises(Stopped):
            run(options)


def killed_while_it_stored(whole, out):
    """A run up to the last student, then reset."""
    shutil.copytree(whole[1], out)
    (out / "teacher/stored").rename(out / "teacher/stored.unfinished")
    (out / "teacher/stored.unfinished/indices.npy").write_bytes(b"half")
    (out / "summary.json").unlink()


def test_a_run_killed_while_it_stored_and_then_while_a_student_learnt_resumes_bit_for_bit(
    corpus, whole, students, tmp_path, monkeypatch
):
    """It stores the outputs again and continues, here with one student."""
    out, student = tmp_path / "out", students[-1]
    killed_while_it_stored(whole, out)
    monkeypatch.setattr(training, "STUDENTS", (student,))
    shutil.rmtree(out / student)
    options = config(corpus, out, resume=True)
    stopped_at(monkeypatch, options, student, 4)
    assert not (out / "teacher/stored.unfinished").exists()
    assert_same((run(options), out), whole, (student,))


@pytest.mark.exhaustive
def test_a_killed_run_resumes_bit_for_bit(corpus, whole, students, tmp_path):
    """In a separate process, which trains all students."""
    options = config(corpus, tmp_path)
    end_held("experiments.distillation", options, tmp_path / "tail" / "metrics.csv", 3, signal.SIGKILL)
    assert_same((run(dataclasses.replace(options, resume=True)), tmp_path), whole, students)


@pytest.mark.exhaustive
def test_a_run_killed_while_it_stored_stores_again(corpus, whole, students, tmp_path):
    out = tmp_path / "out"
    killed_while_it_stored(whole, out)
    for name in students:
        shutil.rmtree(out / name)
    assert_same((run(config(corpus, out, resume=True)), out), whole, students)


def test_a_replaced_run_keeps_nothing_of_the_one_before(corpus, whole, students, tmp_path, monkeypatch):
    """Stopped at its first row."""
    out = tmp_path / "out"
    shutil.copytree(whole[1], out)
    stopped_at(monkeypatch, config(corpus, out, student_steps=2, k=1, overwrite=True), TEACHER, 1)
    assert not (out / "summary.json").exists()
    assert not (out / "teacher/stored").exists()
    assert not [path for name in (TEACHER, *students) for path in (out / name / "checkpoints").iterdir()]


@pytest.mark.exhaustive
def test_a_replaced_run_trains_its_own_students(corpus, whole, students, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[1], out)
    run(config(corpus, out, student_steps=2, k=1, overwrite=True))
    assert {name: len(pd.read_csv(out / name / "metrics.csv")) for name in students} == dict.fromkeys(students, 2)
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
            "--overwrite: expected without --resume, which continues the existing run",
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
    with pytest.raises(InputError, match="teacher: holds an unfinished run: continue it with --resume"):
        run(config(corpus, tmp_path))
