"""Do the energies behind softmax do what texts say: descend, sample, normalise, overfit?

python -m experiments.energies --chains 50000
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from experiments._door import check_counts, check_seed, enter, make_folder
from experiments._numbers import Number, report
from experiments._style import BLACK, BLUE, GREEN, GREY, ORANGE, RED, SKY, WIDE, plt, save, tint
from jaxsoft import cross_entropy, energy

COLORS = BLUE, ORANGE, GREEN
TABULATED = "in the table of numbers"  # the table in `summary.json`, which a run compares with these curves
# Probability of a unit of 0 and 1 at field 1, by temperature.
UNIT = {0.1: 0.9999546, 0.5: 0.8807971, 1.0: 0.7310586, 2.0: 0.6224593, 10.0: 0.5249792}
# Energies (1, 2, 3): probabilities and (1/β)·NLL of the first, by inverse temperature.
LEVELS = np.array([1.0, 2.0, 3.0])
SWEEP = {
    0.5: (0.50648, 0.30720, 0.18632, 1.36054),
    1.0: (0.66524, 0.24473, 0.09003, 0.40761),
    2.0: (0.86681, 0.11731, 0.01588, 0.07147),
}
MACHINE = energy.RestrictedBoltzmann(
    np.array([[0.5, -1.0], [1.5, 0.3], [-0.7, 0.8]]), np.array([0.1, -0.2, 0.3]), np.array([0.4, -0.6])
)
SYMMETRIC = np.array([[0.0, -1.0], [-1.0, 0.0]])
ASYMMETRIC = np.array([[0.0, 1.0], [-1.0, 0.0]])
ORBITS: tuple[str, ...] = "symmetric, all at once", "symmetric, one by one", "asymmetric, all at once"
CENTRES = 1.2 * np.array([[0.0, 1.0], [-0.866, -0.5], [0.866, -0.5]])
SPREAD = 0.8


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    seed: int = 0
    """Seed for the patterns, the chains and the training points."""
    chains: int = 50_000
    """Independent Gibbs chains, all started at zero."""
    steps: int = 20
    """Gibbs steps of each chain."""
    out: Path = Path("out/energies")
    """Folder for summary.json and the pictures."""


# Hopfield: asynchronous descent, synchronous cycles


def descend(
    weights: Float[Array, "units units"], state: Float[Array, " units"], order: Int[Array, " visits"]
) -> tuple[Float[Array, " units"], dict[str, Float[Array, " visits"]]]:
    """The final state, and for each visit the energy after it, its change, and −Δs·field."""

    def visit(state, unit):
        field = energy.hopfield_field(state, weights)
        moved = energy.hopfield_asynchronous(state, weights, order=unit[None])
        after = energy.hopfield_energy(moved, weights)
        change = after - energy.hopfield_energy(state, weights)
        return moved, {"energy": after, "change": change, "predicted": -jnp.sum((moved - state) * field)}

    return jax.lax.scan(visit, state, order)


@jax.jit
def descend_and_sweep(
    weights: Float[Array, "units units"], begin: Float[Array, "starts units"], order: Int[Array, " visits"]
) -> tuple[Float[Array, "starts units"], dict[str, Float[Array, "starts visits"]], Float[Array, "starts units"]]:
    """All descents, and the result of one more sweep of their final states."""
    final, trace = jax.vmap(descend, in_axes=(None, 0, None))(weights, begin, order)
    return final, trace, energy.hopfield_asynchronous(final, weights)


@jax.jit
def orbits_of_two() -> tuple[Float[Array, "steps 2"], ...]:
    """For each kind in `ORBITS`, the states of two units that start at (1, 1), one per row."""

    def orbit(update, weights):
        return jax.lax.scan(lambda state, _: (update(state, weights), state), jnp.ones(2), length=9)[1]

    return (
        orbit(energy.hopfield_synchronous, SYMMETRIC),
        orbit(energy.hopfield_asynchronous, SYMMETRIC),
        orbit(energy.hopfield_synchronous, ASYMMETRIC),
    )


def cycle_length(states: np.ndarray) -> int:
    """The number of steps since the last state occurred before."""
    back = (states[-2::-1] == states[-1]).all(axis=1)
    return int(back.argmax()) + 1


def hopfield(seed: int, path: Path) -> list[Number]:
    """Store four patterns in 128 units; descend from them with a tenth of the units flipped, and from random states."""
    units, patterns, starts = 128, 4, 12
    rng = np.random.default_rng(seed)
    stored = rng.choice([-1.0, 1.0], (patterns, units))
    weights = (stored.T @ stored / units) * (1 - np.eye(units))
    damaged = stored * np.where(rng.permuted(np.tile(np.arange(units) < units // 10, (patterns, 1)), axis=1), -1, 1)
    begin = np.concatenate([damaged, rng.choice([-1.0, 1.0], (starts, units))])
    order = np.concatenate([rng.permutation(units) for _ in range(6)])
    final, trace, swept = jax.device_get(descend_and_sweep(weights, begin, order))
    ends = trace["energy"][:, -1]
    orbits = dict(zip(ORBITS, jax.device_get(orbits_of_two()), strict=True))
    plot_hopfield(trace["energy"], patterns, orbits, path)
    return [
        Number("Hopfield: largest rise of the energy at a visit", "<1e-12", trace["change"].max()),
        Number(
            "Hopfield: energy change against −Δs·field", "<1e-12", np.abs(trace["change"] - trace["predicted"]).max()
        ),
        Number("Hopfield: descents that settled", str(len(begin)), np.all(final == swept, axis=1).sum()),
        Number("Hopfield: damaged patterns recalled", str(patterns), (final[:patterns] == stored).all(axis=1).sum()),
        Number("Hopfield: highest minus lowest final energy: minima are local", ">1e-6", ends.max() - ends.min()),
        *(
            Number(f"Hopfield: cycle length, {name}", stated, cycle_length(orbits[name]))
            for name, stated in zip(orbits, "214", strict=True)
        ),
    ]


def plot_hopfield(energies: np.ndarray, damaged: int, orbits: dict[str, np.ndarray], path: Path) -> None:
    figure = plt.figure(figsize=(WIDE, 3.8))
    grid = figure.add_gridspec(len(orbits), 2, width_ratios=(1, 1))
    left = figure.add_subplot(grid[:, 0])
    for n, line in enumerate(energies):
        of_pattern = n < damaged
        name = {0: "from a damaged pattern", damaged: "from a random state"}.get(n)
        left.plot(line, color=BLUE if of_pattern else ORANGE, label=name, lw=1.8 if of_pattern else 1)
    left.set(title="visits one by one never raise the energy", xlabel="visit", ylabel="energy E(s)")
    left.legend()
    for row, (name, states) in enumerate(orbits.items()):
        axes = figure.add_subplot(grid[row, 1])
        axes.imshow(states.T, cmap="gray", vmin=-1.4, vmax=1.4, aspect="auto")
        for (step, unit), value in np.ndenumerate(states):
            axes.text(step, unit, f"{value:+.0f}", ha="center", va="center", color="white" if value < 0 else "black")
        length = cycle_length(states)
        axes.set_title(f"{name}: " + ("settles" if length == 1 else f"cycle of {length}"))
        axes.set_xticks(range(len(states)))
        axes.set_xlabel("step" if row == len(orbits) - 1 else "")
        axes.set_yticks([0, 1], ["unit 1", "unit 2"])
    save(figure, path)


# One Boltzmann unit


def temperature(path: Path) -> list[Number]:
    """Heat a unit from almost certain to a fair coin."""
    unit, fields = jax.jit(energy.boltzmann_probability, static_argnames="low"), np.linspace(-5, 5, 401)
    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    for t, color in zip(UNIT, (BLACK, BLUE, GREEN, ORANGE, RED), strict=True):
        probability = unit(fields, temperature=t)
        axes.plot(fields, probability, color=color, label=f"0/1 unit, T = {t:g}")
    # It lies on the line of T = 0.5.
    axes.plot(fields, unit(fields, low=-1), ":", color=SKY, lw=3.5, label="±1 unit, T = 1")
    axes.plot(np.ones(len(UNIT)), list(UNIT.values()), "ko", ms=4, label=TABULATED)
    axes.set(title="the probability that a unit is on, by temperature", xlabel="field h", ylabel="probability of 1")
    axes.legend()
    save(figure, path)
    return [
        *(
            Number(f"P(1) of a 0/1 unit, field 1, T = {t:g}", f"{p:.7f}", unit(1.0, temperature=t))
            for t, p in UNIT.items()
        ),
        # ±1 units are twice as far apart: they behave as 0/1 units at half the temperature.
        Number("P(1) of a ±1 unit, field 1, T = 1", f"{UNIT[0.5]:.7f}", unit(1.0, low=-1)),
    ]


# A restricted Boltzmann machine


@functools.partial(jax.jit, static_argnames=("chains", "steps"))
def sample(key: Array, chains: int, steps: int) -> Float[Array, "steps states"]:
    """Frequency of each of the 32 states after each step, over chains that start at zero."""
    place = 2.0 ** jnp.arange(4, -1, -1)

    def step(visible, key):
        visible, hidden = energy.rbm_gibbs(key, MACHINE, visible)
        index = (jnp.concatenate([visible, hidden], axis=1) @ place).astype(jnp.int32)
        return visible, jnp.bincount(index, length=32) / chains

    return jax.lax.scan(step, jnp.zeros((chains, 3)), jax.random.split(key, steps))[1]


@jax.jit
def enumerate_states() -> tuple[Float[Array, "8 4"], Float[Array, " 8"], tuple[Float[Array, ""], ...]]:
    """The probabilities of all states, of the visible ones, and Z over states, from free energies and as a function."""
    visible, hidden = energy.binary_states(3, dtype=float), energy.binary_states(2, dtype=float)
    energies = energy.rbm_energy(MACHINE, visible[:, None], hidden)
    free = energy.rbm_free_energy(MACHINE, visible)
    logs = energy.log_partition(energies, None), energy.log_partition(free), energy.rbm_log_partition(MACHINE)
    return energy.gibbs_distribution(energies, None), energy.gibbs_distribution(free), tuple(map(jnp.exp, logs))


def restricted_boltzmann(config: Config, path: Path) -> list[Number]:
    """Normalise a machine of five units exactly, and sample it."""
    joint, marginal, (over_states, from_free, from_function) = jax.device_get(enumerate_states())
    frequency = np.asarray(sample(jax.random.key(config.seed), config.chains, config.steps))
    seen = frequency.reshape(-1, 8, 4)
    apart = np.abs(seen - joint).sum((1, 2)) / 2
    apart_visible = np.abs(seen.sum(2) - marginal).sum(1) / 2
    # The mean deviation of each frequency for as many independent draws, normal by the central limit theorem.
    chance = np.sqrt(joint * (1 - joint) / (2 * np.pi * config.chains)).sum()
    plot_samples(marginal, seen[-1].sum(1), apart, apart_visible, float(chance), path)
    return [
        Number("RBM: Z over 32 states", "68.62559544", over_states),
        Number("RBM: Z from free energies", "68.62559544", from_free),
        Number("RBM: Z from rbm_log_partition", "68.62559544", from_function),
        Number("RBM: sum over h of P(v, h) against softmax(−F)", "<1e-14", np.abs(joint.sum(1) - marginal).max()),
        Number("RBM: total variation of the visible samples", "<0.02", apart_visible[-1]),
        Number("RBM: total variation of the joint samples", "<0.02", apart[-1]),
    ]


def plot_samples(
    exact: np.ndarray, seen: np.ndarray, apart: np.ndarray, apart_visible: np.ndarray, chance: float, path: Path
) -> None:
    figure, (left, right) = plt.subplots(1, 2)
    states = np.arange(len(exact))
    left.bar(states - 0.2, exact, 0.4, label="exact: softmax(−F)")
    left.bar(states + 0.2, seen, 0.4, label="Gibbs chains, last step")
    left.set_xticks(states, [f"{n:03b}" for n in states])
    left.set(title="visible states", xlabel="state v", ylabel="probability", ylim=(0, 1.35 * exact.max()))
    left.legend()
    steps = np.arange(1, len(apart) + 1)
    right.xaxis.get_major_locator().set_params(integer=True)
    right.semilogy(steps, apart, ".-", label="32 joint states")
    right.semilogy(steps, apart_visible, ".-", label="8 visible states")
    right.axhline(chance, color=GREY, ls="--", lw=1, label="32 joint states, independent draws")
    right.set(title="chains started at zero", xlabel="Gibbs step", ylabel="total variation from the exact")
    right.legend()
    save(figure, path)


# Inverse temperature


def label_loss(energies: Float[Array, " states"], label: int, beta: Float[Array, ""]) -> Float[Array, ""]:
    """(1/β) times the negative log-likelihood of a state."""
    return energies[label] + energy.log_partition(energies, beta=beta) / beta


@jax.jit
def by_temperature(betas: Float[Array, " betas"]) -> tuple[Float[Array, "betas 3"], ...]:
    """The Gibbs distribution over the levels, (1/β)·NLL of each, and the gradient of the first one's."""
    levels = jnp.asarray(LEVELS)
    probabilities = jax.vmap(lambda beta: energy.gibbs_distribution(levels, beta=beta))(betas)
    losses = [jax.vmap(lambda beta, n=n: label_loss(levels, n, beta))(betas) for n in range(len(LEVELS))]
    gradients = jax.vmap(jax.grad(label_loss), in_axes=(None, None, 0))(levels, 0, betas)
    return probabilities, jnp.stack(losses, axis=1), gradients


