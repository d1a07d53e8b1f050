"""The average of the weights: by a loop in float64, in a run, over skipped steps, a resume and two processes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from contrastive.errors import UserError
from contrastive.pretrain import pretrain
from contrastive.training import WeightAverage
from tests.distributed.spawn import run_ranks
from tests.faults.training import faulty
from tests.tiny import tiny_config

EMA = "optim.ema={decay: 0.9, every: 1}"
EACH_STEP = ["checkpoint.every=1", "checkpoint.keep=99"]


def in_float64(history: list[torch.Tensor], decay: float, every: int = 1) -> torch.Tensor:
    """The average behind the last of `history`, whose first entry is the start, one step at a time."""
    average = history[0].double()
    for n in range(1, len(history)):
        if n % every == 0:
            d = min(decay**every, (1 + n) / (10 + n))
            average = d * average + (1 - d) * history[n].double()
    return average


def moved(model: nn.Module, steps: int) -> list[dict[str, torch.Tensor]]:
    """Random changes of every parameter and statistic; yields the states, the start first."""
    generator = torch.Generator().manual_seed(0)
    yield {key: value.clone() for key, value in model.state_dict().items()}
    for _ in range(steps):
        with torch.no_grad():
            for value in model.state_dict().values():
                if value.is_floating_point():
                    value.add_(torch.rand(value.shape, generator=generator))
                else:
                    value += 1
        yield {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize(("decay", "every"), [(0.5, 1), (0.99, 1), (0.99, 7)])
def test_it_is_the_loop_in_float64_with_its_warm_up(decay: float, every: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = WeightAverage(model, decay, every)
    history = []
    for number, state in enumerate(moved(model, 1500)):
        history.append(state)
        if number:
            average.update()
    with average.applied():
        found = {key: value.clone() for key, value in model.state_dict().items()}
    for key, value in found.items():
        if key == "1.num_batches_tracked":
            assert value == 1500  # a counter is the model's own
            continue
        expected = in_float64([state[key] for state in history], decay, every)
        assert float((value - expected).abs().max() / expected.abs().max()) < 1e-6, key


def test_behind_the_warm_up_it_is_that_of_torch() -> None:
    model = nn.Linear(3, 4)
    average = WeightAverage(model, 0.9)
    average.steps = 1000  # (1 + n) / (10 + n) is above the decay
    peer = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    peer.n_averaged += 1  # its first update is a copy
    for number, _ in enumerate(moved(model, 30)):
        if number:
            average.update()
            peer.update_parameters(model)
    for name, expected in peer.module.named_parameters():
        assert torch.allclose(average.state_dict()[name], expected, rtol=1e-6, atol=0), name


def test_what_does_not_learn_is_not_averaged_and_masks_with_infinities_stay() -> None:
    model = nn.Module()
    model.frozen, model.learned = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    average = WeightAverage(model, 0.9)
    average.update()
    assert set(average.state_dict()) == {"learned.weight", "learned.bias", "steps"}
    with average.applied():
        assert model.mask.tolist() == [0.0, -torch.inf]


def test_the_model_has_its_own_weights_again_behind_the_block_also_behind_an_error() -> None:
    model = nn.Linear(3, 4)
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        model.weight.add_(1)
    own = model.weight.detach().clone()
    with pytest.raises(RuntimeError), average.applied():
        assert not torch.equal(model.weight, own)
        raise RuntimeError
    assert torch.equal(model.weight, own)


# ---- in a run


def files(config, name: str) -> list[dict[str, torch.Tensor]]:
    """`name` of the checkpoints of every step, in order."""
    found = sorted((Path(config.run.dir) / "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:]))
    return [load_file(path / f"{name}.safetensors") for path in found]


def final(config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.run.dir) / "model" / "model.safetensors")


def starting_weights(config) -> dict[str, torch.Tensor]:
    from contrastive.build import build_model

    tokenizer = (Path(config.run.dir) / "tokenizer.json").read_text()
    return build_model(config, tokenizer).state_dict()


def test_the_final_model_is_the_average_of_the_steps_and_the_checkpoint_has_both(make_config) -> None:
    config = make_config(EMA, *EACH_STEP)
    pretrain(config, quiet=True)
    start, raw = starting_weights(config), files(config, "model")
    assert len(raw) == 8
    attention = next(key for key in start if key.startswith("image.") and key.endswith("qkv.weight"))
    for key in ("text.embedding.weight", "logit_scale", attention):
        expected = in_float64([start[key], *(step[key] for step in raw)], 0.9)
        assert torch.allclose(final(config)[key].double(), expected, rtol=1e-5, atol=1e-8), key
        assert torch.equal(final(config)[key], files(config, "ema")[-1][key])
        assert not torch.equal(final(config)[key], raw[-1][key])


def test_it_does_not_change_the_training(make_config, tmp_path) -> None:
    plain, averaged = make_config(f"run.dir={tmp_path}/plain"), make_config(EMA, "eval.every=2")
    for config in (plain, averaged):
        pretrain(config, quiet=True)
    raw = files(averaged, "model")[-1]
    assert all(torch.equal(raw[key], value) for key, value in files(plain, "model")[-1].items())


def test_validation_sees_the_average(make_config, monkeypatch) -> None:
    seen = []

    def validate(model):
        seen.append(model.state_dict()["text.embedding.weight"].clone())
        return {"share": 0.5}

    monkeypatch.setattr("contrastive.pretrain.validation", lambda *_: validate)
    monkeypatch.setattr("contrastive.preflight.SCALARS", ("share",))
    config = make_config(EMA, *EACH_STEP, "eval.every=3")
    pretrain(config, quiet=True)
    averages = files(config, "ema")
    assert len(seen) == 2
    for found, step in zip(seen, (3, 6), strict=True):
        assert torch.equal(found, averages[step - 1]["text.embedding.weight"])


def test_results_say_which_weights_they_are_of(make_config) -> None:
    config = make_config(EMA)
    results = pretrain(config, quiet=True)
    assert results is not None
    assert results["model"] == {"step": 8, "choice": "last", "weights": "ema", "stopped_early": None}
    assert json.loads((Path(config.run.dir) / "results.json").read_text())["model"] == results["model"]


@pytest.mark.parametrize("stops", [[1], [3, 4]], ids=str)
def test_a_resumed_average_is_bit_for_bit_that_of_one_run(make_config, tmp_path, stops) -> None:
    options = ["optim.ema={decay: 0.99, every: 2}", "eval.every=3"]
    whole = make_config(f"run.dir={tmp_path}/whole", *options)
    pretrain(whole, quiet=True)
    parts = make_config(*options)
    for number, stop in enumerate([*stops, None]):
        pretrain(parts, resume=number > 0, stop_after=stop, quiet=True)
    assert final(parts).keys() == final(whole).keys()
    assert all(torch.equal(final(parts)[key], value) for key, value in final(whole).items())


def test_an_average_that_is_switched_on_later_begins_there_and_says_so(make_config, capsys) -> None:
    pretrain(make_config("checkpoint.keep=99"), stop_after=4, quiet=True)
    config = make_config(EMA, *EACH_STEP)
    pretrain(config, resume=True, quiet=True)
    assert "step_4 holds no average of the weights; optim.ema begins with the weights of that step" in (
        capsys.readouterr().out
    )
    key = "text.embedding.weight"
    raw = [step[key] for step in files(config, "model")]
    assert torch.allclose(final(config)[key].double(), in_float64(raw, 0.9), rtol=1e-5, atol=1e-8)


def test_an_average_of_other_weights_is_refused(make_config) -> None:
    config = make_config(EMA)
    pretrain(config, stop_after=2, quiet=True)
    average = WeightAverage(nn.Linear(2, 2), 0.9)
    from contrastive.training.checkpoint import load_average

    with pytest.raises(UserError, match="its average is one of other weights"):
        load_average(Path(config.run.dir) / "checkpoints" / "step_2", average)


# ---- skipped steps, two processes


def averaged_run(rank: int, world: int, corpus: Path, run_dir: Path, skipped: list[int]) -> None:
    exact = ["model.image.kwargs.proj_drop_rate=0.0", "model.text.dropout=0.0"]
    config = tiny_config(corpus, run_dir / "run", EMA, *EACH_STEP, *exact, "data.validation=null")
    if skipped:
        faulty.not_a_number(rank, (skipped, world - 1))
    pretrain(config, quiet=True)


def test_two_processes_end_with_the_average_of_their_steps_and_of_one_process(corpus, tmp_path) -> None:
    found = {}
    for world in (1, 2):
        run_ranks(world, averaged_run, corpus, tmp_path / str(world), [])
        config = tiny_config(corpus, tmp_path / str(world) / "run")
        found[world] = final(config)
        start = starting_weights(config)
        for key in ("text.embedding.weight", "logit_scale"):
            expected = in_float64([start[key], *(step[key] for step in files(config, "model"))], 0.9)
            assert torch.allclose(found[world][key].double(), expected, rtol=1e-5, atol=1e-8), (world, key)
    for key, value in found[1].items():
        if not key.endswith("qkv.bias"):  # a key's bias has no gradient; AdamW makes steps of the rounding
            assert torch.allclose(found[2][key], value, rtol=1e-3, atol=1e-5), key


def test_a_skipped_step_is_no_step_of_the_average(corpus, tmp_path) -> None:
    run_ranks(2, averaged_run, corpus, tmp_path, [2, 3])
    config = tiny_config(corpus, tmp_path / "run")
    averages, raw = files(config, "ema"), files(config, "model")
    assert [int(step["steps"]) for step in averages] == [1, 2, 2, 2, 3, 4, 5, 6]
    key = "text.embedding.weight"
    assert torch.equal(averages[1][key], averages[3][key])
    history = [starting_weights(config)[key], *(raw[i][key] for i in (0, 1, 4, 5, 6, 7))]
    assert torch.allclose(averages[-1][key].double(), in_float64(history, 0.9), rtol=1e-5, atol=1e-8)
