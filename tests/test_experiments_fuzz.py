"""The fuzz finds no failure except planted ones, prints the command that repeats them, and its tolerances hold."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from experiments import fuzz
from experiments._door import InputError, ScriptError
from experiments.fuzz import __main__ as script
from experiments.fuzz.measured import Measured, Unit, exp, log1p

pytestmark = pytest.mark.scripts


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        # One program each of the functions; of this seed they have all transformations and derivatives among them.
        ({"seed": 4246, "configurations": 460, "sets": 24}, 500_000),
        pytest.param(
            {"seed": 0, "configurations": 4000, "sets": 96},
            10**6,
            marks=[pytest.mark.exhaustive, pytest.mark.optimized],
        ),
    ],
    ids=["seconds", "a minute"],
)
def test_no_failure_is_found(tmp_path, options, numbers):
    report = script.run(script.Config(out=tmp_path, **options))
    assert report.configurations >= options["configurations"]
    assert report.wrong == 0
    assert report.numbers > numbers
    tried = {what for _, what in report.coverage}
    assert {*script.FUNCTIONS, *fuzz.programs.WRAPS, *fuzz.programs.DERIVATIVES} <= tried


def altered(function, change):
    """A public function whose value is changed."""
    true = getattr(jaxsoft, function)
    return lambda *args, **options: change(true(*args, **options))


def underflowing(*, logits, axis, **options):
    """Sums relative to the overall largest logit, with which float32 loses terms that are e^87 times smaller."""
    lost = logits < jnp.max(logits, axis, keepdims=True) - 87
    return jaxsoft._cross_entropy.cross_entropy(jnp.where(lost, -jnp.inf, logits), axis=axis, **options)


def of_the_rest(*, targets, **options):
    """A remainder counts, although `outside` says that only the chosen classes or their shares do."""
    targets = jaxsoft.SparseTargets(targets.indices, targets.probs, "tail")
    return jaxsoft._cross_entropy.cross_entropy(targets=targets, **options)


def clamped(*args, targets, logits, axis=-1, **options):
    return jaxsoft._cross_entropy.cross_entropy(
        logits=logits, targets=jnp.clip(targets, 0) if targets.ndim < logits.ndim else targets, axis=axis, **options
    )


# The seed is one whose first program of the function finds it.
WRONG = {
    "a part in 10^5": (8, "softmax", altered("softmax", lambda s: s * 1.00001)),
    "an offset": (8, "logsumexp", altered("logsumexp", lambda z: z + 1e-5)),
    "a dtype": (4, "log_softmax", altered("log_softmax", lambda z: z.astype("float32"))),
    "NaN replaced": (35, "softmax", altered("softmax", jnp.nan_to_num)),
    "+inf replaced": (55, "logsumexp", altered("logsumexp", lambda z: jnp.where(jnp.isposinf(z), jnp.nan, z))),
    "labels clamped": (116, "cross_entropy", clamped),
    "a group underflows": (42, "sparse_cross_entropy", underflowing),
    "the rest is counted": (18, "sparse_cross_entropy", of_the_rest),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_result_is_found_and_can_be_repeated(what, monkeypatch, tmp_path, capsys):
    seed, function, fn = WRONG[what]
    monkeypatch.setattr(jaxsoft, fuzz.programs.SPARSE.get(function, function), fn)
    with pytest.raises(ScriptError, match="1 of 1 programs gave wrong results or errors"):
        script.run(script.Config(seed=seed, only=function, out=tmp_path, configurations=1, sets=16))
    told = (tmp_path / "failures.txt").read_text()
    found = re.search(rf"--seed {seed} --sets 16 --program (\d+) --case (\d+)\n(.*)\n", told)
    program, case, said = found.groups()
    capsys.readouterr()
    with pytest.raises(ScriptError, match="1 of 1 programs"):
        script.run(script.Config(seed=seed, sets=16, program=int(program), case=int(case)))
    printed = capsys.readouterr().out
    assert said in printed
    assert "is wrong" in printed


def test_an_exception_is_a_failure(monkeypatch, tmp_path):
    def refuse(*args, **options):
        raise TypeError("not today")

    monkeypatch.setattr(jaxsoft, "softmax_vjp", refuse)
    with pytest.raises(ScriptError, match="1 of 1 programs"):
        script.run(script.Config(only="softmax_vjp", out=tmp_path, configurations=1, sets=4))
    assert "TypeError: not today" in (tmp_path / "failures.txt").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"configurations": 0}, "--configurations, --sets: expected positive numbers"),
        ({"only": "sofmax"}, r"--only: expected one of .*softmax_vjp.*, got sofmax"),
        ({"case": 1}, "--case: expected with --program"),
        ({"program": 15, "sets": 4, "case": 400}, r"--case: expected a number in \[0, \d+\), got 400"),
    ],
)
def test_options_out_of_range_are_one_line(options, message):
    with pytest.raises(InputError, match=message):
        script.run(script.Config(**options))


def test_a_seed_draws_the_same_programs_and_values():
    one, two = (fuzz.values.draw_values(fuzz.programs.draw_program(7, 3, 8)) for _ in range(2))
    for name, array in one.inputs.items():
        np.testing.assert_array_equal(array, two.inputs[name])


def sparse_edges(program):
    """The edge cases of sparse targets that occur in a program's values."""
    values = fuzz.values.draw_values(program)
    frame = fuzz.values.Frame(program, program.arrays["target_indices"])
    indices, probs = (frame.rows(values.inputs[name]) for name in ("target_indices", "target_probs"))
    indices, probs = indices.astype(np.int64), probs.astype(float)
    inside = (indices >= 0) & (indices < program.classes)
    pairs = (indices[..., None] == indices[..., None, :]) & inside[..., None]
    yield "padding", (~inside & (probs == 0)).any()
    yield "no class", (~inside & (probs > 0)).any()
    yield "twice", (pairs.sum((-1, -2)) > inside.sum(-1)).any()
    yield "no mass", (inside & (probs == 0)).any()
    yield "weights of 0", "weights" in values.inputs and (values.inputs["weights"] == 0).any()
    yield "one class", frame.classes == 1
    yield "all classes", frame.classes >= program.classes > 1
    if "where" in values.inputs:
        left = fuzz.values.Frame(program).rows(values.inputs["where"])
        at = np.take_along_axis(left, np.where(inside, indices, 0), -1)
        yield "removed", (inside & ~at).any()
        yield "all removed", (inside.any(-1) & ~(inside & at).any(-1)).any()
    if "logits" in values.inputs:
        z = fuzz.values.Frame(program).rows(values.inputs["logits"]).astype(float)
        chosen = (indices[..., None] == np.arange(program.classes)).any(-2)
        z = np.where(np.isfinite(z).all(-1, keepdims=True) & (np.abs(z) < 500), z, np.nan)
        gap = np.where(chosen, z, -np.inf).max(-1) - np.where(chosen, -np.inf, z).max(-1)
        gap = gap[np.isfinite(gap)]
        yield "they lead", (gap > 150).any()
        yield "they trail", (gap < -150).any()
        yield "neither", (np.abs(gap) < 1).any()