def inverse_temperature(path: Path) -> list[Number]:
    """From a fair die (β = 0) to the lowest energy alone (β = ∞)."""
    curve = np.geomspace(0.05, 20, 200)
    # The curves and the numbers are computed together, at the numbers' temperatures first.
    found = jax.device_get(by_temperature(np.concatenate([[*SWEEP, 100.0], curve])))
    probabilities, losses, gradients = (array[: len(SWEEP) + 1] for array in found)
    numbers = []
    for n, (beta, stated) in enumerate(SWEEP.items()):
        for name, value, computed in zip(
            ("P(0)", "P(1)", "P(2)", "NLL/β of 0"), stated, (*probabilities[n], losses[n, 0]), strict=True
        ):
            numbers.append(Number(f"Gibbs: {name} at β = {beta:g}", f"{value:.5f}", computed))
        error = np.abs(gradients[n] - (np.eye(3)[0] - probabilities[n])).max()
        numbers.append(Number(f"Gibbs: d(NLL/β)/dE against δ − P at β = {beta:g}", "<1e-14", error))
    for label, far in enumerate(losses[-1]):
        numbers.append(Number(f"Gibbs: NLL/β of {label} at β = 100: E − min E", f"{label}.000000000000", far))
    plot_levels(curve, found[0][-len(curve) :], found[1][-len(curve) :], path)
    return numbers


