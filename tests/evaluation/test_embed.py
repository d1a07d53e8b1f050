import numpy as np
import pytest
import torch

from contrastive.errors import UserError
from contrastive.evaluation import embed, embed_texts
from contrastive.shards import open_index, open_source, write_shards
from tests.evaluation.fake import NAMES, square


def test_a_folder_of_pairs(model, pairs):
    found = embed(model, pairs, batch_size=3)
    assert found.keys == [f"{number}.png" for number in range(8)]
    assert found.captions == [f"{NAMES[n % 4]} square" for n in range(8)] and found.labels is None
    assert found.image.shape == found.text.shape == (8, 3) and found.image.dtype == np.float32
    assert ((found.image @ found.text.T).argmax(axis=1) % 4 == np.arange(8) % 4).all()


def test_every_form_of_source_gives_the_same_rows(model, pairs, tmp_path):
    write_shards(open_source(pairs), tmp_path / "shards")
    files = sorted(pairs.glob("*.png"))
    expected = embed(model, pairs).image
    for source in (
        open_source(pairs),
        open_index(tmp_path / "shards"),
        tmp_path / "shards",
        str(pairs / "*.png"),
        files,
        [square(NAMES[n % 4], n) for n in range(8)],
    ):
        np.testing.assert_array_equal(embed(model, source).image, expected)


def test_labels_come_from_the_source(model, labelled):
    assert sorted(set(embed(model, labelled).labels)) == sorted(NAMES)


def test_batch_size_and_workers_change_nothing(model, labelled):
    expected = embed(model, labelled, features="tower").image
    for options in ({"batch_size": 5}, {"workers": 2, "batch_size": 7}):
        # a batch of another size may be summed in another order
        np.testing.assert_allclose(embed(model, labelled, features="tower", **options).image, expected, atol=1e-6)


def test_unreadable_images_are_left_out_and_counted(model, pairs):
    (pairs / "3.png").write_bytes(b"no image")
    (pairs / "5.png").write_bytes((pairs / "5.png").read_bytes()[:45])
    found = embed(model, pairs)
    assert (
        found.keys == [f"{number}.png" for number in (0, 1, 2, 4, 6, 7)]
        and len(found.image) == len(found.captions) == 6
    )
    assert set(found.failures) == {"3.png", "5.png"} and sum(found.rejected.values()) == 2


def test_no_readable_image_is_an_error(model, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of the 1 images can be read \(a.png: not an image\)"):
        embed(model, tmp_path)


def test_a_missing_file_in_a_list_is_a_failure_of_that_file(model, pairs):
    found = embed(model, [pairs / "0.png", pairs / "none.png"])
    assert found.failures == {str(pairs / "none.png"): "no such file or directory"} and len(found.image) == 1


def test_inverting_takes_the_negative(model):
    black, white = (square("red").point(lambda _, v=value: v) for value in (0, 255))
    found = [embed(model, [image], invert=invert).image for image, invert in ((black, True), (white, False))]
    np.testing.assert_array_equal(*found)


def test_every_modules_mode_is_restored_and_off_inside(model, pairs):
    model.train()
    model.dropout.eval()  # as a locked tower would be
    embed(model, pairs)
    assert model.training and not model.dropout.training and model.modes == [False]
    model.dropout.train()
    embed(model, pairs)
    assert model.dropout.training and model.modes == [False, False]


def test_no_gradients_are_kept(model, pairs):
    encode, grads = model.encode_image, []
    model.encode_image = lambda pixels: grads.append(torch.is_grad_enabled()) or encode(pixels)
    embed(model, pairs)
    assert grads == [False]


def test_progress_counts_every_image(model, pairs):
    seen = []
    (pairs / "3.png").write_bytes(b"no image")
    embed(model, pairs, batch_size=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 8), (6, 8), (8, 8)]


def test_texts_are_encoded_once_and_beside_texts_of_like_length(model):
    texts = ["red", "red red red red", "blue", "red", "green green green green", "yellow"]
    found = embed_texts(model, texts, batch_size=2)
    assert model.widths == [4, 1, 1]
    alone = np.concatenate([embed_texts(model, [text]) for text in texts])
    np.testing.assert_allclose(found, alone, atol=1e-6)


def test_unknown_features_and_odd_lists_are_told(model, pairs):
    with pytest.raises(UserError, match="projected, tower or both"):
        embed(model, pairs, features="last")
    with pytest.raises(UserError, match="empty"):
        embed(model, [])
    with pytest.raises(UserError, match="holds an int"):
        embed(model, [3])
