"""The course of a run: which samples, at what rate, divided how; checked against transformers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milm_ray.finetune.packing import bins, shares
from milm_ray.finetune.schedule import Schedule


def schedule(samples=54, per_step=8, epochs=3.0, seed=42, kind="cosine", warmup=0.1):
    return Schedule(samples, per_step, epochs, seed, 1e-4, kind, warmup)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.35])
def test_learning_rate_follows_transformers(kind, warmup):
    import torch
    from transformers import get_scheduler

    course = schedule(samples=83, kind=kind, warmup=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    name = "constant_with_warmup" if kind == "constant" else kind
    peer = get_scheduler(name, optimizer, course.warmup_steps, course.steps)
    for step in range(course.steps):
        assert course.learning_rate_at(step) == pytest.approx(peer.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        peer.step()


def test_step_count_follows_transformers_for_a_ragged_last_step():
    assert schedule(samples=54).steps_per_epoch == 7
    assert schedule(samples=54, epochs=3).steps == 21
    assert schedule(samples=54, epochs=0.5).steps == 4
    assert schedule(samples=2000, per_step=8).steps == 750


@given(st.integers(1, 70), st.integers(1, 16), st.integers(0, 5))
def test_every_epoch_sees_every_sample_once(samples, per_step, seed):
    course = schedule(samples=samples, per_step=per_step, seed=seed, epochs=2)
    per_epoch = course.steps_per_epoch
    for epoch in range(2):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = [index for step in steps for index in course.samples_of(step)]
        assert sorted(seen) == list(range(samples))


def test_epochs_and_seeds_differ_in_order_and_repeat_exactly():
    def first(epoch, seed):
        course = schedule(seed=seed)
        return course.samples_of(epoch * course.steps_per_epoch)

    assert first(0, 1) == first(0, 1)
    assert first(0, 1) != first(1, 1)
    assert first(0, 1) != first(0, 2)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.integers(1, 250))
def test_bins_hold_everything_within_capacity(lengths, capacity):
    groups = bins(lengths, capacity)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[i] for i in group) <= capacity


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=20), st.integers(1, 5), st.integers(1, 250)
)
def test_workers_share_a_step_in_equally_many_passes(lengths, workers, capacity):
    parts = shares(lengths, workers, capacity)
    assert len(parts) == workers
    assert len({len(part) for part in parts}) == 1
    assert sorted(i for part in parts for group in part for i in group) == list(range(len(lengths)))