def plot_levels(betas: np.ndarray, probabilities: np.ndarray, losses: np.ndarray, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 3.9))
    for n, color in enumerate(COLORS):
        left.semilogx(betas, probabilities[:, n], color=color, label=f"state {n}, E = {LEVELS[n]:g}")
        right.loglog(betas, losses[:, n], color=color, label=f"state {n}, E = {LEVELS[n]:g}")
    for beta, stated in SWEEP.items():
        left.plot([beta] * 3, stated[:3], "ko", ms=4, label=TABULATED if beta == 1 else None)
        right.plot(beta, stated[3], "ko", ms=4, label=TABULATED if beta == 1 else None)
    for n in (1, 2):
        right.axhline(n, color=COLORS[n], ls="--", lw=1, label=f"E − min E = {n}")
    left.set(title="Gibbs distribution", xlabel="inverse temperature β", ylabel="probability")
    right.set(title="(1/β)·NLL tends to E − min E", xlabel="inverse temperature β", ylabel="(1/β)·NLL", ylim=(1e-6, 60))
    left.legend(loc="center right")
    right.legend(loc="lower left")
    save(figure, path)


# Maximum likelihood against a prior


def polynomials(points: Float[np.ndarray, "*batch 2"], degree: int = 5) -> Float[np.ndarray, "*batch features"]:
    """All products of powers of the two coordinates, halved so that none is large."""
    x, y = points[..., 0] / 2, points[..., 1] / 2
    return np.stack([x**i * y**j for i in range(degree + 1) for j in range(degree + 1 - i)], axis=-1)


