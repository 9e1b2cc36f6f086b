"""Programs to try: a function with its options, shapes, dtypes, transformation and mesh, drawn from a seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

NORMALISERS = ("softmax", "log_softmax", "logsumexp", "caffe.softmax")
LOSSES = ("cross_entropy", "linear_cross_entropy")
CAFFE_LOSSES = ("caffe.softmax_with_loss", "caffe.infogain_loss")
# The losses have most options, so they are drawn most often.
FUNCTIONS = (
    "cross_entropy", "linear_cross_entropy", "softmax", "cross_entropy", "linear_cross_entropy", "log_softmax",
    "cross_entropy", "linear_cross_entropy", "logsumexp", "cross_entropy", "linear_cross_entropy", *CAFFE_LOSSES,
    "cross_entropy", "linear_cross_entropy", "softmax_vjp", "softmax_jacobian", "caffe.multinomial_logistic_loss",
    "caffe.softmax", "sparse_cross_entropy", "sparse_linear_cross_entropy", "sparse_cross_entropy",
    "sparse_linear_cross_entropy",
)  # fmt: skip
# The losses of `SparseTargets`, and the functions that compute them.
SPARSE = {"sparse_cross_entropy": "cross_entropy", "sparse_linear_cross_entropy": "linear_cross_entropy"}
OUTSIDE = ("tail", "tail", "renormalise", "nothing")
DERIVATIVES = ("value", "vjp", "grad", "linear at 0", "transpose", "jvp of grad", "vjp of grad")
WRAPS = (
    "eager",
    "jit",
    "vmap",
    "vmap inside",
    "map",
    "map inside",
    "scan",
    "checkpoint",
    "shard_map",
    "grad in shard_map",
)
SHARDED = ("shard_map", "grad in shard_map")
# Arrays whose dtypes the table of coverage shows, and options that it counts.
SHOWN = (
    "logits", "x", "probs", "features", "kernel", "bias", "targets", "labels", "weights", "target_indices",
    "target_probs",
)  # fmt: skip
COUNTED = (
    "where", "keepdims", "axis_name", "weights", "class_weights", "ignore_index", "label_smoothing", "z_loss",
    "soft_cap", "temperature", "kernel_axis", "bias", "ignore_label", "normalization", "normalize", "loss_weight",
)  # fmt: skip

Layout = tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """One compiled program; an axis is named c0, c1 … of the classes, p0, p1 … of the positions, k, d, "1" or "all"."""

    seed: int
    index: int
    function: str
    sizes: dict[str, int]
    arrays: dict[str, Layout]
    dtypes: dict[str, str]
    variables: tuple[str, ...]
    outputs: tuple[tuple[Layout, str], ...]
    options: dict[str, Any]
    wrap: str
    derivative: str
    x64: bool
    sets: int
    lanes: int  # sets of values per call
    in_axes: dict[str, int | None]  # under vmap: where an array has its lanes; None: they share it
    mesh: dict[str, int]  # devices along "classes" and "data"
    sharded_position: str | None

    @property
    def is_sparse(self) -> bool:
        return "target_indices" in self.arrays

    @property
    def subject(self) -> str:
        """Its entry in `FUNCTIONS`."""
        return f"sparse_{self.function}" if self.is_sparse else self.function

    @property
    def logits(self) -> Layout:
        """The layout of the logits, even if they are never computed."""
        if self.function == "linear_cross_entropy":
            return (*self.positions, "c0")
        return self.arrays["logits" if "logits" in self.arrays else "x" if "x" in self.arrays else "probs"]

    @property
    def positions(self) -> Layout:
        first = self.arrays["features"][:-1] if self.function == "linear_cross_entropy" else self.logits
        return tuple(name for name in first if name.startswith("p"))

    @property
    def count(self) -> int:
        return math.prod(self.sizes[name] for name in self.positions)

    @property
    def classes(self) -> int:
        return math.prod(self.sizes[name] for name in self.logits if name.startswith("c"))

    @property
    def compute(self) -> np.dtype:
        """The dtype of sums."""
        scores = [self.dtypes[n] for n in ("logits", "x", "probs", "features", "kernel") if n in self.dtypes]
        wide = "float64" in scores or ("int32" in scores and self.x64)
        return np.dtype(np.float64 if wide else np.float32)

    def shape(self, layout: Layout) -> tuple[int, ...]:
        return tuple(1 if name == "1" else self.sizes[name] for name in layout)

    def has(self, option: str) -> bool:
        return option in self.arrays or self.options.get(option) not in (None, 0.0)

    def traits(self) -> list[tuple[str, str]]:
        """The properties that the table of coverage counts."""
        found = [("function", self.subject), ("transformation", self.wrap), ("derivative", self.derivative)]
        found += [("mode", "x64" if self.x64 else "x32"), ("rank of the logits", str(len(self.logits)))]
        found += [(f"dtype of {name}", self.dtypes[name]) for name in self.arrays if name in SHOWN]
        found += [("reduction", self.options["reduction"])] if "reduction" in self.options else []
        for name in COUNTED:
            if name in self.arrays or name in self.options:
                traced = name in self.arrays and not self.arrays[name]
                found.append(("option", f"{name}, traced" if traced else name))
        if self.is_sparse:
            chosen = self.sizes["k"]
            few = "1" if chosen == 1 else "some" if chosen < self.classes else "as many as there are or more"
            found += [("outside of sparse targets", self.options["outside"]), ("classes of sparse targets", few)]
        bounds = {"classes": (1, 16, 999), "positions": (0, 1, 999)}
        for name, count in (("classes", self.classes), ("positions", self.count)):
            low, middle, high = bounds[name]
            span = (
                f"{low}"
                if count <= low
                else f"to {middle}"
                if count <= middle
                else f"to {high}"
                if count <= high
                else "more"
            )
            found.append((name, span))
        return [*found, ("mesh", " x ".join(f"{n} {axis}" for axis, n in self.mesh.items()) or "none")]


def pick(rng: np.random.Generator, options: Sequence) -> Any:
    return options[int(rng.integers(len(options)))]


def chance(rng: np.random.Generator, probability: float) -> bool:
    return bool(rng.random() < probability)


def draw_program(seed: int, index: int, sets: int) -> Program:
    rng = np.random.default_rng([seed, index])
    subject = FUNCTIONS[index % len(FUNCTIONS)]
    function = SPARSE.get(subject, subject)
    derivative, wrap = pick(rng, DERIVATIVES), pick(rng, WRAPS)
    shardable = function in (*NORMALISERS[:3], *LOSSES)
    if wrap in SHARDED and not (shardable and chance(rng, 0.6)):
        wrap = "jit"
    x64 = chance(rng, 0.6)
    mesh: dict[str, int] = {}
    if wrap in SHARDED:
        mesh = pick(
            rng,
            (
                {"classes": 2},
                {"classes": 4},
                {"classes": 8},
                {"data": 2, "classes": 2},
                {"data": 2, "classes": 4},
                {"data": 4, "classes": 2},
            ),
        )
    sizes, layout = draw_layout(rng, function, mesh)
    dtype = pick(rng, ("float32", "float32", "bfloat16", "float16", *(("float64",) if x64 else ())))
    sharded_position = None
    if "data" in mesh:
        sharded_position = pick(rng, [n for n in layout if n.startswith("p")])
    program = Program(
        seed, index, function, sizes, {}, {}, (), (), {}, wrap, derivative, x64, sets, 1, {}, mesh, sharded_position
    )  # fmt: skip
    if function in LOSSES:
        program = draw_loss(rng, program, layout, dtype, sparse=subject in SPARSE)
    elif function in NORMALISERS:
        program = draw_normaliser(rng, program, layout, dtype)
    else:
        program = draw_layer(rng, program, layout, dtype)
    if program.derivative == "grad" and any(program.dtypes[n].startswith("int") for n in program.variables):
        program = replace(program, derivative="value")
    return draw_lanes(rng, program)


def draw_layout(rng: np.random.Generator, function: str, mesh: dict[str, int]) -> tuple[dict[str, int], Layout]:
    """The sizes of all axes, and the layout of the logits."""
    large = chance(rng, 0.04) and not mesh
    ranks = (0, 1, 1, 2, 2, 3)
    rank = pick(rng, ranks)
    if function.startswith("caffe") or mesh:
        rank = max(rank, 1)
    sizes = {f"p{n}": int(pick(rng, (1, 2, 3, 4, 5, 7))) for n in range(rank)}
    if rank and chance(rng, 0.04) and not mesh:
        sizes[f"p{rng.integers(rank)}"] = 0
    if mesh:
        for name in sizes:
            sizes[name] = 4 if chance(rng, 0.5) else 8 if rank == 1 else 4
    class_axes = 1
    if function in NORMALISERS[:3] and not mesh and chance(rng, 0.25):
        class_axes = 2
    sizes |= {
        f"c{n}": int(pick(rng, (1, 2, 3, 5, 10, 17, 33, 64, 130, 300) if class_axes == 1 else (1, 2, 3, 5, 8)))
        for n in range(class_axes)
    }
    if mesh:
        sizes["c0"] = 8 * int(pick(rng, (1, 2, 3, 5, 17)))
    if large:
        if chance(rng, 0.5) or rank == 0:
            sizes |= {n: min(s, 2) for n, s in sizes.items()} | {"c0": int(pick(rng, (1100, 5003, 33000)))}
        else:
            sizes |= {"p0": int(pick(rng, (1500, 6001))), "c0": min(sizes["c0"], 5)}
    names = [n for n in sizes if n.startswith("p")]
    for axis in range(class_axes):
        low = 1 if function.startswith("caffe") else 0
        if axis:
            low = names.index("c0") + 1
        at = (
            len(names)
            if function in ("linear_cross_entropy", "softmax_jacobian")
            else int(rng.integers(low, len(names) + 1))
        )
        names.insert(1 if function == "caffe.multinomial_logistic_loss" else at, f"c{axis}")
    if function == "caffe.multinomial_logistic_loss":  # the classes are all axes except the first
        names = ["p0", "c0", *(f"c{n}" for n in range(1, rank))]
        sizes |= {f"c{n}": sizes.pop(f"p{n}") or 1 for n in range(1, rank)}
    if function == "linear_cross_entropy":
        sizes["d"] = int(pick(rng, (1, 2, 3, 8, 17, 40)))
    return sizes, tuple(names)


def as_axis(rng: np.random.Generator, layout: Layout) -> Any:
    """The class axes as a user may write them."""
    at = [n for n, name in enumerate(layout) if name.startswith("c")]
    at = [n - len(layout) if chance(rng, 0.5) else n for n in at]
    if len(at) == len(layout) and chance(rng, 0.5):
        return None
    return at[0] if len(at) == 1 and chance(rng, 0.8) else tuple(at)


def broadcasting(rng: np.random.Generator, layout: Layout, keep: str = "") -> Layout:
    """A layout that broadcasts to another."""
    chosen = [name if name == keep or chance(rng, 0.8) else "1" for name in layout]
    while chosen and chosen[0] == "1" and chance(rng, 0.5):
        chosen.pop(0)
    return tuple(chosen)


def draw_normaliser(rng: np.random.Generator, program: Program, layout: Layout, dtype: str) -> Program:
    name = "x" if program.function == "caffe.softmax" else "logits"
    if program.derivative == "value" and chance(rng, 0.15):
        dtype = "int32"
    arrays, dtypes, options = {name: layout}, {name: dtype}, {}
    out = layout
    result = dtype if dtype != "int32" else "float64" if program.x64 else "float32"
    if name == "x":
        at = layout.index("c0")
        options["axis"] = at - len(layout) if chance(rng, 0.5) else at
    else:
        options["axis"] = as_axis(rng, layout)
        if program.mesh:
            options["axis_name"] = "classes"
        if chance(rng, 0.4):
            arrays["where"] = broadcasting(rng, layout, keep="c0" if program.mesh else "")
            dtypes["where"] = "bool"
    if program.function == "logsumexp":
        out = tuple(n for n in layout if n.startswith("p"))
        if chance(rng, 0.5):
            options["keepdims"] = True
            out = tuple(n if n.startswith("p") else "1" for n in layout)
    return replace(program, arrays=arrays, dtypes=dtypes, variables=(name,), options=options, outputs=((out, result),))


def draw_loss(rng: np.random.Generator, program: Program, layout: Layout, dtype: str, *, sparse: bool) -> Program:
    arrays: dict[str, Layout] = {}
    dtypes: dict[str, str] = {}
    options: dict[str, Any] = {"reduction": pick(rng, ("none", "sum", "mean"))}
    positions = tuple(n for n in layout if n.startswith("p"))
    linear = program.function == "linear_cross_entropy"
    if linear:
        other = pick(rng, (dtype, dtype, dtype, "float32", "bfloat16"))
        arrays |= {"features": (*positions, "d"), "kernel": ("d", "c0")}
        dtypes |= {"features": dtype, "kernel": other}
        variables = ["features", "kernel"]
        if chance(rng, 0.3):
            options["kernel_axis"] = 0
            arrays["kernel"] = ("c0", "d")
        if chance(rng, 0.5):
            arrays["bias"], dtypes["bias"] = ("c0",), pick(rng, (dtype, "float32"))
            variables.append("bias")
        if chance(rng, 0.3):
            options["soft_cap"] = pick(rng, (1.0, 5.0, 30.0))
        if chance(rng, 0.3):
            options["temperature"] = pick(rng, (0.25, 0.7, 3.0))
    else:
        arrays["logits"], dtypes["logits"], variables = layout, dtype, ["logits"]
        at = layout.index("c0")
        options["axis"] = at - len(layout) if chance(rng, 0.5) else at
    sizes = program.sizes | {"all": program.sizes["c0"]}
    if sparse:
        dtypes["target_indices"], sizes["k"] = draw_chosen(rng, sizes, positions)
        dtypes["target_probs"] = pick(rng, (dtype, dtype, "float32", "bfloat16"))
        arrays["target_indices"] = arrays["target_probs"] = tuple("k" if n == "c0" else n for n in layout)
        variables.append("target_probs")
        options["outside"] = pick(rng, OUTSIDE)
    elif chance(rng, 0.6):
        arrays["targets"] = positions
        signed = ("int32", "int32", "int64", "int8", "int16", "uint8", "uint32")
        dtypes["targets"] = pick(rng, signed)
        if chance(rng, 0.6):
            options["ignore_index"] = pick(rng, (-100, 255, -1, 0, -(2**31), 2**40, program.sizes["c0"]))
    else:
        arrays["targets"] = layout
        onehots = ("int32", "bool") if program.sizes["c0"] > 1 else ()  # with one class they would be labels
        dtypes["targets"] = pick(rng, (dtype, dtype, "float32", *onehots))
        if dtypes["targets"] not in ("int32", "bool"):  # they are one-hot, and not differentiated
            variables.append("targets")
    if chance(rng, 0.4):
        arrays["weights"] = broadcasting(rng, positions)
        dtypes["weights"] = pick(rng, ("float32", "float32", "int32", dtype, "bool", "bool"))
    if not sparse and chance(rng, 0.35):
        arrays["class_weights"], dtypes["class_weights"] = ("all",), pick(rng, ("float32", "int32"))
    if chance(rng, 0.3):
        arrays["where"] = ("c0",) if linear else broadcasting(rng, layout, keep="c0" if program.mesh else "")
        dtypes["where"] = "bool"
    if not sparse and chance(rng, 0.45):
        options["label_smoothing"] = pick(rng, (0.1, 0.1, 0.5, 1.0, 1e-3))
    if chance(rng, 0.35):
        options["z_loss"] = pick(rng, (1e-4, 0.1, 1.0))
    for name in ("label_smoothing", "z_loss", "soft_cap", "temperature"):
        if name in options and chance(rng, 0.4):  # traced, or a concrete array where nothing is traced
            del options[name]
            arrays[name], dtypes[name] = (), "float32"
    if program.mesh:
        options["axis_name"] = "classes"
    if "data" in program.mesh and options["reduction"] == "mean":
        options["reduction"] = "sum"
    program = replace(program, sizes=sizes, arrays=arrays, dtypes=dtypes, variables=tuple(variables), options=options)
    if linear:
        shards, devices = program.mesh.get("classes", 1), program.mesh.get("data", 1)
        row = program.classes // shards * program.compute.itemsize * 4
        options["memory_budget"] = row * int(rng.integers(1, max(program.count // devices, 1) + 2))
    out = positions if options["reduction"] == "none" else ()
    return replace(program, outputs=((out, program.compute.name),))


def draw_chosen(rng: np.random.Generator, sizes: dict[str, int], positions: Layout) -> tuple[str, int]:
    """The dtype of the indices of sparse targets, and their number per position."""
    dtype = pick(rng, ("int32", "int32", "int64", "int8", "int16", "uint8", "uint32"))
    classes, count = sizes["c0"], math.prod(sizes[n] for n in positions)
    # As many as there are classes, and more with duplicates, only where K² comparisons per position are not too many.
    most = classes if classes**2 * max(count, 1) <= 100_000 else min(classes, 16)
    some = int(rng.integers(1, most + 1))
    return dtype, pick(rng, (1, min(some, 4), some, some, most, most + 2))


def draw_layer(rng: np.random.Generator, program: Program, layout: Layout, dtype: str) -> Program:
    arrays: dict[str, Layout] = {}
    dtypes: dict[str, str] = {}
    options: dict[str, Any] = {}
    positions = tuple(n for n in layout if n.startswith("p"))
    sizes = dict(program.sizes)
    at = layout.index("c0")
    wide = "float64" if dtype == "float64" else "float32"
    if program.function in CAFFE_LOSSES:
        arrays["logits"], dtypes["logits"], variables = layout, dtype, ("logits",)
        arrays["labels"], dtypes["labels"] = positions, pick(rng, ("int32", "int64", "int8", "uint8", "float32"))
        if at != 1 or chance(rng, 0.5):
            options["axis"] = at
        if chance(rng, 0.5):
            options["ignore_label"] = pick(rng, (-1, 255, 0, -100, 2**40))
        if chance(rng, 0.7):
            options["normalization"] = pick(rng, ("FULL", "VALID", "BATCH_SIZE", "NONE"))
        if chance(rng, 0.3):
            options["normalize"] = chance(rng, 0.5)
        if chance(rng, 0.5):
            arrays["loss_weight"], dtypes["loss_weight"] = (), "float32"
        if program.function == "caffe.infogain_loss":
            sizes["all"] = sizes["c0"] = min(sizes["c0"], 130)
            arrays["infogain"], dtypes["infogain"] = ("all", "all"), "float32"
        outputs = (((), wide), (layout, dtype))
    elif program.function == "caffe.multinomial_logistic_loss":
        arrays, dtypes, variables = {"probs": layout}, {"probs": dtype}, ("probs",)
        arrays["labels"], dtypes["labels"] = ("p0",), pick(rng, ("int32", "int8", "float32"))
        outputs = (((), wide),)
    elif program.function == "softmax_vjp":
        arrays, dtypes = {"probs": layout, "cotangent": layout}, {"probs": dtype, "cotangent": dtype}
        options["axis"], variables, outputs = as_axis(rng, layout), ("probs", "cotangent"), ((layout, dtype),)
    else:
        arrays, dtypes, variables = {"probs": layout}, {"probs": dtype}, ("probs",)
        sizes |= {"c0": min(sizes["c0"], 33)}
        sizes["c_"] = sizes["c0"]
        outputs = (((*layout, "c_"), dtype),)
    if program.function not in CAFFE_LOSSES and program.derivative not in ("value", "vjp", "linear at 0"):
        program = replace(program, derivative="vjp")
    return replace(
        program, sizes=sizes, arrays=arrays, dtypes=dtypes, variables=variables, options=options, outputs=outputs
    )  # fmt: skip


def draw_lanes(rng: np.random.Generator, program: Program) -> Program:
    """How many sets of values to try, and how many of them in one call."""
    numbers = max(program.count, 1) * program.classes + program.sizes.get("d", 0) * (program.classes + program.count)
    cost = 60_000 if program.compute == np.float64 else 150_000  # wider numbers take the formulas longer
    sets = min(program.sets, max(cost // numbers, 4))
    lanes, in_axes = 1, {}
    if program.wrap == "eager":
        sets = min(sets, 16)
    elif program.wrap in SHARDED:
        lanes = pick(rng, (1, 8))
        sets = min(sets, 24 if lanes == 1 else 256)
    elif program.wrap in ("map", "map inside", "scan", "vmap inside"):
        lanes = 8
    elif program.wrap == "vmap":
        lanes = 8
        for name, layout in program.arrays.items():
            in_axes[name] = pick(rng, (0, 0, 0, None, len(layout), int(rng.integers(len(layout) + 1))))
        if all(axis is None for axis in in_axes.values()):
            in_axes[program.variables[0]] = 0
    sets = max(sets // lanes, 1) * lanes
    return replace(program, sets=sets, lanes=lanes, in_axes=in_axes)
