"""Weights between two models: plain arithmetic, exact ends, and what does not go together."""

import json

import pytest
import torch
from safetensors.torch import load_file

import contrastive
import contrastive.models as models
from contrastive.cli import main
from contrastive.errors import UserError


@pytest.fixture
def ends(make_model, tmp_path):
    """Two folders of one architecture with other weights, counters and batch statistics."""
    for number, name in enumerate(("start", "tuned")):
        model = make_model()
        generator = torch.Generator().manual_seed(number)
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            else:
                value.fill_(10 + number)
        models.save_model(model, tmp_path / name)
    return tmp_path / "start", tmp_path / "tuned"


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.9])
def test_weights_are_those_of_plain_arithmetic(ends, alpha):
    start, tuned = map(tensors, ends)
    mixed = contrastive.interpolate(*ends, alpha).state_dict()
    floats = [name for name, value in start.items() if value.is_floating_point()]
    assert mixed.keys() == start.keys() and "logit_scale" in floats and "image.trunk.bn1.running_var" in floats
    for name in floats:
        expected = (1 - alpha) * start[name].double() + alpha * tuned[name].double()
        torch.testing.assert_close(mixed[name].double(), expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize(("alpha", "end"), [(0.0, 0), (1.0, 1)])
def test_the_ends_are_the_models_themselves(ends, alpha, end):
    expected, mixed = tensors(ends[end]), contrastive.interpolate(*ends, alpha).state_dict()
    assert all(torch.equal(mixed[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("alpha", "count"), [(0.4, 10), (0.5, 11)])
def test_a_counter_comes_from_the_nearer_model(ends, alpha, count):
    assert contrastive.interpolate(*ends, alpha).state_dict()["image.trunk.bn1.num_batches_tracked"] == count


def test_half_precision_is_mixed_in_float32_and_stays_half(ends):
    start, tuned = (models.load(end, device="cpu").half() for end in ends)
    name = "text.embedding.weight"
    expected = (0.7 * start.state_dict()[name].float() + 0.3 * tuned.state_dict()[name].float()).half()
    found = contrastive.interpolate(start, tuned, 0.3).state_dict()[name]  # built again in float32, which holds halves
    assert torch.equal(found, found.half().float())
    # lerp rounds otherwise than two products: where the sum is between two halves, the other of them may be taken
    torch.testing.assert_close(found, expected.float(), rtol=2**-10, atol=0)


def test_the_models_given_stay_as_they_are(ends):
    start = models.load(ends[0], device="cpu")
    before = models.fingerprint(start)
    contrastive.interpolate(start, ends[1], 0.5)
    assert models.fingerprint(start) == before


def test_what_differs_is_named(ends, make_model, tmp_path):
    other = make_model()
    other.image.projection = torch.nn.Linear(16, 12, bias=False)
    with pytest.raises(UserError, match=r"image.projection.weight is \(16, 16\) in the first and \(12, 16\)"):
        contrastive.interpolate(ends[0], other, 0.5)
    with pytest.raises(UserError, match="logit_bias is missing in the first"):
        contrastive.interpolate(ends[0], make_model(bias=0.0), 0.5)
    pooled = make_model()
    pooled.text.arguments["pool"] = "end"
    with pytest.raises(UserError, match="text.pool: mean in the first, end in the second"):
        contrastive.interpolate(ends[0], pooled, 0.5)
    reader = make_model()
    reader.tokenizer = models.CorpusTokenizer(models.train_tokenizer(["zebra zoo"] * 3, vocab_size=330), context=8)
    with pytest.raises(UserError, match="tokenizers"):
        contrastive.interpolate(ends[0], reader, 0.5)
    with pytest.raises(UserError, match="alpha: 1.5 is not between 0 and 1"):
        contrastive.interpolate(*ends, 1.5)


def test_the_command_writes_a_folder_that_opens(ends, tmp_path, pixels):
    assert main(["interpolate", *map(str, ends), str(tmp_path / "mixed"), "--alpha", "0.3"]) == 0
    opened = contrastive.load(tmp_path / "mixed", device="cpu")
    assert torch.equal(opened.encode_image(pixels), contrastive.interpolate(*ends, 0.3).encode_image(pixels))


def test_the_command_writes_and_measures_several(make_model, tmp_path, capsys):
    from tests.tiny import write_corpus

    corpus = write_corpus(tmp_path / "corpus")
    for name in ("start", "tuned"):
        models.save_model(make_model(), tmp_path / name)
    words = ["interpolate", str(tmp_path / "start"), str(tmp_path / "tuned"), str(tmp_path / "out")]
    assert main([*words, "--alphas", "0,0.5,1", "--evaluate", str(corpus / "shards")]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["0.0000", "0.5000", "1.0000"]
    assert len({row.split()[-1] for row in rows}) == 1  # the two are one model here
    config = json.loads((tmp_path / "out" / "alpha_0.5" / "config.json").read_text())
    assert config["format"] == 1 and (tmp_path / "out" / "alpha_0" / "model.safetensors").is_file()


def test_the_command_with_nothing_to_do_says_so(ends, capsys):
    assert main(["interpolate", *map(str, ends)]) == 2
    assert "--evaluate DATA" in capsys.readouterr().err
