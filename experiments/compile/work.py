"""What a compiled program does on its device: the kernels that run, and what each reads, writes and computes.

A kernel is an instruction of the entry, or of a loop, branch or call within it, that does more than name memory; a
fusion is one kernel. A loop's kernels count as often as it runs. Of several branches only the one that moves most bytes
counts, or least for jaxsoft's second attempt, which hardly ever runs.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from experiments.compile.hlo import Array, Computation, Instruction, Module, trip_count
from jaxsoft._linear.one_pass import SECOND_ATTEMPT

# Instructions that only name memory, end what was counted at its start, or call others.
NO_KERNEL = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "domain", "add-dependency", "while", "conditional", "call", "call-start", "call-update", "call-done",
    "async-start", "async-update", "async-done", "copy-done", "send-done", "recv-done", "all-reduce-done",
    "all-gather-done", "collective-permute-done",
}  # fmt: skip
NO_CALLS = {"AllocateBuffer", "AssumeGatherIndicesInBound"}
COLLECTIVES = {
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
}  # fmt: skip
VIEWS = {"bitcast", "reshape", "transpose", "convert", "copy"}
SLICES = {"slice", "dynamic-slice", "gather"}
IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}
"""Instructions that write into their first operand, and the operand that states the size."""
ARITHMETIC = {
    "add", "subtract", "multiply", "divide", "remainder", "maximum", "minimum", "negate", "abs", "sign", "power",
    "exponential", "exponential-minus-one", "log", "log-plus-one", "logistic", "tanh", "sqrt", "rsqrt", "cbrt",
    "floor", "ceil", "round-nearest-even", "round-nearest-afz", "clamp", "compare", "select", "and", "or", "xor", "not",
}  # fmt: skip
PRODUCTS = {"dot", "convolution", "custom-call"}

Types = Callable[[str], tuple[Array, ...]]


@dataclass(frozen=True)
class Kernel:
    """One instruction that runs, as a kernel."""

    name: str
    opcode: str
    nbytes: int  # read and written in the device's memory, each time
    products: dict[str, int]  # FLOPs of its matmuls, by the wider dtype of the two inputs
    others: int  # other operations; an exponential counts as one
    collective: str  # the collective that it starts, if any
    carried: int  # bytes that each device contributes to it
    cycles: int | None  # the compiler's estimate
    loops: tuple[int | None, ...] = ()  # how often the loops around it run, outermost first; None if unknown

    @property
    def times(self) -> float:
        return math.nan if None in self.loops else math.prod(n for n in self.loops if n is not None)

    @property
    def operations(self) -> int:
        return sum(self.products.values()) + self.others


class Cost(NamedTuple):
    """Operations of an instruction and of everything fused into it."""

    products: Counter[str]
    others: int


def kernels(module: Module, on_chip: Collection[int] = ()) -> list[Kernel]:
    """All kernels that run, in order; `on_chip` are memory spaces whose reads and writes are not counted."""
    return list(visit(module, module.entry, on_chip))


def visit(module: Module, name: str, on_chip: Collection[int]) -> Iterator[Kernel]:
    computation = module.computations[name]
    types = types_in(computation)
    for instruction in computation.instructions.values():
        match instruction.opcode:
            case "while":
                trips = trip_count(module, name, instruction)
                for kernel in visit(module, instruction.called("body")[0], on_chip):
                    yield replace(kernel, loops=(trips, *kernel.loops))
            case "conditional":
                named = instruction.called("branch_computations", "true_computation", "false_computation")
                branches = [list(visit(module, branch, on_chip)) for branch in named]
                chosen = min if f"/{SECOND_ATTEMPT}/" in instruction.attributes else max
                yield from chosen(branches, key=lambda branch: sum(k.nbytes * k.times for k in branch))
            case "call" | "call-start" | "async-start":  # asynchronous kernels run next to the others
                for called in instruction.called("to_apply", "calls"):
                    yield from visit(module, called, on_chip)
        if not is_kernel(instruction, types):
            continue
        cost = cost_of(module, instruction, types)
        collective = collective_of(module, instruction)
        # An estimate of more than twelve digits means that the compiler does not know.
        cycles = re.search(r'"estimated_cycles":"(\d{1,12})"', instruction.attributes)
        yield Kernel(
            name=instruction.name,
            opcode=instruction.opcode,
            nbytes=bytes_of(module, instruction, types, on_chip),
            products=dict(cost.products),
            others=cost.others,
            collective=collective,
            carried=sum(array.nbytes for name in instruction.operands for array in types(name)) if collective else 0,
            cycles=int(cycles[1]) if cycles else None,
        )


def types_in(computation: Computation) -> Types:
    return lambda name: computation.instructions[name].types


def is_kernel(instruction: Instruction, types: Types) -> bool:
    if instruction.opcode in NO_KERNEL or (instruction.attribute("custom_call_target") or "").strip('"') in NO_CALLS:
        return False
    if instruction.opcode == "fusion" or instruction.opcode.removesuffix("-start") in COLLECTIVES:
        return True
    # Leave out single numbers that count and compare, which a TPU's scalar unit computes on the side.
    return any(array.dims for name in (instruction.name, *instruction.operands) for array in types(name))


def collective_of(module: Module, instruction: Instruction) -> str:
    """The collective that an instruction is, or that is fused into it."""
    if (opcode := instruction.opcode.removesuffix("-start")) in COLLECTIVES:
        return opcode
    inner = (module.computations[name] for name in fused_into(instruction))
    found = (collective_of(module, i) for computation in inner for i in computation.instructions.values())
    return next(filter(None, found), "")


def fused_into(instruction: Instruction) -> list[str]:
    return instruction.called("calls") if instruction.opcode == "fusion" else []


# Bytes.


def bytes_of(module: Module, instruction: Instruction, types: Types, on_chip: Collection[int]) -> int:
    """The bytes read and written in memory: operands and results, or the parts that are touched."""

    def size(arrays: tuple[Array, ...]) -> int:
        return sum(array.nbytes for array in arrays if array.space not in on_chip)

    read = [size(types(operand)) for operand in instruction.operands]
    written = size(instruction.types)
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in SLICES:
        return 2 * written
    if opcode in IN_PLACE:
        return 2 * size(types(instruction.operands[IN_PLACE[opcode]]))
    if instruction.opcode != opcode and opcode != "all-reduce":
        # An asynchronous start lists its operands among its results: a copy after them, others before.
        count = len(instruction.operands)
        return sum(read) + size(instruction.types[:1] if opcode == "copy" else instruction.types[count : 2 * count])
    for name in fused_into(instruction):
        inner = module.computations[name]
        inner_types = types_in(inner)
        for parameter in inner.instructions.values():
            if parameter.opcode == "parameter":
                n = int(parameter.argument)
                read[n] = min(read[n], read_of(inner, parameter, size))
        for result in results_of(inner):
            if result.opcode in IN_PLACE:
                written -= size(result.types) - size(inner_types(result.operands[IN_PLACE[result.opcode]]))
    return sum(read) + written


def read_of(inner: Computation, parameter: Instruction, size: Callable[[tuple[Array, ...]], int]) -> int:
    """The bytes that a fusion reads of an operand, which it may only slice or update in place."""
    names, read = {parameter.name}, 0
    for user in inner.instructions.values():
        if not names & {*user.operands}:
            continue
        if user.opcode in VIEWS or "output_to_operand_aliasing" in user.attributes:  # in another layout, in place
            names.add(user.name)
        elif user.operands[0] in names and not names & {*user.operands[1:]} and user.opcode in SLICES:
            # In the operand's own dtype, because a view may have changed it.
            whole = max(1, parameter.types[0].elements)
            read += size(parameter.types) * sum(array.elements for array in user.types) // whole
        elif user.operands[0] in names and not names & {*user.operands[1:]} and user.opcode in IN_PLACE:
            changed = inner.instructions[user.operands[IN_PLACE[user.opcode]]].types
            read += size(changed) if user.opcode == "scatter" else 0  # it adds to the existing values
        else:
            return size(parameter.types)
    return read


def results_of(computation: Computation) -> Iterator[Instruction]:
    """The instructions that compute the results of a fusion."""
    instructions = computation.instructions
    root = instructions[computation.root]
    for result in [instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]:
        while result.opcode == "bitcast":
            result = instructions[result.operands[0]]
        yield result


# Operations.


def cost_of(module: Module, instruction: Instruction, types: Types) -> Cost:
    cost = Cost(Counter(), 0)
    for name in fused_into(instruction):
        inner = module.computations[name]
        for fused in inner.instructions.values():
            each = cost_of(module, fused, types_in(inner))
            cost = Cost(cost.products + each.products, cost.others + each.others)
    if instruction.opcode in PRODUCTS and (count := product_operations(instruction, types)):
        wider = max((types(name)[0] for name in instruction.operands[:2]), key=lambda array: array.itemsize)
        return Cost(Counter({wider.dtype: count}), 0)
    if instruction.opcode == "reduce":
        (combiner,) = instruction.called("to_apply")
        steps = sum(i.opcode in ARITHMETIC for i in module.computations[combiner].instructions.values())
        return Cost(Counter(), steps * types(instruction.operands[0])[0].elements)
    if instruction.opcode in ARITHMETIC:
        return Cost(Counter(), instruction.types[0].elements)
    return cost


def product_operations(instruction: Instruction, types: Types) -> int:
    """Two FLOPs for each result and each number summed into it; 0 if this is not a matmul."""
    result, attributes = instruction.types[0].elements, instruction.attributes
    if labels := re.search(r"dim_labels=\w+_(\w+)->", attributes):  # on a TPU matmuls are convolutions
        right = types(instruction.operands[1])[0]
        return 2 * result * right.elements // right.dims[labels[1].index("o")]
    # Of a matmul itself, or of a call of a library that has one.
    if summed := re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', attributes):
        left = types(instruction.operands[0])[0]
        return 2 * result * math.prod(left.dims[int(n)] for n in re.findall(r"\d+", summed[1]))
    return 0
