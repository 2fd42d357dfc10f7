"""What tests of training share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@pytest.fixture
def one_process() -> Iterator[None]:
    """See process_of_one."""
    with process_of_one():
        yield


@contextmanager
def process_of_one() -> Iterator[None]:
    """A process group of one, as training needs it, on one thread: tiny models gain by no more."""
    import torch
    from torch import distributed

    from milm_ray.finetune.engine import single_process

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    single_process()
    yield
    distributed.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.fixture
def plain_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fuse_layers sets for transformers' whole module is set back after the test."""
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
