"""Several samples in one row without padding, and the workers' shares of an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from milm_ray.finetune.samples import Sample
from milm_ray.models.chat_format import IGNORE_INDEX

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Pack:
    """Samples laid end to end in one row of T tokens; each attends to itself only.

    input_ids, position_ids: long [1, T], positions count from 0 in every sample.
    lengths: tokens of each sample, summing to T.
    places: long [N], where a label is predicted from; targets: long [N], the labels themselves.
    names: the samples, for messages.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: tuple[int, ...]
    places: torch.Tensor
    targets: torch.Tensor
    names: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return int(self.input_ids.shape[1])


def collate(samples: Sequence[Sample]) -> Pack:
    """Lay samples end to end."""
    import torch

    input_ids: list[int] = []
    position_ids: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    for sample in samples:
        start = len(input_ids)
        input_ids += sample.input_ids
        position_ids += range(len(sample.input_ids))
        for place, label in enumerate(sample.labels[1:], start):
            if label != IGNORE_INDEX:
                places.append(place)
                targets.append(label)
    return Pack(
        torch.tensor([input_ids]),
        torch.tensor([position_ids]),
        tuple(len(sample.input_ids) for sample in samples),
        torch.tensor(places, dtype=torch.long),
        torch.tensor(targets, dtype=torch.long),
        tuple(sample.name for sample in samples),
    )


def idle(sample: Sample) -> Pack:
    """A row of one token without a label, for a worker that only keeps in step with the others."""
    return collate([Sample(sample.name, sample.input_ids[:1], [IGNORE_INDEX])])


def bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group places of `lengths` into bins of at most `capacity` (first fit, longest first).

    Anything longer than the capacity stands alone.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for group, free in enumerate(room):
            if lengths[index] <= free:
                groups[group].append(index)
                room[group] -= lengths[index]
                break
        else:
            groups.append([index])
            room.append(capacity - lengths[index])
    return groups


def shares(lengths: Sequence[int], workers: int, capacity: int) -> list[list[list[int]]]:
    """Divide a step's samples among workers: for each worker its bins, equally many for all.

    Samples go to the worker with the fewest tokens so far, longest first. Collectives run once per
    bin, so all workers get the same number of bins; an empty bin means a row without loss (idle).
    """
    loads = [0] * workers
    members: list[list[int]] = [[] for _ in range(workers)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        worker = loads.index(min(loads))
        members[worker].append(index)
        loads[worker] += lengths[index]
    packed = [
        [[own[i] for i in group] for group in bins([lengths[i] for i in own], capacity)]
        for own in members
    ]
    rounds = max(len(groups) for groups in packed)
    return [groups + [[] for _ in range(rounds - len(groups))] for groups in packed]
