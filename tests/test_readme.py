"""The README's statements hold."""

import re
import tomllib
from pathlib import Path

import pytest

from experiments.benchmark.headline import headline

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINKS = re.findall(r"\]\(([^)]*)\)", README)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
URLS = PROJECT["project"]["urls"]
SITE = URLS["Documentation"] + "/"
FILES = (f"{URLS['Source']}/blob/main/", f"{URLS['Source']}/raw/main/")


@pytest.mark.x32
def test_the_usage_example_runs_as_printed(capsys):
    block = README.split("```python\n")[1].split("```")[0]
    exec(block, {})
    assert capsys.readouterr().out.strip() == re.search(r"# (\S+), where chance", block)[1]


def test_the_table_of_speed_shows_the_committed_results():
    assert headline() in README


def test_the_readme_is_short():
    assert len(README.split()) <= 1000


@pytest.mark.parametrize("link", LINKS)
def test_links_lead_to_files_of_the_repository(link):
    assert (ROOT / link).is_file()


def test_links_in_the_package_index_are_absolute_and_lead_to_the_same():
    """Where `hatch-fancy-pypi-readme` substitutes them when a wheel is built."""
    text = README
    for rule in PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) == len(LINKS)
    for link, relative in zip(links, LINKS, strict=True):
        if link.startswith(SITE):
            page = link.removeprefix(SITE).strip("/")
            assert relative in (f"docs/{page}.md", f"docs/{page}/index.md")
        else:
            assert link in [start + relative for start in FILES]


def test_ci_finds_the_test_command():
    assert len(re.findall(r"^python3 -m venv .*pytest$", README, re.MULTILINE)) == 1
