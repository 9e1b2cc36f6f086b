"""Find the conventions and mistakes that give a number: without a mistake, then with one, then with two."""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxsoft._doctor.inputs import Numbers, Rows, Sample
from jaxsoft._doctor.loss_conventions import FORMS, REDUCTIONS, SMOOTHINGS, WEIGHTINGS, smoothed
from jaxsoft._doctor.loss_mistakes import (
    ADDITIONS,
    CONSTANT,
    HALF,
    INPUTS,
    LOG_PROBS,
    LOSSES,
    OUTERS,
    SMOOTHED,
    TEXTS,
    USUAL,
    half_sums,
)
from jaxsoft._doctor.problem import log_softmax

# Pairs of mistakes are tried for at most so many logits; for more they would take minutes.
MOST_LOGITS = 100_000
# Sums in half precision are tried for at most so many losses, since NumPy adds them one by one.
MOST_ADDED = 1_000_000
ORDER = {name: n for n, name in enumerate(TEXTS)}
Targets = list[tuple[tuple[str, ...], np.ndarray]]


class Precision(NamedTuple):
    """How accurately the given number is known."""

    tight: float  # in units of a position's 1 + loss, averaged as the number is
    loose: float
    half_unit: np.ndarray  # of the last digit that was given


class Way(NamedTuple):
    """One way to compute a loss, with its distance to the given number."""

    mistakes: tuple[str, ...]
    conventions: tuple[str, str, str, str]
    off: float  # from the number, in units of a position's 1 + loss
    value: float | str | None = None  # of a mistake with a number

    @property
    def cost(self) -> float:
        """How unlikely it is compared with others that give the same number."""
        tables = SMOOTHINGS, FORMS, WEIGHTINGS, REDUCTIONS
        places = [list(table).index(name) for table, name in zip(tables, self.conventions, strict=True)]
        doubt = max(0.0, np.log10(max(self.off, 1e-30) / 1e-8))
        usual = 0.02 * sum(ORDER[name] for name in self.mistakes)
        return usual + 0.4 * places[3] + 1.5 * places[2] + 0.2 * places[1] + 1.5 * places[0] + doubt


class Node(NamedTuple):
    """A sample with mistakes applied, before anything is summed."""

    mistakes: tuple[str, ...]
    s: Sample
    lp: Rows
    losses: Numbers | None = None  # in place of the cross-entropy


class Factors(NamedTuple):
    """The factors of every reduction: one per given number if possible, else one per position."""

    s: Sample  # kept alive because the identities of its arrays are a cache key
    reductions: list[str]
    shared: Float[np.ndarray, "ways groups"]
    each: list[Numbers]  # for the last reductions, one factor per position

    def reduce(self, numbers: Numbers) -> Float[np.ndarray, "ways groups"]:
        """The numbers of all positions by every reduction."""
        own = [self.s.reduced(k * numbers) for k in self.each]
        return np.concatenate([self.shared * self.s.reduced(numbers), np.reshape(own, (len(own), self.s.groups))])


class Reading(NamedTuple):
    """All numbers that the reductions give for a node with one smoothing, form and weighting."""

    names: tuple[str, str, str]
    factors: Factors
    weighted: Numbers
    numbers: Float[np.ndarray, "ways groups"]
    units: Float[np.ndarray, "ways groups"]

    def conventions(self, n: int | np.integer) -> tuple[str, str, str, str]:
        return *self.names, self.factors.reductions[n]


Cache = dict[object, Factors]


def nodes(s: Sample, count: int) -> Iterator[Node]:
    """The samples with `count` mistakes in targets, logits, weights, probabilities or losses."""
    if count == 0:
        yield Node((), s, log_softmax(s.z))
        return
    for mistakes, made in _inputs(s, count):
        yield Node(mistakes, made, log_softmax(made.z))
    for mistakes, made in _inputs(s, count - 1):
        for name, (_, formula) in LOG_PROBS.items():
            yield from (Node((*mistakes, name), made, lp) for lp in formula(made))
        lp = log_softmax(made.z)
        q = smoothed(made)
        for name, (_, formula) in LOSSES.items():
            each = (np.where(made.live, losses, 0) for losses in formula(made, lp, q))
            yield from (Node((*mistakes, name), made, lp, losses) for losses in each)


