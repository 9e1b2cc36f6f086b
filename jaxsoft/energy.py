"""Energies and the probabilities they give: Gibbs, Hopfield, Boltzmann, restricted Boltzmann.

A Gibbs distribution is the softmax of negated energies, −βE. Hopfield networks descend such energies, Boltzmann
machines sample from them, and in restricted Boltzmann machines the sums over states factorise. States have the units
along the last axis; axes before it are a batch.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from jaxsoft._arrays.checks import as_array, as_floating, as_integer, broadcast, check_values
from jaxsoft._arrays.dtypes import at_least_int32
from jaxsoft._jax_internals import Tracer
from jaxsoft._softmax import logsumexp, softmax

__all__ = [
    "RestrictedBoltzmann",
    "binary_states",
    "boltzmann_probability",
    "gibbs_distribution",
    "hopfield_asynchronous",
    "hopfield_energy",
    "hopfield_field",
    "hopfield_synchronous",
    "log_partition",
    "perceptron_criterion",
    "rbm_energy",
    "rbm_free_energy",
    "rbm_gibbs",
    "rbm_log_partition",
]

MAX_UNITS = 20  # a million states


def gibbs_distribution(
    energies: Float[ArrayLike, "..."],
    axis: int | Sequence[int] | None = -1,
    *,
    beta: Float[ArrayLike, ""] = 1.0,
) -> Float[Array, "..."]:
    """Probabilities of states in thermal equilibrium: the lower the energy, the more likely.

    P_i = exp(−βE_i) / Σ_j exp(−βE_j) = softmax(−βE)_i

    Args:
        energies: energies E of any shape, in float16, bfloat16, float32 or float64 (integers are promoted).
        axis: the axis of the states, several axes that together enumerate them, or None for all.
        beta: inverse temperature β, a scalar that may be traced.

    Returns:
        Array of the energies' shape and dtype that sums to one over `axis`.

    Edges: β = 0 gives the uniform distribution, β → ∞ spreads all probability over the lowest energies. A
    state of energy +inf is forbidden: probability and gradient are 0 at every β, even 0.

    Raises:
        TypeError: energies or beta that are not real numbers, an axis that is not an integer.
        ValueError: beta that is not a scalar, an axis out of range or repeated.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import energy
        >>> probabilities = energy.gibbs_distribution(jnp.array([1.0, 2.0, 3.0]), beta=0.5)
        >>> [f"{p:.4f}" for p in probabilities]
        ['0.5065', '0.3072', '0.1863']

    Source: J. W. Gibbs, "Elementary principles in statistical mechanics" (1902); Y. LeCun, S. Chopra,
    R. Hadsell, M. Ranzato, F. J. Huang, "A tutorial on energy-based learning" (2006).
    """
    logits, allowed = _exponents(energies, beta)
    return jnp.where(allowed, softmax(logits, axis), 0)


def log_partition(
    energies: Float[ArrayLike, "..."],
    axis: int | Sequence[int] | None = -1,
    *,
    beta: Float[ArrayLike, ""] = 1.0,
) -> Float[Array, "..."]:
    """Logarithm of the partition function, the normaliser of the Gibbs distribution.

    log Z = log Σ_j exp(−βE_j)        ∂ log Z/∂E_i = −βP_i,  ∂ log Z/∂β = −⟨E⟩

    Args:
        energies: energies E of any shape, in float16, bfloat16, float32 or float64 (integers are promoted).
        axis: the axis of the states, several axes, or None for all.
        beta: inverse temperature β, a scalar that may be traced.

    Returns:
        Array of the energies' dtype without `axis`. The negative log-likelihood of state i is
        βE_i + log Z, and the free energy −log Z/β.

    Edges: as `gibbs_distribution`; −inf if every state is forbidden.

    Raises:
        TypeError, ValueError: as `gibbs_distribution`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxsoft import energy
        >>> print(jax.grad(energy.log_partition)(jnp.array([1.0, 2.0, 3.0])).round(4))
        [-0.6652 -0.2447 -0.09  ]

    Source: J. W. Gibbs (1902).
    """
    return logsumexp(_exponents(energies, beta)[0], axis)


def hopfield_energy(
    state: Float[ArrayLike, "*batch units"],
    weights: Float[ArrayLike, "units units"],
    bias: Float[ArrayLike, " units"] | None = None,
) -> Float[Array, "*batch"]:
    """Energy of a Hopfield network.

    E(s) = −½ sᵀWs − b·s        −∂E/∂s = Ws + b for symmetric W

    Args:
        state: units s, each −1 or 1.
        weights: couplings W, symmetric with a zero diagonal.
        bias: b, zero by default.

    Returns:
        The energy of each state, in the dtype the arguments promote to.

    Edges: only the symmetric part of W matters, and its diagonal adds a constant. If W is not
    symmetric the value is still defined, but updates need not lower it.

    Raises:
        TypeError: arguments that are not real numbers.
        ValueError: weights that are not a square matrix, a state or bias of another number of units.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import energy
        >>> weights = jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> print(energy.hopfield_energy(jnp.array([[1.0, 1.0], [1.0, -1.0]]), weights))
        [-1.  1.]

    Source: J. J. Hopfield, "Neural networks and physical systems with emergent collective
    computational abilities" (1982).
    """
    s, w, b = _read_hopfield(state, weights, bias)
    return -jnp.sum(s * _affine(s, w.T / 2, b), axis=-1)


def hopfield_field(
    state: Float[ArrayLike, "*batch units"],
    weights: Float[ArrayLike, "units units"],
    bias: Float[ArrayLike, " units"] | None = None,
) -> Float[Array, "*batch units"]:
    """Local field at each unit of a Hopfield network: its sign is the value that lowers the energy.

    h_i = Σ_j W_ij s_j + b_i        E after unit i moves by Δs minus E before = −Δs·h_i

    Args:
        state: units s, each −1 or 1.
        weights: couplings W; the second equation holds for a symmetric W with a zero diagonal.
        bias: b, zero by default.

    Returns:
        The field at each unit, in the dtype the arguments promote to.

    Edges: defined for any square W; for an asymmetric W it is not the gradient of an energy.

    Raises:
        TypeError, ValueError: as `hopfield_energy`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import energy
        >>> weights = jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> print(energy.hopfield_field(jnp.array([1.0, -1.0]), weights))
        [-1.  1.]

    Source: J. J. Hopfield (1982).
    """
    s, w, b = _read_hopfield(state, weights, bias)
    return _affine(s, w.T, b)


def hopfield_asynchronous(
    state: Float[ArrayLike, "*batch units"],
    weights: Float[ArrayLike, "units units"],
    bias: Float[ArrayLike, " units"] | None = None,
    *,
    order: Int[ArrayLike, " visits"] | None = None,
) -> Float[Array, "*batch units"]:
    """Units move to the sign of their field one after another, each seeing the moves before it.

    s_i ← sign(h_i), and s_i stays if h_i = 0

    With symmetric weights and a zero diagonal no move raises the energy, so repeated sweeps end in a
    local minimum. Neither holds for asymmetric weights.

    Args:
        state: units s, each −1 or 1.
        weights: couplings W.
        bias: b, zero by default.
        order: the units to visit, in turn, any number of them; every unit once by default.
            `jax.random.permutation(key, units)` gives a random sweep.

    Returns:
        The state after the visits, in the dtype the arguments promote to.

    Edges: a visit to a unit that does not exist changes nothing.

    Raises:
        TypeError: arguments that are not real numbers, an order that is not integers.
        ValueError: as `hopfield_energy`, an order that is not one-dimensional. Under `checked`: a unit that is not −1
            or 1, a visit out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import energy
        >>> weights = jnp.array([[0.0, -1.0], [-1.0, 0.0]])
        >>> print(energy.hopfield_asynchronous(jnp.array([1.0, 1.0]), weights))
        [-1.  1.]

    Source: J. J. Hopfield (1982).
    """
    s, w, b = _read_hopfield(state, weights, bias)
    units = s.shape[-1]
    given: Any = jnp.arange(units) if order is None else order
    if not isinstance(given, jax.Array):
        given = np.asarray(given)
        if given.dtype.itemsize == 8:  # JAX would narrow 2³² + 1 to unit 1
            given = np.where((given >= -(2**31)) & (given < 2**31), given, 2**31 - 1)
    visits = jnp.asarray(given)
    if not jnp.issubdtype(visits.dtype, jnp.integer):
        raise TypeError(f"order: expected integers, got dtype {visits.dtype}")
    if visits.ndim != 1:
        raise ValueError(f"order: expected one dimension, got shape {visits.shape}")
    visits = at_least_int32(visits)
    exists = (visits >= 0) & (visits < units)
    check_values("state", s, jnp.abs(s) == 1, "-1 or 1")
    check_values("order", visits, exists, f"a unit in [0, {units})")
    visits = jnp.where(exists, visits.astype(jnp.int32), -1)

    def visit(s: Array, i: Array) -> tuple[Array, None]:
        moved = _towards(s @ w[i] + b[i], s[..., i])
        return jnp.where(jnp.arange(units, dtype=i.dtype) == i, moved[..., None], s), None

    return jax.lax.scan(visit, s, visits)[0]


def hopfield_synchronous(
    state: Float[ArrayLike, "*batch units"],
    weights: Float[ArrayLike, "units units"],
    bias: Float[ArrayLike, " units"] | None = None,
) -> Float[Array, "*batch units"]:
    """All units move at once to the signs of their fields.

    s ← sign(Ws + b), and s_i stays if h_i = 0

    The energy may rise. With symmetric weights the states settle, or alternate between two; with
    asymmetric weights longer cycles occur. `hopfield_asynchronous` is the update that descends.

    Args:
        state: units s, each −1 or 1.
        weights: couplings W.
        bias: b, zero by default.

    Returns:
        The next state, in the dtype the arguments promote to.

    Edges: a unit whose field is zero keeps its value.

    Raises:
        TypeError, ValueError: as `hopfield_energy`. Under `checked`: a unit that is not −1 or 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import energy
        >>> weights = jnp.array([[0.0, -1.0], [-1.0, 0.0]])
        >>> print(energy.hopfield_synchronous(jnp.array([1.0, 1.0]), weights))
        [-1. -1.]

    Source: W. A. Little, "The existence of persistent states in the brain" (1974); the cycles:
    E. Goles, J. Olivos, "Periodic behaviour of generalized threshold functions" (1980).
    """
    s, w, b = _read_hopfield(state, weights, bias)
    check_values("state", s, jnp.abs(s) == 1, "-1 or 1")
    return _towards(_affine(s, w.T, b), s)


def perceptron_criterion(
    fields: Float[ArrayLike, "..."], labels: Float[ArrayLike, "..."] | Int[ArrayLike, "..."]
) -> Float[Array, "..."]:
    """How far a field is on the wrong side of zero: the loss whose gradient descent is the perceptron rule.

    loss = max(0, −y h) = ½ h (sign(h) − y)        ∂loss/∂h = −y where y h ≤ 0, else 0

    Args:
        fields: fields h = w·x + b of any shape.
        labels: labels y, each −1 or 1, broadcasting to the fields. Constants: no gradient.

    Returns:
        The loss of each field, not reduced, of the fields' shape and dtype.

    Edges: at h = 0 the loss is 0 and the gradient −y, so that learning can start from zero weights.

    Raises:
        TypeError: arguments that are not real numbers.
        ValueError: labels that do not broadcast. Under `checked`: a label that is not −1 or 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import energy
        >>> print(energy.perceptron_criterion(jnp.array([0.5, -2.0]), jnp.array([-1, -1])))
        [0.5 0. ]

    Source: F. Rosenblatt, "The perceptron" (1958); as a loss: C. M. Bishop, "Pattern recognition and
    machine learning" (2006).
    """
    h = as_floating("fields", fields)
    y = jax.lax.stop_gradient(as_floating("labels", labels).astype(h.dtype))
    y = broadcast("labels", y, h.shape)
    check_values("labels", y, jnp.abs(y) == 1, "-1 or 1")
    return jnp.where(y * h > 0, 0, -y * h)


def boltzmann_probability(
    fields: Float[ArrayLike, "..."],
    *,
    temperature: Float[ArrayLike, ""] = 1.0,
    low: Literal[0, -1] = 0,
) -> Float[Array, "..."]:
    """Probability that a stochastic unit is 1, given its field.

    P(1) = σ((1 − low)·h/T): σ(h/T) for units of 0 and 1, σ(2h/T) for units of −1 and 1

    This is the Gibbs distribution at β = 1/T over the unit's two energies, −h·low and −h; the factor 2
    is the distance between −1 and 1.

    Args:
        fields: fields h of any shape, in float16, bfloat16, float32 or float64 (integers are promoted).
        temperature: T > 0, a scalar that may be traced.
        low: the other value of a unit, 0 or −1.

    Returns:
        Probabilities of the fields' shape and dtype.

    Edges: T → 0 gives the step function of a Hopfield unit, T → ∞ a probability of ½.

    Raises:
        TypeError: fields or a temperature that are not real numbers, `low` that is not an integer.
        ValueError: a temperature that is not a scalar or known not to be positive, `low` other than 0 or −1.

    Example:
        >>> from jaxsoft import energy
        >>> [f"{energy.boltzmann_probability(1.0, low=low):.4f}" for low in (0, -1)]
        ['0.7311', '0.8808']

    Source: D. H. Ackley, G. E. Hinton, T. J. Sejnowski, "A learning algorithm for Boltzmann machines" (1985).
    """
    h = as_floating("fields", fields)
    if as_integer("low", low) not in (0, -1):
        raise ValueError(f"low: expected 0 or -1, got {low}")
    t = _scalar("temperature", temperature, h)
    if not isinstance(t, Tracer) and not t > 0:
        raise ValueError(f"temperature: expected a number that is positive in {t.dtype}, got {temperature}")
    check_values("temperature", t, t > 0, "a positive number")
    return jax.nn.sigmoid((1 - low) * h / t)


class RestrictedBoltzmann(NamedTuple):
    """Parameters of a restricted Boltzmann machine: visible and hidden units of 0 and 1.

    A tuple of arrays, so `jax.grad` of a function of it has the same fields.
    """

    weights: Float[ArrayLike, "visible hidden"]
    visible_bias: Float[ArrayLike, " visible"]
    hidden_bias: Float[ArrayLike, " hidden"]


def rbm_energy(
    params: RestrictedBoltzmann,
    visible: Float[ArrayLike, "*#batch visible"],
    hidden: Float[ArrayLike, "*#batch hidden"],
) -> Float[Array, "*batch"]:
    """Energy of a restricted Boltzmann machine: no couplings within a layer.

    E(v, h) = −b·v − c·h − vᵀWh        P(v, h) = exp(−E)/Z

    Args:
        params: weights W, visible bias b and hidden bias c.
        visible: visible units v, each 0 or 1.
        hidden: hidden units h, each 0 or 1; their batch axes broadcast with the batch axes of `visible`.

    Returns:
        The energy of each pair of states, in the dtype the arguments promote to.

    Raises:
        TypeError: arguments that are not real numbers.
        ValueError: parameters whose shapes disagree, states of another number of units, batch axes
            that do not broadcast.

    Edges: defined for real units too, such as grey values of visible units.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import energy
        >>> params = energy.RestrictedBoltzmann(jnp.ones((3, 2)), jnp.zeros(3), jnp.zeros(2))
        >>> print(energy.rbm_energy(params, jnp.array([1.0, 1.0, 0.0]), jnp.array([1.0, 0.0])))
        -2.0

    Source: P. Smolensky, "Information processing in dynamical systems: foundations of harmony theory" (1986).
    """
    w, b, c, v, h = _read_rbm(params, visible=visible, hidden=hidden)
    try:
        jnp.broadcast_shapes(v.shape[:-1], h.shape[:-1])
    except ValueError:
        raise ValueError(
            f"hidden: expected batch axes that broadcast with {v.shape[:-1]}, got {h.shape[:-1]}"
        ) from None
    rank = max(v.ndim, h.ndim)
    v, h = (jnp.expand_dims(states, range(rank - states.ndim)) for states in (v, h))
    return -(v @ b + h @ c + jnp.sum((v @ w) * h, axis=-1))


def rbm_free_energy(params: RestrictedBoltzmann, visible: Float[ArrayLike, "*batch visible"]) -> Float[Array, "*batch"]:
    """Energy of a visible state with the hidden units summed out.

    F(v) = −log Σ_h exp(−E(v, h)) = −b·v − Σ_j log(1 + exp(c_j + (vᵀW)_j))        P(v) = softmax(−F)(v)

    Args:
        params: weights W, visible bias b and hidden bias c.
        visible: visible units v, each 0 or 1.

    Returns:
        The free energy of each state, in the dtype the arguments promote to.

    Edges: the sum factorises over the hidden units, so it costs one matmul. The gradient to c is −P(h_j = 1 | v).

    Raises:
        TypeError, ValueError: as `rbm_energy`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import energy
        >>> params = energy.RestrictedBoltzmann(jnp.zeros((3, 2)), jnp.zeros(3), jnp.zeros(2))
        >>> print(energy.rbm_free_energy(params, jnp.ones(3)).round(4))  # -log 4
        -1.3863

    Source: G. E. Hinton, "Training products of experts by minimizing contrastive divergence" (2002).
    """
    w, b, c, v = _read_rbm(params, visible=visible)
    return -(v @ b + jnp.sum(jax.nn.softplus(_affine(v, w, c)), axis=-1))


def rbm_log_partition(params: RestrictedBoltzmann) -> Float[Array, ""]:
    """Exact log partition function of a small restricted Boltzmann machine, by enumeration.

    log Z = log Σ_v exp(−F(v)), over the states of the smaller layer

    Args:
        params: weights W, visible bias b and hidden bias c.

    Returns:
        log Z, a scalar in the parameters' dtype. log P(v) = −F(v) − log Z.

    Edges: memory holds the 2ⁿ states of the smaller layer times the units of the larger layer.
    The gradient is exactly minus the mean of ∂E under the model.

    Raises:
        TypeError: parameters that are not real numbers.
        ValueError: parameters whose shapes disagree, more than 20 units in both layers.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsoft import energy
        >>> params = energy.RestrictedBoltzmann(jnp.zeros((3, 2)), jnp.zeros(3), jnp.zeros(2))
        >>> print(jnp.exp(energy.rbm_log_partition(params)).round(2))  # 2**5 states of energy 0
        32.0

    Source: P. Smolensky (1986).
    """
    w, b, c = _read_rbm(params)
    # The energy is symmetric in the two layers: exchange them if the hidden layer is smaller.
    smaller = RestrictedBoltzmann(w, b, c) if w.shape[0] <= w.shape[1] else RestrictedBoltzmann(w.T, c, b)
    units = min(w.shape)
    if units > MAX_UNITS:
        raise ValueError(f"params: expected a layer of at most {MAX_UNITS} units to enumerate, got weights {w.shape}")
    return logsumexp(-rbm_free_energy(smaller, binary_states(units, dtype=w.dtype)))


def rbm_gibbs(
    key: Key[Array, ""],
    params: RestrictedBoltzmann,
    visible: Float[ArrayLike, "*batch visible"],
    *,
    steps: int = 1,
) -> tuple[Float[Array, "*batch visible"], Float[Array, "*batch hidden"]]:
    """Block Gibbs sampling: draw one whole layer given the other, in turn.

    h_j ~ σ(c_j + (vᵀW)_j), then v_i ~ σ(b_i + (Wh)_i), `steps` times

    Args:
        key: a JAX random key; every chain of the batch draws its own numbers from it.
        params: weights W, visible bias b and hidden bias c.
        visible: the visible states from which the chains start, each unit 0 or 1.
        steps: how often both layers are drawn.

    Returns:
        The last visible and hidden states, of 0 and 1 in the dtype the arguments promote to: for many steps draws from
        P(v, h).

    Edges: chains mix slowly if the weights are large; this is not detected.

    Raises:
        TypeError: arguments that are not real numbers, steps that are not an integer.
        ValueError: as `rbm_energy`, fewer than one step.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxsoft import energy
        >>> params = energy.RestrictedBoltzmann(jnp.zeros((3, 2)), jnp.full(3, 99.0), jnp.full(2, -99.0))
        >>> visible, hidden = energy.rbm_gibbs(jax.random.key(0), params, jnp.zeros((4, 3)))
        >>> print(visible[0], hidden[0])
        [1. 1. 1.] [0. 0.]

    Source: S. Geman, D. Geman, "Stochastic relaxation, Gibbs distributions, and the Bayesian
    restoration of images" (1984); G. E. Hinton (2002).
    """
    w, b, c, v = _read_rbm(params, visible=visible)
    if as_integer("steps", steps) < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")

    def step(state: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], None]:
        hidden_key, visible_key = jax.random.split(key)
        hidden = _draw(hidden_key, _affine(state[0], w, c))
        return (_draw(visible_key, _affine(hidden, w.T, b)), hidden), None

    hidden = jnp.zeros((*v.shape[:-1], w.shape[1]), v.dtype)
    return jax.lax.scan(step, (v, hidden), jax.random.split(key, steps))[0]


def binary_states(units: int, *, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "states units"]:
    """All states of a few units of 0 and 1, in counting order: the last unit changes fastest.

    row n holds the binary digits of n, for n from 0 to 2**units − 1

    Args:
        units: how many units, at most 20.
        dtype: dtype of the states.

    Returns:
        Array of shape (2**units, units).

    Edges: no units have one state, the empty one.

    Raises:
        TypeError: units that are not an integer.
        ValueError: units outside [0, 20].

    Example:
        >>> from jaxsoft import energy
        >>> print(energy.binary_states(2))
        [[0. 0.]
         [0. 1.]
         [1. 0.]
         [1. 1.]]
    """
    count = as_integer("units", units)
    if not 0 <= count <= MAX_UNITS:
        raise ValueError(f"units: expected an integer in [0, {MAX_UNITS}], got {count}")
    return (jnp.arange(2**count)[:, None] >> jnp.arange(count)[None, ::-1] & 1).astype(dtype)


def _exponents(energies: ArrayLike, beta: ArrayLike) -> tuple[Array, Bool[Array, "..."]]:
    """−βE, and which states are allowed. Forbidden states are separate: 0·inf would be NaN here or in the gradient.

    There is no literal infinity, because `jax_debug_infs` stops at one even if it is not selected.
    """
    e = as_floating("energies", energies)
    allowed = jnp.isfinite(e) | ~(e > 0)
    scaled = -_scalar("beta", beta, e) * jnp.where(allowed, e, 0)
    return jnp.where(allowed, scaled, jax.lax.stop_gradient(-e)), allowed


def _scalar(name: str, value: ArrayLike, like: Array) -> Array:
    scalar = as_floating(name, value)
    if scalar.shape:
        raise ValueError(f"{name}: expected a scalar, got shape {scalar.shape}; map over it with jax.vmap")
    return scalar.astype(like.dtype)


def _read_hopfield(state: ArrayLike, weights: ArrayLike, bias: ArrayLike | None) -> tuple[Array, Array, Array]:
    arrays = {"weights": weights, "state": state} | ({} if bias is None else {"bias": bias})
    w, s, *rest = _promote(arrays)
    if w.ndim != 2 or w.shape[0] != w.shape[1]:
        raise ValueError(f"weights: expected a square matrix, got shape {w.shape}")
    b = rest[0] if rest else jnp.zeros(w.shape[:1], w.dtype)
    _check_vector("bias", b, w.shape[0])
    _check_units("state", s, w.shape[0])
    return s, w, b


def _read_rbm(params: RestrictedBoltzmann, **states: ArrayLike) -> list[Array]:
    """Weights, visible bias, hidden bias, and the states of layers by name."""
    w, b, c, *layers = _promote(params._asdict() | states)
    if w.ndim != 2:
        raise ValueError(f"weights: expected shape (visible, hidden), got {w.shape}")
    _check_vector("visible_bias", b, w.shape[0])
    _check_vector("hidden_bias", c, w.shape[1])
    for name, layer in zip(states, layers, strict=True):
        _check_units(name, layer, w.shape[("visible", "hidden").index(name)])
    return [w, b, c, *layers]


def _promote(arrays: dict[str, ArrayLike]) -> list[Array]:
    """The arrays in the dtype to which the floating ones promote; integers do not affect it."""
    given = {name: as_array(name, array) for name, array in arrays.items()}
    floating = [a.dtype for a in given.values() if jnp.issubdtype(a.dtype, jnp.floating)]
    dtype = jnp.result_type(*floating, float)
    return [as_floating(name, array).astype(dtype) for name, array in given.items()]


def _check_units(name: str, array: Array, count: int) -> None:
    if array.shape[-1:] != (count,):
        raise ValueError(f"{name}: expected {count} units along the last axis, got shape {array.shape}")


def _check_vector(name: str, array: Array, count: int) -> None:
    if array.shape != (count,):
        raise ValueError(f"{name}: expected shape ({count},), got {array.shape}")


def _affine(x: Array, weights: Array, bias: Array) -> Array:
    """x·W + b, with the bias broadcast explicitly, as strict rank promotion requires."""
    product = x @ weights
    return product + jnp.broadcast_to(bias, product.shape)


def _towards(field: Array, state: Array) -> Array:
    return jnp.where(field == 0, state, jnp.sign(field))


def _draw(key: Array, field: Array) -> Array:
    return jax.random.bernoulli(key, boltzmann_probability(field)).astype(field.dtype)
