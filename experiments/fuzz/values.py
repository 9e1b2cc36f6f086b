"""Sets of values for a program: logits of many kinds, labels in and out of range, cotangents, directions."""

import math
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from experiments.fuzz.programs import CAFFE_LOSSES, LOSSES, NORMALISERS, Layout, Program

REGIMES = ("normal", "small", "tiny", "wide", "offset", "margin", "ties", "constant")
TRACED = {
    "label_smoothing": (0, 0.1, 0.5, 1),
    "z_loss": (0, 1e-3, 0.1),
    "soft_cap": (2, 10, 30),
    "temperature": (0.5, 1, 2),
}
TEMPERS = ("tame", "huge", "-inf", "empty", "nan and inf")


@dataclass
class Values:
    """The first axis of every array counts the sets."""

    inputs: dict[str, np.ndarray]
    cotangents: list[np.ndarray] = field(default_factory=list)
    tangents: dict[str, np.ndarray] = field(default_factory=dict)
    tempers: np.ndarray = field(default_factory=lambda: np.empty(0, object))  # one word per set


class Frame:
    """Reshape the arrays of a program to (sets, positions, classes), and back."""

    def __init__(self, program: Program, layout: Layout | None = None):
        """For the logits or another layout; all axes that are not positions count as classes."""
        self.program, self.full = program, program.logits if layout is None else layout
        self.at = [n for n, name in enumerate(self.full) if not name.startswith("p")]
        self.sets, self.count = program.sets, program.count
        self.classes = math.prod(program.sizes[self.full[n]] for n in self.at)

    def broadcast(self, array: np.ndarray, full: Layout) -> np.ndarray:
        shape = self.program.shape(full)
        padded = array.reshape(self.sets, *(1,) * (len(shape) - array.ndim + 1), *array.shape[1:])
        return np.broadcast_to(padded, (self.sets, *shape))

    def rows(self, array: np.ndarray) -> np.ndarray:
        """To (S, N, C)."""
        whole = self.broadcast(array, self.full)
        last = tuple(range(-len(self.at), 0))
        return np.moveaxis(whole, [a + 1 for a in self.at], last).reshape(self.sets, self.count, self.classes)

    def positions(self, array: np.ndarray) -> np.ndarray:
        """To (S, N)."""
        return self.broadcast(array, self.program.positions).reshape(self.sets, self.count)

    def back(self, array: np.ndarray) -> np.ndarray:
        """From (S, N, C) to the layout."""
        sizes = self.program.sizes
        shape = [sizes[n] for n in self.program.positions] + [sizes[self.full[n]] for n in self.at]
        last = tuple(range(-len(self.at), 0))
        return np.moveaxis(array.reshape(self.sets, *shape), last, [a + 1 for a in self.at])


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.asarray(array).astype(jnp.dtype(dtype))


def draw_values(program: Program) -> Values:
    rng = np.random.default_rng([program.seed, program.index, 1])
    frame = Frame(program)
    draw = Draw(rng, program, frame)
    if program.function in LOSSES:
        draw.loss()
    elif program.function in NORMALISERS:
        draw.normaliser()
    else:
        draw.layer()
    draw.directions()
    return draw.values


