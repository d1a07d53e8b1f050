"""Plans of whole recipes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from contrastive.build import build_data, build_model
from contrastive.config import Config, load_config
from contrastive.errors import UserError
from contrastive.models import train_tokenizer
from contrastive.plan.cards import GIB
from contrastive.plan.recipe import Choices, Plan, make_plan
from contrastive.plan.report import as_json, lines, remedies
from tests.tiny import tiny_config, write_corpus

VIT = Path(__file__).resolve().parents[2] / "recipes" / "pretrain" / "vit-b-32.yaml"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("plan") / "corpus")


def plan(corpus: Path, *overrides: str, **choices: object) -> Plan:
    settings = {"gpu": "h100", **choices}
    return make_plan(tiny_config(corpus, corpus / "run", *overrides), Choices(**settings))  # type: ignore[arg-type]


def model_of(config: Config) -> nn.Module:
    trained = train_tokenizer(build_data(config).captions(), 300).to_str()
    return build_model(config, trained)


def test_parameters_are_those_of_the_model_that_will_train(corpus: Path) -> None:
    model = model_of(tiny_config(corpus, corpus / "run"))
    found = plan(corpus).job.network
    assert found.parameters == found.learned == sum(p.numel() for p in model.parameters())


def test_a_locked_tower_learns_its_projection_only(corpus: Path) -> None:
    model = model_of(tiny_config(corpus, corpus / "run", "model.image.locked=true"))
    found, unlocked = plan(corpus, "model.image.locked=true"), plan(corpus)
    assert found.job.network.learned == sum(p.numel() for p in model.parameters() if p.requires_grad)
    image, text = found.job.network.towers
    assert image.backward.each < unlocked.job.network.towers[0].backward.each / 10
    assert text == unlocked.job.network.towers[1]


@pytest.mark.parametrize(("override", "steps"), [("train.steps=7", 7), ("train.samples=33", 3), ("train.epochs=2", 5)])
def test_steps_are_those_of_the_trainer(corpus: Path, override: str, steps: int) -> None:
    assert plan(corpus, override).steps == steps  # 40 pairs, 16 a step


def test_a_run_of_minutes_has_as_many_steps_as_it_can(corpus: Path) -> None:
    found = plan(corpus, "train.minutes=2")
    assert found.seconds == pytest.approx(120, rel=0.01)


def test_the_number_of_samples_is_needed_for_epochs_without_data(tmp_path: Path) -> None:
    config = load_config(VIT, [f"data.train={tmp_path}/none"])
    with pytest.raises(UserError, match=r"train.epochs: 32 epochs need the number of pairs.*--samples N"):
        make_plan(config, Choices(gpu="h100"))


# mparams, image_gflops, text_gflops of open_clip's docs/model_profile.csv: multiplications and additions of a forward
@pytest.mark.parametrize(
    ("name", "millions", "image", "text"), [("ViT-B-32", 151.28, 8.82, 5.96), ("RN50", 102.01, 12.22, 5.96)]
)
def test_clips_models_are_what_open_clip_says_of_them(name: str, millions: float, image: float, text: float) -> None:
    config = load_config(VIT, ["data.train=none", f"model.name={name}", "train.gradient_checkpointing=false"])
    network = make_plan(config, Choices(gpu="h100", samples=1)).job.network
    assert network.parameters / 1e6 == pytest.approx(millions, abs=0.01)
    assert [tower.forward.each / 1e9 for tower in network.towers] == pytest.approx([image, text], rel=0.002)


def test_the_recipe_for_many_gpus_is_planned_without_data() -> None:
    found = make_plan(load_config(VIT, ["data.train=none"]), Choices(gpus=64, gpu="h100", samples=4_096_000))
    assert found.steps == 32_000 and found.fits
    assert found.both > 3.5 * found.forward  # gradient checkpointing: nearly a second forward


def test_a_trained_tokenizer_without_data_is_taken_for_full(corpus: Path) -> None:
    found = plan(corpus, "data.train=none", samples=100)
    assert found.job.network.towers[1].parameters >= 300 * 32
    assert any("300 rows" in note for note in found.notes)


def test_shorter_captions_cost_less(corpus: Path) -> None:
    assert plan(corpus, tokens=4).forward < plan(corpus).forward


def test_a_loss_of_a_recipe_is_counted_as_it_is_set(corpus: Path) -> None:
    terms = plan(corpus, "loss=[{kind: margin, negatives: hardest, adaptive: 0.5}, {kind: cyclip}]").job.terms
    assert [(term.kind, term.sweeps, term.fixed) for term in terms] == [("margin", 2, 16), ("cyclip", 2, 0)]


def test_cached_features_run_the_towers_once_before_the_first_step(corpus: Path) -> None:
    locked = ("model.image.locked=true", "model.text.locked=true")
    still = "data.augment={crop: [1, 1], ratio: 1}"
    found = plan(corpus, *locked, still, "data.cache=features")
    assert found.once > 0 and plan(corpus, *locked, still).once == 0
    assert found.forward == pytest.approx(2 * 2 * 32 * 16)  # two projections of 32 to 16 are all that is left


def test_what_does_not_fit_is_told_with_what_would(corpus: Path) -> None:
    whole, chunked = (
        sum(plan(corpus, "train.global_batch=32", f"train.chunk={chunk}", reserve=0).memory.values())
        for chunk in ("null", 8)
    )
    room = {"gpu": "rtx4090", "reserve": 24 - (whole + chunked) / 2 / GIB}  # for chunks of 8, and not for 32 rows
    small = plan(corpus, "train.global_batch=32", **room)
    assert not small.fits and any("DOES NOT FIT" in line for line in lines(small))
    found = remedies(small)
    assert found[0].startswith("train.chunk=")
    assert plan(corpus, "train.global_batch=32", found[0].split()[0], **room).fits
    assert any("gradient_checkpointing" in line for line in found)


def test_batch_normalisation_is_offered_no_chunks(corpus: Path) -> None:
    image = "model.image={name: resnet18, size: 32, kwargs: {layers: [1, 1, 1, 1], channels: [8, 8, 8, 8]}}"
    found = plan(corpus, image, gpu="rtx4090", reserve=24)
    assert not any("chunk" in line for line in remedies(found))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"gpu": "h101"}, "--gpu h101: unknown"),
        ({"gpus": 0}, "--gpus 0"),
        ({"gpus": 3}, "global_batch 16 is not divisible by 3"),
        ({"utilisation": 1.5}, "--utilisation 1.5"),
        ({"overlap": -1.0}, "--overlap -1"),
        ({"network": 0.0}, "--network 0"),
        ({"reserve": float("nan")}, "--reserve nan"),
        ({"samples": 0}, "--samples 0"),
        ({"tokens": 9}, "--tokens 9: the tokenizer keeps 8"),
    ],
)
def test_a_choice_that_cannot_be_is_named(corpus: Path, choices: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        plan(corpus, **choices)
    assert message in str(error.value)


def test_a_card_without_bf16_is_refused_with_the_precisions_it_has(corpus: Path) -> None:
    with pytest.raises(UserError, match="bf16, which v100 lacks; use train.precision=fp16, train.precision=fp32"):
        plan(corpus, "train.precision=bf16", gpu="v100")


def test_this_machine_is_measured(corpus: Path) -> None:
    found = plan(corpus, gpu="here")
    assert found.card.peak["fp32"] > 0 and found.card.bandwidth > 0 and found.card.memory > 0.1
    assert any("measured" in line for line in lines(found))


def test_every_assumption_is_printed_with_its_option(corpus: Path) -> None:
    shown = "\n".join(lines(plan(corpus, gpus=2)))
    for option in ("utilisation", "memory-utilisation", "link-utilisation", "overlap", "per-node", "link", "network"):
        assert f"--{option}" in shown
    assert "--reserve" in shown and "--tokens" in shown


def test_json_adds_up(corpus: Path) -> None:
    found = as_json(plan(corpus, gpus=4, price=2.0))
    parts = [size for part, size in found["memory"].items() if part not in ("total", "card")]
    assert sum(parts) == found["memory"]["total"]
    assert found["device_hours"] == pytest.approx(found["seconds"]["run"] * 4 / 3600)
    assert found["cost"] == pytest.approx(2.0 * found["device_hours"])


def test_the_random_state_of_a_later_run_is_no_plans_business(corpus: Path) -> None:
    first = plan(corpus)
    torch.manual_seed(123)
    assert plan(corpus).memory == first.memory


@pytest.mark.parametrize(
    "override",
    ["train.sharding=fsdp", "model.image.patch_dropout=0.5", "optim.ema={}", "model.text.unfreeze_at=3"],
)
def test_what_a_plan_does_not_count_is_said(corpus: Path, override: str) -> None:
    assert not any("not counted" in note for note in plan(corpus).notes)
    (note,) = [note for note in plan(corpus, override).notes if "not counted" in note]
    assert override.partition("=")[0].rpartition(".")[2] in note
