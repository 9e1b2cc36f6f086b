"""Docstrings as Markdown, for the reference: an extension of griffe, which reads the package for mkdocstrings.

They have headings of their own: a line, a formula, then "Args:", "Returns:", "Edges:" and so on.
"""

import inspect
import re
import textwrap
from collections.abc import Iterator

import griffe

# Items below these are "name: what it is".
LISTS = ("Args", "Raises")
PARAGRAPHS = ("Returns", "Edges", "Differentiation", "Exactness", "Source")
HEADING = re.compile(r"([A-Z][\w ,]*):(?: (.*))?", re.DOTALL)
# A sum, a product or an arrow between symbols, before any sentence begins.
FORMULA = re.compile(r"(?!The )[^.`]*[^\s.`] +[=←~] ")


def as_markdown(docstring: str) -> str:
    """The same text with headings in bold, formulas and examples as code, and arguments as a list."""
    return "\n\n".join(_parts(inspect.cleandoc(docstring))) + "\n"


def _parts(docstring: str) -> Iterator[str]:
    blocks = re.split(r"\n\s*\n(?=\S)", docstring)
    for number, block in enumerate(blocks):
        first, _, rest = block.partition("\n")
        heading = HEADING.match(block)
        if first == "Example:":
            yield f"**Example**\n\n```pycon\n{textwrap.dedent(rest).strip()}\n```"
        elif heading and first.endswith(":") and heading[1] in LISTS:
            yield f"**{heading[1]}**\n\n" + "\n".join(
                _items(textwrap.dedent(rest))
            )
        elif heading and first.endswith(":") and heading[1] in PARAGRAPHS:
            yield f"**{heading[1]}**\n\n{textwrap.dedent(rest).strip()}"
        elif (
            heading
            and heading[2]
            and all(name in PARAGRAPHS for name in heading[1].split(", "))
        ):
            yield f"**{heading[1]}**: {heading[2]}"
        elif number == 1 and FORMULA.match(first):
            # What stands apart on a line has one of its own: a page is narrower than a screen of code.
            yield (
                "```formula\n"
                + re.sub(r"(?<=[^:\s]) {3,}|;  ", "\n", block.replace("`", ""))
                + "\n```"
            )
        else:
            yield block


def _items(text: str) -> Iterator[str]:
    """A list item for each line that is not the continuation of another."""
    for item in re.split(r"\n(?=\S)", text.strip()):
        names, _, meaning = item.partition(": ")
        yield f"- {', '.join(f'`{name}`' for name in names.split(', '))}: {' '.join(meaning.split())}"


class Docstrings(griffe.Extension):
    """Replace every docstring of the package as it is read, and list the fields of its tuples with their comments."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)

    def on_class_members(self, *, cls: griffe.Class, **_: object) -> None:
        fields = [
            member
            for member in cls.members.values()
            if member.is_attribute and member.lineno
        ]
        if cls.docstring is not None and fields:
            lines = cls.filepath.read_text().splitlines()
            items = (
                _field(member, lines[member.lineno - 1]) for member in fields
            )
            cls.docstring.value += "\n**Fields**\n\n" + "\n".join(items) + "\n"


def _field(member: griffe.Attribute, line: str) -> str:
    comment = line.partition("  # ")[2]
    return f"- `{member.name}` (`{member.annotation}`)" + (
        f": {comment}" if comment else ""
    )
