"""Reading recipes: values, overrides, kinds, and the text of everything that can be wrong."""

import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from contrastive.config import (
    Config,
    CyCLIPConfig,
    HuggingFaceTextConfig,
    InfoNCEConfig,
    MarginConfig,
    OpenClipModelConfig,
    TransformerTextConfig,
    dump_yaml,
    load_config,
)
from contrastive.errors import UserError

PERIOD = (
    "expected a number of steps, a share of the run such as 5%, or a text such as 10m (s, m, h), 1 epoch or 50000 "
    "samples, above 0 and at most 100%"
)
MINIMAL = "data: {train: shards}\ntrain: {epochs: 1}\n"


@pytest.fixture
def recipe(tmp_path):
    def load(text: str, *overrides: str) -> Config:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return load_config(path, overrides)

    return load


@pytest.fixture
def problems(recipe):
    """The lines that a recipe is refused with, without the name of the file."""

    def lines(text: str, *overrides: str) -> list[str]:
        with pytest.raises(UserError) as caught:
            recipe(text, *overrides)
        head, *rest = str(caught.value).split("\n")
        start, _, first = head.partition("mine.yaml: ")
        assert start.startswith("recipe ")
        if not rest:
            return [first]
        assert first == f"{len(rest)} problems"
        assert all(line.startswith("  ") for line in rest)
        return [line.strip() for line in rest]

    return lines


# Values


def test_a_recipe_may_leave_out_everything_but_the_data_and_the_length(recipe):
    config = recipe(MINIMAL)
    assert (config.data.train, config.train.epochs, config.train.steps) == ("shards", 1.0, None)
    assert isinstance(config.model.text, TransformerTextConfig)
    assert isinstance(config.loss, InfoNCEConfig)
    assert config.optim.betas == (0.9, 0.98)
    assert config.track.trackers == ("tensorboard",)


def test_run_dir_is_named_for_the_recipe(recipe):
    assert recipe(MINIMAL).run.dir == "runs/mine"
    assert recipe(MINIMAL, "run.seed=3").run.dir == "runs/mine"
    assert recipe(MINIMAL, "run.dir=elsewhere").run.dir == "elsewhere"


@pytest.mark.parametrize("text, value", [("1e-3", 0.001), ("1.5E+2", 150.0), ("3", 3.0), (".5", 0.5)])
def test_numbers_are_numbers_however_they_are_written(recipe, text, value):
    assert recipe(MINIMAL + f"optim: {{lr: {text}}}").optim.lr == value


def test_text_that_yaml_1_1_takes_for_something_else_stays_text(recipe):
    config = recipe(MINIMAL, "run.dir=no", "data.validation=12:30", "model.image.name=2026-11-22")
    assert (config.run.dir, config.data.validation, config.model.image.name) == ("no", "12:30", "2026-11-22")


def test_warm_up_is_a_share_or_a_number_of_steps(recipe):
    assert recipe(MINIMAL).optim.warmup == "5%"
    assert recipe(MINIMAL, "optim.warmup=2.5%").optim.warmup == "2.5%"
    assert recipe(MINIMAL, "optim.warmup=0").optim.warmup == 0


def test_a_config_cannot_be_changed(recipe):
    with pytest.raises(ValueError, match="frozen"):
        recipe(MINIMAL).run.seed = 1


