"""A trial of one program: run it, judge its results, and describe wrong ones."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from experiments.fuzz.execution import execute
from experiments.fuzz.expectations import expect
from experiments.fuzz.formulas import Expected
from experiments.fuzz.judge import Verdict, judge
from experiments.fuzz.programs import Program
from experiments.fuzz.values import Values, draw_values


@dataclass
class Trial:
    """The outcome of a program."""

    program: Program
    values: Values
    expected: dict[str, Expected]
    found: dict[str, np.ndarray] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    refusal: str = ""

    @property
    def wrong(self) -> np.ndarray:
        """The sets of values with a wrong result; all if the program raised an error."""
        verdicts = [verdict.wrong for verdict in self.verdicts.values()]
        return np.full(self.program.sets, bool(self.refusal)) | np.any(verdicts, axis=0)

    @property
    def reason(self) -> str:
        return self.refusal or "; ".join(
            self.describe(name) for name in self.verdicts if self.verdicts[name].wrong.any()
        )

    @property
    def tempers(self) -> Counter:
        return Counter(self.values.tempers.tolist())

    def describe(self, name: str) -> str:
        """The first entry of a result that is wrong."""
        found, expected, verdict = self.found[name], self.expected[name], self.verdicts[name]
        case = int(verdict.wrong.argmax())
        start = f"{name}: {int(verdict.wrong.sum())} sets, first {case}: "
        if found.shape != expected.number.value.shape or not verdict.compared:
            return f"{start}{found.dtype} of shape {found.shape}"
        at = (case, *np.argwhere(verdict.detail[case])[0]) if found.ndim > 1 else (case,)
        place = ", ".join(str(n) for n in at[1:])
        number = expected.number.map(lambda a: np.broadcast_to(a, found.shape)[at])
        return (
            f"{start}[{place}] is {float(found[at]):.9g}, "
            f"expected {float(number.value):.9g} within {float(number.error):.2g}"
        )


def attempt(program: Program) -> Trial:
    """Draw the values of a program, run it and judge every result."""
    values = draw_values(program)
    trial = Trial(program, values, expect(program, values))
    try:
        trial.found = execute(program, values)
    except Exception as error:  # any exception is a failure, because the call is valid
        first = [*str(error).strip().splitlines(), ""][0]
        trial.refusal = f"{type(error).__name__}: {first[:200]}"
        return trial
    for name, expected in trial.expected.items():
        trial.verdicts[name] = judge(trial.found[name], expected, dtype_of(program, name))
    return trial


def dtype_of(program: Program, name: str) -> str:
    """The dtype that a result must have; for a gradient, the dtype of its input."""
    kind, _, variable = name.partition(" to ")
    return program.dtypes[variable] if variable else program.outputs[int(kind.partition(" ")[2] or 0)][1]
