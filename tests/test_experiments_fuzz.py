"""A minute of the fuzz; that it finds what is wrong, and says how to see it again; and its tolerances."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from experiments import fuzz
from experiments._door import InputError, ScriptError
from experiments.fuzz import __main__ as script
from experiments.fuzz.measured import Measured, Unit, exp, log1p

pytestmark = pytest.mark.optimized

MINUTE = {"seed": 0, "configurations": 4000, "sets": 96}


def test_a_minute_finds_nothing(tmp_path):
    report = script.run(script.Config(out=tmp_path, **MINUTE))
    assert report.configurations >= 4000
    assert report.wrong == 0
    assert report.numbers > 10**6
    tried = {what for _, what in report.coverage}
    assert {*script.FUNCTIONS, "eager", "jit", "vmap", "scan", "checkpoint", "shard_map"} <= tried


def altered(function, change):
    """A public function whose value is changed."""
    true = getattr(jaxsoft, function)
    return lambda *args, **options: change(true(*args, **options))


def clamped(*args, targets, logits, axis=-1, **options):
    return jaxsoft._cross_entropy.cross_entropy(
        logits=logits, targets=jnp.clip(targets, 0) if targets.ndim < logits.ndim else targets, axis=axis, **options
    )


WRONG = {
    "a part in 10^5": ("softmax", altered("softmax", lambda s: s * 1.00001)),
    "an offset": ("logsumexp", altered("logsumexp", lambda z: z + 1e-5)),
    "a dtype": ("log_softmax", altered("log_softmax", lambda z: z.astype("float32"))),
    "NaN replaced": ("softmax", altered("softmax", jnp.nan_to_num)),
    "+inf replaced": ("logsumexp", altered("logsumexp", lambda z: jnp.where(jnp.isposinf(z), jnp.nan, z))),
    "labels clamped": ("cross_entropy", clamped),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_found_and_can_be_repeated(what, monkeypatch, tmp_path, capsys):
    function, fn = WRONG[what]
    monkeypatch.setattr(jaxsoft, function, fn)
    with pytest.raises(ScriptError, match="programs were wrong or refused"):
        script.run(script.Config(only=function, out=tmp_path, configurations=300, sets=16))
    told = (tmp_path / "failures.txt").read_text()
    program, case, said = re.search(r"--seed 0 --sets 16 --program (\d+) --case (\d+)\n(.*)\n", told).groups()
    capsys.readouterr()
    with pytest.raises(ScriptError, match="1 of 1 programs"):
        script.run(script.Config(sets=16, program=int(program), case=int(case)))
    printed = capsys.readouterr().out
    assert said in printed
    assert "is wrong" in printed


def test_a_refused_call_is_a_failure(monkeypatch, tmp_path):
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
        ({"only": "sofmax"}, r"--only: expected one of .*softmax_vjp, got sofmax"),
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


@pytest.mark.parametrize("margin", [0.5, 10.0, 80.0])
def test_a_bound_holds_in_float32_and_is_tight(margin):
    """log(1 + Σ exp(−margin·u)) as float32 computes it is within its bound, and the bound within a part in 10^4."""
    terms = -margin * np.random.default_rng(0).uniform(0.5, 1, (1000, 7)).astype(np.float32)
    measured = log1p(exp(Measured(terms.astype(np.float64), 0, Unit.of(np.float32))).sum())
    computed = np.log1p(np.exp(terms).sum(-1, dtype=np.float32))
    assert (np.abs(computed - measured.value) <= 2 * measured.error).all()
    assert (measured.error <= 1e-4 * measured.value).all()
