"""The trials and their failures, as a table and as files."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from experiments._door import write_json
from experiments.fuzz.trial import Trial


@dataclass
class Report:
    """Counts over all trials."""

    configurations: int = 0
    programs: int = 0
    numbers: int = 0
    wrong: int = 0
    seconds: float = 0.0
    coverage: Counter = field(default_factory=Counter)
    worst: defaultdict = field(default_factory=lambda: defaultdict(float))
    failures: list[str] = field(default_factory=list)

    def add(self, trial: Trial, again: str) -> str:
        """Count a trial; for a failure, return its description with the command that repeats it."""
        program, wrong = trial.program, trial.wrong
        self.programs += 1
        self.configurations += program.sets
        self.wrong += int(wrong.sum())
        for trait in program.traits():
            self.coverage[trait] += program.sets
        for temper, count in trial.tempers.items():
            self.coverage["values", temper] += count
        for verdict in trial.verdicts.values():
            self.numbers += verdict.compared
            key = program.subject, program.dtypes[program.variables[0]]
            self.worst[key] = max(self.worst[key], verdict.worst)
        if not wrong.any():
            return ""
        again += "" if trial.refusal else f" --case {int(wrong.argmax())}"
        said = f"{again}\n    {program.subject}, {program.wrap}, {program.derivative}: {trial.reason}"
        self.failures.append(f"{said}\n    {program}\n")
        return said

    def __str__(self) -> str:
        lines, last = [], ""
        for (family, what), count in sorted(self.coverage.items()):
            lines += [] if family == last else ["", family]
            lines.append(f"    {what:32} {count:>9,}")
            last = family
        lines += ["", "largest error as a share of the tolerance, without the rounding of the result"]
        lines += [
            f"    {function:32} {dtype:10} {worst:.2f}" for (function, dtype), worst in sorted(self.worst.items())
        ]
        counts = (
            f"{self.configurations:,} configurations of {self.programs:,} programs, {self.numbers:,} numbers compared"
        )
        return "\n".join([*lines, "", f"{counts} in {self.seconds / 60:.1f} minutes: {self.wrong:,} wrong"])

    def write(self, out: Path) -> None:
        rows = [f"{family},{what},{count}\n" for (family, what), count in sorted(self.coverage.items())]
        (out / "coverage.csv").write_text("kind,what,configurations\n" + "".join(rows))
        (out / "failures.txt").write_text("".join(self.failures))
        names = ("configurations", "programs", "numbers", "wrong", "seconds")
        write_json(out / "summary.json", {name: getattr(self, name) for name in names})