def test_every_key_of_the_documented_recipe_is_read(recipe):
    text = """
run: {dir: runs/pictograms, seed: 0}
model:
  kind: pair
  image: {kind: timm, name: resnet18, size: 48, kwargs: {a: 1}, weights: null, mean: [0.5, 0.5, 0.5],
          std: [0.5, 0.5, 0.5], locked: false, lr_scale: 1.0}
  text: {kind: huggingface, path: some/folder, pool: cls, locked: true, lr_scale: 0.1}
  tokenizer: {kind: huggingface, path: some/folder, context: 64}
  dim: 256
  logit_scale: {init: 14.2857, max: 100.0, learned: true}
  logit_bias: -10
data: {train: a, validation: b, workers: 1, cache: none, caption_variants: 0.5, augment: {crop: [0.5, 1.0],
       ratio: 1.3333, flip: 0.5, rotate: 10, color: 0.1, grayscale: 0.1, tint: 0.1}}
loss: {kind: margin, margin: 0.3, negatives: hardest, same_caption: negative}
optim: {lr: 1.0e-3, weight_decay: 0.1, betas: [0.9, 0.98], eps: 1.0e-8, warmup: 5%, schedule: constant,
        clip: null}
train: {minutes: 6, global_batch: 512, chunk: 64, precision: bf16, gradient_checkpointing: true,
        channels_last: false, threads: 2}
checkpoint: {every: 10m, keep: 3}
eval:
  every: 20%
  labelled:
    - {name: fashion, train: c, test: d, invert: true, templates: none, tasks: [zeroshot, probe]}
  report: false
track: {with: [tensorboard, wandb], log_every: 5}
"""
    config = recipe(text)
    assert config.model.text == HuggingFaceTextConfig(path="some/folder", pool="cls", locked=True, lr_scale=0.1)
    assert config.model.logit_bias == -10.0
    assert config.loss == MarginConfig(margin=0.3, negatives="hardest", same_caption="negative")
    assert config.eval.labelled[0].tasks == ("zeroshot", "probe")
    assert (config.eval.every, config.checkpoint.every, config.optim.clip) == ("20%", "10m", None)
    assert config.track.trackers == ("tensorboard", "wandb")
    assert config.model.image.kwargs == {"a": 1}


# Overrides


def test_an_override_may_contain_equals_signs(recipe):
    assert recipe(MINIMAL, "run.dir=runs/lr=3=a").run.dir == "runs/lr=3=a"


def test_a_loss_may_be_a_weighted_list(recipe, tmp_path):
    config = recipe(MINIMAL, "loss=[{kind: infonce, weight: 2}, {kind: cyclip}]")
    assert config.loss == (InfoNCEConfig(weight=2), CyCLIPConfig())
    (tmp_path / "resolved.yaml").write_text(dump_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config


def test_an_override_may_be_a_whole_block(recipe):
    config = recipe(MINIMAL, "loss={kind: margin, margin: 0.5}")
    assert config.loss == MarginConfig(margin=0.5)


def test_of_two_overrides_of_one_key_the_last_wins(recipe):
    assert recipe(MINIMAL, "run.seed=1", "run.seed=2").run.seed == 2


def test_an_empty_override_is_null(recipe):
    assert recipe(MINIMAL + "optim: {clip: 1.0}", "optim.clip=").optim.clip is None


def test_a_length_on_the_command_line_takes_the_place_of_the_recipes(recipe):
    config = recipe(MINIMAL, "train.steps=5")
    assert (config.train.steps, config.train.epochs) == (5, None)


def test_another_kind_drops_the_other_keys_of_its_block(recipe):
    text = MINIMAL + "loss: {kind: infonce, label_smoothing: 0.1}"
    assert recipe(text, "loss.kind=margin").loss == MarginConfig()


@pytest.mark.parametrize("order", [1, -1])
def test_keys_overridden_together_with_the_kind_stay_in_any_order(recipe, order):
    overrides = ["loss.kind=margin", "loss.margin=0.4"][::order]
    assert recipe(MINIMAL + "loss: {label_smoothing: 0.1}", *overrides).loss == MarginConfig(margin=0.4)


def test_the_same_kind_resets_nothing(recipe):
    text = MINIMAL + "loss: {label_smoothing: 0.1}"
    assert recipe(text, "loss.kind=infonce").loss == InfoNCEConfig(label_smoothing=0.1)


def test_another_kind_of_an_inner_block_leaves_the_outer_one(recipe):
    text = MINIMAL + "model: {dim: 32, text: {width: 64}, tokenizer: {kind: huggingface, path: t}}"
    config = recipe(text, "model.text.kind=huggingface", "model.text.path=t")
    assert config.model.text == HuggingFaceTextConfig(path="t")
    assert (config.model.dim, config.model.tokenizer.path) == (32, "t")


def test_another_kind_of_the_outer_block_drops_the_inner_ones(recipe):
    text = MINIMAL + "model: {dim: 32, text: {width: 64}}"
    config = recipe(text, "model.image.lr_scale=0.5", "model.kind=open_clip", "model.name=ViT-B-32")
    assert isinstance(config.model, OpenClipModelConfig)
    assert (config.model.name, config.model.image.lr_scale) == ("ViT-B-32", 0.5)


# Writing


def test_a_dumped_recipe_reads_back_equal(recipe, tmp_path):
    config = recipe(MINIMAL, "run.dir='1e-3'", "model.image.kwargs={a: [1, {b: no}], c: 010}", "data.validation=5%")
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    assert load_config(path) == config


# a path takes no NUL, and ~ for a home folder
@given(st.text(min_size=1).filter(lambda text: "\0" not in text and not text.startswith("~")))
def test_any_text_survives_dump_and_load(tmp_path_factory, text):
    config = Config.model_validate({"data": {"train": text}, "train": {"steps": 1}})
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump_yaml(config), encoding="ascii")
    assert load_config(path) == config


