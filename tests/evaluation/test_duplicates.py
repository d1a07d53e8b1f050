import io

import numpy as np
from PIL import Image

from contrastive.evaluation import duplicates
from contrastive.evaluation.duplicates import difference_hashes, nearest_embedding, nearest_look


def picture(seed, size=64):
    rough = np.random.default_rng(seed).integers(0, 255, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((size, size), Image.Resampling.BICUBIC)


def changed(image):
    data = io.BytesIO()
    image.resize((90, 90)).point(lambda value: value * 0.9 + 8).save(data, "JPEG", quality=70)
    return Image.open(data)


def bits(hashes):
    return np.array([[int(word) >> place & 1 for word in row for place in range(63, -1, -1)] for row in hashes])


def test_a_hash_survives_resizing_recompression_and_contrast_and_tells_others_apart():
    images = [picture(seed) for seed in range(20)]
    plain, other = bits(difference_hashes(images)), bits(difference_hashes([changed(image) for image in images]))
    apart = (plain[:, None] != plain[None]).sum(axis=2)[~np.eye(20, dtype=bool)]
    assert (plain != other).sum(axis=1).max() <= 8 < 40 < apart.min()


def test_a_hash_holds_the_signs_of_horizontal_differences():
    rows = np.random.default_rng(0).integers(0, 5, (16, 17)).astype(np.uint8) * 2  # differences of 2 are noise
    found = bits(difference_hashes([Image.fromarray(rows)]))[0]
    expected = [int(rows[y, x]) - int(rows[y, x + 1]) > 2 for y in range(16) for x in range(16)]
    assert found.tolist() == expected and 20 < sum(expected) < 200


def test_the_nearest_look_equals_brute_force(monkeypatch):
    monkeypatch.setattr(duplicates, "TILE", 7)
    random = np.random.default_rng(0)
    train = random.integers(0, 2**64, (30, 4), dtype=np.uint64)
    test = np.r_[train[[3, 29]] ^ np.uint64(5), random.integers(0, 2**64, (18, 4), dtype=np.uint64)]
    distance = (bits(test)[:, None] != bits(train)[None]).sum(axis=2)
    found = nearest_look(test, train)
    assert found.value.tolist() == distance.min(axis=1).tolist() and found.row[:2].tolist() == [3, 29]
    assert (distance[np.arange(20), found.row] == distance.min(axis=1)).all()


def test_the_nearest_embedding_is_by_cosine(monkeypatch):
    monkeypatch.setattr(duplicates, "TILE", 7)
    random = np.random.default_rng(0)
    test, train = random.normal(size=(20, 5)).astype(np.float32), random.normal(size=(30, 5)).astype(np.float32)
    train[4] = 100 * test[9]
    from sklearn.metrics.pairwise import cosine_similarity

    expected = cosine_similarity(test, train)
    found = nearest_embedding(test, train)
    assert found.row.tolist() == expected.argmax(axis=1).tolist() and found.row[9] == 4
    np.testing.assert_allclose(found.value, expected.max(axis=1), atol=1e-6)
