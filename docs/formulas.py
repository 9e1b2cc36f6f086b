"""Formulas of one line each, as the docstrings write them, as MathML: browsers set it without a script."""

import re
from html import escape

# An operator with the range of its index below it.
OPERATORS = ("Σ", "max")
# Names that stand for a function or a number, set upright without spaces around them.
NAMES = ("KL", "diag", "entropy", "exp", "label", "log", "log1p", "loss", "lse")
NAMES += ("max", "mean", "normaliser", "sign", "softmax", "tanh")
# Words of fewer letters are products of variables, such as Wh.
SHORT_WORDS = ("as", "in", "is", "of", "or")
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵀⁿ", "0123456789−Tn")
TOKEN = re.compile(
    r"(?P<quoted>\"[^\"]*\")"
    r"|(?P<identifier>[a-z]{3,}(?:_[a-z]{3,})+)"
    r"|(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?|½)"
    r"|(?P<word>log1p|[A-Za-z]+)"
    r"|(?P<greek>[α-ωΑ-Ω∂])"
    r"|(?P<space>\s+)"
    r"|(?P<other>.)"
)
SUBSCRIPT = re.compile(r"_(?:\{([^}]*)\}|(\w(?:\w|,\w)*))")
SUPERSCRIPT = re.compile(r"\^\{([^}]*)\}|([⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵀⁿ]+)")


def as_mathml(text: str) -> str:
    """A block of lines, a formula each."""
    lines = (
        f"<mtr><mtd>{_row(line)}</mtd></mtr>" for line in text.splitlines()
    )
    return f'<math display="block"><mtable displaystyle="true" columnalign="left" rowspacing="0.7ex">{"".join(lines)}</mtable></math>'


def _row(text: str) -> str:
    """What stands side by side."""
    parts, position = [], 0
    while position < len(text):
        token = TOKEN.match(text, position)
        position = token.end()
        kind, value = token.lastgroup, token[0]
        if kind == "word" and not _is_word(value):
            # The last of these variables may have an index.
            parts += [f"<mi>{letter}</mi>" for letter in value[:-1]]
            value = value[-1]
        base = _base(kind, value)
        beside = (
            text[token.start() - 1 : token.start()],
            text[position : position + 1],
        )
        if (
            kind == "space"
            and len(value) == 1
            and any(side and side in "=+−·/←~,≤≠" for side in beside)
        ):
            base = ""  # operators have spaces of their own
        if text[position : position + 1] == "\u0303":
            base, position = (
                f'<mover accent="true">{base}<mo>~</mo></mover>',
                position + 1,
            )
        subscript = superscript = None
        if kind not in ("space", "quoted", "identifier"):
            if match := SUBSCRIPT.match(text, position):
                subscript, position = _row(match[1] or match[2]), match.end()
            if match := SUPERSCRIPT.match(text, position):
                superscript, position = (
                    _row(match[1] or match[2].translate(SUPERSCRIPTS)),
                    match.end(),
                )
        parts.append(_with_scripts(value, base, subscript, superscript))
    return "".join(parts)


def _is_word(value: str) -> bool:
    return (
        len(value) == 1
        or len(value) > 2
        or value in NAMES
        or value in SHORT_WORDS
    )


def _base(kind: str, value: str) -> str:
    if kind == "space":  # wide between formulas, narrow otherwise
        return f'<mspace width="{"2em" if len(value) > 1 else "0.25em"}"/>'
    if kind == "number":
        return f"<mn>{value}</mn>"
    if kind in ("quoted", "identifier") or (
        kind == "word" and len(value) > 1 and value not in NAMES
    ):
        return f"<mtext>{escape(value)}</mtext>"
    if kind in ("word", "greek") and value != "Σ":
        return f"<mi>{value}</mi>"
    if value == "Σ":
        return "<mo>∑</mo>"
    return (
        f'<mo stretchy="false">{escape(value)}</mo>'
        if value in "()[]"
        else f"<mo>{escape(value)}</mo>"
    )


def _with_scripts(
    value: str, base: str, subscript: str | None, superscript: str | None
) -> str:
    if subscript is not None and value in OPERATORS:
        return f"<munder>{base}<mrow>{subscript}</mrow></munder>"
    if subscript is not None and superscript is not None:
        return f"<msubsup>{base}<mrow>{subscript}</mrow><mrow>{superscript}</mrow></msubsup>"
    if subscript is not None:
        return f"<msub>{base}<mrow>{subscript}</mrow></msub>"
    return (
        base
        if superscript is None
        else f"<msup>{base}<mrow>{superscript}</mrow></msup>"
    )
