"""The frameworks, the packages of each, and each call with its options, jaxsoft's call, and why both differ."""

from typing import NamedTuple

from experiments.frameworks import ours
from experiments.frameworks.ours import Ours

LABELS = ("mean", "sum", "none")


class Variant(NamedTuple):
    """A call of a framework with the options that it takes, and the call of jaxsoft that equals it."""

    name: str
    takes: tuple[str, ...]
    ours: Ours
    differs: str = ""  # why value or gradient cannot be equal
    precision: str = ""  # if it differs from the logits' precision


class Framework(NamedTuple):
    """A framework that a worker runs."""

    name: str
    module: str  # imported to see whether the framework is installed
    packages: tuple[str, ...]
    worker: str
    dtype: str
    variants: tuple[Variant, ...]
    python: str = ""  # the version that an environment of its own needs
    environment: tuple[tuple[str, str], ...] = ()
    shares: str = ""  # the framework whose environment contains this one too
    build: str = ""  # the worker that builds a framework without a package, in a separate environment

    @property
    def home(self) -> str:
        return self.shares or self.name


WEIGHTED = ("class_weights", "smoothing", "images", *LABELS)
OLD = ("setuptools<60", "numpy<1.24")
P_MINUS_T = "the gradient is p − t, which is not the gradient of the value"
NO_GRADIENT = "it gives no gradient"
FRAMEWORKS = {
    framework.name: framework
    for framework in (
        Framework(
            "pytorch",
            "torch",
            ("torch==2.13.0", "numpy"),
            "of_torch.py",
            "float64",
            (
                Variant("F.cross_entropy, labels", ("minus_100", "class", *WEIGHTED), ours.as_pytorch),
                Variant("F.cross_entropy, probabilities", ("soft!", *WEIGHTED), ours.as_pytorch),
                Variant("F.nll_loss of F.log_softmax", ("mark", "class_weights", "images", *LABELS), ours.as_pytorch),
                Variant("F.kl_div, batchmean", ("soft!", "images"), ours.batchmean),
                Variant(
                    "F.linear_cross_entropy",
                    ("linear!", "minus_100", "class_weights", "smoothing", *LABELS),
                    ours.of_a_layer,
                ),
                Variant(
                    "F.linear_cross_entropy in chunks",
                    ("linear!", "minus_100", "class_weights", *LABELS),
                    ours.of_a_layer,
                ),
            ),
        ),
        Framework(
            "optax",
            "optax",
            ("optax", "jax"),
            "of_optax.py",
            "float64",
            (
                Variant("integer labels", ("images",), ours.each),
                Variant("integer labels, axis=1", ("images!",), ours.each),
                Variant("probabilities", ("soft!", "images"), ours.each),
                Variant("smooth_labels", ("smoothing!", "images"), ours.each),
                Variant("a mask, where(mask, loss, 0).sum() / mask.sum()", ("minus_1!", "images"), ours.masked),
                Variant("kl_divergence of log_softmax", ("soft!",), ours.divergence),
                Variant("safe_softmax_cross_entropy", ("soft!", "images"), ours.each),
                Variant("kl_divergence_with_log_targets of log_softmax", ("soft!",), ours.divergence),
            ),
        ),
        *(
            Framework(
                f"keras-{backend}",
                module,
                ("keras==3.15.1", package, "numpy"),
                "of_keras.py",
                "float32",
                (
                    Variant("SparseCategoricalCrossentropy", ("class", "weights", "images", *LABELS), ours.over_all),
                    Variant(
                        "SparseCategoricalCrossentropy, mean_with_sample_weight",
                        ("class", "weights", "images"),
                        ours.over_weights,
                    ),
                    Variant(
                        "CategoricalCrossentropy", ("soft!", "weights", "smoothing", "images", *LABELS), ours.over_all
                    ),
                    Variant(
                        "CategoricalCrossentropy, mean_with_sample_weight",
                        ("weights", "smoothing", "images"),
                        ours.over_weights,
                    ),
                    Variant("CategoricalCrossentropy, Σt ≠ 1", ("sums!",), ours.over_all, sums),
                    Variant(
                        "SparseCategoricalCrossentropy of probabilities",
                        ("small!", "class", "weights", "images", *LABELS),
                        ours.over_all,
                    ),
                    Variant(
                        "CategoricalCrossentropy of probabilities",
                        ("small!", "soft!", "weights", "smoothing", "images", *LABELS),
                        ours.over_all,
                    ),
                    *no_class,
                ),
                environment=(("KERAS_BACKEND", backend), ("TF_CPP_MIN_LOG_LEVEL", "3")),
                shares="" if backend == "jax" else "tensorflow",
            )
            for backend, module, package, sums, no_class in (
                (
                    "jax",
                    "keras",
                    "jax",
                    "",
                    [Variant("SparseCategoricalCrossentropy, a label that is no class", ("mark!",), ours.no_class)],
                ),
                ("tensorflow", "tensorflow", "tensorflow==2.21.0", P_MINUS_T, []),  # it brings Keras
            )
        ),
        Framework(
            "tensorflow",
            "tensorflow",
            ("tensorflow==2.21.0", "keras==3.15.1", "numpy"),
            "of_tensorflow.py",
            "float64",
            (
                Variant("tf.nn.sparse_softmax_cross_entropy_with_logits", ("images",), ours.each),
                Variant("tf.nn.softmax_cross_entropy_with_logits", ("soft!", "images"), ours.each),
                Variant("tf.nn.softmax_cross_entropy_with_logits, Σt ≠ 1", ("sums!",), ours.each, P_MINUS_T),
                Variant(
                    "v1.losses.sparse_softmax_cross_entropy",
                    ("zeros", "images", "mean", "sum"),
                    ours.by_nonzero_weights,
                    precision="float32",
                ),
                Variant(
                    "v1.losses.sparse_softmax_cross_entropy, MEAN",
                    ("zeros!", "images"),
                    ours.over_weights,
                    precision="float32",
                ),
                Variant("v1.losses.softmax_cross_entropy", ("smoothing",), ours.over_all, precision="float32"),
            ),
            environment=(("TF_CPP_MIN_LOG_LEVEL", "3"),),
        ),
        Framework(
            "paddlepaddle",
            "paddle",
            ("paddlepaddle==3.3.1", "numpy"),
            "of_paddle.py",
            "float64",
            (
                Variant("F.cross_entropy", ("class", "class_weights", "images", *LABELS), ours.as_pytorch),
                Variant(
                    "F.cross_entropy, ignore_index=-100",
                    ("minus_100!", "class_weights", "images", *LABELS),
                    ours.negative_ignored,
                ),
                Variant(
                    "F.cross_entropy, smoothing and an ignore_index that is a class",
                    ("class!", "smoothing!"),
                    ours.all_entries,
                    precision="float32",
                ),
                Variant("F.cross_entropy, soft_label", ("soft!", "class_weights", *LABELS), ours.weight_of_row),
                Variant("F.cross_entropy, soft_label, Σt ≠ 1", ("sums!",), ours.weight_of_row, P_MINUS_T),
                Variant("F.nll_loss of F.log_softmax", ("class_weights", *LABELS), ours.as_pytorch),
                Variant(
                    "F.cross_entropy, logits 100 apart",
                    ("far!",),
                    ours.as_pytorch,
                    "logits more than 64 below the largest are lifted; the gradient does not know",
                ),
            ),
        ),
        Framework(
            "mxnet",
            "mxnet",
            ("mxnet==1.9.1", *OLD),
            "of_mxnet.py",
            "float32",
            (
                Variant("gluon.loss.SoftmaxCELoss", ("weights", "images"), ours.of_examples),
                Variant("gluon.loss.SoftmaxCELoss, sparse_label=False", ("soft!", "images"), ours.of_examples),
                Variant("SoftmaxOutput, null", ("minus_1", "smoothing"), ours.output("null"), "it has no value"),
                Variant("SoftmaxOutput, batch", ("minus_1", "smoothing"), ours.output("batch"), "it has no value"),
                Variant("SoftmaxOutput, valid", ("minus_1!", "smoothing"), ours.output("valid"), "it has no value"),
                Variant("SoftmaxOutput, multi_output, null", ("images!",), ours.output("null"), "it has no value"),
                Variant(
                    "SoftmaxOutput, out_grad=True",
                    (),
                    ours.output("null"),
                    "(p − t) is multiplied by p, whatever gradient arrives",
                ),
            ),
            python="3.8",
        ),
        Framework(
            "chainer",
            "chainer",
            ("chainer==7.8.1", *OLD),
            "of_chainer.py",
            "float64",
            (
                Variant("labels", ("minus_1", "mark", "class_weights", "images", "mean", "none"), ours.chainers),
                Variant("labels, normalize=False", ("minus_1", "class_weights", "images", "sum"), ours.chainers),
                Variant("soft targets", ("soft!", "images", "mean", "none"), ours.chainers),
                Variant("soft targets, class_weight", ("soft!", "class_weights!", "mean", "none"), ours.chainers),
            ),
            python="3.8",
        ),
        Framework(
            "mlx",
            "mlx",
            ("mlx[cpu]==0.32.4", "numpy"),
            "of_mlx.py",
            "float32",
            (
                Variant("labels", ("weights", "smoothing", "images", *LABELS), ours.over_all),
                Variant("probabilities", ("soft!", "weights", "smoothing", "images", *LABELS), ours.over_all),
                Variant(
                    "probabilities, Σt ≠ 1",
                    ("sums!",),
                    ours.over_all,
                    "the value is lse − m − Σ t (z − m), m the largest logit; the gradient omits m",
                ),
            ),
        ),
        Framework(
            "tinygrad",
            "tinygrad",
            ("tinygrad==0.14.0", "numpy"),
            "of_tinygrad.py",
            "float32",
            (
                Variant("sparse_categorical_crossentropy", ("mark", "smoothing", *LABELS), ours.as_pytorch),
                Variant(
                    "sparse_categorical_crossentropy, rows of -1", ("minus_1!", "smoothing", *LABELS), ours.tinygrads
                ),
                Variant("cross_entropy", ("soft", "smoothing", *LABELS), ours.as_pytorch),
                Variant("nll_loss of log_softmax", ("mark", "class_weights", *LABELS), ours.as_pytorch),
            ),
            environment=(("DEV", "PYTHON"),),
        ),
        Framework(
            "mindspore",
            "mindspore",
            ("mindspore==2.10.0", "numpy"),
            "of_mindspore.py",
            "float32",
            (
                Variant(
                    "ops.cross_entropy, labels", ("minus_100", "class_weights", "smoothing", *LABELS), ours.as_pytorch
                ),
                Variant(
                    "ops.cross_entropy, probabilities",
                    ("soft!", "class_weights", "smoothing", *LABELS),
                    ours.as_pytorch,
                ),
                Variant("nn.SoftmaxCrossEntropyWithLogits", LABELS, ours.as_pytorch),
            ),
        ),
        Framework(
            "onnxruntime",
            "onnxruntime",
            ("onnxruntime==1.32.0", "onnx", "numpy"),
            "of_onnxruntime.py",
            "float32",
            tuple(
                Variant(name, ("mark", "class", "class_weights", "images", *LABELS), ours.as_pytorch, NO_GRADIENT)
                for call in ("SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss of LogSoftmax")
                for name in (call, f"{call}, onnx's reference")
            ),
        ),
        Framework(
            "nnabla",
            "nnabla",
            ("nnabla", "numpy"),
            "of_nnabla.py",
            "float32",
            (
                Variant("softmax_cross_entropy", ("images",), ours.each),
                Variant("softmax_cross_entropy, labels below 0", ("minus_100!",), ours.negatives_ignored),
                Variant("log_softmax", ("soft!", "images"), ours.each),
                Variant("categorical_cross_entropy of softmax", ("small!", "images"), ours.each),
            ),
            python="3.10",
        ),
        Framework(
            "thinc",
            "thinc",
            ("thinc", "numpy"),
            "of_thinc.py",
            "float32",
            tuple(
                Variant(
                    f"CategoricalCrossentropy.get_grad, {kind}",
                    takes,
                    ours.thincs,
                    "the loss that it reports is the sum of squared gradients",
                )
                for kind, takes in (
                    ("labels", ("smoothing", "mean", "sum")),
                    ("probabilities", ("soft!", "mean", "sum")),
                )
            ),
        ),
        Framework(
            "scikit-learn",
            "sklearn",
            ("scikit-learn==1.9.1", "numpy"),
            "of_sklearn.py",
            "float64",
            (
                Variant("log_loss", ("small!", "weights", "mean", "sum"), ours.over_weights_or_sum, NO_GRADIENT),
                Variant("the loss of LogisticRegression", ("weights",), ours.weighted_sum),
            ),
        ),
        Framework(
            "xgboost",
            "xgboost",
            ("xgboost==3.4.1", "numpy"),
            "of_xgboost.py",
            "float32",
            (
                Variant(
                    "multi:softprob with jaxsoft's gradient",
                    ("every!", "small!", "weights", "sum"),
                    ours.nothing_left,
                    "trees are compared",
                ),
                Variant("mlogloss", ("weights",), ours.over_weights, NO_GRADIENT),
            ),
            python="3.12",
        ),
        Framework(
            "lightgbm",
            "lightgbm",
            ("lightgbm==4.7.0", "numpy"),
            "of_lightgbm.py",
            "float32",
            (
                Variant(
                    "multiclass with jaxsoft's gradient",
                    ("every!", "small!", "weights", "sum"),
                    ours.nothing_left,
                    "trees are compared",
                ),
            ),
            python="3.12",
        ),
        Framework(
            "catboost",
            "catboost",
            ("catboost==1.2.10", "numpy"),
            "of_catboost.py",
            "float64",
            (
                Variant(
                    "MultiClass with jaxsoft's gradient", ("every!", "sum"), ours.nothing_left, "trees are compared"
                ),
            ),
            python="3.12",
        ),
        Framework(
            "caffe",
            "caffe",
            ("numpy",),
            "of_caffe.py",
            "float64",
            (
                *(
                    Variant(f"SoftmaxWithLoss, {normalization}", ("minus_1", "images"), ours.caffes(normalization))
                    for normalization in ("VALID", "FULL", "BATCH_SIZE", "NONE")
                ),
                Variant("SoftmaxWithLoss, logits 100 apart", ("far!", "minus_1"), ours.caffes("VALID")),
                Variant("MultinomialLogisticLoss of Softmax", ("small!",), ours.as_pytorch),
            ),
            build="build_caffe.py",
        ),
        Framework(
            "liger",
            "liger_kernel",
            ("liger-kernel==0.8.5", "torch==2.13.0", "packaging", "numpy"),
            "of_liger.py",
            "float32",
            (
                Variant(
                    "LigerCrossEntropyLoss",
                    ("minus_100", "class_weights", "smoothing", "z_loss", "soft_cap", *LABELS),
                    ours.of_a_layer,
                ),
                Variant(
                    "LigerFusedLinearCrossEntropyLoss",
                    ("linear!", "minus_100", "class_weights", "smoothing", "z_loss", "soft_cap", *LABELS),
                    ours.of_a_layer,
                ),
            ),
        ),
        Framework(
            "trl",
            "trl",
            ("trl", "torch==2.13.0", "numpy"),
            "of_trl.py",
            "float64",
            (
                Variant("selective_log_softmax", (), ours.log_probability),
                Variant("entropy_from_logits", (), ours.entropies),
                Variant(
                    "transformers' ForCausalLMLoss", ("minus_100", "mean", "sum"), ours.causal, precision="float32"
                ),
            ),
        ),
    )
}
# Frameworks that cannot run here, as far as a search showed, and why.
NOT_RUN = {
    "megengine, oneflow, jittor, cntk, theano": "no release of them installs with the Pythons at hand",
}
