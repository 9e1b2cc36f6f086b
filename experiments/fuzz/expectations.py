"""The results that the documentation promises for a program, given its values."""

from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.fuzz.formulas import EXACT, FREE, Expected, Rows
from experiments.fuzz.layers import CaffeLoss, Jacobian, MultinomialLogistic, SoftmaxProduct
from experiments.fuzz.losses import Layer, Loss, PositionLoss, Targets
from experiments.fuzz.measured import Measured, Unit
from experiments.fuzz.normalisers import LogSoftmax, LogSumExp, Normaliser, Softmax
from experiments.fuzz.programs import CAFFE_LOSSES, NORMALISERS, Program
from experiments.fuzz.sparse import Chosen, SparseLoss
from experiments.fuzz.values import Frame, Values

NORMALISING: dict[str, type[Normaliser]] = {
    "softmax": Softmax, "caffe.softmax": Softmax, "log_softmax": LogSoftmax, "logsumexp": LogSumExp,
}  # fmt: skip
Gradients = dict[str, Expected]


def expect(program: Program, values: Values) -> dict[str, Expected]:
    """The results of a program by name: "value", "value 1", "gradient to logits" and so on."""
    with np.errstate(all="ignore"):
        case = case_of(program.function)(program, values)
        found: dict[str, Expected] = {}
        match program.derivative:
            case "value":
                found |= outputs("value", case.value())
            case "vjp" | "grad":
                found |= outputs("value", case.value()) | gradients("gradient", case.pull(linear=False))
            case "linear at 0":
                slopes = case.pull(linear=True)
                found |= gradients("gradient", slopes)
                found |= gradients("zero", {name: case.zero(e) for name, e in slopes.items()})
            case "transpose":
                found |= outputs("derivative", case.push())
            case "jvp of grad":
                found |= outputs("derivative", case.push())
                found |= gradients("gradient", case.pull(linear=False)) | gradients("bend", case.bend())
            case "vjp of grad":
                found |= gradients("bend", case.bend())
        return {name: e for name, e in found.items() if " to " not in name or name.split()[-1] in program.variables}


def outputs(kind: str, found: tuple[Expected, ...]) -> dict[str, Expected]:
    return {f"{kind} {n}" if n else kind: e for n, e in enumerate(found)}


def gradients(kind: str, found: Gradients) -> dict[str, Expected]:
    return {f"{kind} to {name}": e for name, e in found.items()}


def case_of(function: str) -> type["Case"]:
    if function in NORMALISERS:
        return NormaliserCase
    if function in CAFFE_LOSSES:
        return CaffeCase
    return {
        "cross_entropy": DenseCase, "linear_cross_entropy": LayerCase, "softmax_vjp": ProductCase,
        "softmax_jacobian": JacobianCase, "caffe.multinomial_logistic_loss": MultinomialCase,
    }[function]  # fmt: skip


class Case:
    """The inputs in wider numbers, and the expected results of one function."""

    def __init__(self, program: Program, values: Values):
        self.program, self.frame = program, Frame(program)
        # Float64 results are judged in the widest dtype of the machine.
        self.wide = np.longdouble if program.compute == np.float64 else np.float64
        self.inputs = {name: self.widen(a) for name, a in values.inputs.items()}
        self.cotangents = [self.widen(a) for a in values.cotangents]
        self.tangents = {name: self.widen(a) for name, a in values.tangents.items()}
        self.unit = Unit.of(program.compute)

    def value(self) -> tuple[Expected, ...]:
        raise NotImplementedError

    def pull(self, *, linear: bool) -> Gradients:
        """The gradients for the cotangents; `linear`: as the derivative of the pullback at a cotangent of 0."""
        raise NotImplementedError

    def push(self) -> tuple[Expected, ...]:
        """The derivative of the value along the tangents."""
        raise NotImplementedError

    def bend(self) -> Gradients:
        """The derivative of the gradients along the tangents."""
        raise NotImplementedError

    def widen(self, array: np.ndarray) -> np.ndarray:
        return array if array.dtype.kind in "iub" else array.astype(self.wide)

    def measured(self, array: np.ndarray) -> Measured:
        return Measured(array, 0, self.unit)

    def zero(self, e: Expected) -> Expected:
        """The pullback of a zero cotangent; promised only where the pullback of another cotangent is finite."""
        free = ~np.isfinite(e.number.value) | (e.judged == FREE)
        return Expected(self.measured(np.zeros_like(e.number.value)), np.where(free, FREE, EXACT))

    def back(self, e: Expected) -> Expected:
        """From (sets, positions, classes) to the layout of the logits."""
        return Expected(e.number.map(self.frame.back), self.frame.back(e.everywhere))

    def shaped(self, e: Expected, shape: tuple[int, ...]) -> Expected:
        shape = (self.program.sets, *shape)
        return Expected(e.number.map(lambda a: a.reshape(shape)), e.everywhere.reshape(shape))

    def of_positions(self, e: Expected) -> Expected:
        """A result of each position, or of all together, in the shape of the output."""
        return self.shaped(e, self.program.shape(self.program.outputs[0][0]))

    @cached_property
    def removed(self) -> np.ndarray:
        where = self.inputs.get("where")
        if where is None:
            return np.zeros((self.frame.sets, self.frame.count, self.frame.classes), bool)
        return ~self.frame.rows(where)


