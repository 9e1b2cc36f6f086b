"""Products of Hessians of a tiled head: the memory that docs/second-order.md states."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxsoft import linear_cross_entropy, native_kernels

pytestmark = [pytest.mark.x32, pytest.mark.optimized]
PAGE = Path(__file__).parents[1] / "docs" / "second-order.md"


def gradient(loss, x, w, of_x, of_w):
    return jax.grad(loss, (0, 1))(x, w)


def forward(loss, x, w, of_x, of_w):
    return jax.jvp(loss, (x, w), (of_x, of_w))[1]


def of_kernel(loss, x, w, of_x, of_w):
    return jax.jvp(lambda w: jax.grad(loss, 1)(x, w), (w,), (of_w,))[1]


def of_features(loss, x, w, of_x, of_w):
    return jax.jvp(lambda x: jax.grad(loss)(x, w), (x,), (of_x,))[1]


def of_both(loss, x, w, of_x, of_w):
    return jax.jvp(jax.grad(loss, (0, 1)), (x, w), (of_x, of_w))[1]


def gauss_newton(loss, x, w, of_x, of_w):
    def moved(dx, dw):
        return loss(jnp.concatenate([x, dx], -1), jnp.concatenate([w + dw, w]))

    return jax.jvp(jax.grad(moved, (0, 1)), (jnp.zeros_like(x), jnp.zeros_like(w)), (of_x, of_w))[1]


PRODUCTS = {
    "gradient of both": gradient,
    "JVP, x and W": forward,
    "Hessian product, W": of_kernel,
    "Hessian product, x": of_features,
    "Hessian product, x and W": of_both,
    "Gauss–Newton product, x and W": gauss_newton,
}


def temporaries(product, loss, positions, width, classes):
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((positions, width), (width, classes)))
    labels = jax.ShapeDtypeStruct((positions,), jnp.int32)

    def run(labels, *arrays):
        return product(lambda x, w: loss(x, w, labels), *arrays)

    return jax.jit(run).lower(labels, x, w, x, w).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", ["Hessian product, x", "Hessian product, x and W"])
def test_a_hessian_product_keeps_one_tile(name):
    positions, width, classes, budget = 1024, 64, 8192, 4 << 20
    tiled = functools.partial(linear_cross_entropy, memory_budget=budget)
    used = temporaries(PRODUCTS[name], tiled, positions, width, classes)
    # Logits, tangents and gradients of a tile, where all of them would take 96 MiB; and layouts and sums of the kernel.
    assert used <= 3 * budget + 6 * 4 * width * classes


@pytest.mark.exhaustive
def test_the_memory_that_the_page_states():
    def full(x, w, labels):
        return optax.softmax_cross_entropy_with_integer_labels(x @ w, labels).mean()

    tight = functools.partial(linear_cross_entropy, memory_budget=2**26)
    rows = [
        [c.strip() for c in line.strip("|").split("|")] for line in PAGE.read_text().splitlines() if line[:1] == "|"
    ]
    stated = {name: tuple(map(int, numbers)) for name, *numbers in rows if re.fullmatch(r"\d+", numbers[0])}
    assert stated.keys() == PRODUCTS.keys()
    for name, product in PRODUCTS.items():
        of_kernels, plain, of_optax = stated[name][:2], stated[name][2:4], stated[name][4]
        ours = of_kernels if native_kernels().loaded else plain
        for megabytes, loss in zip((*ours, of_optax), (linear_cross_entropy, tight, full), strict=True):
            assert temporaries(product, loss, 1024, 64, 128_256) / 1e6 == pytest.approx(megabytes, rel=0.1), name
