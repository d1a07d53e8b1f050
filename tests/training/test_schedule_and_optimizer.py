"""The learning rate on the way, and which parameters get which rate and decay."""

import math

import pytest
import torch
from torch import nn

from contrastive.training import Duration, Schedule, adamw
from contrastive.training.optimizer import parameter_groups, set_learning_rate


def test_warm_up_then_cosine_to_zero():
    schedule = Schedule(warmup_share=0.1)
    assert schedule.factor(5, 0.05) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 0.05)))
    assert schedule.factor(50, 0.5) == pytest.approx(0.5)
    assert schedule.factor(100, 1.0) == pytest.approx(0.0)


def test_warm_up_in_steps_moves_at_the_first_step():
    schedule = Schedule(warmup_steps=4, shape="constant")
    assert [schedule.factor(step, 0.0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_progress_by_steps_ignores_the_clock_and_by_minutes_follows_it():
    assert Duration(steps=10).progress(5, 1e9) == 0.5
    assert Duration(minutes=2).progress(10**9, 30.0) == 0.25
    assert Duration(minutes=2).progress(0, 500.0) == 1.0


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
        self.text = nn.Embedding(5, 2)
        self.text.position = nn.Parameter(torch.zeros(4, 2))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_norms_biases_positions_and_the_scale_do_not_decay():
    groups = {g["name"]: g for g in parameter_groups(Towers(), 1e-3, 0.1, {"image": 0.1, "text": 2.0})}
    assert set(groups) == {"image/decay", "image/no_decay", "text/decay", "text/no_decay", "joint/no_decay"}
    assert [tuple(p.shape) for p in groups["image/decay"]["params"]] == [(2, 3)]
    assert [tuple(p.shape) for p in groups["image/no_decay"]["params"]] == [(2,), (2,), (2,)]
    assert [tuple(p.shape) for p in groups["text/no_decay"]["params"]] == [(4, 2)]
    assert groups["image/decay"]["lr"] == pytest.approx(1e-4) and groups["text/decay"]["lr"] == pytest.approx(2e-3)
    assert groups["joint/no_decay"]["lr"] == pytest.approx(1e-3)
    assert all(g["weight_decay"] == (0.1 if g["name"].endswith("/decay") else 0.0) for g in groups.values())


def test_a_tower_keeps_its_share_of_the_rate():
    optimizer = adamw(Towers(), lr=1e-2, weight_decay=0.0, betas=(0.9, 0.98), eps=1e-8, tower_lr={"image": 0.5})
    set_learning_rate(optimizer, 0.1)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["image/decay"] == pytest.approx(5e-4) and rates["joint/no_decay"] == pytest.approx(1e-3)
