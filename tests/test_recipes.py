"""The recipes against the same losses on all logits, and what is known of them by hand."""

import ast
import functools
import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import recipes
from experiments._door import InputError
from experiments.recipes import __main__ as door
from experiments.recipes import examples as given
from experiments.recipes import losses, naive
from experiments.recipes.losses import IGNORED
from experiments.vocabulary.heads import temporary_bytes

CASES = [
    pytest.param(seed, n, marks=() if seed == 0 else pytest.mark.exhaustive) for seed in range(3) for n in range(11)
]


examples = functools.cache(given.examples)


@functools.cache
def outcome(seed, n):
    """Values and gradients of an example by the recipe and on all logits, in one program."""
    example = examples(seed)[n]
    still = tuple(map(np.asarray, example.arguments[example.moving :]))  # the naive losses look at their values

    def differentiated(loss, moving, others):
        def value(*moving):
            found = example._replace(arguments=moving + others).values(loss)
            return found["loss"], found

        (_, values), gradients = jax.value_and_grad(value, range(example.moving), has_aux=True)(*moving)
        return values, gradients

    @jax.jit
    def run(moving, others):
        return differentiated(example.recipe, moving, others), differentiated(example.naive, moving, still)

    return run(example.arguments[: example.moving], example.arguments[example.moving :])


@pytest.mark.parametrize(("seed", "n"), CASES)
def test_equals_the_loss_on_all_logits(seed, n):
    (found, gradients), (expected, expected_gradients) = outcome(seed, n)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == jnp.float64
        np.testing.assert_allclose(found[name], value, rtol=1e-10, err_msg=name)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert np.any(np.asarray(theirs) != 0)
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_every_recipe_has_an_example_and_is_short():
    assert len(examples(0)) * 3 == len(CASES)
    functions = dict(inspect.getmembers(losses, lambda x: inspect.isfunction(x) and x.__module__ == losses.__name__))
    assert {example.recipe.__name__ for example in examples(0)} == {name for name in functions if "loss" in name}
    for function in functions.values():
        body = ast.parse(inspect.getsource(function)).body[0].body[1:]  # without the docstring
        assert body[-1].end_lineno - body[0].lineno < 25


def test_the_recipes_import_nothing_of_the_library_but_its_public_functions():
    for node in ast.walk(ast.parse(inspect.getsource(losses))):
        if isinstance(node, ast.ImportFrom):
            assert node.module in ("typing", "jax", "jaxtyping", "jaxsoft")


def test_labels_never_cross_from_a_sequence_to_the_next():
    tokens, sequences = np.array([[5, 6, 7, 8, 9, 3, 0]]), np.array([[4, 4, 4, 1, 1, 2, 2]])
    learnt = np.array([[True, False, True, True, True, True, False]])
    i, labels = IGNORED, jax.jit(losses.packed_labels)
    assert labels(tokens, sequences, learnt).tolist() == [[i, 7, i, 9, i, i, i]]
    assert labels(tokens, sequences, learnt | True).tolist() == [[6, 7, i, 9, i, 0, i]]


def test_a_row_packed_or_apart_has_the_same_loss():
    rng = np.random.default_rng(0)
    x, w, tokens = rng.normal(size=(9, 4)), rng.normal(size=(4, 7)), rng.integers(7, size=9)

    @jax.jit
    def run(x, w):
        parts = np.s_[:5], np.s_[5:]
        packed = losses.packed_loss(x[None], w, tokens[None], np.array([[0] * 5 + [1] * 4]), np.ones((1, 9), bool))
        return packed, [naive.at(naive.log_softmax(x[part] @ w)[:-1], tokens[part][1:]) for part in parts]

    packed, apart = run(x, w)
    np.testing.assert_allclose(packed, -np.concatenate(apart).mean(), rtol=1e-12)


def test_what_is_said_of_ignored_tokens_does_not_count():
    example = next(e for e in examples(3) if e.recipe is losses.grpo_loss)
    x, w, labels, old, reference, rewards = example.arguments
    ignored = np.asarray(labels) == IGNORED
    assert ignored.any()

    @jax.jit
    def run(arguments):
        given = example._replace(arguments=arguments)
        return given.values(losses.grpo_loss)["loss"], *given.gradients(losses.grpo_loss)

    junk = (np.where(ignored, np.nan, a) for a in (old, reference))
    for ours, theirs in zip(run((x, w, labels, *junk, rewards)), run(example.arguments), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_grpo_before_its_first_step_is_the_policy_gradient():
    """ρ = 1 and ℓ_ref = ℓ: the gradient is that of −A·ℓ, and equal rewards give none, though their mean is rounded."""
    x, w, labels, *_, rewards = next(e for e in examples(4) if e.recipe is losses.grpo_loss).arguments

    @jax.jit
    def run(w, rewards):
        now = jnp.where(labels == IGNORED, 0, naive.at(naive.log_softmax(x @ w), labels))
        a = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-4)

        def policy(w):
            log_p = naive.at(naive.log_softmax(x @ w), labels)
            known = (labels != IGNORED).astype(float)
            return -jnp.mean(jnp.sum(a[..., None] * log_p * known, -1) / known.sum(-1))

        return jax.grad(losses.grpo_loss, 1)(x, w, labels, now, now, rewards), jax.grad(policy)(w)

    np.testing.assert_allclose(*run(w, rewards), rtol=1e-9, atol=1e-14)
    assert np.abs(run(w, np.full(rewards.shape, 0.1))[0]).max() < 1e-11


