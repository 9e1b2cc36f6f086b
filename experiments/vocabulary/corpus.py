"""Tokens of files as numbers: each of the most frequent is a class, and all others share one class."""

import re
import sysconfig
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from experiments._door import InputError

WORD = re.compile(r"\w+|[^\w\s]")
"""A run of letters, digits and underscores, or one other character; white space separates tokens."""
UNKNOWN = 0
"""The class of tokens that are not in the vocabulary, and of the positions before a document's first token."""
LIBRARIES = {"standard-library": ("stdlib",), "installed": ("stdlib", "purelib", "platlib")}
"""The folders of Python sources that come with the interpreter, by their names in `sysconfig`."""
STRETCHES = 20
"""One document in this many is held out; a corpus of one file is cut into this many documents."""

Words = Int[np.ndarray, " words"]


class Text(NamedTuple):
    """The classes of the tokens, each document after `context` unknown ones."""

    train: Words
    test: Words
    classes: tuple[str, ...]
    counts: Int[np.ndarray, " classes"]  # in the training documents
    origin: str  # a description of the tokens


def read_text(corpus: str, vocabulary: int, context: int, seed: int) -> Text:
    """The documents of a corpus, some of them held out, in the vocabulary of the training documents.

    The vocabulary is the unknown class and the `vocabulary` − 1 commonest words of the training
    documents; among words as common those come first that the corpus has first.
    """
    documents, words = number(list_files(corpus))
    if len(documents) == 1:
        documents = np.array_split(documents[0], STRETCHES)
    documents = [document for document in documents if document.size]
    if len(documents) < 2:
        raise InputError(
            f"{corpus}: expected at least two documents with tokens, to hold one out, got {len(documents)}"
        )
    order = np.random.default_rng(seed).permutation(len(documents))
    held_out = set(order[: max(1, len(documents) // STRETCHES)].tolist())
    train = [document for n, document in enumerate(documents) if n not in held_out]
    test = [documents[n] for n in sorted(held_out)]
    counts = np.bincount(np.concatenate(train), minlength=len(words))
    found = np.count_nonzero(counts)
    if vocabulary > found + 1:
        more = "" if corpus not in LIBRARIES or corpus == "installed" else "; --corpus installed has more"
        raise InputError(
            f"--vocabulary: expected at most {found + 1}, the distinct tokens of the training documents of {corpus} "
            f"and the unknown class, got {vocabulary}{more}"
        )
    commonest = np.argsort(-counts, kind="stable")[: vocabulary - 1]
    classes = np.full(len(words), UNKNOWN, np.int32)
    classes[commonest] = np.arange(1, vocabulary)
    if not classes[np.concatenate(test)].any():
        raise InputError(
            f"--vocabulary {vocabulary}: expected some of its tokens in the held-out documents of {corpus}, got none"
        )
    everything = zlib.crc32(np.concatenate(documents).tobytes() + "\n".join(words).encode())
    return Text(
        join(train, classes, context),
        join(test, classes, context),
        ("unknown", *(words[n] for n in commonest)),
        np.concatenate([[counts.sum() - counts[commonest].sum()], counts[commonest]]),
        f"{corpus}, {sum(map(len, documents))} tokens, checksum {everything:08x}",
    )


def number(files: Sequence[Path]) -> tuple[list[Words], list[str]]:
    """The documents as numbers of tokens, and the tokens in the order of their first occurrence."""
    numbers: dict[str, int] = {}
    documents = []
    with tqdm(files, unit="file", desc="reading") as bar:
        for path in bar:
            met = [numbers.setdefault(word, len(numbers)) for word in WORD.findall(read(path))]
            documents.append(np.array(met, np.int32))
    return documents, list(numbers)


def join(documents: Sequence[Words], classes: Words, context: int) -> Words:
    apart = np.full(context, UNKNOWN, np.int32)
    return np.concatenate([part for document in documents for part in (apart, classes[document])])


def list_files(corpus: str) -> list[Path]:
    """The files in the order of their names, except hidden ones: files and folders whose names begin with a dot."""
    if corpus in LIBRARIES:
        folders = dict.fromkeys(Path(sysconfig.get_path(name)) for name in LIBRARIES[corpus])
        return [path for folder in folders for path in sorted(folder.rglob("*.py")) if is_source(path, folder)]
    root = Path(corpus)
    if root.is_dir():
        hidden = re.compile(r"(^|/)\.")
        files = (path for path in sorted(root.rglob("*")) if path.is_file())
        return [path for path in files if not hidden.search(path.relative_to(root).as_posix())]
    return [root]


def is_source(path: Path, folder: Path) -> bool:
    """Whether a file belongs to this folder of sources, and not to a package installed inside it."""
    return path.is_file() and not {"site-packages", "dist-packages"} & set(path.relative_to(folder).parts)


def read(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        if path.suffix == ".py":  # some of Python's own tests are in other encodings
            return content.decode(errors="replace")
        raise InputError(
            f"{path}: expected text in UTF-8, got byte {content[error.start]:#x} at {error.start}"
        ) from None
