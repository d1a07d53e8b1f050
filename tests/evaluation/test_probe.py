import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.datasets import load_digits, make_classification
from sklearn.linear_model import LogisticRegression

from contrastive.errors import UserError
from contrastive.evaluation import LinearProbe


def problem(samples=300, dim=20, classes=4, seed=0):
    return make_classification(
        samples, dim, n_informative=8, n_redundant=4, n_classes=classes, random_state=seed, class_sep=0.7
    )


def objective(coef, intercept, features, target, strength):
    logits = features @ coef.T + intercept
    log_sum = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    return strength * (log_sum - logits[np.arange(len(target)), target]).sum() + 0.5 * (coef**2).sum()


@pytest.mark.parametrize("strength", [1e-3, 1.0, 1e2])
@pytest.mark.parametrize("dim", [20, 400], ids=["more samples", "more features"])
def test_the_solution_is_scikit_learns(strength, dim):
    features, target = problem(dim=dim)
    ours = LinearProbe(strength, tol=1e-14, max_iter=20_000).fit(features, target)
    theirs = LogisticRegression(C=strength, tol=1e-10, max_iter=100_000).fit(features, target)
    np.testing.assert_allclose(ours.predict_proba(features), theirs.predict_proba(features), atol=2e-4)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=2e-3 * np.abs(theirs.coef_).max())
    values = [objective(p.coef_, p.intercept_, features, target, strength) for p in (ours, theirs)]
    assert values[0] <= values[1] * (1 + 1e-7)


def test_the_default_tolerance_ends_within_a_thousandth_of_the_optimum():
    features, target = load_digits(return_X_y=True)
    rough = LinearProbe(0.01).fit(features, target)
    exact = LinearProbe(0.01, tol=1e-14, max_iter=20_000).fit(features, target)
    values = [objective(p.coef_, p.intercept_, features, target, 0.01) for p in (rough, exact)]
    assert values[1] <= values[0] <= values[1] * 1.001


def test_features_far_from_the_origin_leave_the_optimum_where_it_is():
    features, target = problem()
    near = LinearProbe(1.0, tol=1e-13).fit(features, target)
    far = LinearProbe(1.0, tol=1e-13).fit(features + 1000, target)
    np.testing.assert_allclose(near.coef_, far.coef_, atol=1e-4)


def test_two_classes_are_scikit_learns_at_twice_the_strength():
    """Weights w/2 and -w/2 have half the penalty of the one vector w that scikit-learn takes."""
    features, target = problem(classes=2)
    names = np.array(["cat", "dog"])[target]
    probe = LinearProbe(1.0, tol=1e-14).fit(features, names)
    assert probe.coef_.shape == (2, 20) and probe.classes_.tolist() == ["cat", "dog"]
    theirs = LogisticRegression(C=2.0, tol=1e-10).fit(features, names)
    np.testing.assert_allclose(probe.predict_proba(features), theirs.predict_proba(features), atol=1e-4)


def test_score_is_the_share_of_right_predictions():
    features, target = problem()
    probe = LinearProbe(1.0).fit(features, target)
    assert probe.score(features, target) == (probe.predict_proba(features).argmax(axis=1) == target).mean()


def test_the_sweep_finds_a_strength_as_good_as_an_exhaustive_one():
    features, target = problem(400, 60)
    test_features, test_target = features[250:], target[250:]
    swept = LinearProbe(validation=0.2).fit(features[:250], target[:250])
    scores = [
        LogisticRegression(C=c, max_iter=5000).fit(features[:250], target[:250]).score(test_features, test_target)
        for c in np.logspace(-4, 3, 15)
    ]
    assert swept.score(test_features, test_target) >= max(scores) - 0.05
    assert dict(swept.validation_curve_)[swept.C_] == max(accuracy for _, accuracy in swept.validation_curve_)


def test_of_equally_accurate_strengths_a_confident_one_is_chosen():
    features = np.concatenate([np.full((30, 4), -1.0), np.full((30, 4), 1.0)])
    probe = LinearProbe().fit(features, ["a"] * 30 + ["b"] * 30)
    assert probe.predict_proba(features).max(axis=1).min() > 0.9


def test_a_grid_is_tried_whole_and_refitted_to_all_samples():
    features, target = problem()
    probe = LinearProbe([1.0, 0.01, 100.0], tol=1e-13).fit(features, target)
    assert [c for c, _ in probe.validation_curve_] == [0.01, 1.0, 100.0]
    again = LinearProbe(probe.C_, tol=1e-13).fit(features, target)
    np.testing.assert_allclose(probe.predict_proba(features), again.predict_proba(features), atol=1e-4)


def test_the_validation_split_is_a_share_of_every_class():
    from contrastive.evaluation.probe import _split

    target = np.repeat([0, 1, 2], [100, 20, 1])
    fitted, held = _split(target, 0.15, seed=0)
    assert np.bincount(target[held], minlength=3).tolist() == [15, 3, 0]
    assert sorted([*fitted, *held]) == list(range(121))


def test_saved_and_loaded_it_predicts_the_same(tmp_path):
    features, target = problem()
    probe = LinearProbe([0.1, 1.0]).fit(features, np.array(["a", "b", "c", "d"])[target])
    probe.save(tmp_path / "new" / "probe.safetensors", model="somewhere", features="tower")
    loaded = LinearProbe.load(tmp_path / "new" / "probe.safetensors")
    # the weights are the same bits; a product on several threads may round its last one differently
    np.testing.assert_array_equal(loaded.coef_, probe.coef_)
    np.testing.assert_allclose(loaded.predict_proba(features), probe.predict_proba(features), rtol=1e-12)
    assert loaded.predict(features).tolist() == probe.predict(features).tolist()
    assert loaded.C_ == probe.C_ and loaded.validation_curve_ == probe.validation_curve_
    assert loaded.metadata_ == {"model": "somewhere", "features": "tower"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, np.zeros_like(y)), "two classes"),
        (lambda x, y: (np.where(np.arange(len(x))[:, None] == 7, np.nan, x), y), "row 7"),
        (lambda x, y: (x[:-1], y), "299 feature rows but 300 labels"),
        (lambda x, y: (x[:, 0], y), "shape"),
    ],
)
def test_input_that_cannot_be_fitted_is_told(change, message):
    with pytest.raises(UserError, match=message):
        LinearProbe(1.0).fit(*change(*problem()))


@pytest.mark.parametrize("strength", [0, -1.0, float("nan"), [1.0, -2.0], []])
def test_a_strength_must_be_positive(strength):
    with pytest.raises(UserError, match="C"):
        LinearProbe(strength).fit(*problem())


def test_another_width_is_told():
    features, target = problem()
    with pytest.raises(UserError, match=r"19 features.*expecting 20"):
        LinearProbe(1.0).fit(features, target).predict(features[:, :19])


def test_a_file_that_is_no_probe_is_told(tmp_path):
    save_file({"coef": np.zeros((2, 2))}, str(tmp_path / "other.safetensors"))
    (tmp_path / "text.safetensors").write_text("hello")
    for name, message in (("other", "not a probe"), ("text", "not a probe"), ("none", "no such file")):
        with pytest.raises(UserError, match=message):
            LinearProbe.load(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("grid", [np.array([0.01, 1.0]), (0.01, 1.0)], ids=["array", "tuple"])
def test_a_grid_is_what_is_tried(grid):
    probe = LinearProbe(grid).fit(*problem())
    assert [strength for strength, _ in probe.validation_curve_] == [0.01, 1.0]
    assert LinearProbe(np.float32(0.5)).fit(*problem()).C_ == 0.5
