"""The documentation's statements hold, and every public name is in it. CI builds the site."""

import csv
import inspect
import math
import re
import runpy
import types
from pathlib import Path
from xml.etree import ElementTree

import jax.numpy as jnp
import pytest

import jaxsoft
from experiments import __main__ as listing
from experiments.benchmark.headline import RESULTS, VERSIONS, headline
from experiments.benchmark.report import read_table
from jaxsoft import cross_entropy, diagnose

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.py"))
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
REFERENCE = "".join(text for name, text in PAGES.items() if name.startswith("api/") and name != "api/index.md")
INDEX = PAGES["api/index.md"]
REPOSITORY = "https://github.com/jaxsoft/jaxsoft/"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", jaxsoft.__all__)
def test_every_public_name_is_in_the_reference(name):
    assert re.search(rf"^::: jaxsoft\.{name}$", REFERENCE, re.MULTILINE)
    assert inspect.ismodule(getattr(jaxsoft, name)) or f"[`{name}`][jaxsoft.{name}]" in INDEX


def test_the_reference_names_nothing_else():
    assert set(re.findall(r"^::: jaxsoft\.(\w+)$", REFERENCE, re.MULTILINE)) == set(jaxsoft.__all__)


def test_navigation_and_pages_are_the_same():
    nav = re.search(r"^nav:\n(.*?)^\S", (ROOT / "mkdocs.yml").read_text(), re.DOTALL | re.MULTILINE)
    listed = re.findall(r"([\w/-]+\.(?:md|py))$", nav[1], re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == set(PAGES) | {f"notebooks/{path.name}" for path in NOTEBOOKS}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^ *```.*?^ *```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        target = link.partition("#")[0]
        if link.startswith(REPOSITORY):
            path = re.fullmatch(r"(?:(?:blob|tree)/main/(.*))?", target.removeprefix(REPOSITORY))
            assert path is not None, link
            assert (ROOT / (path[1] or "")).exists(), link
        elif not link.startswith(("http", "#")):
            assert ((DOCS / page).parent / target).is_file(), link


def test_a_copied_function_ends_with_an_empty_line_which_the_prompt_of_python_needs():
    prompt, more = '<span class="gp">&gt;&gt;&gt; </span>', '<span class="gp">... </span>'
    shown = (
        f"{prompt}def f(\n{more}    x,\n{more}):\n{more}    return x\n{prompt}f(\n{more}    1\n{more})\n{prompt}f(2)\n"
    )
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="start.md"))
    content = runpy.run_path(str(DOCS / "hooks.py"))["on_page_content"](shown, page)
    copied = re.sub(r'<span class="gp">.*?</span>', "", content.replace('<span class="copied">\n</span>', "\n"))
    assert copied == "def f(\n    x,\n):\n    return x\n\nf(\n    1\n)\nf(2)\n"
    assert re.sub(r'<span class="copied">\n</span>', "", content) == shown


@pytest.mark.parametrize("page", PAGES)
def test_code_has_80_columns(page):
    code = re.findall(r"^ *```(?:python|pycon|py|text)\n(.*?)^ *```$", PAGES[page], re.DOTALL | re.MULTILINE)
    assert [line for block in code for line in block.splitlines() if len(line) > 80] == []