def _inputs(s: Sample, count: int) -> Iterator[tuple[tuple[str, ...], Sample]]:
    if count == 0:
        yield (), s
        return
    for mistakes, made in _inputs(s, count - 1):
        for name, (_, formula) in INPUTS.items():
            if mistakes and not _follows(mistakes[-1], name, s, made):
                continue
            yield from (((*mistakes, name), again) for again in formula(made))


def _follows(first: str, second: str, s: Sample, made: Sample) -> bool:
    """Whether to try the second mistake after the first: mistakes that commute are tried in one order only."""
    if first == second or first.split()[0] == second.split()[0] == "temperature":
        return False
    return made.z is not s.z or ORDER[first] < ORDER[second]


def read(node: Node, plain: bool, cache: Cache) -> list[Reading]:
    """The numbers that the conventions give for a node; `plain` tries only the first smoothing and form."""
    s, found = node.s, []
    for names, losses, r in _weighted_losses(node, plain):
        key = (names[2], *map(id, (s.t, s.live, s.present, s.w, s.c)))
        if key not in cache:
            cache[key] = _factors(s, r * s.present)
        factors, losses = cache[key], losses * s.present
        units = factors.reduce(np.abs(losses) + r * s.present)
        found.append(Reading(names, factors, losses, factors.reduce(losses), units))
    return found


def _factors(s: Sample, r: Numbers) -> Factors:
    shared, each = {}, {}
    for name, (_, formula) in REDUCTIONS.items():
        k = formula(s, r)
        if k is None:
            continue
        by_group = np.broadcast_to(k, len(s.w)).reshape(s.groups, -1)
        if (by_group == by_group[:, :1]).all():
            shared[name] = by_group[:, 0]
        else:
            each[name] = by_group.reshape(-1)
    factors = np.reshape(list(shared.values()), (len(shared), s.groups))
    return Factors(s, [*shared, *each], factors, list(each.values()))


def _weighted_losses(node: Node, plain: bool) -> Iterator[tuple[tuple[str, str, str], Numbers, Numbers]]:
    """Names of smoothing, form and weighting, with the weighted losses and the positions' weights."""
    s, first = node.s, 1 if plain or node.losses is not None else None
    for smoothing, (_, smooth) in itertools.islice(SMOOTHINGS.items(), first):
        q = smooth(s)
        if q is None:
            continue
        for weighting, (_, weigh) in WEIGHTINGS.items():
            made = weigh(s, q)
            if made is None:
                continue
            wq, r = made
            for form, (_, formula) in itertools.islice(FORMS.items(), first):
                costs = formula(node.lp, q)
                if node.losses is not None:
                    weights = s.w * np.where(s.live, s.label_weights(), 0) if s.has_class_weights else s.w
                    yield (smoothing, form, weighting), node.losses * weights, r
                elif costs is not None:
                    yield (smoothing, form, weighting), np.einsum("nc,nc->n", wq, costs), r


def ways(s: Sample, given: np.ndarray, count: int, precision: Precision) -> Iterator[Way]:
    """All ways with `count` mistakes that come near the number."""
    cache: Cache = {}
    for before in range(count + 1):
        rest = count - before
        targets = {number: list(_undone(s, given, number)) for number in (rest, rest - 1) if number >= 0}
        for node in nodes(s, before):
            for reading in read(node, count > 1, cache):
                yield from _near(node, reading, targets[rest], precision)
                for mistakes, target in targets.get(rest - 1, ()):
                    yield from _added(node, reading, mistakes, target, (precision, cache))


def _undone(s: Sample, given: np.ndarray, count: int) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """The numbers from which `count` mistakes give the given number."""
    if count == 0:
        yield (), given
        return
    for mistakes, undone in _undone(s, given, count - 1):
        for name, (_, formula) in OUTERS.items():
            if name not in mistakes and (not mistakes or ORDER[mistakes[-1]] < ORDER[name]):
                yield from (((*mistakes, name), again) for again in formula(s, undone))


def _near(node: Node, reading: Reading, targets: Targets, precision: Precision) -> Iterator[Way]:
    for mistakes, target in targets:
        off = _off(reading.numbers - target, reading.units, precision)
        for n in np.flatnonzero(off <= precision.loose):
            yield Way((*node.mistakes, *mistakes), reading.conventions(n), float(off[n]))


