"""The package's metadata."""

import runpy
import tomllib
from pathlib import Path

import pytest

import jaxsoft

ROOT = Path(__file__).parents[1]
RELEASE = runpy.run_path(str(ROOT / ".ci" / "version"))


def test_every_file_states_the_version():
    stated = RELEASE["stated"]()
    assert stated.pop("CHANGELOG.md").split()[0] == jaxsoft.__version__
    assert set(stated.values()) == {jaxsoft.__version__}


@pytest.mark.parametrize("tag", ["v0.0.1", "0.0.1", "v"])
def test_a_tag_that_differs_from_the_version_is_refused(tag, capsys):
    assert RELEASE["main"](tag)
    assert f"error: pyproject.toml: expected {tag.removeprefix('v')} for the tag {tag}" in capsys.readouterr().err


def test_the_core_needs_only_jax_and_jaxtyping():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [need.split(">=")[0] for need in project["dependencies"]] == ["jax", "jaxlib", "jaxtyping"]
