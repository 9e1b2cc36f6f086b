"""What a user's type checker says: every program and example of README and documentation passes pyright's strict mode."""

import doctest
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYRIGHT = Path(sys.executable).with_name("pyright")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Examples need not annotate their own functions, and JAX's types are unknown in part; both make reports of `Unknown`.
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
# `linear_log_probs` has labels, but `label_log_prob` may be None by its type.
OPTIONAL = pytest.mark.xfail(reason="the results of linear_log_probs are optional, whatever the call")

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not PYRIGHT.is_file(), reason="pyright is not installed: it is in the extra dev"),
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
def reports(tmp_path_factory):
    """What pyright says of each program."""
    folder = tmp_path_factory.mktemp("types")
    (folder / "pyrightconfig.json").write_text(json.dumps(RULES | {"extraPaths": [str(ROOT)]}))
    files = {name: folder / (re.sub(r"\W", "_", name) + ".py") for name in PROGRAMS}
    for name, file in files.items():
        file.write_text(PROGRAMS[name])
    command = [PYRIGHT, "--outputjson", "--pythonpath", sys.executable, "-p", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    diagnostics = json.loads(done.stdout)["generalDiagnostics"]
    return {
        name: [f"{d['range']['start']['line'] + 1}: {d['message']}" for d in diagnostics if d["file"] == str(file)]
        for name, file in files.items()
    }


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[OPTIONAL] if name == "docs/recipes program 1" else []) for name in PROGRAMS],
)
def test_a_user_of_strict_types_can_write_this(reports, name):
    assert reports[name] == []