def test_dpo_at_its_reference_is_undecided():
    x, w, labels, _ = next(e for e in examples(5) if e.recipe is losses.dpo_loss).arguments

    @jax.jit
    def run(x, w):
        log_p = jnp.where(labels == IGNORED, 0, naive.at(naive.log_softmax(x @ w), labels))
        return losses.dpo_loss(x, w, labels, log_p.sum(-1))

    np.testing.assert_allclose(run(x, w), np.log(2), rtol=1e-12)


def test_the_stored_classes_are_the_likeliest():
    rng = np.random.default_rng(6)
    x, w = rng.normal(size=(3, 7, 5)), rng.normal(size=(5, 19))

    @jax.jit
    def run(x, w):
        return losses.store_top_k(x, w, 4, temperature=2.0), jax.lax.top_k(naive.log_softmax(x @ w / 2), 4)

    (indices, log_probs), (expected, classes) = run(x, w)
    np.testing.assert_array_equal(indices, classes)
    np.testing.assert_allclose(log_probs, expected, rtol=1e-12)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn_from_it():
    rng = np.random.default_rng(7)
    x, w = rng.normal(size=(6, 5)), rng.normal(size=(5, 19))

    @jax.jit
    def run(x, w):
        stored = losses.store_top_k(x, w, 4)
        gradients = {
            outside: jax.grad(losses.stored_teacher_loss)(x, w, *stored, outside=outside)
            for outside in ("tail", "renormalise", "nothing")
        }
        gradients["teacher"] = jax.grad(losses.teacher_loss)(x, w, np.zeros(6, int), x, w, share=1.0)
        return {name: jnp.abs(gradient).max() for name, gradient in gradients.items()}

    largest = run(x, w)
    assert largest["tail"] < 1e-14
    assert largest["renormalise"] < 1e-14
    assert largest["nothing"] > 1e-3
    assert largest["teacher"] < 1e-14


@pytest.mark.x32
def test_the_contrastive_loss_stores_no_matrix_of_all_pairs():
    n = 4096
    arguments = *(jax.ShapeDtypeStruct((n, 8), jnp.float32),) * 2, jax.ShapeDtypeStruct((), jnp.float32)
    recipe = jax.value_and_grad(lambda *a: losses.clip_loss(*a, memory_budget=2**20), (0, 1, 2))
    stored, all_pairs = (
        temporary_bytes(jax.jit(f).lower(*arguments).compile())
        for f in (recipe, jax.value_and_grad(naive.clip_loss, (0, 1, 2)))
    )
    assert stored < 6 * 2**20
    assert all_pairs >= 4 * n**2


def test_a_balanced_router_has_a_term_of_alpha():
    router_loss = jax.jit(functools.partial(losses.router_loss, balance=0.5))
    _, metrics = router_loss(np.eye(4) * 9, np.eye(4))
    np.testing.assert_array_equal(metrics["load"], 0.25)
    np.testing.assert_allclose(metrics["balance"], 0.5, rtol=1e-12)
    alone, one = router_loss(np.ones((8, 4)), 9 * np.eye(4)[:, :1] * np.array([1.0, 0, 0, 0]))
    np.testing.assert_array_equal(one["load"], [1, 0, 0, 0])
    assert one["balance"] > 1.99  # E times as much
    np.testing.assert_allclose(alone, one["balance"] + one["z_loss"])


def compiled(seed):
    """The examples, of which the script gets what was computed in one program each, and one computes itself."""
    return [
        example
        if example.recipe is losses.clip_loss
        else SimpleNamespace(
            title=example.title,
            recipe=0,
            naive=1,
            values=lambda of, n=n: outcome(seed, n)[of][0],
            gradients=lambda of, n=n: outcome(seed, n)[of][1],
        )
        for n, example in enumerate(examples(seed))
    ]


@pytest.mark.parametrize("get", [compiled, pytest.param(given.examples, marks=pytest.mark.exhaustive)])
def test_the_script_states_and_computes_each(get, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(door, "examples", get)
    numbers = door.run(door.Config(out=tmp_path))
    said = capsys.readouterr().out
    for example in examples(0):
        assert f"{example.title}: gradients" in numbers
        assert f"{example.title}: loss" in said
    assert (tmp_path / "summary.json").exists()
    assert recipes.__doc__
    with pytest.raises(InputError, match=r"--seed: expected an integer in \[0, 2\*\*32\), got -1"):
        door.run(door.Config(seed=-1, out=tmp_path))