def test_sparse_targets_are_drawn_with_their_edge_cases():
    first, turn = script.FUNCTIONS.index("sparse_cross_entropy"), len(script.FUNCTIONS)
    draws = [fuzz.programs.draw_program(0, first + n % 2 + turn * (n // 2), 8) for n in range(80)]
    small = [program for program in draws if program.count * program.classes * program.sizes["k"] < 20_000]
    found = [edge for program in small for edge in sparse_edges(program)]
    assert {name for name, has in found if has} == {name for name, _ in found}
    assert {program.options["outside"] for program in small} == set(fuzz.programs.OUTSIDE)
    assert {program.options["reduction"] for program in small} == {"none", "sum", "mean"}


@pytest.mark.parametrize("margin", [0.5, 10.0, 80.0])
def test_a_bound_holds_in_float32_and_is_tight(margin):
    """log(1 + Σ exp(−margin·u)) computed in float32 is within its bound, and the bound is tight to 1e-4."""
    terms = -margin * np.random.default_rng(0).uniform(0.5, 1, (1000, 7)).astype(np.float32)
    measured = log1p(exp(Measured(terms.astype(np.float64), 0, Unit.of(np.float32))).sum())
    computed = np.log1p(np.exp(terms).sum(-1, dtype=np.float32))
    assert (np.abs(computed - measured.value) <= 2 * measured.error).all()
    assert (measured.error <= 1e-4 * measured.value).all()
