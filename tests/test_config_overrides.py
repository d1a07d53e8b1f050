"""Values on the command line: text as it stands where a key takes text, YAML where it does not; paths at home."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.config import Config, dump_yaml, load_config
from contrastive.errors import UserError

FEW = settings(max_examples=40, deadline=None)
TEXT_KEYS = ["run.dir", "data.train", "data.validation", "data.features", "model.image.weights", "model.tokenizer.path"]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    path = tmp_path_factory.mktemp("overrides") / "mine.yaml"

    def load(*overrides: str, text: str = "data: {train: shards}\ntrain: {epochs: 1}\n") -> Config:
        path.write_text(text)
        return load_config(path, overrides)

    return load


def value_of(config: Config, key: str):
    for name in key.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("key", TEXT_KEYS)
@pytest.mark.parametrize("text", ["out/exp #3", "a: b", "- a", "1e-3", "007", "true", "*star", "&x", "!y", "a,b",
                                  "100%", "it's", 'a"b"', "a # b",
                                  "#1", "2026-13-45", "é ü", "'a' 'b'", "null/x", "@x", "`x`",
                                  "x\ny"])  # fmt: skip
def test_text_is_taken_as_it_stands(load, key, text):
    needs = ["loss={kind: distillation, teacher: t}"] if key == "data.features" else []
    assert value_of(load(f"{key}={text}", *needs), key) == text


@FEW
@given(st.text(min_size=1, alphabet=st.characters(codec="utf-8", exclude_characters="\0")))
def test_any_text_is_taken_as_it_stands(load, text):
    plain = text == text.strip() and text[0] not in "~'\"" and text not in ("null", "Null", "NULL")
    if plain:
        assert load(f"run.dir={text}").run.dir == text


def test_the_run_in_a_folder_of_a_shorter_name_is_not_meant(load):
    assert load("run.dir=runs/exp #3").run.dir == "runs/exp #3"
    assert load("model.kind=open_clip", "model.name=a #3").model.name == "a #3"
    assert load("model.kind=folder", "model.path=a #3").model.path == "a #3"
    assert load("loss.kind=distillation", "loss.teacher=a #3").loss.teacher == "a #3"


@pytest.mark.parametrize(("text", "value"), [("'null'", "null"), ('"a b"', "a b"), ("'it''s'", "it's"), ("''", "")])
def test_quotes_are_those_of_a_recipe(load, text, value):
    assert load(f"data.validation={text}").data.validation == value


@pytest.mark.parametrize("text", ["null", ""])
def test_null_stays_null_where_a_text_may_be_missing(load, text):
    assert (
        load(f"data.validation={text}", text="data: {train: a, validation: b}\ntrain: {steps: 1}").data.validation
        is None
    )


def test_what_is_not_text_is_yaml(load):
    config = load("data.train={a: 1, b: 2}", "eval.labelled=[]", "data.cache=none", "optim.ema=null",
                  "optim.warmup=3%", "data.window=null", "data.compiled=false", "track.with=[tensorboard]")  # fmt: skip
    assert config.data.train == {"a": 1, "b": 2} and config.data.cache == "none" and config.data.window is None
    assert config.optim.warmup == "3%" and config.data.compiled is False and config.optim.ema is None


@pytest.mark.parametrize("override", [
    "optim.lr=3e-4 # higher", "data.train={a: 1} # b", "train.steps=10 #0", "eval.labelled=[] # none", 
    "data.cache=none #", "data.window=4\n# c", "no.such.key=1 # x", "loss={kind: infonce} #", "optim.warmup=5% # of it",
])  # fmt: skip
def test_a_comment_in_a_value_is_refused(load, override):
    with pytest.raises(UserError, match="'#' begins a comment in it"):
        load(override)


def test_a_number_sign_that_is_no_comment_is_kept(load):
    config = load("data.train={a#b: 1, 'c #d': 2}", "model.image.kwargs={a: 'x # y'}")
    assert config.data.train == {"a#b": 1, "c #d": 2} and config.model.image.kwargs == {"a": "x # y"}


@pytest.mark.parametrize("override", ["run.dir= x", "run.dir=x ", "run.dir=~", "data.validation=~"])
def test_a_value_that_could_mean_two_things_is_refused(load, override):
    with pytest.raises(UserError, match="begins or ends with a blank|null in a recipe and the home folder"):
        load(override)


HOMES = {
    "run.dir": "run: {dir: ~/x}\ndata: {train: a}\ntrain: {steps: 1}",
    "data.train": "data: {train: ~/x}\ntrain: {steps: 1}",
    "data.validation": "data: {train: a, validation: ~/x}\ntrain: {steps: 1}",
    "data.features": "loss: {kind: distillation, teacher: t}\ndata: {train: a, features: ~/x}\ntrain: {steps: 1}",
    "model.image.weights": "model: {image: {weights: ~/x}}\ndata: {train: a}\ntrain: {steps: 1}",
    "model.tokenizer.path": "model: {tokenizer: {path: ~/x}}\ndata: {train: a}\ntrain: {steps: 1}",
    "loss.teacher": "loss: {kind: distillation, teacher: ~/x}\ndata: {train: a}\ntrain: {steps: 1}",
    "model.path": "model: {kind: folder, path: ~/x}\ndata: {train: a}\ntrain: {steps: 1}",
    "model.name": "model: {kind: open_clip, name: ~/x}\ndata: {train: a}\ntrain: {steps: 1}",
    "model.pretrained": "model: {kind: open_clip, name: a, pretrained: ~/x}\ndata: {train: a}\ntrain: {steps: 1}",
}


@pytest.mark.parametrize("key", HOMES)
def test_a_path_at_home_is_the_same_in_a_recipe_and_on_the_command_line(load, key, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/me")
    assert value_of(load(text=HOMES[key]), key) == "/home/of/me/x"
    assert value_of(load(f"{key}=~/y", text=HOMES[key]), key) == "/home/of/me/y"


def test_every_path_of_a_labelled_set_and_of_a_mixture_may_be_at_home(load, monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    config = load("data.train={~/a: 1, b: 2}", "eval.labelled=[{name: n, train: ~/t, test: ~/e, templates: ~/f}]")
    assert config.data.train == {"/h/a": 1, "b": 2}
    labelled = config.eval.labelled[0]
    assert (labelled.train, labelled.test, labelled.templates) == ("/h/t", "/h/e", "/h/f")


def test_the_home_of_no_user_is_refused_with_the_way_to_write_such_a_folder(load):
    with pytest.raises(UserError, match=r"run.dir: .*no user has that name.*written \./~nobody-of-that-name"):
        load("run.dir=~nobody-of-that-name")
    assert load("run.dir=./~nobody-of-that-name").run.dir == "./~nobody-of-that-name"


def test_a_path_at_home_is_written_whole(load, tmp_path):
    config = load("run.dir=~/x")
    assert config.run.dir == os.path.expanduser("~/x")
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_every_key_that_names_a_file_is_one_of_a_path(load):
    """A new key of that kind must have the type that takes ~."""
    from contrastive.config.block import at_home, fields_of, models_in
    from contrastive.config.losses import CustomLossConfig

    found, models = set(), [Config]
    while models:
        model = models.pop()
        for name, field in fields_of(model).items():
            models += models_in(field.annotation)
            words = f"{field.description}".lower()
            about_files = any(word in words for word in ("folder", "file", "json", "split"))
            if about_files and "str" in str(field.annotation) and model is not CustomLossConfig:
                found.add(name)
                assert "at_home" in str((field.annotation, field.metadata)) or name == "train", (model, name)
    assert {"dir", "path", "weights", "validation", "features"} <= found and at_home("x") == "x"
    assert Path(at_home("~")).is_absolute()
