import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.datasets import load_digits, make_classification, make_multilabel_classification
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from contrastive.errors import UserError
from contrastive.evaluation import LinearProbe, probe_with_controls
from contrastive.evaluation.controls import _parts


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


def test_the_default_tolerance_ends_within_a_millionth_of_the_optimum():
    features, target = load_digits(return_X_y=True)
    rough = LinearProbe(0.01).fit(features, target)
    exact = LinearProbe(0.01, tol=1e-14, max_iter=20_000).fit(features, target)
    values = [objective(p.coef_, p.intercept_, features, target, 0.01) for p in (rough, exact)]
    assert values[1] <= values[0] <= values[1] * (1 + 1e-6)


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


def test_clips_preset_is_96_strengths_over_twelve_decades():
    features, target = problem(120, 14)
    curve = LinearProbe("clip").fit(features, target).validation_curve_
    np.testing.assert_allclose([c for c, _ in curve], np.logspace(-6, 6, 96))


def test_dinov2s_preset_is_45_strengths_over_eleven_decades():
    features, target = problem(120, 14)
    curve = LinearProbe("dinov2").fit(features, target).validation_curve_
    np.testing.assert_allclose([c for c, _ in curve], np.logspace(-6, 5, 45))


@pytest.mark.filterwarnings("ignore")
def test_the_curve_is_what_scikit_learn_measures_on_the_validation_part():
    from sklearn.metrics import log_loss

    from contrastive.evaluation.probe import _split

    features, target = problem()
    fitted, held = _split(target, 0.15, seed=0)
    for entry in LinearProbe([1e-3, 0.1, 10.0]).fit(features, target).curve_:
        oracle = LogisticRegression(C=entry["C"], tol=1e-8, max_iter=20_000).fit(features[fitted], target[fitted])
        assert entry["accuracy"] == pytest.approx(oracle.score(features[held], target[held]), abs=1e-9)
        expected = log_loss(target[held], oracle.predict_proba(features[held]))
        assert entry["cross_entropy"] == pytest.approx(expected, rel=1e-2)


def test_a_best_strength_at_the_border_is_warned_of():
    features, target = load_digits(return_X_y=True)
    with pytest.warns(UserWarning, match="is the largest that was tried"):
        LinearProbe([1e-12, 1e-6]).fit(features[:300], target[:300])


def test_a_fit_that_ends_early_says_so():
    with pytest.warns(UserWarning, match="3 iterations end within"):
        LinearProbe(1.0, max_iter=3).fit(*problem())


def test_an_unknown_preset_is_told():
    with pytest.raises(UserError, match="'clap' is unknown; use clip, dinov2, default"):
        LinearProbe("clap").fit(*problem())


def test_the_norm_of_the_gradient_is_that_of_the_objective():
    features, target = problem()
    probe = LinearProbe(1.0).fit(features, target)
    residual = probe.predict_proba(features) - np.eye(4)[target]
    centred = features - features.mean(axis=0)
    slope = np.column_stack([residual.T @ centred + probe.coef_, residual.sum(axis=0)])
    assert probe.kkt_ == pytest.approx(np.linalg.norm(slope), rel=1e-3)


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_several_labels_a_sample_are_one_against_the_rest(strength):
    features, target = make_multilabel_classification(200, 10, n_classes=4, random_state=0)
    probe = LinearProbe(strength, tol=1e-12).fit(features, target)
    oracle = OneVsRestClassifier(LogisticRegression(C=strength, tol=1e-10, max_iter=20_000)).fit(features, target)
    np.testing.assert_allclose(probe.predict_proba(features), oracle.predict_proba(features), atol=1e-4)
    np.testing.assert_array_equal(probe.predict(features), oracle.predict(features))
    assert probe.score(features, target) == pytest.approx(oracle.score(features, target))


def test_several_labels_choose_the_strength_by_cross_entropy():
    features, target = make_multilabel_classification(200, 10, n_classes=4, random_state=0)
    probe = LinearProbe([1e-6, 1e-3, 1e-1]).fit(features, target)
    by_loss = min(probe.curve_, key=lambda entry: entry["cross_entropy"])["C"]
    assert probe.C_ == by_loss


def test_a_label_column_of_one_value_is_told():
    features, target = make_multilabel_classification(50, 5, n_classes=3, random_state=0)
    target[:, 1] = 1
    with pytest.raises(UserError, match="label column 1 is 1 for all 50 samples"):
        LinearProbe(1.0).fit(features, target)


def test_several_labels_survive_the_file(tmp_path):
    features, target = make_multilabel_classification(100, 5, n_classes=3, random_state=0)
    probe = LinearProbe(0.1).fit(features, target)
    probe.save(tmp_path / "probe.safetensors")
    loaded = LinearProbe.load(tmp_path / "probe.safetensors")
    np.testing.assert_array_equal(loaded.predict(features), probe.predict(features))
    assert loaded.kkt_ == probe.kkt_


def test_one_sample_a_class_leaves_no_choice_of_strength():
    with pytest.raises(UserError, match="give C as a number"):
        LinearProbe().fit(np.eye(4), ["a", "b", "c", "d"])


def test_parts_of_the_training_set_are_nested_and_measured(model, labelled):
    results = probe_with_controls(model, labelled, labelled, C=1.0, partial=(1.0, 0.01, 0.3)).results
    assert [(part["share"], part["samples"]) for part in results["partial"]] == [(0.01, 8), (0.3, 16), (1.0, 48)]
    whole = results["partial"][-1]
    assert (whole["top1"], whole["C"]) == (results["model"]["top1"], 1.0)
    labels = np.repeat(["a", "b"], [100, 3])
    small, large = (set(rows) for _, rows in _parts(labels, [0.05, 0.5], seed=0))
    assert small < large and (len(small), len(large)) == (7, 52)


def test_the_commonest_class_is_a_control(model, labelled):
    results = probe_with_controls(model, labelled, labelled, C=1.0).results
    assert results["majority"] == {"value": 0.25}


@pytest.mark.parametrize("share", [0, 1.5, -0.1])
def test_a_share_of_the_training_set_is_between_0_and_1(model, labelled, share):
    with pytest.raises(UserError, match="partial"):
        probe_with_controls(model, labelled, labelled, C=1.0, partial=[share])
