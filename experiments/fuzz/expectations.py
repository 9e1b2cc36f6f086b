"""From a program and its values to what the contract says of every result."""

from typing import Any

import numpy as np

from experiments.fuzz.formulas import EXACT, FREE, Expected, Rows
from experiments.fuzz.layers import CaffeLoss, Jacobian, MultinomialLogistic, SoftmaxProduct
from experiments.fuzz.losses import Layer, Loss, Targets
from experiments.fuzz.measured import Measured, Unit
from experiments.fuzz.normalisers import LogSoftmax, LogSumExp, Softmax
from experiments.fuzz.programs import CAFFE_LOSSES, LOSSES, NORMALISERS, Program
from experiments.fuzz.values import Frame, Values

ORACLES = {"softmax": Softmax, "caffe.softmax": Softmax, "log_softmax": LogSoftmax, "logsumexp": LogSumExp}


def expect(program: Program, values: Values) -> dict[str, Expected]:
    """The results of a program by name: "value", "value 1", "gradient to …", and so on."""
    with np.errstate(all="ignore"):
        return Expectation(program, values).all()


class Expectation:
    def __init__(self, program: Program, values: Values):
        self.program, self.frame = program, Frame(program)
        # Float64 is judged by the longest numbers that there are.
        self.wide = np.longdouble if program.compute == np.float64 else np.float64
        self.inputs = {name: self.widen(a) for name, a in values.inputs.items()}
        self.cotangents = [self.widen(a) for a in values.cotangents]
        self.tangents = {name: self.widen(a) for name, a in values.tangents.items()}
        self.unit = Unit.of(program.compute)

    def widen(self, array: np.ndarray) -> np.ndarray:
        return array if array.dtype.kind in "iub" else array.astype(self.wide)

    def all(self) -> dict[str, Expected]:
        function, derivative = self.program.function, self.program.derivative
        if function in LOSSES:
            value, pull, push, bend = self.loss()
        elif function in NORMALISERS:
            value, pull, push, bend = self.normaliser()
        elif function in CAFFE_LOSSES:
            value, pull, push, bend = self.caffe_loss()
        else:
            value, pull = self.layer()
            push = bend = None
        results: dict[str, Expected] = {}

        def add(kind: str, found: Any) -> None:
            if isinstance(found, dict):
                results.update({f"{kind} to {name}": e for name, e in found.items() if name in self.program.variables})
            else:
                many = found if isinstance(found, tuple) else (found,)
                results.update({f"{kind} {n}" if n else kind: e for n, e in enumerate(many)})

        if derivative in ("value", "vjp", "grad"):
            add("value", value())
        if derivative in ("vjp", "grad", "linear at 0", "jvp of grad"):
            gradients = pull(linear=derivative == "linear at 0")
            add("gradient", gradients)
        if derivative == "linear at 0":
            add("zero", {name: self.zero(e) for name, e in gradients.items()})
        if derivative == "transpose":
            assert push is not None
            add("derivative", push())
        if derivative in ("jvp of grad", "vjp of grad"):
            assert bend is not None
            add("bend", bend())
        return results

    def zero(self, e: Expected) -> Expected:
        """The pullback of a zero cotangent, where that of another is finite."""
        free = ~np.isfinite(e.number.value) | (e.judged == FREE)
        return Expected(self.measured(np.zeros_like(e.number.value)), np.where(free, FREE, EXACT))

    def back(self, e: Expected) -> Expected:
        judged = np.broadcast_to(e.judged, e.number.value.shape)
        return Expected(e.number.map(self.frame.back), self.frame.back(judged))

    def shaped(self, e: Expected, output: int = 0) -> Expected:
        """A result of every position in the shape of an output."""
        shape = (self.program.sets, *self.program.shape(self.program.outputs[output][0]))
        judged = np.broadcast_to(e.judged, e.number.value.shape)
        return Expected(e.number.map(lambda a: a.reshape(shape)), judged.reshape(shape))

    def measured(self, array: np.ndarray) -> Measured:
        return Measured(array, 0, self.unit)

    def removed(self) -> np.ndarray:
        shape = (self.frame.sets, self.frame.count, self.frame.classes)
        where = self.inputs.get("where")
        return np.zeros(shape, bool) if where is None else ~self.frame.rows(where)

    def normaliser(self):
        (name,) = self.program.variables
        dtype = self.program.outputs[0][1]
        z = self.frame.rows(self.inputs[name]).astype(self.wide)
        oracle = ORACLES[self.program.function](self.measured(z), self.removed(), dtype)
        of_rows = self.program.function == "logsumexp"
        g = self.cotangents[0]
        g = g.reshape(self.frame.sets, self.frame.count) if of_rows else self.frame.rows(g)
        v = self.frame.rows(self.tangents[name]) if self.tangents else None
        out = self.shaped if of_rows else self.back

        return (
            lambda: out(oracle.value()),
            lambda linear: {name: self.back(oracle.pull(g))},
            lambda: out(oracle.push(v)),
            lambda: {name: self.back(oracle.bend(g, v))},
        )

    def scalar(self, name: str, default: float | None) -> Any:
        """An option, static or traced, as an array over the sets."""
        option = self.inputs.get(name, self.program.options.get(name, default))
        return None if option is None else np.broadcast_to(self.wide(option), self.frame.sets).reshape(-1, 1, 1)

    def loss(self):
        program, frame, inputs = self.program, self.frame, self.inputs
        targets = inputs["targets"]
        is_label = program.arrays["targets"] == program.positions
        weights = np.ones((frame.sets, frame.count), self.wide)
        if "weights" in inputs:
            weights = frame.positions(inputs["weights"]).astype(self.wide)
        label = None
        if is_label:
            label = frame.positions(targets)
            ignore = program.options.get("ignore_index")
            if ignore is not None and np.iinfo(label.dtype).min <= ignore <= np.iinfo(label.dtype).max:
                weights = np.where(label == ignore, 0, weights)
            label = label.astype(np.int64)
        part = weights != 0
        layer, removed, dtype = None, self.removed(), program.compute
        if program.function == "linear_cross_entropy":
            x = inputs["features"].reshape(frame.sets, frame.count, program.sizes["d"])
            x = np.where(part[..., None], x, 0)
            w, bias = inputs["kernel"], inputs.get("bias")
            self.flipped = program.arrays["kernel"][0] != "d"
            w = w.swapaxes(-1, -2) if self.flipped else w
            both = program.dtypes["features"], program.dtypes["kernel"]
            product = both[0] if both[0] == both[1] else program.compute  # two half precisions meet in float32
            layer = Layer(
                x, w, bias, self.scalar("soft_cap", None), self.scalar("temperature", 1.0), product, self.unit
            )  # fmt: skip
            z = layer.z
            if bias is not None:
                removed = removed | np.isneginf(bias)[:, None, :]
        else:
            z, dtype = self.measured(frame.rows(inputs["logits"])), program.dtypes["logits"]
        self.idle = ~part
        z = Measured(np.where(part[..., None], z.value, 0), z.error, self.unit)  # what takes no part may be anything
        settings = Targets(
            label,
            None if is_label else frame.rows(targets).astype(self.wide),
            weights,
            inputs.get("class_weights"),
            self.scalar("label_smoothing", 0.0),
            self.scalar("z_loss", 0.0),
            ~removed,
        )
        rows = Rows(z, removed)
        if layer is not None:
            rows.has_nan |= layer.spoiled
            rows.bad |= layer.spoiled
        loss = Loss(rows, settings, program.options["reduction"], self.unit, dtype)
        g = self.cotangents[0]
        g = g.reshape(frame.sets, frame.count) if program.options["reduction"] == "none" else g
        spread = frame.rows(self.tangents["targets"]) if "targets" in self.tangents else None
        if layer is None:
            v: Any = frame.rows(self.tangents["logits"])
        else:
            to_x, to_w, to_b = (self.tangents.get(n) for n in ("features", "kernel", "bias"))
            to_x = np.where(part[..., None], to_x.reshape(frame.sets, frame.count, program.sizes["d"]), 0)
            to_w = to_w.swapaxes(-1, -2) if self.flipped else to_w
            change = layer.along(to_x, to_w, to_b)
            v = change * layer.slope

        def with_targets(found: dict[str, Expected], to_targets: Any) -> dict[str, Expected]:
            return found | {"targets": self.back(to_targets())} if "targets" in program.variables else found

        def of_layer(found: dict[str, Expected]) -> dict[str, Expected]:
            shape = (frame.sets, *program.shape(program.arrays["features"]))
            features = found["features"]
            found["features"] = Expected(
                features.number.map(lambda a: a.reshape(shape)), features.judged.reshape(shape)
            )  # fmt: skip
            if self.flipped:
                found["kernel"] = Expected(found["kernel"].number.transposed, found["kernel"].judged.swapaxes(-1, -2))
            return found

        def pull(linear: bool) -> dict[str, Expected]:
            gradient = loss.pull(g)
            if layer is None:
                found = {"logits": self.back(gradient)}
            else:
                found = of_layer(layer.pull(gradient))
            return with_targets(found, lambda: loss.pull_targets(g, linear=linear))

        def bend() -> dict[str, Expected]:
            turned = loss.bend(g, v, spread)
            if layer is None:
                found = {"logits": self.back(turned)}
            else:
                found = of_layer(layer.bend(loss.pull(g), turned, change, to_x, to_w))
            return with_targets(found, lambda: loss.bend_targets(g, v))

        return lambda: self.shaped(loss.value()), pull, lambda: self.shaped(loss.push(v, spread)), bend

    def caffe_loss(self):
        program, frame, inputs = self.program, self.frame, self.inputs
        label = frame.positions(inputs["labels"])
        label = np.trunc(label) if label.dtype.kind == "f" else label.astype(np.int64)
        ignore = program.options.get("ignore_label")
        ignored = np.zeros(label.shape, bool) if ignore is None else label == ignore
        normalization = program.options.get("normalization")
        if normalization is None:
            normalization = "BATCH_SIZE" if program.options.get("normalize") is False else "VALID"
        axis = program.options.get("axis", 1)
        outer = np.prod(program.shape(program.logits)[:axis])
        counts = {"FULL": frame.count, "BATCH_SIZE": outer, "NONE": 1, "VALID": (~ignored).sum(-1)}
        weight = inputs.get("loss_weight", np.ones(frame.sets))
        scale = self.measured(weight.astype(self.wide)) / np.maximum(counts[normalization], 1)
        z = self.measured(frame.rows(inputs["logits"]))
        loss = CaffeLoss(z, label, ignored, inputs.get("infogain"), scale, program.outputs[1][1])
        g, g_probs = self.cotangents[0], frame.rows(self.cotangents[1])
        v = frame.rows(self.tangents["logits"])

        def both(found: tuple[Expected, Expected]) -> tuple[Expected, Expected]:
            return self.shaped(found[0]), self.back(found[1])

        return (
            lambda: both(loss.value()),
            lambda linear: {"logits": self.back(loss.pull(g, g_probs))},
            lambda: both(loss.push(v)),
            lambda: {"logits": self.back(loss.bend(g, g_probs, v))},
        )

    def layer(self):
        frame, inputs = self.frame, self.inputs
        probs = frame.rows(inputs["probs"])
        if self.program.function == "softmax_vjp":
            product = SoftmaxProduct(probs, frame.rows(inputs["cotangent"]), self.unit)
            u = frame.rows(self.cotangents[0])
            return lambda: self.back(product.value()), lambda linear: {
                n: self.back(e) for n, e in product.pull(u).items()
            }
        if self.program.function == "softmax_jacobian":
            jacobian = Jacobian(probs, Unit.of(self.program.dtypes["probs"]))
            u = self.cotangents[0].reshape(*probs.shape, frame.classes)
            return lambda: self.shaped(jacobian.value()), lambda linear: {"probs": self.back(jacobian.pull(u))}
        trunc = np.trunc(frame.positions(inputs["labels"]).astype(np.float64))
        loss = MultinomialLogistic(probs, trunc, self.unit)
        g = self.cotangents[0]
        return lambda: self.shaped(loss.value()), lambda linear: {"probs": self.back(loss.pull(g))}
