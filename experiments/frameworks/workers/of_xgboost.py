"""XGBoost: one tree for each class, by its own objective, and by jaxsoft's gradient with XGBoost's Hessian."""

import numpy as np
import xgboost
from exchange import work

OPTIONS = {
    "max_depth": 3,
    "eta": 0.5,
    "lambda": 1.0,
    "min_child_weight": 0,
    "tree_method": "exact",
    "nthread": 1,
    "disable_default_eval_metric": 1,
}


def data(case):
    x = np.float32(np.arange(len(case.logits)) % 2)[:, None]  # one split, because near ties would give other trees
    made = xgboost.DMatrix(x, label=case.labels, weight=case.weights)
    made.set_base_margin(case.logits)
    return made


def trees(case, **options):
    """The margins after one round by each objective."""
    classes, made = case.logits.shape[-1], data(case)
    own = xgboost.train({**OPTIONS, **options, "objective": "multi:softprob", "num_class": classes}, made, 1)

    def ours(margins, made):
        hessian = np.maximum(2 * case.probabilities * (1 - case.probabilities), 1e-16)
        weights = 1 if case.weights is None else case.weights[:, None]
        return case.gradient, weights * hessian

    theirs = xgboost.train({**OPTIONS, **options, "num_class": classes}, made, 1, obj=ours)
    return own.predict(made, output_margin=True), theirs.predict(made, output_margin=True)


def call(case):
    own, with_ours = trees(case)
    return own - with_ours, None


def metric(case):
    made, classes = data(case), case.logits.shape[-1]
    options = {**OPTIONS, "objective": "multi:softprob", "num_class": classes, "eval_metric": "mlogloss", "eta": 0.0}
    options.pop("disable_default_eval_metric")
    found = {}
    xgboost.train(options, made, 1, evals=[(made, "it")], evals_result=found, verbose_eval=False)
    return found["it"]["mlogloss"][-1], None


CALLS = {"multi:softprob with jaxsoft's gradient": call, "mlogloss": metric}
work(CALLS, "xgboost " + xgboost.__version__)
