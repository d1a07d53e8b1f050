"""Our estimators under scikit-learn's own checks and tools."""

import subprocess
import sys
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import sklearn
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.datasets import load_digits, make_classification
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from contrastive.evaluation import LinearProbe

DIGITS = tuple(part[:400] for part in load_digits(return_X_y=True))


def _not_meant(estimator):
    """Rows that are repeated draw another validation split than rows with a weight, as in any choice by validation."""
    reason = "the validation split is drawn from rows"
    return {} if estimator.C == 1.0 else {"check_sample_weight_equivalence_on_dense_data": reason}


# Not the default sweep: on separable toys it takes so large a C that probabilities round to 1, and a check wants the
# ranks of probabilities and decisions to be the same.
@pytest.mark.skipif(not hasattr(sklearn.utils, "Tags"), reason="tags of a class that is not scikit-learn's: 1.6")
@parametrize_with_checks([LinearProbe(1.0), LinearProbe([0.01, 1.0])], expected_failed_checks=_not_meant)
@pytest.mark.filterwarnings("ignore:probe. C. the best strength:UserWarning")
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def test_a_pipeline_standardises_before_the_probe():
    features, target = DIGITS
    pipeline = make_pipeline(StandardScaler(), LinearProbe(0.1)).fit(features, target)
    by_hand = StandardScaler().fit(features)
    direct = LinearProbe(0.1).fit(by_hand.transform(features), target)
    np.testing.assert_array_equal(pipeline.predict(features), direct.predict(by_hand.transform(features)))


def test_a_grid_search_finds_the_better_strength():
    features, target = DIGITS
    search = GridSearchCV(LinearProbe(), {"C": [1e-7, 1e-2]}, cv=3).fit(features, target)
    assert search.best_params_ == {"C": 1e-2}


def test_processes_of_joblib_give_what_one_gives():
    features, target = DIGITS
    together = Parallel(n_jobs=2)(delayed(LinearProbe(c).fit)(features, target) for c in (0.01, 0.1))
    for probe, strength in zip(together, (0.01, 0.1), strict=True):
        alone = LinearProbe(strength).fit(features, target)
        np.testing.assert_allclose(probe.predict_proba(features), alone.predict_proba(features), atol=1e-5)


def test_cross_validation_by_roc_auc_takes_the_decision_of_two_classes():
    features, target = DIGITS
    two = target < 2
    assert cross_val_score(LinearProbe(0.1), features[two], target[two], scoring="roc_auc", cv=3).min() > 0.99


def test_a_clone_has_the_parameters_and_nothing_learned():
    copy = clone(LinearProbe([1e-3, 0.1, 1e3], seed=3).fit(*DIGITS))
    assert copy.get_params() == LinearProbe([1e-3, 0.1, 1e3], seed=3).get_params()
    assert not hasattr(copy, "coef_")


def test_it_works_without_scikit_learn():
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import numpy as np\nfrom contrastive.evaluation import LinearProbe\n"
        "from contrastive.errors import UserError\n"
        "x = np.random.default_rng(0).normal(size=(20, 3))\n"
        "try: LinearProbe().predict(x)\nexcept UserError as error: print(error)\n"
        "print(LinearProbe(1.0).fit(x, x[:, 0] > 0).score(x, x[:, 0] > 0) > 0.8)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.splitlines() == ["LinearProbe: this estimator is not fitted yet; call fit first", "True"], run


def test_a_probe_in_the_middle_of_its_grid_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LinearProbe([1e-9, 1e-2, 1e4]).fit(*make_classification(400, 60, n_informative=4, flip_y=0.3, random_state=0))


@pytest.fixture(scope="module", autouse=True)
def no_processes_are_left() -> Iterator[None]:
    """joblib keeps its processes for the next call; other tests look for children that were left."""
    yield
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True)