class Draw:
    """Draw arrays in the order in which they depend on each other: masks, weights, labels, then logits."""

    def __init__(self, rng: np.random.Generator, program: Program, frame: Frame):
        self.rng, self.program, self.frame = rng, program, frame
        self.values = Values({}, tempers=np.full(program.sets, "tame", object))
        self.idle = np.zeros((frame.sets, frame.count), bool)  # ignored positions
        self.removed = np.zeros((frame.sets, frame.count, frame.classes), bool)

    def some(self, probability: float, *shape: int) -> np.ndarray:
        """A mask over the sets, which broadcasts over the other axes."""
        return (self.rng.random(self.program.sets) < probability).reshape(-1, *(1,) * len(shape))

    def share(self, choices: list[float], odds: list[float], shape: tuple[int, ...]) -> np.ndarray:
        """One number per set, which broadcasts over the other axes."""
        return self.rng.choice(choices, p=odds, size=shape[0]).reshape(-1, *(1,) * (len(shape) - 1))

    def put(self, name: str, array: np.ndarray) -> np.ndarray:
        """Store an input, with one copy if all lanes of a vmapped call share it."""
        array = cast(array, self.program.dtypes[name])
        if self.program.in_axes.get(name, 0) is None:
            array = np.repeat(array[:: self.program.lanes], self.program.lanes, 0)
        self.values.inputs[name] = array
        return array

    def shape(self, name: str) -> tuple[int, ...]:
        return (self.program.sets, *self.program.shape(self.program.arrays[name]))

    def mask(self) -> None:
        if "where" in self.program.arrays:
            shape = self.shape("where")
            keep = self.share([0.0, 0.3, 0.7, 0.95, 1.0], [0.05, 0.25, 0.3, 0.3, 0.1], shape)
            kept = self.put("where", self.rng.random(shape) < keep)
            self.removed = ~self.frame.rows(kept)

    def tempers(self) -> np.ndarray:
        chosen = self.rng.choice(TEMPERS, p=[0.5, 0.1, 0.15, 0.1, 0.15], size=self.program.sets)
        self.values.tempers = chosen.astype(object)
        return chosen

    def onehot(self, lead: np.ndarray) -> np.ndarray:
        return np.arange(self.frame.classes) == lead[..., None]

    def logits(self, dtype: str, ahead: np.ndarray, *, squared: bool) -> np.ndarray:
        """Rows (S, N, C), each of a regime; the set's temper decides which logits are huge or not finite.

        `ahead` marks a label or the classes of sparse targets, which get the largest or the smallest logits.
        """
        rng, (sets, count, classes) = self.rng, self.removed.shape
        regime = rng.integers(len(REGIMES), size=(sets, count, 1))
        base = rng.normal(size=(sets, count, classes))
        narrow = dtype == "float16"
        offset = rng.uniform(-1e4, 1e4, (sets, count, 1))
        if self.program.is_sparse:
            margin = self.apart(base, ahead)
            regime = np.where(rng.random(regime.shape) < 0.4, REGIMES.index("margin"), regime)
        else:
            others = np.where(ahead, -np.inf, 0.3 * base).max(-1, keepdims=True, initial=-1.0)
            margin = np.where(ahead, others + rng.uniform(-80, 80, (sets, count, 1)), 0.3 * base)
        constant = np.broadcast_to(offset, base.shape)
        tiny = (1e-6 if narrow else 1e-30) * base
        rows = [3 * base, 1e-3 * base, tiny, 30 * base, constant + base, margin, np.rint(base), constant]  # REGIMES
        z = np.choose(regime, rows) if base.size else base
        temper = self.tempers()[:, None, None]
        # A fraction of the dtype's largest number, so that sums of weighted losses and of squares do not overflow.
        largest = float(jnp.finfo(jnp.dtype(dtype)).max) / (8 if narrow else 1e4)
        largest = min(largest, 1e15) if squared else largest
        row = rng.random((sets, count, 1))
        z = np.where((temper == "huge") & (row < 0.5), largest * rng.uniform(-1, 1, base.shape), z)
        holes = rng.random(base.shape) < rng.choice([0.1, 0.5, 0.9], size=(sets, count, 1))
        keep = np.arange(classes) == rng.integers(classes, size=(sets, count, 1))
        z = np.where(np.isin(temper, ("-inf", "empty")) & (row < 0.7) & holes & ~keep, -np.inf, z)
        z = np.where((temper == "empty") & (row > 0.6), -np.inf, z)
        wild = (temper == "nan and inf") & (row < 0.4) & (rng.random(base.shape) < 0.3)
        z = np.where(wild, rng.choice([np.nan, np.inf, -np.inf, np.nan], size=base.shape), z)
        # Logits at ignored positions may be anything.
        junk = rng.choice([np.nan, np.inf, -np.inf, 0.0], size=base.shape)
        spoil = self.some(0.6, 1, 1)
        return np.where((self.removed | self.idle[..., None]) & spoil, junk, z)

    def apart(self, base: np.ndarray, ahead: np.ndarray) -> np.ndarray:
        """Two groups of classes with a margin of up to ±200 between them, or none, and single classes far apart.

        Sums relative to the largest logit underflow, and so do the sums of a group with one dominant class.
        """
        rng, shape = self.rng, (*base.shape[:2], 1)
        near = rng.choice([0.0, 0.3, 3.0], size=shape) * base
        between = rng.uniform(-200, 200, shape) * rng.choice([1.0, 1.0, 0.005], size=shape)
        z = near + np.where(ahead, between, 0)
        for group in (ahead, ~ahead):
            one = np.where(group, rng.random(base.shape), -1).argmax(-1)
            alone = self.onehot(one) & group & (rng.random(shape) < 0.4)
            z = np.where(alone, z + rng.uniform(-200, 200, shape), z)
        return z

    def normaliser(self) -> None:
        self.mask()
        (name,) = self.program.variables
        dtype = self.program.dtypes[name]
        lead = self.rng.integers(self.frame.classes, size=self.idle.shape)
        if dtype == "int32":
            z = self.rng.integers(-50, 50, self.removed.shape)
        else:
            z = self.logits(dtype, self.onehot(lead), squared=False)
        self.put(name, self.frame.back(z))

    @property
    def keeps_wide(self) -> bool:
        """Whether the functions see labels in their own dtype; JAX narrows traced ones before."""
        return self.program.wrap == "eager" or self.program.x64

    def beyond(self, dtype: str) -> list[int]:
        """Labels out of range that the dtype can hold."""
        integers, classes = np.iinfo("int32" if dtype.startswith("float") else dtype), self.frame.classes
        values = [-1, -2, classes, classes + 3, -100, 127, 2**31 - 1, -(2**31), 200, 255, 2**32 - 1]
        if self.keeps_wide and not dtype.startswith("float"):
            values += [2**32, 2**32 + classes - 1, -(2**32), 2**40 + 1]
        low, high = (integers.min, integers.max) if self.keeps_wide or dtype != "int64" else (-(2**31), 2**31 - 1)
        return [v for v in values if low <= v <= high and not 0 <= v < classes]

    def labels(self, name: str, ignore: int | None) -> np.ndarray:
        """Labels in range, ignored and, in some sets, out of range; (S, N) in their dtype."""
        rng, dtype, classes = self.rng, self.program.dtypes[name], self.frame.classes
        shape = self.shape(name)
        integers = np.iinfo("int32" if dtype.startswith("float") else dtype)
        y = rng.integers(min(classes, integers.max + 1), size=shape)
        beyond, wide = self.beyond(dtype), self.keeps_wide
        tail = (1,) * (len(shape) - 1)
        if beyond:
            stray = self.some(0.2, *tail) & (rng.random(shape) < 0.3)
            y = np.where(stray, rng.choice(beyond, size=shape), y)
        if ignore is not None and integers.min <= ignore <= integers.max and (wide or abs(ignore) <= 2**31):
            ignored = rng.random(shape) < self.share([0.0, 0.3, 1.0], [0.2, 0.65, 0.15], shape)
            y = np.where(ignored, ignore, y)
        if dtype.startswith("float"):
            y = y + np.sign(y) * rng.choice([0.0, 0.5], size=shape)
            odd = self.some(0.1, *tail) & (rng.random(shape) < 0.2)
            y = np.where(odd, rng.choice([np.nan, np.inf, -np.inf, -0.5], size=shape), y)
        return self.frame.positions(self.put(name, y))

    def loss(self) -> None:
        rng, program, frame = self.rng, self.program, self.frame
        self.mask()
        if "weights" in program.arrays:
            shape = self.shape("weights")
            dtype = program.dtypes["weights"]
            weights = rng.uniform(0.2, 2, shape) if dtype not in ("int32", "bool") else rng.integers(0, 3, shape)
            zero = rng.random(shape) < self.share([0.0, 0.4, 1.0], [0.3, 0.6, 0.1], shape)
            weights = self.put("weights", np.where(zero, 0, weights))
            self.idle |= frame.positions(weights) == 0
        if "class_weights" in program.arrays:
            shape = self.shape("class_weights")
            whole = program.dtypes["class_weights"] == "int32"
            by_class = rng.integers(0, 3, shape) if whole else rng.uniform(0.2, 2, shape)
            self.put("class_weights", np.where(self.some(0.3, 1) & (rng.random(shape) < 0.4), 0, by_class))
        if program.is_sparse:
            self.sparse_loss()
            return
        lead = rng.integers(frame.classes, size=self.idle.shape)
        if program.arrays["targets"] == program.positions:
            ignore = program.options.get("ignore_index")
            y = self.labels("targets", ignore).astype(np.int64)
            if ignore is not None:
                self.idle |= y == ignore
            lead = np.where(rng.random(y.shape) < 0.6, y, lead)
        else:
            self.put("targets", frame.back(self.distribution(lead)))
        self.traced()
        if program.function == "cross_entropy":
            self.dense(self.onehot(lead))
        else:
            self.lead(self.layer_inputs())

    def traced(self) -> None:
        for name, choices in TRACED.items():
            if name in self.program.arrays:
                self.put(name, self.rng.choice(choices, size=self.program.sets))

    def dense(self, ahead: np.ndarray) -> None:
        z = self.logits(self.program.dtypes["logits"], ahead, squared=self.program.has("z_loss"))
        self.put("logits", self.frame.back(z))

    def sparse_loss(self) -> None:
        """For a linear layer draw the logits, then classes of large or small logits; else the classes first."""
        self.traced()
        if self.program.function == "cross_entropy":
            self.dense(self.chosen(None))
        else:
            self.chosen(self.layer_inputs())

    def chosen(self, z: np.ndarray | None) -> np.ndarray:
        """Draw the indices and probabilities of sparse targets; return the chosen classes as a mask (S, N, C)."""
        rng, program, (sets, count, classes) = self.rng, self.program, self.removed.shape
        frame, dtype = Frame(program, program.arrays["target_indices"]), program.dtypes["target_indices"]
        shape, row = (sets, count, frame.classes), (sets, count, 1)
        order = rng.random((sets, count, min(classes, np.iinfo(dtype).max + 1)))
        if z is not None:
            sign = rng.choice([-1.0, 1.0, 0.0], p=[0.2, 0.4, 0.4], size=row)
            order = np.where(sign == 0, order, sign * np.nan_to_num(z[..., : order.shape[-1]]))
        order = np.argsort(-order, -1)
        y = order[..., np.arange(frame.classes) % order.shape[-1]]
        twice = self.some(0.3, 1, 1) & (rng.random(shape) < 0.3)
        y = np.where(twice, np.take_along_axis(y, rng.integers(frame.classes, size=shape), -1), y)
        q = self.masses(shape)
        beyond = self.beyond(dtype)
        if beyond:
            pads = self.some(0.4, 1, 1) & (rng.random(shape) < rng.choice([0.2, 0.6, 1.0], p=[0.6, 0.3, 0.1], size=row))
            strays = self.some(0.15, 1, 1) & (rng.random(row) < 0.3) & (rng.random(shape) < 0.5)
            y = np.where(strays | pads, np.where(rng.random(shape) < 0.6, beyond[0], rng.choice(beyond, size=shape)), y)
            q = np.where(pads & ~strays, 0, q)
        names = ("target_indices", "target_probs")
        if all(program.in_axes.get(name, 0) is not None for name in names):  # else others may count where these do not
            spoil = self.idle[..., None] & self.some(0.5, 1, 1)
            q = np.where(spoil, rng.choice([np.nan, np.inf, 0.3], size=shape), q)
            y = np.where(spoil & bool(beyond), beyond[-1] if beyond else 0, y)
        y, q = (frame.rows(self.put(name, frame.back(a))) for name, a in zip(names, (y, q), strict=True))
        found = np.zeros((sets, count, classes + 1), bool)
        y = y.astype(np.int64)
        np.put_along_axis(found, np.where((y >= 0) & (y < classes), y, classes), True, -1)
        return found[..., :classes]

    def masses(self, shape: tuple[int, ...]) -> np.ndarray:
        """Probabilities whose remainder is nothing, something or nearly everything; some of them 0."""
        rng, program = self.rng, self.program
        raw = rng.gamma(0.7, size=shape) + 1e-6
        raw = np.where(self.some(0.4, 1, 1) & (rng.random(shape) < 0.3), 0, raw)
        normal = raw / np.maximum(raw.sum(-1, keepdims=True), 1e-6)
        onehot = (normal == normal.max(-1, keepdims=True)).astype(float)
        tiny = 1e-6 if program.dtypes["target_probs"] == "float16" else 1e-10
        more = 0.9 if program.options["outside"] == "tail" else 4.0
        kinds = [normal, rng.uniform(0.02, 0.98, (*shape[:2], 1)) * normal, onehot, tiny * normal, more * normal]
        return np.choose(rng.integers(len(kinds), size=(*shape[:2], 1)), kinds) if raw.size else raw

    def distribution(self, lead: np.ndarray) -> np.ndarray:
        rng, shape = self.rng, self.removed.shape
        onehot = (np.arange(shape[-1]) == lead[..., None]).astype(float)
        if self.program.dtypes["targets"] in ("int32", "bool"):
            return onehot
        kind = rng.integers(5, size=(*shape[:2], 1))
        raw = rng.gamma(0.7, size=shape) + 1e-6
        normal = raw / raw.sum(-1, keepdims=True)
        sparse = np.where(rng.random(shape) < 0.5, 0, 4 * normal)
        tiny = 1e-6 if self.program.dtypes["targets"] == "float16" else 1e-25
        kinds = [normal, onehot, sparse, tiny * normal, normal * (rng.random(shape) < 0.6)]
        return np.choose(kind, kinds) if raw.size else raw

    def lead(self, z: np.ndarray) -> None:
        """Give some positions the label of the largest logit, whose loss must be accurate."""
        shared = self.program.in_axes.get("targets", 0) is None
        if shared or self.program.arrays["targets"] != self.program.positions:
            return
        y = self.values.inputs["targets"]
        first = np.where(self.removed, -np.inf, z).argmax(-1).reshape(y.shape)
        inside = (y >= 0) & (y < self.frame.classes) & (y != self.program.options.get("ignore_index"))
        held = first <= np.iinfo(y.dtype).max
        chosen = inside & held & ~self.idle.reshape(y.shape) & (self.rng.random(y.shape) < 0.4)
        self.values.inputs["targets"] = np.where(chosen, first, y).astype(y.dtype)

    def layer_inputs(self) -> np.ndarray:
        """Draw the layer and its features; return their approximate logits, (S, N, C)."""
        rng, program, frame = self.rng, self.program, self.frame
        width = program.sizes["d"]
        temper = rng.choice(("tame", "padded", "nan and inf"), p=[0.6, 0.25, 0.15], size=program.sets)
        if "bias" not in program.arrays:
            temper = np.where(temper == "padded", "tame", temper)
        self.values.tempers = temper.astype(object)
        length = rng.choice([0.0, 1.0, 1.0, 2.0], size=(program.sets, frame.count, 1))
        x = rng.normal(size=(program.sets, frame.count, width)) * length
        x = np.where((temper == "nan and inf")[:, None, None] & (rng.random((*x.shape[:2], 1)) < 0.3), np.nan, x)
        x = np.where(self.idle[..., None] & self.some(0.6, 1, 1), rng.choice([np.nan, np.inf, 1.0], size=x.shape), x)
        self.put("features", x.reshape(self.shape("features")))
        narrow = "float16" in (program.dtypes["features"], program.dtypes["kernel"])  # it cannot hold such gradients
        scales = [0.01, 1.0, 3.0, 20.0, *([100.0] if program.is_sparse and not narrow else [])]
        scale = rng.choice(scales, size=(program.sets, 1, 1)) / np.sqrt(width)
        w = rng.normal(size=(program.sets, width, frame.classes)) * scale
        self.put("kernel", w if program.arrays["kernel"][0] == "d" else w.swapaxes(-1, -2))
        b = np.zeros((program.sets, frame.classes))
        if "bias" in program.arrays:
            share = rng.choice([0.2, 0.8, 1.0], p=[0.6, 0.3, 0.1], size=(program.sets, 1))
            gone = (temper == "padded")[:, None] & (rng.random(b.shape) < share)
            b = self.put("bias", np.where(gone, -np.inf, rng.normal(size=b.shape))).astype(np.float64)
        with np.errstate(all="ignore"):
            return np.nan_to_num(x) @ w + b[:, None, :]

    def layer(self) -> None:
        rng, program, frame = self.rng, self.program, self.frame
        if program.function in CAFFE_LOSSES:
            ignore = program.options.get("ignore_label")
            y = np.trunc(self.labels("labels", ignore).astype(np.float64))
            ignored = y == ignore if ignore is not None else np.zeros(y.shape, bool)
            self.idle = ignored
            lead = np.where(np.isfinite(y), y, 0).astype(np.int64)
            self.put("logits", frame.back(self.logits(program.dtypes["logits"], self.onehot(lead), squared=False)))
            if "loss_weight" in program.arrays:
                self.put("loss_weight", rng.choice([0.5, 1.0, 2.0, 0.0], size=program.sets))
            if "infogain" in program.arrays:
                h = rng.choice([0.0, 1.0, 0.3, 10.0], size=(program.sets, frame.classes, frame.classes))
                self.put("infogain", np.where(self.some(0.3, 1, 1), np.eye(frame.classes), h))
            return
        shape = (program.sets, frame.count, frame.classes)
        raw = rng.gamma(rng.choice([0.05, 1.0], size=(program.sets, 1, 1)), size=shape) + 1e-30
        probs = raw / raw.sum(-1, keepdims=True)
        probs = np.where(self.some(0.2, 1, 1), (probs == probs.max(-1, keepdims=True)).astype(float), probs)
        self.put("probs", frame.back(probs))
        if program.function == "softmax_vjp":
            self.put("cotangent", frame.back(rng.normal(size=shape) * 10 ** rng.uniform(-3, 2, (program.sets, 1, 1))))
        if program.function == "caffe.multinomial_logistic_loss":
            self.labels("labels", None)

    def directions(self) -> None:
        """Cotangents and tangents: some are zero, and at ignored positions they have values that must not matter."""
        rng, program = self.rng, self.program
        for layout, dtype in program.outputs:
            shape = (program.sets, *program.shape(layout))
            g = rng.normal(size=shape)
            g = np.where(rng.random(shape) < 0.15, 0, g) if layout else g
            if program.derivative == "grad" and program.outputs[0][0] == layout == ():
                g = np.ones(shape)
            elif program.derivative == "grad":
                g = np.round(g, 2)
            if program.derivative in ("vjp", "linear at 0", "jvp of grad") and shape != (program.sets,):
                g = self.harmless(g, layout)
            self.values.cotangents.append(cast(g, dtype))
        for name in program.variables:
            if not program.dtypes[name].startswith("int"):
                self.values.tangents[name] = cast(rng.normal(size=self.shape(name)), program.dtypes[name])

    def harmless(self, g: np.ndarray, layout: Layout) -> np.ndarray:
        """NaN and infinite cotangents at masked classes and, for a loss, at ignored positions."""
        junk = self.rng.choice([np.nan, np.inf, -np.inf], size=g.shape)
        spoil = self.some(0.3, *g.shape[1:])
        if self.program.function in ("softmax", "log_softmax"):
            return np.where(spoil & self.frame.back(self.removed), junk, g)
        if self.program.function in LOSSES:
            return np.where(spoil & self.idle.reshape(g.shape), junk, g)
        return g