@given(st.floats(min_value=1e-300, allow_infinity=False))
def test_any_number_survives_an_override(tmp_path_factory, number):
    path = tmp_path_factory.mktemp("override") / "recipe.yaml"
    path.write_text(MINIMAL)
    assert load_config(path, [f"optim.lr={number!r}"]).optim.lr == number


def test_a_dumped_recipe_is_plain_yaml_to_others(recipe):
    data = yaml.safe_load(dump_yaml(recipe(MINIMAL)))
    assert data["optim"]["betas"] == [0.9, 0.98]
    assert data["track"] == {
        "with": ["tensorboard"], "log_every": 10, "probe": 256, "probe_every": "5%", "mfu": False
    }  # fmt: skip


# What is wrong

SETS = (
    "expected a folder of shards (in quotes if it looks like something else), or several with whole numbers as "
    "weights, such as {data/a: 1, data/b: 3}"
)


@pytest.mark.parametrize(
    "override, line",
    [
        ("model.image.img_size=48", "model.image.img_size: unknown key (value 48). Did you mean 'size'?"),
        ("modle.dim=3", "modle: unknown key (value {\"dim\": 3}). Did you mean 'model'?"),
        ("train.lr=3", "train.lr: unknown key (value 3). Did you mean 'optim.lr'?"),
        ("loss.margin=0.2", "loss.margin: unknown key (value 0.2). Only kind margin has it"),
        ("checkpoint.zzz=1", "checkpoint.zzz: unknown key (value 1). Valid: every, keep, keep_every, keep_best"),
        (
            "track.trackers=[a]",
            'track.trackers: unknown key (value ["a"]). Valid: with, log_every, probe, probe_every, mfu',
        ),
        ("optim.lr=fast", 'optim.lr: expected a number (value "fast")'),
        ("optim.lr=0", "optim.lr: expected a number above 0 (value 0)"),
        ("optim.lr=.nan", "optim.lr: expected a finite number (value NaN)"),
        ("run.seed=true", "run.seed: expected a whole number (value true)"),
        ("run.seed=1.5", "run.seed: expected a whole number (value 1.5)"),
        ("checkpoint.keep=true", "checkpoint.keep: expected a whole number (value true)"),
        ("data.train=[3]", f"data.train: {SETS} (value [3])"),
        ("data.train=''", f'data.train: {SETS} (value "")'),
        ("data.train={}", f"data.train: {SETS} (value {{}})"),
        ("data.train={a: 1, b: 0.5}", f'data.train: {SETS} (value {{"a": 1, "b": 0.5}})'),
        ("data.window=0", "data.window: expected a number of at least 1 or null (value 0)"),
        ("data.max_skip_rate=2", "data.max_skip_rate: expected a number of at most 1 (value 2)"),
        ("data.timeout=0", "data.timeout: expected a number above 0 (value 0)"),
        ("checkpoint.every=x", f'checkpoint.every: {PERIOD} (value "x")'),
        ("checkpoint.every=0", f"checkpoint.every: {PERIOD} (value 0)"),
        ("train.chunk=0", "train.chunk: expected a number of at least 1 or null (value 0)"),
        ("optim.betas=[0.9]", "optim.betas: expected a list of 2 values"),
        ("optim.betas=[1, 2, 3]", "optim.betas: expected a list of 2 values (value [1, 2, 3])"),
        ("model.image.mean=[0, x, 0]", 'model.image.mean[1]: expected a number (value "x")'),
        ("data.augment=3", "data.augment: expected a block of keys (value 3)"),
        ("loss=margin", 'loss: expected a block of keys (value "margin")'),
        ("optim.schedule=cosin", "optim.schedule: expected 'cosine' or 'constant' (value \"cosin\")"),
        ("loss.kind=magrin", "loss.kind: unknown kind (value \"magrin\"). Did you mean 'margin'?"),
        ("model.kind=resnet", 'model.kind: unknown kind (value "resnet"). Valid: pair, open_clip, folder'),
        (
            "model.text.pool=cls",
            "model.text.pool: expected 'mean' or 'end' for kind transformer (value \"cls\")",
        ),
        (
            "optim.warmup=150%",
            "optim.warmup: expected a number of steps or a share of the run such as 5%, "
            'at least 0 and at most 100% (value "150%")',
        ),
        ("eval.every=0%", f'eval.every: {PERIOD} (value "0%")'),
        ("checkpoint.every=10 minutes", f'checkpoint.every: {PERIOD} (value "10 minutes")'),
        ("loss=[{kind: infonce, tiles: 1}]", "loss[0].tiles: unknown key (value 1). Did you mean 'tile'?"),
        ("loss=[{kind: infonc}]", "loss[0].kind: unknown kind (value \"infonc\"). Did you mean 'infonce'?"),
        ("loss=[{label_smoothing: 1}]", "loss[0].label_smoothing: expected a number of at most 0.999 (value 1)"),
        ("loss=[3]", "loss[0]: expected a block of keys (value 3)"),
        ("loss=[]", "loss: expected a list that is not empty (value [])"),
        (
            "loss.tile=0",
            "loss.tile: expected auto, null (no tiles: whole matrices) or the side of a tile, a whole number of at "
            "least 1 (value 0)",
        ),
        ("loss.label_smoothing=1", "loss.label_smoothing: expected a number of at most 0.999 (value 1)"),
        ("eval.labelled=[{name: a}]", "eval.labelled[0].test: missing; expected the test split"),
    ],
)
def test_a_wrong_value_is_told_with_its_path_and_a_remedy(problems, override, line):
    assert problems(MINIMAL, override) == [line]