@pytest.mark.x32
@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if blocks(text, "python")])
def test_programs_run_and_the_doctor_says_what_is_printed(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for program in blocks(PAGES[page], "python"):
        exec(program, {})
    commands = (re.fullmatch(r"\$ jaxsoft-diagnose (.*?)\n(.*)", b, re.DOTALL) for b in blocks(PAGES[page], "console"))
    for command, said in (found.groups() for found in commands if found):
        diagnose.main(command.split())
        assert capsys.readouterr().out.split() == said.split()


def is_quick(notebook):
    return notebook.stem == "debug_my_gradient"


@pytest.mark.x32
@pytest.mark.parametrize(
    "notebook",
    [
        pytest.param(
            path, id=path.stem, marks=() if is_quick(path) else [pytest.mark.optimized, pytest.mark.exhaustive]
        )
        for path in NOTEBOOKS
    ],
)
def test_notebooks_run(notebook, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    monkeypatch.setattr(plt, "show", plt.close)
    runpy.run_path(str(notebook))


def test_docstrings_become_markdown():
    pytest.importorskip("griffe")
    as_markdown = runpy.run_path(str(DOCS / "docstrings.py"))["as_markdown"]
    for module in (jaxsoft, jaxsoft.caffe, jaxsoft.energy):
        for name in module.__all__:
            if inspect.isfunction(fn := getattr(module, name)):
                text = as_markdown(inspect.getdoc(fn))
                prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
                assert ">>>" in text
                assert ">>>" not in prose
                assert not re.search(
                    r"^(Args|Returns|Raises|Edges|Example|Source|Differentiation):", prose, re.MULTILINE
                )


def test_formulas_become_equivalent_mathml():
    as_mathml = runpy.run_path(str(DOCS / "formulas.py"))["as_mathml"]
    formulas = [
        inspect.getdoc(fn) or "" for name in jaxsoft.__all__ if inspect.isfunction(fn := getattr(jaxsoft, name))
    ]
    formulas = [docstring.split("\n\n")[1] for docstring in formulas if "Args:" in docstring]
    formulas += blocks(PAGES["exactness.md"], "formula")
    same = str.maketrans("∑⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵀⁿ", "Σ0123456789−Tn", " ~_{}^\n\u0303")
    for formula in formulas:
        text = "".join(ElementTree.fromstring(as_mathml(formula)).itertext())
        assert text.translate(same) == formula.translate(same)
    (indexed,) = ElementTree.fromstring(as_mathml("z_j")).iter("msub")
    assert [child.tag for child in indexed] == ["mi", "mrow"]


def test_the_experiments_table_is_the_listing():
    lines = PAGES["experiments.md"].splitlines()
    rows = dict(line.strip("| ").split(" | ") for line in lines if line.startswith("| `python -m experiments."))
    expected = {name: question for name, question, _ in listing.scripts()}
    assert {command.strip("`").split(".")[1].split()[0]: question for command, question in rows.items()} == expected


@pytest.mark.x32
def test_the_table_of_margins_matches_computed_values():
    rows = re.findall(r"^\| (\d+) \| (\S+) \| (\S+) \| \S+ \|$", PAGES["exactness.md"], re.MULTILINE)
    assert [margin for margin, *_ in rows] == ["10", "16", "20", "40", "80"]
    for margin, true, ours in rows:
        assert f"{math.log1p(2 * math.exp(-float(margin))):.4e}" == true
        assert f"{float(cross_entropy(jnp.array([float(margin), 0, 0]), jnp.array(0))):.4e}" == ours


def test_the_figures_of_speed_match_the_committed_results():
    text = " ".join(PAGES["performance.md"].split())
    assert headline() in PAGES["performance.md"]
    tables = [read_table(RESULTS / f"cpu-jax{version}.csv") for version in VERSIONS]
    loops = " / ".join(f"{table.loc[table['implementation'] == 'NumPy', 'ratio'].item():.1f}" for table in tables)
    assert f"Iris loop makes {loops} times the steps per second of the NumPy loop" in text


def test_the_figures_of_the_compiled_programs_match_the_committed_results():
    with (ROOT / "experiments/compile/results/h100.csv").open() as file:
        rows = {
            (row["case"], row["shape"], row["dtype"], row["implementation"]): row
            for row in csv.DictReader(file)
            if not row["mesh"]
        }
    table = PAGES["performance.md"].split("| for an H100 |")[1].split("\n\n")[0].splitlines()[2:]
    stated = [re.findall(r"\d+\.\d+", " ".join(line.split("|")[2:])) for line in table]

    def computed(column, scale, digits, case, shape, dtype, *implementations):
        return [f"{float(rows[case, shape, dtype, name][column]) / scale:.{digits}f}" for name in implementations]

    dense, head = "(8192, 32768)", "(8192, 2304, 256000)"
    full = "optax, full logits in bfloat16", "optax, full logits"
    assert stated == [
        computed("passes", 1, 2, "cross-entropy", dense, "float32", "jaxsoft", "optax"),
        computed("passes", 1, 2, "cross-entropy + gradient", dense, "float32", "jaxsoft", "optax"),
        computed("passes", 1, 2, "cross-entropy + gradient", dense, "bfloat16", "jaxsoft", "optax", "optax in float32"),
        computed("temporaries MB", 1000, 1, "linear cross-entropy + gradient", head, "bfloat16", "jaxsoft", *full),
        computed("over least", 1, 2, "linear cross-entropy + gradient", head, "bfloat16", "jaxsoft", *full),
    ]
