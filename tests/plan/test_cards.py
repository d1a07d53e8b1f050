"""The table of GPUs."""

import pytest

from contrastive.errors import UserError
from contrastive.plan.cards import CARDS, find_card


def test_a_card_is_found_in_any_case() -> None:
    assert find_card("H100") is CARDS["h100"]


def test_an_unknown_card_lists_the_known_ones() -> None:
    with pytest.raises(UserError) as error:
        find_card("h101")
    assert "did you mean 'h100'" in str(error.value)
    assert all(name in str(error.value) for name in [*CARDS, "here"])


def test_products_of_fewer_bits_are_no_slower() -> None:
    for card in CARDS.values():
        rates = [card.peak[name] for name in ("fp32", "tf32", "bf16") if name in card.peak]
        assert rates == sorted(rates)
        assert card.peak["fp16"] == card.peak.get("bf16", card.peak["fp16"])
