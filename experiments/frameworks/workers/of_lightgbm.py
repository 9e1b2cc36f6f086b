"""LightGBM: one tree for each class, by its own objective, and by jaxsoft's gradient with LightGBM's Hessian."""

import lightgbm
import numpy as np
from exchange import work

OPTIONS = {
    "num_leaves": 4,
    "min_data_in_leaf": 1,
    "min_sum_hessian_in_leaf": 0,
    "feature_pre_filter": False,
    "min_data_in_bin": 1,
    "learning_rate": 0.5,
    "verbosity": -1,
    "num_threads": 1,
}


def margins(case, objective):
    classes = case.logits.shape[-1]
    x = np.float64(np.arange(len(case.logits)) % 2)[:, None]  # one split, because near ties would give other trees
    made = lightgbm.Dataset(x, case.labels, weight=case.weights, init_score=case.logits.ravel(order="F"))
    options = {**OPTIONS, "num_class": classes, "objective": objective, "boost_from_average": False}
    return lightgbm.train(options, made, 1).predict(x, raw_score=True)


def call(case):
    def ours(scores, made):
        k = case.logits.shape[-1]
        p = case.probabilities
        weights = 1 if case.weights is None else case.weights[:, None]
        return case.gradient, weights * k / (k - 1) * p * (1 - p)

    own = margins(case, "multiclass")
    return (own - margins(case, ours)) / max(1, np.abs(own).max()), None


CALLS = {"multiclass with jaxsoft's gradient": call}
work(CALLS, "lightgbm " + lightgbm.__version__)
