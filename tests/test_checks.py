"""`checked`: values become errors that name argument, index and value."""

import functools
import re

import jax
import numpy as np
import pytest

from jaxsoft import checked, cross_entropy, softmax

LOGITS = np.zeros((2, 3, 4))
LABELS = np.zeros((2, 3), int)


def with_label(index, label):
    labels = LABELS.copy()
    labels[index] = label
    return labels


TRANSFORMED = {
    "plain": cross_entropy,
    "jit": jax.jit(cross_entropy),
    "grad": jax.grad(cross_entropy),
    "jit of grad": jax.jit(jax.value_and_grad(cross_entropy)),
    "checkpoint": jax.grad(jax.checkpoint(cross_entropy)),
}


@pytest.mark.parametrize("fn", TRANSFORMED.values(), ids=TRANSFORMED)
def test_a_label_out_of_range_raises(fn):
    call = checked(fn)
    expected = fn(LOGITS, LABELS)  # traced and cached without checks first
    for label in (-1, 4, 255):
        with pytest.raises(ValueError, match=re.escape(f"targets[1, 2] is {label}: expected a label in [0, 4)")):
            call(LOGITS, with_label((1, 2), label))
    # By the plain formula in place of the kernels.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-15)
    jax.tree.map(close, call(LOGITS, LABELS), expected)


def test_the_first_offender_is_named_and_the_ignored_label_allowed():
    labels = np.array([[0, 255, 0], [9, 0, 7]])
    with pytest.raises(
        ValueError, match=re.escape("targets[1, 0] is 9: expected a label in [0, 4) or ignore_index=255")
    ):
        checked(jax.jit(lambda z, y: cross_entropy(z, y, ignore_index=255)))(LOGITS, labels)


@pytest.mark.parametrize(
    ("label", "hint"),
    [
        (4, "; labels are 0 to 3: if yours are 1 to 4, subtract 1"),
        (-100, "; to ignore this label, pass ignore_index=-100"),
        (255, "; to ignore this label, pass ignore_index=255"),
        (7, ""),
    ],
)
def test_an_error_says_what_to_do_with_a_usual_label_out_of_range(label, hint):
    labels = with_label((0, 1), label)
    labels[1, 1] = 4
    for given in (labels, labels.astype(np.int16)):
        with pytest.raises(
            ValueError, match=re.escape(f"targets[0, 1] is {label}: expected a label in [0, 4){hint}") + "$"
        ):
            checked(jax.jit(cross_entropy))(LOGITS, given)
    wide = np.where(np.arange(6).reshape(2, 3) == 5, 2**40, labels)
    with pytest.raises(
        ValueError, match=re.escape(f"targets[0, 1] is {label}: expected a label in [0, 4){hint}") + "$"
    ):
        checked(cross_entropy)(LOGITS, wide)


def test_another_label_than_the_ignored_one_gets_no_hint_to_ignore_it():
    call = checked(jax.jit(lambda z, y: cross_entropy(z, y, ignore_index=255)))
    with pytest.raises(ValueError, match=r"or ignore_index=255$"):
        call(LOGITS, with_label((0, 0), -100))


def test_arrays_and_options_given_by_keyword():
    bad = with_label((1, 0), 5)
    options = {"ignore_index": 0, "label_smoothing": 0.1, "reduction": "none"}
    logits = np.arange(24.0).reshape(LOGITS.shape) % 5
    weights = np.array([1.0, 0.5, 2.0])
    for fn in (cross_entropy, jax.jit(cross_entropy, static_argnames=tuple(options))):
        call = checked(fn)
        given = {"targets": with_label((0, 1), 3), "weights": weights, **options}
        np.testing.assert_array_equal(call(logits, **given), fn(logits, **given))
        with pytest.raises(ValueError, match=re.escape("targets[1, 0] is 5: expected a label in [0, 4)")):
            call(logits, targets=bad)
        with pytest.raises(ValueError, match=re.escape("weights[2] is -1.0: expected a finite weight of at least 0")):
            call(logits, LABELS, weights=np.array([1.0, 0.5, -1]))
    with pytest.raises(TypeError, match="wrap checked around jit, grad and vmap"):
        jax.jit(lambda y: checked(cross_entropy)(logits, targets=y))(LABELS)


def test_under_vmap():
    with pytest.raises(ValueError, match=re.escape("targets[2] is 8")):
        checked(jax.jit(jax.vmap(cross_entropy)))(LOGITS, with_label((1, 2), 8))


def test_inside_another_transformation():
    for transformed in (jax.jit(checked(cross_entropy)), jax.grad(checked(cross_entropy))):
        with pytest.raises(TypeError, match="wrap checked around jit, grad and vmap"):
            transformed(LOGITS, LABELS)


def test_without_checks_nothing_raises_after_checks_ran():
    fn = jax.jit(cross_entropy)
    labels = with_label((0, 0), -1)
    with pytest.raises(ValueError, match="targets"):
        checked(fn)(LOGITS, labels)
    assert np.isnan(fn(LOGITS, labels))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: checked(jax.jit(softmax))(np.array([0.0, np.nan])), "logits[1] is nan: expected a number"),
        (lambda: checked(jax.jit(cross_entropy))(np.where(np.arange(24).reshape(2, 3, 4) == 14, np.nan, 0), LABELS), "logits[1, 0, 2] is nan"),
        (lambda: checked(jax.jit(cross_entropy))(np.zeros(3), np.array([0.5, -0.5, 1.0])), "targets[1] is -0.5: expected a finite probability"),
        (lambda: checked(jax.jit(lambda w: cross_entropy(np.zeros((2, 3)), np.zeros(2, int), weights=w)))(np.array([1.0, -2.0])), "weights[1] is -2.0"),
        (lambda: checked(jax.jit(lambda w: cross_entropy(np.zeros((2, 3)), np.zeros(2, int), class_weights=w)))(np.array([1.0, np.inf, 1.0])), "class_weights[1] is inf"),
        (lambda: checked(jax.jit(cross_entropy))(np.zeros(3), np.array(3)), "targets is 3: expected a label in [0, 3)"),
    ],
)  # fmt: skip
def test_messages(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_nan_under_a_mask_is_allowed():
    value = checked(jax.jit(lambda z: softmax(z, where=np.array([True, False]))))(np.array([0.0, np.nan]))
    np.testing.assert_array_equal(value, [1, 0])