def draw_points(rng: np.random.Generator, count: int) -> tuple[np.ndarray, Int[np.ndarray, " points"]]:
    labels = np.arange(count) % 3
    return CENTRES[labels] + SPREAD * rng.normal(size=(count, 2)), labels


@functools.partial(jax.jit, static_argnames="steps")
def fit(
    features: Float[Array, "points features"],
    labels: Int[Array, " points"],
    precision: Float[Array, ""],
    steps: int = 3000,
):
    """Weights (features, classes) of highest posterior under a N(0, 1/precision) prior; 0 is maximum likelihood."""

    def negative_log_posterior(weights):
        return cross_entropy(features @ weights, labels, reduction="sum") + precision / 2 * jnp.sum(weights**2)

    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))

    def step(state, _):
        weights, moments = state
        updates, moments = optimizer.update(jax.grad(negative_log_posterior)(weights), moments)
        return (optax.apply_updates(weights, updates), moments), None

    start = jnp.zeros((features.shape[-1], 3))
    (weights, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    return weights


def prior(seed: int, path: Path) -> list[Number]:
    """Fit 63 weights to 45 points of three overlapping classes, with and without a prior.

    With a prior the steps end at the maximum of the posterior. Without one they are still on their way
    to maximum likelihood, which may lie at infinity: more steps would overfit more.
    """
    rng = np.random.default_rng(seed)
    points, labels = draw_points(rng, 45)
    test_points, test_labels = draw_points(rng, 3000)
    precisions = np.concatenate([[0], 10.0 ** np.arange(-3, 3.5, 0.5)])
    weights = jax.jit(jax.vmap(fit, in_axes=(None, None, 0)))(polynomials(points), labels, precisions)
    # The classes are Gibbs distributed given the point: energies are squared distances to the centres.
    distances = ((test_points[:, None] - CENTRES) ** 2).sum(-1) / (2 * SPREAD**2)

    @jax.jit
    def losses(weights):
        drawn = (points, labels), (test_points, test_labels)
        of_fits = [jax.vmap(lambda w, x=x, y=y: cross_entropy(polynomials(x) @ w, y))(weights) for x, y in drawn]
        return *of_fits, cross_entropy(-distances, test_labels)

    weights, (train, test, best) = jax.device_get((weights, losses(weights)))
    unit = int(np.argmin(np.abs(precisions - 1)))
    plot_prior(points, labels, weights[[0, unit]], precisions, train, test, float(best), path)
    return [
        Number("training loss: maximum likelihood over unit Gaussian prior", "<1", train[0] / train[unit]),
        Number("held-out loss: unit Gaussian prior over maximum likelihood", "<1", test[unit] / test[0]),
        Number("held-out loss: unit Gaussian prior over true classes", "<2", test[unit] / best),
    ]


def plot_prior(
    points: np.ndarray, labels: np.ndarray, weights: np.ndarray, precisions: np.ndarray, train: np.ndarray,
    test: np.ndarray, best: float, path: Path,
) -> None:  # fmt: skip
    figure, axes = plt.subplot_mosaic([["likelihood", "prior"], ["losses", "losses"]], figsize=(WIDE, 7.6))
    *maps, right = axes.values()
    grid = np.stack(np.meshgrid(np.linspace(-3.5, 3.5, 250), np.linspace(-3.5, 3.5, 250)), axis=-1)
    titles = "maximum likelihood", "Gaussian prior of precision 1"
    for axes, fitted, title in zip(maps, weights, titles, strict=True):
        predicted = np.argmax(polynomials(grid) @ fitted, axis=-1)
        axes.contourf(grid[..., 0], grid[..., 1], predicted, levels=[-0.5, 0.5, 1.5, 2.5], colors=[*map(tint, COLORS)])
        for label, (color, marker) in enumerate(zip(COLORS, "os^", strict=True)):
            chosen = points[labels == label]
            axes.scatter(
                chosen[:, 0],
                chosen[:, 1],
                26,
                color=color,
                marker=marker,
                edgecolor="black",
                lw=0.4,
                label=f"class {label}",
            )
        axes.set(title=title, xlabel="x", ylabel="y", aspect="equal")
    maps[0].legend(loc="lower left")
    right.loglog(precisions[1:], test[1:], "o-", ms=4, color=RED, label="held out, prior")
    right.loglog(precisions[1:], train[1:], "o-", ms=4, color=BLUE, label="training, prior")
    right.axhline(test[0], color=RED, ls="--", lw=1, label="held out, maximum likelihood")
    right.axhline(train[0], color=BLUE, ls="--", lw=1, label="training, maximum likelihood")
    right.axhline(best, color="black", ls=":", lw=1.4, label="held out, true probabilities")
    right.set(
        title="cross-entropy by prior",
        xlabel="precision of the prior",
        ylabel="cross-entropy (nats)",
        ylim=(train[0] / 1.3, None),
    )
    right.legend(loc="center right", bbox_to_anchor=(1, 0.32))
    save(figure, path)


def run(config: Config) -> dict[str, float]:
    """Compute everything in float64, write the results to `config.out` and return the numbers."""
    check_counts(config, "chains", "steps")
    check_seed(config.seed)
    out = make_folder(config.out)
    with jax.enable_x64(True):
        numbers = [
            *hopfield(config.seed, out / "hopfield.png"),
            *temperature(out / "temperature.png"),
            *restricted_boltzmann(config, out / "gibbs_sampling.png"),
            *inverse_temperature(out / "inverse_temperature.png"),
            *prior(config.seed, out / "prior.png"),
        ]
    return report(numbers, out)


if __name__ == "__main__":
    enter(Config, run, __doc__)
