"""From dialogues to training samples: token ids and labels, with loss on every counselor turn."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from milm_ray.errors import UserError
from milm_ray.models.chat_format import IGNORE_INDEX, Message, encode_dialogue, fit
from milm_ray.models.messages import dialogue_messages
from milm_ray.schema import turns_of


@dataclass(frozen=True)
class Sample:
    """One training text. labels[i] is the token to be predicted at place i, or IGNORE_INDEX."""

    name: str
    input_ids: list[int]
    labels: list[int]

    @property
    def label_tokens(self) -> int:
        """Places that carry loss; the first place never does, nothing stands before it."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass
class Tokenised:
    """The samples of a table of dialogues and what it took to make them.

    shortened: dialogues over the cutoff that lost their oldest rounds (rounds_dropped in all);
    too_long: names of samples whose newest round alone is over the cutoff, left out.
    """

    samples: list[Sample] = field(default_factory=list)
    shortened: int = 0
    rounds_dropped: int = 0
    too_long: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(sample.input_ids) for sample in self.samples)

    @property
    def label_tokens(self) -> int:
        return sum(sample.label_tokens for sample in self.samples)

    @property
    def cut(self) -> str:
        """What the cutoff took, for people; "" where it took nothing."""
        parts = []
        if self.shortened:
            parts.append(
                f"{self.shortened} lost their oldest rounds ({self.rounds_dropped} in all)"
            )
        if self.too_long:
            parts.append(f"{len(self.too_long)} left out, too long in one round")
        return f", over the cutoff: {', '.join(parts)}" if parts else ""

    def counts(self) -> dict[str, int]:
        """Figures for a manifest."""
        return {
            "samples": len(self.samples),
            "tokens": self.tokens,
            "label_tokens": self.label_tokens,
            "shortened": self.shortened,
            "rounds_dropped": self.rounds_dropped,
            "too_long": len(self.too_long),
        }


def hold_out(
    rows: Sequence[Mapping[str, Any]], share: float, seed: int
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Divide rows into those to train on and those held out, `share` of the source dialogues.

    All rows made from one dialogue (its augmented copies too) fall on the same side, which depends
    on the seed and the dialogue alone. Raises UserError when a side would be empty.
    """
    if not share:
        return list(rows), []
    sources = sorted(
        {_source(row) for row in rows},
        key=lambda source: hashlib.sha256(f"{seed}/{source}".encode()).digest(),
    )
    held = set(sources[: max(1, round(share * len(sources)))])
    if len(held) == len(sources):
        raise UserError(
            f"finetune.eval_share={share:g} of {len(sources)} dialogue(s) leaves none to train on",
            "lower finetune.eval_share",
        )
    return (
        [row for row in rows if _source(row) not in held],
        [row for row in rows if _source(row) in held],
    )


def _source(row: Mapping[str, Any]) -> str:
    return str(row.get("source_dialogue_id") or row["dialogue_id"])


def tokenise(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    chat_format: str,
    cutoff: int,
    unit: Literal["dialogue", "round"] = "dialogue",
) -> Tokenised:
    """Samples of rows of schema.MI_DIALOGUES.

    cutoff: most tokens of a sample; longer ones lose their oldest rounds. unit: one sample per
    dialogue with loss on every counselor turn, or one per round with loss on its last turn only.
    """
    result = Tokenised()
    for row in rows:
        messages = dialogue_messages(turns_of(dict(row)))
        if unit == "dialogue":
            _add(result, row["dialogue_id"], messages, tokenizer, chat_format, cutoff, False)
            continue
        for end in range(2, len(messages) + 1, 2):
            name = f"{row['dialogue_id']}#{end // 2}"
            _add(result, name, messages[:end], tokenizer, chat_format, cutoff, True)
    if not result.samples:
        raise UserError(
            f"no training sample is left of {len(rows)} dialogues at a cutoff of {cutoff} tokens",
            "raise finetune.cutoff, or look at the train/ table",
        )
    return result


def _add(
    result: Tokenised,
    name: str,
    messages: Sequence[Message],
    tokenizer: Any,
    chat_format: str,
    cutoff: int,
    last_only: bool,
) -> None:
    input_ids, labels = encode_dialogue(tokenizer, chat_format, messages)
    if len(input_ids) > cutoff:
        messages, dropped = fit(tokenizer, chat_format, messages, cutoff, training=True)
        input_ids, labels = encode_dialogue(tokenizer, chat_format, messages)
        if len(input_ids) > cutoff:
            result.too_long.append(name)
            return
        result.shortened += 1
        result.rounds_dropped += dropped
    if last_only:
        asked, _ = encode_dialogue(tokenizer, chat_format, messages[:-1])
        labels = [IGNORE_INDEX] * len(asked) + labels[len(asked) :]
    result.samples.append(Sample(name, input_ids, labels))
