"""The probe: the same pairs whatever the run, and no trace in the run."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from contrastive.build import build_model, build_probe
from contrastive.losses import infonce
from contrastive.pretrain import pretrain
from contrastive.shards import open_index
from contrastive.training import read_metrics

BATCH_NORM = ["model.image.name=resnet18", "model.image.kwargs={layers: [1, 1, 1, 1], channels: [16, 16, 16, 16]}"]
OWN = ["model.tokenizer.kind=open_clip", "model.tokenizer.context=8"]


def probe_of(config):
    model = build_model(config).train()
    return model, build_probe(config, model, open_index(config.data.validation))


def rows(config) -> list[dict[str, float]]:
    found = read_metrics(Path(config.run.dir) / "metrics.jsonl")
    names = ("step", "probe/loss", "probe/accuracy")
    return [{name: row[name] for name in names} for row in found if "probe/loss" in row]


def weights(config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.run.dir) / "model" / "model.safetensors")


def test_the_loss_is_infonce_over_its_pairs_with_equal_captions_left_out(make_config):
    model, probe = probe_of(make_config(*OWN, "track.probe=24"))
    ids = probe.ids.clone()
    probe.ids[:4] = ids[0]  # captions that are equal
    found = probe(model)
    model.eval()
    with torch.no_grad():
        out = model(probe.pixels, probe.tokens)
        expected = infonce(out["image"], out["text"], out["scale"], ids=probe.ids, same_caption="ignore")
        logits = out["image"] @ out["text"].T
    assert found["probe/loss"] == pytest.approx(float(expected["loss"]), rel=1e-5)
    right = 0
    for i in range(24):
        others = [j for j in range(24) if j != i and probe.ids[j] != probe.ids[i]]
        right += float(logits[i, i]) > max(float(logits[i, j]) for j in others)
        right += float(logits[i, i]) > max(float(logits[j, i]) for j in others)
    assert found["probe/accuracy"] == pytest.approx(right / 48)


def test_pairs_with_an_equal_image_are_left_out_as_well(make_config):
    model, probe = probe_of(make_config(*OWN, "track.probe=24"))
    probe.ids = torch.stack([probe.ids, torch.arange(24) // 2], dim=1)
    found = probe(model)
    model.eval()
    with torch.no_grad():
        out = model(probe.pixels, probe.tokens)
        expected = infonce(out["image"], out["text"], out["scale"], ids=probe.ids, same_caption="ignore", tile=None)
    assert found["probe/loss"] == pytest.approx(float(expected["loss"]), rel=1e-5)


def test_its_pairs_depend_neither_on_the_seed_nor_on_the_batch_nor_on_augmentation(make_config):
    _, one = probe_of(make_config(*OWN, "track.probe=24"))
    _, other = probe_of(
        make_config(*OWN, "track.probe=24", "run.seed=7", "train.global_batch=8", "data.augment.crop=[1, 1]")
    )
    assert torch.equal(one.ids, other.ids) and torch.equal(one.pixels, other.pixels)
    assert torch.equal(one.tokens, other.tokens)


def test_no_more_pairs_than_there_are_and_none_without_validation_or_where_it_is_not_wanted(make_config):
    config = make_config(*OWN)
    model, probe = probe_of(config)
    assert len(probe.ids) == 40
    assert build_probe(config, model, None) is None
    assert probe_of(make_config(*OWN, "track.probe=null"))[1] is None


@pytest.mark.parametrize("options", [[], BATCH_NORM], ids=["dropout", "batch normalisation"])
def test_a_run_is_bit_for_bit_the_run_without_it(make_config, tmp_path, options):
    runs = [make_config(*options, f"track.{way}", f"run.dir={tmp_path}/{i}/run") for i, way in
            enumerate(["probe_every=1", "probe=null"])]  # fmt: skip
    for config in runs:
        pretrain(config, quiet=True)
    assert len(rows(runs[0])) == 8 and not rows(runs[1])
    one, other = map(weights, runs)
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_resumed_run_logs_the_same_loss(make_config, tmp_path):
    whole, parts = (make_config("track.probe_every=2", f"run.dir={tmp_path}/{name}/run") for name in ("whole", "parts"))
    pretrain(whole, quiet=True)
    pretrain(parts, quiet=True, stop_after=3)
    pretrain(parts, quiet=True, resume=True)
    assert [row["step"] for row in rows(whole)] == [2, 4, 6, 8]
    assert rows(parts) == rows(whole)


def test_features_that_know_nothing_have_the_loss_of_chance(make_config):
    model, probe = probe_of(make_config(*OWN, "track.probe=16"))
    with torch.no_grad():
        for parameter in model.text.parameters():
            parameter.fill_(0.1)  # every caption is the same
        model.logit_scale.fill_(0.0)
    same = (probe.ids[:, None] == probe.ids[None, :]).sum(dim=1)
    expected = sum(math.log(len(same) - int(n) + 1) for n in same) / len(same)
    assert probe(model)["probe/loss"] == pytest.approx(expected, rel=0.05)
