"""A compiled program as XLA prints it: its computations, their instructions, and how often its loops run."""

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

MOST_TRIPS = 10_000
"""A loop is followed for at most this many iterations."""

ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
# The operations on a loop's integers.
INTEGERS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "negate": operator.neg,
    "maximum": max, "minimum": min, "remainder": math.fmod, "and": operator.and_, "or": operator.or_,
    "select": lambda chosen, one, other: one if chosen else other,
}  # fmt: skip
COMPARISONS = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne,
}  # fmt: skip


class Array(NamedTuple):
    """The type of one array."""

    dtype: str
    dims: tuple[int, ...]
    space: int  # the memory space, 0 for the device's memory

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def itemsize(self) -> float:
        """The size in bytes; tokens and similar types have none."""
        bits = re.search(r"\d+", self.dtype)
        return int(bits[0]) / 8 if bits else float(self.dtype == "pred")

    @property
    def nbytes(self) -> int:
        return math.ceil(self.elements * self.itemsize)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    types: tuple[Array, ...]  # the types of the result, one array or a tuple's arrays
    operands: tuple[str, ...]
    argument: str  # the text between the parentheses
    attributes: str  # the text after the parentheses

    @property
    def is_scalar(self) -> bool:
        return len(self.types) == 1 and not self.types[0].dims

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return found and found[1]

    def called(self, *names: str) -> list[str]:
        """The computations named by these attributes."""
        return [name for given in names for name in re.findall(r"[\w.\-]+", self.attribute(given) or "")]


class Computation(NamedTuple):
    """Instructions by name, in the order in which they run."""

    instructions: dict[str, Instruction]
    root: str


class Module(NamedTuple):
    """A program."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Parse the text of `jax.stages.Compiled.as_text`."""
    computations: dict[str, Computation] = {}
    entry = name = root = ""
    body: dict[str, Instruction] = {}
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if head := COMPUTATION.match(line):
            name, root, body = head[2], "", {}
            entry = name if head[1] else entry
        elif found := INSTRUCTION.match(line):
            instruction = read_instruction(*found.groups()[1:])
            body[instruction.name] = instruction
            root = instruction.name if found[1] else root
        elif line.startswith("}"):
            computations[name] = Computation(body, root)
    return Module(computations, entry)


def read_instruction(name: str, result: str, opcode: str, rest: str) -> Instruction:
    depth, end = 1, 0
    while depth:
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    argument, attributes = rest[: end - 1], rest[end:]
    operands = re.findall(r"%([\w.\-]+)", argument)
    return Instruction(name, opcode, read_types(result), tuple(operands), argument, attributes)


def read_types(text: str) -> tuple[Array, ...]:
    arrays = []
    for dtype, dims, layout in ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        arrays.append(
            Array(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n), int(space[1]) if space else 0)
        )
    return tuple(arrays)


def trip_count(module: Module, within: str, loop: Instruction) -> int | None:
    """How often a loop runs, as the compiler states or as its integers show; None if unknown."""
    if stated := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(stated[1])
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    carried = evaluate(module, within, (), of=loop.operands[0])
    for trips in range(MOST_TRIPS):
        if (goes_on := evaluate(module, condition, (carried,))) is None:
            return None
        if not goes_on:
            return trips
        carried = evaluate(module, body, (carried,))
    return None


def evaluate(module: Module, name: str, arguments: Sequence[Any], of: str | None = None) -> Any:
    """The value of a computation's root, or of an instruction: an integer, a tuple of these, or None if unknown."""
    instructions, root = module.computations[name]
    known: dict[str, Any] = {}

    def value(name: str) -> Any:
        if name not in known:
            known[name] = follow(instructions[name])
        return known[name]

    def follow(instruction: Instruction) -> Any:
        match instruction.opcode:
            case "parameter":
                n = int(instruction.argument)
                return arguments[n] if n < len(arguments) else None
            case "tuple":
                return tuple(map(value, instruction.operands))
            case "get-tuple-element":
                whole = value(instruction.operands[0])
                return None if whole is None else whole[int(instruction.attribute("index") or 0)]
        if not instruction.is_scalar:
            return None
        match instruction.opcode:
            case "constant":
                written = {"true": "1", "false": "0"}.get(instruction.argument, instruction.argument)
                return int(written) if re.fullmatch(r"-?\d+", written) else None
            case "copy" | "bitcast" | "convert":
                return value(instruction.operands[0])
            case "fusion" | "call":
                (called,) = instruction.called("calls", "to_apply")
                return evaluate(module, called, [value(operand) for operand in instruction.operands])
        compute = COMPARISONS.get(instruction.attribute("direction") or "", INTEGERS.get(instruction.opcode))
        if compute is None:
            return None
        values = [value(operand) for operand in instruction.operands]
        return None if None in values else int(compute(*values))

    return value(of or root)