class NormaliserCase(Case):
    def __init__(self, program: Program, values: Values):
        super().__init__(program, values)
        (self.name,) = program.variables
        z = self.frame.rows(self.inputs[self.name]).astype(self.wide)
        self.oracle = NORMALISING[program.function](self.measured(z), self.removed, program.outputs[0][1])
        self.reduces = program.function == "logsumexp"
        g = self.cotangents[0]
        self.g = g.reshape(self.frame.sets, self.frame.count) if self.reduces else self.frame.rows(g)

    @property
    def v(self) -> np.ndarray:
        return self.frame.rows(self.tangents[self.name])

    def out(self, e: Expected) -> tuple[Expected]:
        return (self.of_positions(e) if self.reduces else self.back(e),)

    def value(self) -> tuple[Expected, ...]:
        return self.out(self.oracle.value())

    def pull(self, *, linear: bool) -> Gradients:
        return {self.name: self.back(self.oracle.pull(self.g))}

    def push(self) -> tuple[Expected, ...]:
        return self.out(self.oracle.push(self.v))

    def bend(self) -> Gradients:
        return {self.name: self.back(self.oracle.bend(self.g, self.v))}


class LossCase(Case):
    """The effect of the options that both losses share."""

    loss: PositionLoss

    @cached_property
    def of_targets(self) -> str:
        """The part of the targets that may be differentiated."""
        return "target_probs" if self.program.is_sparse else "targets"

    @cached_property
    def target_frame(self) -> Frame:
        """The frame of a distribution, or of the probabilities of sparse targets."""
        return Frame(self.program, self.program.arrays[self.of_targets])

    @cached_property
    def label(self) -> np.ndarray | None:
        if self.program.is_sparse or self.program.arrays["targets"] != self.program.positions:
            return None
        return self.frame.positions(self.inputs["targets"])

    @cached_property
    def weights(self) -> np.ndarray:
        """The weight of each position, 0 where it is ignored."""
        weights = np.ones((self.frame.sets, self.frame.count), self.wide)
        if "weights" in self.inputs:
            weights = self.frame.positions(self.inputs["weights"]).astype(self.wide)
        ignore = self.program.options.get("ignore_index")
        if self.label is None or ignore is None:
            return weights
        held = np.iinfo(self.label.dtype).min <= ignore <= np.iinfo(self.label.dtype).max
        return np.where(self.label == ignore, 0, weights) if held else weights

    def scalar(self, name: str, default: float) -> np.ndarray:
        """An option, static or traced, as an array over the sets."""
        option = self.inputs.get(name, self.program.options.get(name, default))
        return np.broadcast_to(np.asarray(option, self.wide), self.frame.sets).reshape(-1, 1, 1)

    def loss_of(self, z: Measured, removed: np.ndarray, dtype: Any) -> PositionLoss:
        part = (self.weights != 0)[..., None]
        z = Measured(np.where(part, z.value, 0), z.error, self.unit)  # values at ignored positions may be anything
        if self.program.is_sparse:
            return self.sparse_loss_of(z, removed, dtype)
        label = None if self.label is None else self.label.astype(np.int64)
        spread = None if label is not None else self.frame.rows(self.inputs["targets"]).astype(self.wide)
        targets = Targets(
            label, spread, self.weights, self.inputs.get("class_weights"), self.scalar("label_smoothing", 0.0),
            self.scalar("z_loss", 0.0), ~removed,
        )  # fmt: skip
        return Loss(Rows(z, removed), targets, self.program.options["reduction"], self.unit, dtype)

    def sparse_loss_of(self, z: Measured, removed: np.ndarray, dtype: Any) -> PositionLoss:
        indices, probs = (self.target_frame.rows(self.inputs[n]) for n in ("target_indices", "target_probs"))
        rounding = 2 * Unit.of(self.program.dtypes["target_probs"]).roundoff
        held = self.program.compute, jnp.dtype(self.program.dtypes["target_probs"])
        chosen = Chosen(
            indices.astype(np.int64), probs.astype(self.wide), self.program.options["outside"], rounding,
            min(float(jnp.finfo(d).max) for d in held), self.weights, self.scalar("z_loss", 0.0),
        )  # fmt: skip
        return SparseLoss(z, removed, chosen, self.program.options["reduction"], self.unit, dtype)

    @property
    def g(self) -> np.ndarray:
        g = self.cotangents[0]
        each = self.program.options["reduction"] == "none"
        return g.reshape(self.frame.sets, self.frame.count) if each else g

    @property
    def spread(self) -> np.ndarray | None:
        """The tangent of a distribution or of probabilities."""
        change = self.tangents.get(self.of_targets)
        return None if change is None else self.target_frame.rows(change)

    def to_targets(self, e: Expected) -> Gradients:
        """The gradient to the targets, which labels do not have."""
        if self.of_targets not in self.program.variables:
            return {}
        frame = self.target_frame
        return {self.of_targets: Expected(e.number.map(frame.back), frame.back(e.everywhere))}

    def value(self) -> tuple[Expected, ...]:
        return (self.of_positions(self.loss.value()),)


