"""More training dialogues from those there are: synonyms, or a paraphrase by the teacher.

The paper names both as future work; both are off by default. Only training dialogues are ever
augmented, after the split, and a copy keeps the source of its original, so the test set stays
untouched and unseen.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from milm_ray.config import Config, TranscribeSection
from milm_ray.dataset.table_rows import Row
from milm_ray.dataset.transcribe import SCHEMA, parse_transcription
from milm_ray.dataset.transcript import transcript
from milm_ray.job import Plan
from milm_ray.llm.ask import Asking
from milm_ray.llm.exchange import Answer
from milm_ray.llm.replies import Request, Subject
from milm_ray.prompts import load
from milm_ray.schema import Dialogue, Turn, turns_of
from milm_ray.workspace import Workspace

PROMPT = "mi_paraphrase.zh.md"

# Everyday words that can stand for each other almost anywhere in these dialogues.
_GROUPS = """
但是 可是 不过|因为 由于|所以 因此|现在 眼下 如今|经常 常常 时常|特别 格外 十分|慢慢 渐渐 逐渐
突然 忽然|好像 似乎 仿佛|也许 或许|总是 老是|疲惫 疲倦|高兴 开心|烦躁 烦闷|办法 法子|立刻 马上
早上 早晨|希望 盼望|想法 念头|重要 要紧|每天 天天|反复 一再|其实 实际上|然后 接着|如果 要是 假如
虽然 尽管|一直 始终|愿意 乐意|家里 家中|父母 爸妈|医生 大夫|聊聊 谈谈|说说 讲讲|看看 瞧瞧
生气 恼火|孤单 孤独|着急 焦急|后悔 懊悔|觉得 感觉|试试 试一试|完全 彻底|非常 极其|困难 难处
"""
SYNONYMS: dict[str, list[str]] = {
    word: [other for other in group.split() if other != word]
    for group in _GROUPS.replace("\n", "|").split("|")
    for word in group.split()
}


@dataclass
class Augmented:
    """Added training rows (of MI_DIALOGUES) and what was left out, by reason."""

    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    usage: dict[str, Any] | None = None

    def leave_out(self, reason: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1


class Paraphrasing:
    """One MI dialogue to a reworded one with the same turns; the row's `copy` is its number."""

    reply_tokens = 980

    def request(self, row: Row) -> Request:
        return Request(
            messages=[
                {"role": "system", "content": load(PROMPT).text},
                {"role": "user", "content": transcript(turns_of(row))},
            ],
            schema=SCHEMA,
            subject=Subject(row["corpus"], row["source_id"], f"{PROMPT}, copy {row['copy']}"),
            version=f"copy {row['copy']}",
        )

    def parse(self, row: Row, text: str) -> list[Turn]:
        rounds = len(row["turns"]) // 2
        rules = TranscribeSection(min_rounds=rounds, max_rounds=rounds)
        return parse_transcription(text, rules, rounds)


def augment(config: Config, workspace: Workspace, train: Sequence[Row]) -> Augmented:
    """The copies that `augment:` asks for, none by default; one equal to an original is dropped.

    Raises UserError as every asking of the teacher does.
    """
    result = Augmented()
    if not config.augment.synonyms and not config.augment.paraphrases:
        return result
    seen = {_text(turns_of(row)) for row in train}
    for copy in range(1, config.augment.synonyms + 1):
        for row in train:
            chance = random.Random(f"{config.seed}:{row['dialogue_id']}:{copy}")
            turns = replace_synonyms(turns_of(row), config.augment.synonym_rate, chance)
            _add(result, seen, row, turns, f"synonyms {copy}")
    rows = _paraphrased(config, train)
    if rows:
        asking = Asking(config, config.teacher, workspace, Paraphrasing(), "augment")
        for answer in asking.run(rows):
            _add_answer(result, seen, answer)
        result.usage = asking.usage.facts()
    return result


def paraphrasing_plan(config: Config, workspace: Workspace, train: Sequence[Row]) -> Plan:
    """The calls that `augment` would make."""
    rows = _paraphrased(config, train)
    asking = Asking(config, config.teacher, workspace, Paraphrasing(), "augment")
    return asking.plan(rows)


def _paraphrased(config: Config, train: Sequence[Row]) -> list[Row]:
    copies = range(1, config.augment.paraphrases + 1)
    return [{**row, "copy": copy} for copy in copies for row in train]


def _add_answer(result: Augmented, seen: set[str], answer: Answer) -> None:
    if not answer.ok:
        result.leave_out(f"paraphrase_{answer.reason}")
        return
    key = answer.reply.key if answer.reply else None
    row = {name: value for name, value in answer.row.items() if name != "copy"}
    _add(result, seen, row, answer.value, f"paraphrase {answer.row['copy']}", key)


def _add(
    result: Augmented,
    seen: set[str],
    row: Row,
    turns: list[Turn],
    how: str,
    reply_key: str | None = None,
) -> None:
    """Keep a copy under a source id of its own, but with its original's source dialogue."""
    if _text(turns) in seen:
        result.leave_out(f"{how.split()[0]}_changed_nothing")
        return
    seen.add(_text(turns))
    made = Dialogue(row["corpus"], f"{row['source_id']} ({how})", turns, row["topic"] or "")
    result.rows.append({**row, **made.row(), "reply_key": reply_key or row["reply_key"]})


def _text(turns: Sequence[Turn]) -> str:
    return "\n".join(turn.content for turn in turns)


def replace_synonyms(turns: Sequence[Turn], rate: float, chance: random.Random) -> list[Turn]:
    """The dialogue with each word that has synonyms replaced with probability `rate`."""
    import jieba

    def reworded(text: str) -> str:
        return "".join(
            chance.choice(SYNONYMS[word]) if word in SYNONYMS and chance.random() < rate else word
            for word in jieba.cut(text)
        )

    return [Turn(turn.role, reworded(turn.content)) for turn in turns]
