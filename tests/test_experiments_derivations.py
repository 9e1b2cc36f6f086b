"""The derivations, and the error for a stated number that does not match."""

import pytest

from experiments import derivations
from experiments._door import ScriptError
from experiments._numbers import Number, each, report


def test_every_stated_number_matches(tmp_path):
    numbers = derivations.run(derivations.Config(out=tmp_path))
    assert len(numbers) > 20
    assert (tmp_path / "summary.json").exists()
    assert list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("stated", "computed", "holds"),
    [
        (".125", 0.1254, True), (".125", 0.1256, False), ("-1.50", -1.504, True), ("-1.50", -1.506, False), ("3", 3, True),
        ("3", 4, False), ("<1e-3", 9e-4, True), ("<1e-3", 1e-3, False), (">2", 2.1, True), (">2", 2.0, False),
        ("nan", float("nan"), True), ("nan", 0.0, False), ("-inf", float("-inf"), True), ("-inf", float("inf"), False),
        (".125", float("nan"), False),
    ],
)  # fmt: skip
def test_a_number_must_match_in_all_its_digits(stated, computed, holds):
    assert Number("it", stated, computed).holds is holds


def test_a_number_that_does_not_match_ends_the_script(tmp_path, capsys):
    with pytest.raises(ScriptError, match=r"1 of 3 stated numbers do not match: v\[1\]"):
        report([Number("right", "1.0", 1.0), *each("v", (0.5, 0.25), [0.5, 0.3], 2)], tmp_path)
    assert "differs" in capsys.readouterr().out