class DenseCase(LossCase):
    def __init__(self, program: Program, values: Values):
        super().__init__(program, values)
        z = self.measured(self.frame.rows(self.inputs["logits"]))
        self.loss = self.loss_of(z, self.removed, program.dtypes["logits"])

    @property
    def v(self) -> np.ndarray:
        return self.frame.rows(self.tangents["logits"])

    def pull(self, *, linear: bool) -> Gradients:
        to_targets = self.loss.pull_targets(self.g, linear=linear)
        return {"logits": self.back(self.loss.pull(self.g))} | self.to_targets(to_targets)

    def push(self) -> tuple[Expected, ...]:
        return (self.of_positions(self.loss.push(self.v, self.spread)),)

    def bend(self) -> Gradients:
        of_targets = self.loss.bend_targets(self.g, self.v, self.spread)
        return {"logits": self.back(self.loss.bend(self.g, self.v, self.spread))} | self.to_targets(of_targets)


class LayerCase(LossCase):
    def __init__(self, program: Program, values: Values):
        super().__init__(program, values)
        self.flipped = program.arrays["kernel"][0] != "d"
        both = program.dtypes["features"], program.dtypes["kernel"]
        product = both[0] if both[0] == both[1] else program.compute  # float16 and bfloat16 together promote to float32
        capped = program.has("soft_cap")
        self.layer = Layer(
            self.features(self.inputs["features"]), self.kernel(self.inputs["kernel"]), self.inputs.get("bias"),
            self.scalar("soft_cap", np.inf) if capped else None, self.scalar("temperature", 1.0), product, self.unit,
        )  # fmt: skip
        removed = self.removed
        if "bias" in self.inputs:
            removed = removed | np.isneginf(self.inputs["bias"])[:, None, :]
        self.loss = self.loss_of(self.layer.z, removed, program.compute)
        self.loss.broken |= self.layer.spoiled  # also where no class has a finite logit
        if capped:  # the cap makes an infinite logit finite, but not NaN
            self.loss.unsaid |= self.layer.spoiled & ~np.isnan(self.features(self.inputs["features"])).any(-1)

    def features(self, array: np.ndarray) -> np.ndarray:
        """Features of shape (sets, positions, D), 0 at ignored positions."""
        rows = array.reshape(self.frame.sets, self.frame.count, self.program.sizes["d"])
        return np.where((self.weights != 0)[..., None], rows, 0)

    def kernel(self, array: np.ndarray) -> np.ndarray:
        return array.swapaxes(-1, -2) if self.flipped else array

    @cached_property
    def changes(self) -> tuple[np.ndarray, np.ndarray]:
        return self.features(self.tangents["features"]), self.kernel(self.tangents["kernel"])

    @cached_property
    def along(self) -> Measured:
        return self.layer.along(*self.changes, self.tangents.get("bias"))

    def given(self, found: Gradients) -> Gradients:
        """In the layouts in which features and kernel are given."""
        kernel = found["kernel"]
        if self.flipped:
            kernel = Expected(kernel.number.transposed, kernel.everywhere.swapaxes(-1, -2))
        features = self.shaped(found["features"], self.program.shape(self.program.arrays["features"]))
        return found | {"features": features, "kernel": kernel}

    def pull(self, *, linear: bool) -> Gradients:
        found = self.given(self.layer.pull(self.loss.pull(self.g)))
        return found | self.to_targets(self.loss.pull_targets(self.g, linear=linear))

    def push(self) -> tuple[Expected, ...]:
        found = self.loss.push(self.along * self.layer.slope, self.spread)
        if self.program.derivative == "transpose" and self.program.options["reduction"] != "none":
            # The transpose multiplies the tangent by a gradient in the dtype of the matmuls, before a mean divides.
            share = self.loss.loss_share.value / np.where(self.weights == 0, 1, self.weights)
            each = share * np.abs(self.along.value).sum(-1)
            found.number.error = found.number.error + Unit.of(self.layer.product).tiny * np.nansum(each, -1)
        return (self.of_positions(found),)

    def bend(self) -> Gradients:
        v = self.along * self.layer.slope
        turned = self.loss.bend(self.g, v, self.spread)
        found = self.given(self.layer.bend(self.loss.pull(self.g), turned, self.along, *self.changes))
        return found | self.to_targets(self.loss.bend_targets(self.g, v, self.spread))


