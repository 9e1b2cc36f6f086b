"""Types of arguments and results with which `jax.export` can store programs."""

import contextlib
import json
from typing import TypeVar

from jax import export

Kind = TypeVar("Kind", bound=type)


def exportable(kind: Kind) -> Kind:
    """Let `jax.export` store programs that take or return a NamedTuple, or a dataclass that is registered as a tree.

    Its name must never change, because it is stored with the program.
    """
    name = f"jaxsoft.{kind.__name__}"
    with contextlib.suppress(ValueError):  # if the package is imported again; JAX keeps the first registration
        if hasattr(kind, "_fields"):
            export.register_namedtuple_serialization(kind, serialized_name=name)
        else:  # JAX stores the static fields, which are strings, in addition to the arrays
            export.register_pytree_node_serialization(
                kind,
                serialized_name=name,
                serialize_auxdata=lambda fields: json.dumps(fields).encode(),
                deserialize_auxdata=lambda stored: tuple(json.loads(stored.decode())),
            )
    return kind