@pytest.mark.parametrize(
    "overrides, line",
    [
        (
            ["train.epochs=null"],
            "train: give exactly one of steps, samples, epochs, minutes (given: none)",
        ),
        (
            ["train.steps=3", "train.minutes=2.5"],
            "train: give exactly one of steps, samples, epochs, minutes (given: steps 3, minutes 2.5)",
        ),
        (
            ["train.steps=3", "optim.warmup=5"],
            "optim.warmup: 5 steps of warm-up do not fit into train.steps 3",
        ),
        (
            ["loss.kind=siglip"],
            "loss: siglip needs a learned bias; set model.logit_bias to -10 (and model.logit_scale.init to 10)",
        ),
        (
            ["loss=[{kind: cyclip}]"],
            "loss: cyclip is a regulariser, which constant features satisfy; use a list with another loss, "
            "[{kind: infonce}, {kind: cyclip}]",
        ),
        (
            ["loss={kind: margin, warmup_steps: 5}"],
            "loss.warmup_steps: 5 steps of warm-up need negatives: hardest (negatives: sum); set that, or "
            "warmup_steps to 0",
        ),
        (
            ["loss=[{kind: infonce}, {kind: margin, warmup_steps: 5}]"],
            "loss[1].warmup_steps: 5 steps of warm-up need negatives: hardest (negatives: sum); set that, or "
            "warmup_steps to 0",
        ),
        (
            ["loss={weight: 3}"],
            "loss.weight: 3 does nothing for a single loss; change optim.lr, or use a list of losses",
        ),
        (
            ["loss={kind: distillation, teacher: t}", "data.caption_variants=0.5"],
            "data.caption_variants: the teacher of loss has read each sample's first caption only; set it to 0",
        ),
        (
            ["loss={tile: null, exchange: ring}"],
            "loss.exchange: ring passes tiles on; use it with loss.tile auto, or gather with null",
        ),
        (
            ["model.text.pool=end"],
            "model.text.pool: 'end' needs model.text.causal true; use it, or pool 'mean'",
        ),
        (
            ["model.text.width=256", "model.text.heads=3"],
            "model.text.heads: 3 does not divide model.text.width 256; use 2",
        ),
        (
            ["model.text.kind=huggingface", "model.text.path=t"],
            "model.tokenizer.kind: 'trained' does not fit a huggingface text tower; "
            "use 'huggingface' and the same path",
        ),
        (
            ["loss.kind=margin", "loss.same_caption=positive"],
            "loss.same_caption: expected 'negative' or 'ignore' for kind margin (value \"positive\")",
        ),
        (
            ["model.logit_scale.init=200"],
            "model.logit_scale.init: 200 is above model.logit_scale.max 100",
        ),
        (
            ["data.augment.crop=[1.0, 0.5]"],
            "data.augment.crop: expected [from, to] with 0 < from <= to <= 1 (value [1, 0.5])",
        ),
        (
            ["eval.every=100"],
            "eval.every: 100 needs data.validation, which is null; set that, or eval.every to null",
        ),
        (
            ["eval.labelled=[{name: a, test: b}]"],
            "eval.labelled[0].train: the probe needs a training split; name it, or set tasks to [zeroshot]",
        ),
        (
            ["eval.labelled=[{name: a, train: t, test: b}, {name: a, train: t, test: c}]"],
            "eval.labelled[1].name: 'a' is taken; choose another name",
        ),
    ],
)
def test_an_impossible_combination_is_told_with_its_remedy(problems, overrides, line):
    assert problems(MINIMAL, *overrides) == [line]