class CaffeCase(Case):
    def __init__(self, program: Program, values: Values):
        super().__init__(program, values)
        frame, options = self.frame, program.options
        label = frame.positions(self.inputs["labels"])
        label = np.trunc(label) if label.dtype.kind == "f" else label.astype(np.int64)
        ignore = options.get("ignore_label")
        ignored = np.zeros(label.shape, bool) if ignore is None else label == ignore
        normalization = options.get("normalization")
        if normalization is None:
            normalization = "BATCH_SIZE" if options.get("normalize") is False else "VALID"
        outer = np.prod(program.shape(program.logits)[: options.get("axis", 1)])
        counts = {"FULL": frame.count, "BATCH_SIZE": outer, "NONE": 1, "VALID": (~ignored).sum(-1)}
        weight = self.inputs.get("loss_weight", np.ones(frame.sets)).astype(self.wide)
        scale = self.measured(weight) / np.maximum(counts[normalization], 1)
        z = self.measured(frame.rows(self.inputs["logits"]))
        self.oracle = CaffeLoss(z, label, ignored, self.inputs.get("infogain"), scale, program.outputs[1][1])
        self.g, self.g_probs = self.cotangents[0], frame.rows(self.cotangents[1])

    @property
    def v(self) -> np.ndarray:
        return self.frame.rows(self.tangents["logits"])

    def both(self, found: tuple[Expected, Expected]) -> tuple[Expected, ...]:
        return self.of_positions(found[0]), self.back(found[1])

    def value(self) -> tuple[Expected, ...]:
        return self.both(self.oracle.value())

    def pull(self, *, linear: bool) -> Gradients:
        return {"logits": self.back(self.oracle.pull(self.g, self.g_probs))}

    def push(self) -> tuple[Expected, ...]:
        return self.both(self.oracle.push(self.v))

    def bend(self) -> Gradients:
        return {"logits": self.back(self.oracle.bend(self.g, self.g_probs, self.v))}


class MultinomialCase(Case):
    def __init__(self, program: Program, values: Values):
        super().__init__(program, values)
        label = np.trunc(self.frame.positions(self.inputs["labels"]).astype(np.float64))
        self.oracle = MultinomialLogistic(self.frame.rows(self.inputs["probs"]), label, self.unit)

    def value(self) -> tuple[Expected, ...]:
        return (self.of_positions(self.oracle.value()),)

    def pull(self, *, linear: bool) -> Gradients:
        return {"probs": self.back(self.oracle.pull(self.cotangents[0]))}


class ProductCase(Case):
    def __init__(self, program: Program, values: Values):
        super().__init__(program, values)
        s, g = (self.frame.rows(self.inputs[name]) for name in program.variables)
        self.oracle = SoftmaxProduct(s, g, self.unit)

    def value(self) -> tuple[Expected, ...]:
        return (self.back(self.oracle.value()),)

    def pull(self, *, linear: bool) -> Gradients:
        found = self.oracle.pull(self.frame.rows(self.cotangents[0]))
        return {name: self.back(e) for name, e in zip(self.program.variables, found, strict=True)}


class JacobianCase(Case):
    def __init__(self, program: Program, values: Values):
        super().__init__(program, values)
        # The only function that does not widen half precision.
        self.oracle = Jacobian(self.frame.rows(self.inputs["probs"]), Unit.of(program.dtypes["probs"]))

    def value(self) -> tuple[Expected, ...]:
        return (self.of_positions(self.oracle.value()),)

    def pull(self, *, linear: bool) -> Gradients:
        shape = (self.frame.sets, self.frame.count, self.frame.classes, self.frame.classes)
        return {"probs": self.back(self.oracle.pull(self.cotangents[0].reshape(shape)))}
