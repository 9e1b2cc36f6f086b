"""experiments.exactness: its stated numbers match, and its picture equals the committed one."""

from pathlib import Path

import numpy as np
import pytest

from experiments import exactness
from experiments._door import InputError

pytestmark = pytest.mark.x32


def test_its_numbers_match_and_it_writes_a_picture(tmp_path):
    numbers = exactness.run(exactness.Config(out=tmp_path))
    assert numbers["jaxsoft: loss, worst of all margins"] < 1e-5
    assert (tmp_path / "exactness.svg").stat().st_size > 10_000
    assert (Path(__file__).parents[1] / "docs" / "pictures" / "exactness.svg").is_file()


@pytest.mark.optimized
@pytest.mark.parametrize("classes", [2, 1000])
def test_jaxsoft_is_accurate_for_any_number_of_classes(classes):
    losses, gradients = exactness.measure(exactness.draw_logits(exactness.Config(classes=classes, draws=4)))
    for ours in ("jaxsoft", "jaxsoft, one-hot"):
        assert max(losses[ours].max(), gradients[ours].max()) < 1e-5
    assert losses["optax"].max() == 1


def test_a_result_that_is_not_finite_has_the_error_1():
    assert exactness.worst(np.array([[np.nan, 2.0]]), np.array([[1.0, 2.0]])) == 1


def test_too_few_classes_are_refused(tmp_path):
    with pytest.raises(InputError, match="--classes: expected an integer in"):
        exactness.run(exactness.Config(classes=1, out=tmp_path))
