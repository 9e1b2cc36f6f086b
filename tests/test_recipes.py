"""The recipes against the same losses on all logits, and against results known by hand."""

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

pytestmark = pytest.mark.scripts

# What is compiled once, all tests read.

CASES = [
    pytest.param(seed, n, marks=() if seed == 0 else pytest.mark.exhaustive) for seed in range(3) for n in range(11)
]


examples = functools.cache(given.examples)


def log_softmax(z):
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def at(log_p, labels):
    return np.take_along_axis(log_p, np.maximum(labels, 0)[..., None], -1)[..., 0]


@functools.cache
def program(seed, n):
    return examples(seed)[n].program()


@functools.cache
def outcome(seed, n):
    return program(seed, n)(*examples(seed)[n].arguments)


def of_the_recipe(loss, **options):
    """The program of its first example with such options: of the recipe alone, values and gradients."""
    named = (n for n, e in enumerate(examples(0)) if e.recipe is loss and e.options.items() >= options.items())
    run = program(0, next(named))
    return lambda *arguments: run(*arguments)[0]


def arguments_of(loss, seed):
    return next(e.arguments for e in examples(seed) if e.recipe is loss)


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


def test_the_recipes_import_only_public_functions_of_jaxsoft():
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


def test_values_at_ignored_tokens_do_not_count():
    x, w, labels, old, reference, rewards = arguments_of(losses.grpo_loss, seed=3)
    ignored = np.asarray(labels) == IGNORED
    assert ignored.any()
    loss = of_the_recipe(losses.grpo_loss)
    junk = (np.where(ignored, np.nan, a) for a in (old, reference))
    (changed, of_changed), (same, gradients) = (
        loss(x, w, labels, *junk, rewards),
        loss(x, w, labels, old, reference, rewards),
    )
    np.testing.assert_array_equal(changed["loss"], same["loss"])
    for ours, theirs in zip(of_changed, gradients, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_grpo_before_its_first_step_is_the_policy_gradient():
    """ρ = 1 and ℓ_ref = ℓ: the gradient is that of −A·ℓ, and equal rewards give none, though their mean is rounded."""
    x, w, labels, *_, rewards = map(np.asarray, arguments_of(losses.grpo_loss, seed=4))
    known = (labels != IGNORED).astype(float)
    now = np.where(labels != IGNORED, at(log_softmax(x @ w), labels), 0)
    loss = of_the_recipe(losses.grpo_loss)
    a = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-4)

    @jax.jit
    @jax.grad
    def policy_gradient(w):
        log_p = naive.at(naive.log_softmax(x @ w), labels)
        return -jnp.mean(jnp.sum(a[..., None] * log_p * known, -1) / known.sum(-1))

    _, (_, gradient) = loss(x, w, labels, now, now, rewards)
    np.testing.assert_allclose(gradient, policy_gradient(w), rtol=1e-9, atol=1e-14)
    _, (_, gradient) = loss(x, w, labels, now, now, np.full(rewards.shape, 0.1))
    assert np.abs(gradient).max() < 1e-11


def test_dpo_at_its_reference_is_undecided():
    x, w, labels, _ = map(np.asarray, arguments_of(losses.dpo_loss, seed=5))
    log_p = np.where(labels == IGNORED, 0, at(log_softmax(x @ w), labels))
    values, _ = of_the_recipe(losses.dpo_loss)(x, w, labels, log_p.sum(-1))
    np.testing.assert_allclose(values["loss"], np.log(2), rtol=1e-12)


def test_the_stored_classes_are_the_most_likely():
    rng = np.random.default_rng(6)
    x, w = rng.normal(size=(3, 7, 5)), rng.normal(size=(5, 19))

    @jax.jit
    def run(x, w):
        return losses.store_top_k(x, w, 4, temperature=2.0), jax.lax.top_k(naive.log_softmax(x @ w / 2), 4)

    (indices, log_probs), (expected, classes) = run(x, w)
    np.testing.assert_array_equal(indices, classes)
    np.testing.assert_allclose(log_probs, expected, rtol=1e-12)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn_from_it():
    x, w, *_ = arguments_of(losses.stored_teacher_loss, seed=6)
    stored = losses.store_top_k(x, w, 5, temperature=1.5)
    largest = {}
    for outside in ("tail", "renormalise", "nothing"):
        _, gradients = of_the_recipe(losses.stored_teacher_loss, outside=outside, temperature=1.5)(x, w, *stored)
        largest[outside] = np.abs(gradients[0]).max()
    assert largest["tail"] < 1e-14
    assert largest["renormalise"] < 1e-14
    assert largest["nothing"] > 1e-3
    to_teacher = jax.jit(jax.grad(functools.partial(losses.teacher_loss, share=1.0)))(x, w, np.zeros((3, 7), int), x, w)
    assert np.abs(to_teacher).max() < 1e-14


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
    """The examples, whose programs have run."""
    return [
        SimpleNamespace(title=example.title, arguments=(), program=lambda n=n: lambda: outcome(seed, n))
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
