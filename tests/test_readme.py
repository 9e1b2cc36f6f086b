"""What the README says holds."""

import re
from pathlib import Path

import pytest

from experiments.benchmark.headline import headline

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINKS = re.findall(r"\]\(([^)]*)\)", README)
REPOSITORY = "https://github.com/jaxsoft/jaxsoft"
FILES = (f"{REPOSITORY}/blob/main/", "https://raw.githubusercontent.com/jaxsoft/jaxsoft/main/")
SITE = "https://jaxsoft.github.io/jaxsoft/"


@pytest.mark.x32
def test_the_usage_example_runs_as_printed(capsys):
    block = README.split("```python\n")[1].split("```")[0]
    exec(block, {})
    assert capsys.readouterr().out.strip() == re.search(r"# (\S+), where chance", block)[1]


def test_the_table_of_speed_is_that_of_the_committed_results():
    assert headline() in README


def test_it_is_short():
    assert len(README.split()) <= 1300


@pytest.mark.parametrize("link", LINKS)
def test_links_are_absolute_and_lead_somewhere(link):
    for start in FILES:
        if link.startswith(start):
            assert (ROOT / link.removeprefix(start)).is_file()
            return
    assert link.startswith(SITE)
    page = ROOT / "docs" / (link.removeprefix(SITE).strip("/") or "index")
    assert page.with_suffix(".md").is_file() or (page / "index.md").is_file()


def test_ci_finds_the_test_command():
    assert len(re.findall(r"^python3 -m venv .*pytest$", README, re.MULTILINE)) == 1