def _off(differences: np.ndarray, units: np.ndarray, precision: Precision) -> np.ndarray:
    """The largest difference, in units, beyond the digits that were given."""
    beyond = np.maximum(np.abs(differences) - precision.half_unit, 0)
    off = np.where(beyond == 0, 0, beyond / units)
    return np.where(np.isnan(off), np.inf, off).max(-1)


def _added(
    node: Node, reading: Reading, mistakes: tuple[str, ...], target: np.ndarray, search: tuple[Precision, Cache]
) -> Iterator[Way]:
    """The ways that remain: an addition times a likely number, or a sum accumulated in half precision."""
    s, (precision, cache) = node.s, search
    for name, directions in _directions(node, reading, cache):
        numbers = np.sum(directions * (target - reading.numbers), -1) / np.sum(directions**2, -1)  # they fit best
        for n in np.flatnonzero(np.isfinite(numbers) & (numbers > 0)):
            k = _likely(float(numbers[n]), directions[n], reading.units[n], precision)
            if k is None or (name == SMOOTHED and k > 1):
                continue
            off = _off(reading.numbers[n] + k * directions[n] - target, reading.units[n], precision)
            if off <= precision.tight:
                yield Way((*node.mistakes, *mistakes, name), reading.conventions(n), float(off), k)
    if s.groups == 1 < len(s.w) <= MOST_ADDED:
        for dtype, total in half_sums(reading.weighted):
            off = _off(reading.factors.shared * total - target, reading.units[: len(reading.factors.shared)], precision)
            for n in np.flatnonzero(off <= precision.loose):
                yield Way((*node.mistakes, *mistakes, HALF), reading.conventions(n), float(off[n]), dtype)


def _directions(node: Node, reading: Reading, cache: Cache) -> Iterator[tuple[str, np.ndarray]]:
    """What each addition adds to each number; a penalty may be weighted or not."""
    s = node.s
    for name, (_, formula) in ADDITIONS.items():
        if name == SMOOTHED:
            if not s.epsilon and node.losses is None:
                # Every loss is linear in ε.
                whole = read(node._replace(s=s._replace(epsilon=1.0)), True, cache)
                yield from ((name, end.numbers - reading.numbers) for end in whole if end.names == reading.names)
        elif name != CONSTANT or s.groups > 2:
            added = formula(s, node.lp) * s.live * s.present
            for kind in (added, added * s.w) if s.has_weights else (added,):
                yield name, reading.factors.reduce(kind)


def _likely(k: float, direction: np.ndarray, unit: np.ndarray, precision: Precision) -> float | None:
    """The number, if it is a usual one or several numbers agree on it, and if its effect exceeds the error."""
    known = float(np.max(precision.tight * unit + precision.half_unit) / np.abs(direction).max())
    if k < 3 * precision.loose * float(unit.max() / np.abs(direction).max()):
        return None
    if len(direction) > 2:
        return k
    nearest = min(USUAL, key=lambda usual: abs(usual - k))
    return nearest if abs(nearest - k) <= known and known < 0.02 * k else None


def search(s: Sample, given: np.ndarray, precision: Precision) -> list[Way]:
    """The most likely ways to the number, with the fewest mistakes; an empty list if there is none."""
    none, one, two = (functools.cache(lambda n=n: list(ways(s, given, n, precision))) for n in (0, 1, 2))
    tight, loose = precision.tight, precision.loose
    stages = [(none, tight), (one, tight), (none, loose), (one, loose)]
    with np.errstate(all="ignore"):
        has_digits = s.groups > 2 or float(np.max(precision.half_unit / np.abs(given))) < 1e-6
        if s.z.size <= MOST_LOGITS and has_digits and tight < 1e-5:
            # For a float64 number, two mistakes that match all digits are likelier than one that matches five.
            stages.insert(3 if tight < 1e-8 else 4, (two, tight))
        for found, limit in stages:
            if near := [way for way in found() if way.off <= limit]:
                return sorted(near, key=lambda way: way.cost)
    return []


def distinct(found: Iterable[Way]) -> list[Way]:
    """The three most likely ways whose names differ."""
    by_name: dict[object, Way] = {}
    for way in found:
        by_name.setdefault(frozenset(way.mistakes) if way.mistakes else way.conventions, way)
    return list(by_name.values())[:3]
