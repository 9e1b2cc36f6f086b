"""Cross-entropy of a linear layer whose logits are never all stored."""

from typing import Any

from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxsoft._arrays.checks import as_option, broadcast
from jaxsoft._arrays.dtypes import compute_dtype
from jaxsoft._arrays.sharding import AxisName
from jaxsoft._formula.losses import check_targets, loss_head
from jaxsoft._formula.sparse import SparseTargets
from jaxsoft._formula.targets import REDUCTIONS, Averaging, Reduction, as_options
from jaxsoft._linear.args import Execution, HeadArgs, Scaling, check_head
from jaxsoft._linear.mesh import BatchAxes
from jaxsoft._linear.run import run_head
from jaxsoft._linear_log_probs import LogProbs, with_log_probs


def linear_cross_entropy(
    features: Float[ArrayLike, "*positions features"],
    kernel: Float[ArrayLike, "features classes"],
    targets: Int[ArrayLike, "*positions"]
    | Float[ArrayLike, "*positions classes"]
    | Bool[ArrayLike, "..."]
    | SparseTargets,
    bias: Float[ArrayLike, " classes"] | None = None,
    *,
    ignore_index: int | None = None,
    weights: Float[ArrayLike, "*positions"] | Bool[ArrayLike, "*positions"] | None = None,
    class_weights: Float[ArrayLike, " classes"] | None = None,
    where: Bool[ArrayLike, " classes"] | None = None,
    label_smoothing: Float[ArrayLike, ""] = 0.0,
    z_loss: Float[ArrayLike, ""] = 0.0,
    soft_cap: Float[ArrayLike, ""] | None = None,
    temperature: Float[ArrayLike, ""] = 1.0,
    reduction: Reduction = "mean",
    with_statistics: bool = False,
    kernel_axis: int = -1,
    memory_budget: int | None = None,
    axis_name: AxisName = None,
    batch_axes: BatchAxes = None,
) -> Float[Array, "..."] | Any:  # with statistics a tuple: a union would make every caller distinguish them
    """Cross-entropy between targets and softmax(features @ kernel + bias), without storing all logits.

    z = c·tanh((x·W + b)/c)/T;  loss = τ·lse − Σ_j q_j z_j + ζ·lse², as in `cross_entropy`

    Positions are processed in tiles, see `plan_linear_cross_entropy`; only one tile's logits exist at a time. Each tile
    is computed as `cross_entropy` computes it, and stays as accurate.

    Args:
        features: inputs x of the layer, in float16, bfloat16, float32 or float64, with any number of leading axes.
        kernel: weights W of shape (features, classes), as in Flax's Dense; see `kernel_axis`.
        targets: as in `cross_entropy`: integer labels of the features' shape without their last axis; or a floating
            distribution or a one-hot of shape (..., classes); or `SparseTargets` of a few classes.
        bias: b of shape (classes,).
        ignore_index: label of the ignored positions, which cost almost no time.
        weights: weight per position, or a boolean mask of the positions to keep; a weight of 0 ignores a position.
        class_weights: weight of each class, of shape (classes,).
        where: booleans of shape (classes,); False masks a class, such as one that pads the vocabulary.
        label_smoothing: ε in [0, 1], as in `cross_entropy`.
        z_loss: ζ ≥ 0, as in `cross_entropy`.
        soft_cap: c > 0, which keeps the logits within ±c; None for none.
        temperature: T > 0, which divides the logits after the cap. Like smoothing, z-loss and cap it may be
            traced, for schedules, and is a constant: to learn a temperature, divide the features by it.
        reduction: "none", "sum" or "mean", as in `cross_entropy`.
        with_statistics: whether to return `LogProbs` too, computed from the same logits, for logging.
        kernel_axis: the kernel's class axis: -1, or 0 for a kernel of shape (classes, features), such as tied
            embeddings, which is used without a transposed copy.
        memory_budget: bytes that one tile's logits, their gradient, and the stored logit gradients of a group of tiles
            may take; None for a size that suits the device, on an accelerator at most a third of its memory.
        axis_name: inside `jax.shard_map`, or on an automatic mesh set by `jax.set_mesh`, the mesh axis over which the
            classes are sharded in contiguous blocks, as in `cross_entropy`. Inside `shard_map`, kernel, bias, `where`
            and distributions hold one block; labels and class weights refer to all classes.
        batch_axes: on an automatic mesh set by `jax.set_mesh`, the names of the mesh axes over which the first axis of
            the positions is sharded, or a `PartitionSpec` for all of them. Explicit axes are read from the types.

    Returns:
        The loss in float32, or float64 for float64 inputs: a scalar, or with "none" an array of the
        features' shape without the last axis, 0 at ignored positions. With statistics, a pair of the loss and
        `LogProbs`, which are constants: per position lse, argmax, entropy and, for labels, their log-probability.

    Edges: as in `cross_entropy`: a label out of range gives NaN, the mean is 0 if every position is ignored, and the
    features of an ignored position may be NaN. A bias of −inf masks a class as `where` does, with or without a soft
    cap: smoothing then spreads over the remaining classes.

    Differentiation: with respect to features, kernel, bias and distributions, in reverse and forward mode to any order.
    Without it there is one matmul per tile. In reverse mode a scalar loss computes its gradients together with the
    loss: three matmuls per tile, 6·N·D·V FLOPs, as in forward mode. "none" computes them in the backward pass, from
    recomputed logits: four matmuls, 8·N·D·V FLOPs. An input that is not differentiated saves the matmul of its
    gradient. The kernel's gradient is summed in float32, over devices too. Training takes memory for one tile, the
    gradients, and one or two temporaries of the kernel's size: see `plan_linear_cross_entropy`.

    Under `jax.vmap` over features (and targets and weights, if these are mapped), all examples share one loop over
    tiles, and their gradients are computed in the backward pass. A mapped layer, or `vmap` of a gradient, has one
    kernel gradient per example, and cannot be mapped over an axis that is sharded over an explicit mesh. Wrap the body
    of a `jax.lax.scan` or `jax.lax.map` in `jax.checkpoint`, or every step stores its gradients.

    Matmuls run in the wider dtype of features and kernel: to compute in bfloat16, cast both. Their
    sums and everything else are in float32.

    Sharded arrays under plain `jax.jit`: each device loops over its own positions. Explicit axes state the sharding in
    the types; for automatic axes `batch_axes` and `axis_name` do. In the loop only two numbers per position are summed
    over the blocks of a vocabulary. A kernel that is sharded over the positions' axes (fully sharded data parallelism)
    is gathered once and its gradient, in float32, reduced once; "mean" is over the positions of all devices. Without
    `batch_axes` on automatic axes the result is the same, but every device may compute all positions. JAX cannot
    differentiate a `shard_map` nested in another: in your own, name every axis that is used.

    Raises:
        TypeError: inputs that are not real numbers of 16 bits or more, targets of a wrong dtype, an option that is
            not a number.
        ValueError: shapes that do not fit, an option out of range, a budget below one position's logits and
            gradient, names that are not axes of the mesh, positions that cannot be split evenly over its devices.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxsoft import cross_entropy, linear_cross_entropy
        >>> x, w = jnp.linspace(-1, 1, 6).reshape(3, 2), jnp.linspace(-2, 1, 8).reshape(2, 4)
        >>> labels = jnp.array([0, 3, 1])
        >>> print(linear_cross_entropy(x, w, labels).round(4), cross_entropy(x @ w, labels).round(4))
        1.342 1.342

    Source: tiles with gradients computed in the forward pass, P.-L. Hsu et al., "Liger kernel" (2024);
    the memory argument, E. Wijmans et al., "Cut your losses in large-vocabulary language models" (2024);
    the soft cap, Gemma Team, "Gemma 2" (2024).
    """
    execution = Execution(kernel_axis, memory_budget, axis_name, batch_axes)
    args = check_head(features, kernel, bias, where, Scaling(soft_cap, temperature), execution)
    x = args.layer.features
    options = as_options(weights, class_weights, args.mask, label_smoothing, z_loss, compute_dtype(x.dtype))
    if options.weights is not None:  # `vmap` needs weights of all positions
        options = options._replace(weights=broadcast("weights", options.weights, x.shape[:-1]))
    checked, ignore_index = check_targets(targets, args.classes, options, ignore_index)
    has_labels = not isinstance(checked, SparseTargets) and checked.ndim < x.ndim
    head = loss_head(checked)
    config = args.config._replace(
        head=with_log_probs(head, has_labels) if with_statistics else head,
        averaging=Averaging(as_option("reduction", reduction, REDUCTIONS)),
        ignore_index=ignore_index,
    )
    loss, *constants = run_head(HeadArgs(args.layer, checked, options), config)
    if reduction == "none":
        loss = loss[..., 0]
    if not with_statistics:
        return loss
    *label, lse, entropy, argmax = (array[..., 0] for array in constants)
    return loss, LogProbs(label[0] if has_labels else None, lse, argmax, entropy)
