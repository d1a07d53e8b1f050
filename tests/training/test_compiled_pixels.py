"""When a run has its pixels made by compiled code, and what it says when it cannot."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from contrastive.build import uses_compiled
from contrastive.errors import UserError
from contrastive.pretrain import pretrain
from contrastive.shards import compiled, why_not_compiled

needs_compiler = pytest.mark.skipif(why_not_compiled() is not None, reason=f"{why_not_compiled()}")
NO_COLORS = ["data.augment.color=0", "data.augment.grayscale=0", "data.augment.tint=0"]


@pytest.mark.parametrize(
    ("options", "used"),
    [
        (["data.cache=pixels", *NO_COLORS], True),
        (["data.cache=pixels", "data.augment.rotate=10", *NO_COLORS], False),
        (["data.cache=pixels", "data.augment.rotate=10", "data.augment.color=0.1"], True),
        (["data.augment.color=0.1"], True),
        (NO_COLORS, False),
        (["data.cache=pixels", "data.compiled=false"], False),
    ],
)
def test_compiled_code_is_used_where_it_has_something_to_do(make_config, monkeypatch, options, used):
    monkeypatch.setattr("contrastive.builders.data.why_not_compiled", lambda: None)
    assert uses_compiled(make_config(*options)) == used


def test_a_run_that_cannot_have_it_says_why_and_goes_on(make_config, monkeypatch, capsys):
    for place in ("contrastive.builders.data", "contrastive.pretrain"):
        monkeypatch.setattr(f"{place}.why_not_compiled", lambda: "no C compiler on PATH (cc)")
    monkeypatch.setattr("contrastive.shards.loader.shape_cached", lambda *_: pytest.fail("used all the same"))
    assert pretrain(make_config("data.cache=pixels")) is not None
    said = capsys.readouterr().out
    assert "loader  makes pixels without compiled code, slower: no C compiler on PATH (cc)\n" in said


def test_a_run_that_insists_is_refused(make_config, monkeypatch):
    monkeypatch.setattr(compiled, "why_not_compiled", lambda: "no C compiler on PATH (cc)")
    config = make_config("data.cache=pixels", "data.compiled=true")
    with pytest.raises(UserError, match="data.compiled true: no C compiler"):
        pretrain(config, quiet=True)
    assert not Path(config.run.dir).exists()


@needs_compiler
def test_a_run_with_it_ends_with_the_weights_of_one_without(make_config, tmp_path, monkeypatch):
    calls, shape = [], compiled.shape_cached
    monkeypatch.setattr("contrastive.shards.loader.shape_cached", lambda *given: (calls.append(1), shape(*given)))
    ends = []
    for choice in ("true", "false"):
        options = ["data.cache=pixels", "data.augment.color=0.3", f"data.compiled={choice}", "data.workers=0"]
        config = make_config(*options, f"run.dir={tmp_path}/{choice}", "data.validation=null")
        pretrain(config, quiet=True)
        ends.append(load_file(max((Path(config.run.dir) / "checkpoints").glob("step_*")) / "model.safetensors"))
        assert len(calls) == config.train.steps
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
