"""Type checkers on a user's code: all programs of README and documentation pass pyright's and mypy's strict modes."""

import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYRIGHT, MYPY = (Path(sys.executable).with_name(name) for name in ("pyright", "mypy"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Examples need not annotate their own functions, and JAX's types are unknown in part: neither checker reports these.
UNTYPED = ("--allow-untyped-defs", "--allow-incomplete-defs", "--allow-untyped-calls", "--ignore-missing-imports")
RULES = {
    "typeCheckingMode": "strict",
    "reportMissingParameterType": False,
    "reportMissingTypeStubs": False,
    "reportUnknownArgumentType": False,
    "reportUnknownLambdaType": False,
    "reportUnknownMemberType": False,
    "reportUnknownParameterType": False,
    "reportUnknownVariableType": False,
    "reportUnusedExpression": False,  # what an interpreter prints
}

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not (PYRIGHT.is_file() and MYPY.is_file()), reason="pyright and mypy are in the extra dev"),
]


def programs() -> dict[str, str]:
    """The source of each program, and of all examples of each page as one."""
    parser, found = doctest.DocTestParser(), {}
    for path in PAGES:
        name, text = str(path.relative_to(ROOT).with_suffix("")), path.read_text()
        for number, program in enumerate(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)):
            found[f"{name} program {number + 1}"] = program
        if examples := parser.get_examples(text):
            found[f"{name} examples"] = "".join(example.source for example in examples)
    return found


PROGRAMS = programs()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("types")
    files = {name: folder / (re.sub(r"\W", "_", name) + ".py") for name in PROGRAMS}
    for name, file in files.items():
        file.write_text(PROGRAMS[name])
    return files


@pytest.fixture(scope="module")
def reports(files):
    """pyright's reports on each program."""
    folder = next(iter(files.values())).parent
    (folder / "pyrightconfig.json").write_text(json.dumps(RULES | {"extraPaths": [str(ROOT)]}))
    command = [PYRIGHT, "--outputjson", "--pythonpath", sys.executable, "-p", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    diagnostics = json.loads(done.stdout)["generalDiagnostics"]
    return {
        name: [f"{d['range']['start']['line'] + 1}: {d['message']}" for d in diagnostics if d["file"] == str(file)]
        for name, file in files.items()
    }


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_user_of_strict_types_can_write_this(reports, name):
    assert reports[name] == []


def test_a_user_of_mypy_can_write_them(files):
    command = [MYPY, "--strict", *UNTYPED, "--follow-imports=silent", *files.values()]
    done = subprocess.run(
        command,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.stdout == f"Success: no issues found in {len(files)} source files\n", done.stdout + done.stderr