def test_all_problems_are_told_at_once(problems):
    text = """
model: {image: {img_size: 48}, text: {heads: 3, pool: end}}
data: {validation: 3}
loss: {kind: margn}
train: {steps: 3, epochs: 2}
"""
    assert set(problems(text, "optim.lr=fast", "oops", "run.seed=-1", "model.dim.x=1")) == {
        "override 'oops': expected key.path=value, as in optim.lr=3e-4",
        "run.seed: expected a number of at least 0 (value -1)",
        "model.dim: expected a whole number (value {\"x\": 1})",
        "model.image.img_size: unknown key (value 48). Did you mean 'size'?",
        "model.text.heads: 3 does not divide model.text.width 256; use 2",
        "model.text.pool: 'end' needs model.text.causal true; use it, or pool 'mean'",
        "data.train: missing; expected the folder of the training shards, or several with their weights: "
        "{data/a: 1, data/b: 3}",
        "data.validation: expected text (in quotes if it looks like something else) or null (value 3)",
        "loss.kind: unknown kind (value \"margn\"). Did you mean 'margin'?",
        "optim.lr: expected a number (value \"fast\")",
        "train: give exactly one of steps, samples, epochs, minutes (given: steps 3, epochs 2)",
    }  # fmt: skip


def test_a_wrong_key_does_not_draw_a_second_complaint_about_what_it_meant(problems):
    assert problems("data: {train: a}\ntrain: {step: 3}") == [
        "train.step: unknown key (value 3). Did you mean 'steps'?"
    ]


@pytest.mark.parametrize(
    "text, line",
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- a\n- b\n", "expected blocks such as `data:`, found list"),
        ("run: {seed: 1\nmodel: 3\n", "not YAML: expected ',' or '}', but got ':' (line 2, column 6)"),
        ("run: {seed: 1}\nrun: {seed: 2}\n", "not YAML: key 'run' is given twice (line 2, column 1)"),
    ],
)
def test_a_file_that_is_no_recipe_is_told_in_one_line(problems, text, line):
    assert problems(text) == [line]


@pytest.mark.parametrize(
    "override, line",
    [
        ("run.seed", "override 'run.seed': expected key.path=value, as in optim.lr=3e-4"),
        ("=3", "override '=3': expected key.path=value, as in optim.lr=3e-4"),
        ("run..seed=3", "override 'run..seed=3': expected key.path=value, as in optim.lr=3e-4"),
        ("data.train.x=3", "override 'data.train.x': data.train is a value, not a block of keys"),
        (
            "optim.betas=[1",
            "override 'optim.betas=[1': the value is not YAML: expected ',' or ']', but got '<stream end>' "
            "(line 1, column 3)",
        ),
    ],
)
def test_an_override_that_cannot_be_applied_is_told_in_one_line(problems, override, line):
    assert problems(MINIMAL, override) == [line]


def test_a_recipe_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match=r"absent.yaml: no such file; `contrastive recipes list` names"):
        load_config(tmp_path / "absent.yaml")


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_a_binary_file_is_no_recipe(tmp_path):
    (tmp_path / "weights.yaml").write_bytes(b"\x80\x02\xff")
    with pytest.raises(UserError, match="not UTF-8 text"):
        load_config(tmp_path / "weights.yaml")


def test_a_recipe_that_comes_along_opens_by_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load_config("pretrain/pictograms", ["run.seed=7"]).run.seed == 7


def test_the_configuration_loads_no_torch():
    code = "import sys, contrastive.config; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
