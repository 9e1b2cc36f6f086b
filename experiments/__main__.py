"""List the experiments: name, question, command."""

import ast
from pathlib import Path


def scripts() -> list[tuple[str, str, str]]:
    """(name, question, command) of every script, from the first two paragraphs of its docstring."""
    folder = Path(__file__).parent
    found = []
    for path in sorted([*folder.glob("[!_]*.py"), *folder.glob("[!_]*/__main__.py")]):
        name = path.parent.name if path.stem == "__main__" else path.stem
        question, command, *_ = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")
        found.append((name, " ".join(question.split()), command.strip()))
    return found


def main() -> None:
    for name, question, command in scripts():
        print(f"{name}\n    {question}\n    $ {command}\n")


if __name__ == "__main__":
    main()
