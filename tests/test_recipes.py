"""The recipes against the same losses on all logits, and what is known of them by hand."""

import ast
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import recipes
from experiments._door import InputError
from experiments.recipes import __main__ as door
from experiments.recipes import losses, naive
from experiments.recipes.examples import examples
from experiments.recipes.losses import IGNORED
from experiments.vocabulary.heads import temporary_bytes

SEEDS = 2
CASES = [(seed, n) for seed in range(1, 1 + SEEDS) for n in range(11)]


@pytest.mark.parametrize(("seed", "n"), CASES)
def test_equals_the_loss_on_all_logits(seed, n):
    example = examples(seed)[n]
    expected = example.values(example.naive)
    found = jax.jit(lambda: example.values(example.recipe))()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == jnp.float64
        np.testing.assert_allclose(found[name], value, rtol=1e-10, err_msg=name)
    for ours, theirs in zip(example.gradients(example.recipe), example.gradients(example.naive), strict=True):
        assert jnp.any(theirs != 0)
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_every_recipe_has_an_example_and_is_short():
    assert len(examples(0)) * SEEDS == len(CASES)
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
    tokens, sequences = jnp.array([[5, 6, 7, 8, 9, 3, 0]]), jnp.array([[4, 4, 4, 1, 1, 2, 2]])
    learnt = jnp.array([[True, False, True, True, True, True, False]])
    i = IGNORED
    assert losses.packed_labels(tokens, sequences, learnt).tolist() == [[i, 7, i, 9, i, i, i]]
    assert losses.packed_labels(tokens, sequences, learnt | True).tolist() == [[6, 7, i, 9, i, 0, i]]


def test_a_row_packed_or_apart_has_the_same_loss():
    rng = np.random.default_rng(0)
    x, w, tokens = rng.normal(size=(9, 4)), rng.normal(size=(4, 7)), rng.integers(7, size=9)
    packed = losses.packed_loss(x[None], w, tokens[None], np.array([[0] * 5 + [1] * 4]), np.ones((1, 9), bool))
    apart = [naive.at(naive.log_softmax(x[part] @ w)[:-1], tokens[part][1:]) for part in (np.s_[:5], np.s_[5:])]
    np.testing.assert_allclose(packed, -np.concatenate(apart).mean(), rtol=1e-12)


def test_what_is_said_of_ignored_tokens_does_not_count():
    example = next(e for e in examples(3) if e.recipe is losses.grpo_loss)
    x, w, labels, old, reference, rewards = example.arguments
    assert (labels == IGNORED).any()
    junk = (jnp.where(labels == IGNORED, jnp.nan, a) for a in (old, reference))
    changed = example._replace(arguments=(x, w, labels, *junk, rewards))
    np.testing.assert_array_equal(*(e.values(e.recipe)["loss"] for e in (example, changed)))
    for ours, theirs in zip(changed.gradients(losses.grpo_loss), example.gradients(losses.grpo_loss), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_grpo_before_its_first_step_is_the_policy_gradient():
    """ρ = 1 and ℓ_ref = ℓ: the gradient is that of −A·ℓ, and equal rewards give none, though their mean is rounded."""
    x, w, labels, *_, rewards = next(e for e in examples(4) if e.recipe is losses.grpo_loss).arguments
    now = jnp.where(labels == IGNORED, 0, naive.at(naive.log_softmax(x @ w), labels))
    gradient = jax.grad(losses.grpo_loss, 1)
    a = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-4)

    def policy(w):
        log_p = naive.at(naive.log_softmax(x @ w), labels)
        known = (labels != IGNORED).astype(float)
        return -jnp.mean(jnp.sum(a[..., None] * log_p * known, -1) / known.sum(-1))

    np.testing.assert_allclose(gradient(x, w, labels, now, now, rewards), jax.grad(policy)(w), rtol=1e-9, atol=1e-14)
    assert jnp.abs(gradient(x, w, labels, now, now, jnp.full_like(rewards, 0.1))).max() < 1e-11


def test_dpo_at_its_reference_is_undecided():
    x, w, labels, _ = next(e for e in examples(5) if e.recipe is losses.dpo_loss).arguments
    log_p = jnp.where(labels == IGNORED, 0, naive.at(naive.log_softmax(x @ w), labels))
    np.testing.assert_allclose(losses.dpo_loss(x, w, labels, log_p.sum(-1)), np.log(2), rtol=1e-12)


def test_the_stored_classes_are_the_likeliest():
    rng = np.random.default_rng(6)
    x, w = rng.normal(size=(3, 7, 5)), rng.normal(size=(5, 19))
    indices, log_probs = losses.store_top_k(x, w, 4, temperature=2.0)
    expected, classes = jax.lax.top_k(naive.log_softmax(x @ w / 2), 4)
    np.testing.assert_array_equal(indices, classes)
    np.testing.assert_allclose(log_probs, expected, rtol=1e-12)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn_from_it():
    rng = np.random.default_rng(7)
    x, w = rng.normal(size=(6, 5)), rng.normal(size=(5, 19))
    stored = losses.store_top_k(x, w, 4)
    gradient = {
        outside: jnp.abs(jax.grad(losses.stored_teacher_loss)(x, w, *stored, outside=outside)).max()
        for outside in ("tail", "renormalise", "nothing")
    }
    assert gradient["tail"] < 1e-14
    assert gradient["renormalise"] < 1e-14
    assert gradient["nothing"] > 1e-3
    to_teacher = jax.grad(losses.teacher_loss)(x, w, np.zeros(6, int), x, w, share=1.0)
    assert jnp.abs(to_teacher).max() < 1e-14


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
    _, metrics = losses.router_loss(jnp.eye(4) * 9, jnp.eye(4), balance=0.5)
    np.testing.assert_array_equal(metrics["load"], 0.25)
    np.testing.assert_allclose(metrics["balance"], 0.5, rtol=1e-12)
    alone, one = losses.router_loss(jnp.ones((8, 4)), 9 * jnp.eye(4)[:, :1] * jnp.array([1.0, 0, 0, 0]), balance=0.5)
    np.testing.assert_array_equal(one["load"], [1, 0, 0, 0])
    assert one["balance"] > 1.99  # E times as much
    np.testing.assert_allclose(alone, one["balance"] + one["z_loss"])


def test_the_script_states_and_computes_each(tmp_path, capsys):
    numbers = door.run(door.Config(out=tmp_path))
    said = capsys.readouterr().out
    for example in examples(0):
        assert f"{example.title}: gradients" in numbers
        assert f"{example.title}: loss" in said
    assert (tmp_path / "summary.json").exists()
    assert recipes.__doc__
    with pytest.raises(InputError, match=r"--seed: expected an integer in \[0, 2\*\*32\), got -1"):
        door.run(door.Config(seed=-1, out=tmp_path))
