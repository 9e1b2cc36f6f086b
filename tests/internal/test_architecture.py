"""What ARCHITECTURE.md promises: which folder imports which, how far it is to the arithmetic, how long a function is."""

import ast
import re
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jaxsoft

ROOT = Path(jaxsoft.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# Each folder may import from those before it. On the last floor are the public functions.
FLOORS = ["_jax_internals", "_arrays", "_platform", "_custom_vjp", "_formula", "_linear", "", "_doctor"]


def floor(module):
    name = module.removeprefix("jaxsoft").removeprefix(".").partition(".")[0]
    return FLOORS.index(name if name in FLOORS else "")


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent != ROOT or f.stem == "_jax_internals"], ids=lambda f: f.stem
)
def test_modules_import_only_from_lower_folders(file):
    own = floor(".".join(("jaxsoft", *file.relative_to(ROOT).with_suffix("").parts)))
    imports = re.findall(r"^from (jaxsoft[\w.]*) import", file.read_text(), re.MULTILINE)
    assert [module for module in imports if floor(module) > own] == []


class Planted(Exception):
    pass


@pytest.mark.x32
@pytest.mark.parametrize(
    ("call", "frames", "files"),
    [
        (lambda: jaxsoft.cross_entropy(jnp.ones((5, 4)), jnp.zeros(5, int)), 7, 4),
        (lambda: jaxsoft.linear_cross_entropy(jnp.ones((5, 3)), jnp.ones((3, 4)), jnp.zeros(5, int)), 16, 5),
    ],
    ids=["dense", "linear"],
)
def test_few_frames_lead_to_the_arithmetic(call, frames, files, monkeypatch):
    def fail(*_):
        raise Planted

    jax.clear_caches()
    monkeypatch.setattr(jnp, "exp", fail)
    with pytest.raises(Planted) as raised:
        call()
    of_package = [f for f in traceback.extract_tb(raised.value.__traceback__) if ROOT in Path(f.filename).parents]
    assert len(of_package) <= frames
    assert len({f.filename for f in of_package}) <= files


def functions(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_no_body_is_longer_than_40_lines_and_no_internal_function_has_more_than_6_parameters_by_position(file):
    for node in functions(file):
        documented = ast.get_docstring(node) is not None
        body = node.body[documented:]
        length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
        assert length <= 40, node.name
        assert not node.name.startswith("_") or len(node.args.posonlyargs + node.args.args) <= 6, node.name


def test_the_folders_of_the_page_are_the_folders_of_the_package():
    page = ROOT.parent / "ARCHITECTURE.md"
    if not page.exists():
        pytest.skip("not in a checkout")
    rooms = set(re.findall(r"^\| `(\w+)/` \|", page.read_text(), re.MULTILINE))
    assert rooms == {folder.name for folder in ROOT.iterdir() if folder.is_dir() and folder.name != "__pycache__"}
    named = re.findall(r"`(_(?:formula|linear|platform|arrays)/\w+\.py)`", page.read_text())
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
