"""What every corpus reader shares: decoding, JSON that may be broken, and the rules of a dialogue.

A reader is a pure function from one file's name and bytes to dialogues, rejects and repairs. A
*repair* is anything that was changed so that the text could be used (a merged turn, a dropped
trailing turn, another encoding); a *reject* is what could not be used. Both carry the source's
name, so nothing disappears silently.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from milm_ray.schema import Dialogue, Reject, Role, Turn

STAGE = "ingest"
Pair = tuple[Role, str]

_ENDINGS = re.compile(r"(\.(txt|json|jsonl|csv|utf8|gz))+$")
# Code points that no UTF-8 file may hold, and control characters other than tab and newline.
_UNUSABLE = re.compile("[\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Unusable(Exception):
    """A file or record that cannot be used. reason: one of the reject reasons; detail: why."""

    def __init__(self, reason: str, detail: str, raw: str = "") -> None:
        self.reason, self.detail, self.raw = reason, detail, raw
        super().__init__(f"{reason}: {detail}")

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.reason, self.detail, self.raw)


@dataclass(frozen=True)
class Repair:
    """Something changed to make a source usable: what, and how many times."""

    source_id: str
    what: str
    number: int = 1
    dialogue_id: str = ""


@dataclass
class Parsed:
    """What one file yielded, in the file's own order. ids: those of `dialogues`, hashed once."""

    corpus: str
    name: str
    dialogues: list[Dialogue] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    repairs: list[Repair] = field(default_factory=list)

    def reject(self, reason: str, source_id: str, detail: str = "", raw: str = "") -> None:
        where = f"{self.name}: {detail}" if detail else self.name
        self.rejects.append(
            Reject(STAGE, reason, self.corpus, source_id, detail=where, raw=scrub(raw[:2000]))
        )

    def repair(self, what: str, source_id: str, number: int = 1) -> None:
        self.repairs.append(Repair(source_id, what, number))

    def add(
        self,
        source_id: str,
        pairs: Sequence[Pair],
        topic: str = "",
        repaired: Mapping[str, int] | None = None,
    ) -> None:
        """Keep a dialogue after the rules of `arrange`, or reject it with the reason."""
        changes = Counter(repaired or {})
        try:
            turns = arrange(pairs, changes)
        except Unusable as error:
            raw = "\n".join(f"{role}: {content}" for role, content in pairs)
            self.reject(error.reason, source_id, error.detail, raw)
            return
        dialogue = Dialogue(self.corpus, source_id, turns, topic)
        try:
            identity = dialogue.dialogue_id
        except UnicodeEncodeError:  # half of a surrogate pair, as in a badly escaped emoji
            changes["characters_replaced"] += 1
            dialogue = Dialogue(
                self.corpus, source_id, [Turn(t.role, scrub(t.content)) for t in turns], topic
            )
            identity = dialogue.dialogue_id
        self.dialogues.append(dialogue)
        self.ids.append(identity)
        self.repairs += [Repair(source_id, what, n, identity) for what, n in changes.items()]


Parse = Callable[[Parsed, str, int | None], None]


@dataclass(frozen=True)
class Reader:
    """How one corpus is read.

    parse: (result, text, limit) adds what the text of one file holds to the result.
    patterns: file names, best first: in a directory or an archive the first that matches anything
        wins.
    one_per_file: each file holds one dialogue, so `limit` counts files, not records.
    """

    name: str
    title: str
    patterns: tuple[str, ...]
    parse: Parse
    one_per_file: bool

    def read(self, name: str, data: bytes, limit: int | None = None) -> Parsed:
        """Everything in one file: its name (for ids and messages), its bytes, the record limit.

        Never raises for what the file holds: what cannot be used is in `rejects`.
        """
        parsed = Parsed(self.name, name)
        try:
            text, repair = decode(data)
            if repair:
                parsed.repair(repair, stem(name))
            if not text.strip():
                raise Unusable("empty", "the file holds no text")
            self.parse(parsed, text, limit)
            if not parsed.dialogues and not parsed.rejects:
                raise Unusable("empty", "the file holds no record")
        except Unusable as error:
            parsed.reject(error.reason, stem(name), error.detail, error.raw or preview(data))
        return parsed


def stem(name: str) -> str:
    """The file's name without folders and without any of its known endings: case_0, 17."""
    return _ENDINGS.sub("", name.rpartition("/")[2])


def preview(data: bytes) -> str:
    return data[:2000].decode("utf-8", errors="replace")


def scrub(text: str) -> str:
    """Text without lone surrogates and control characters (each becomes U+FFFD)."""
    return _UNUSABLE.sub("\ufffd", text)


def decode(data: bytes) -> tuple[str, str | None]:
    """The text of a file and the repair it needed, if any: a byte-order mark, UTF-16, GB18030.

    GB18030 accepts most byte strings, so UTF-8 with a few damaged bytes would pass as Chinese
    nonsense. A file that is mostly valid UTF-8 is therefore unusable, not GB18030.
    Raises Unusable("bad_encoding").
    """
    if data.startswith(codecs.BOM_UTF8):
        return _utf8(data[3:]), "byte_order_mark_removed"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return data.decode("utf-16"), "encoding_utf16"
        except UnicodeDecodeError as error:
            raise Unusable("bad_encoding", f"not UTF-16: {error}") from None
    try:
        return data.decode("utf-8"), None
    except UnicodeDecodeError as error:
        lenient = data.decode("utf-8", errors="replace")
        damaged = lenient.count("\ufffd")
        sound = sum(character > "\x7f" for character in lenient) - damaged
        if sound < damaged:
            try:
                return data.decode("gb18030"), "encoding_gb18030"
            except UnicodeDecodeError:
                pass
        raise Unusable("bad_encoding", f"neither UTF-8 nor GB18030: {error}") from None


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unusable("bad_encoding", f"marked as UTF-8 but is not: {error}") from None


def load_json(text: str) -> Any:
    """The value of a JSON text. Raises Unusable("broken_json") with the place of the fault."""
    try:
        return json.loads(text)
    except RecursionError:
        raise Unusable("broken_json", "nested too deeply", text[:2000]) from None
    except ValueError as error:
        raise Unusable("broken_json", str(error), text[:2000]) from None


def json_records(
    parsed: Parsed, text: str, limit: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, record) of a JSON list of objects or of JSON lines, at most `limit` of them.

    A broken line or a record of another type is rejected by its number. A list that is cut off
    gives the records before the cut and one reject for the rest.
    """
    values = _list_items(text) if text.lstrip().startswith("[") else _lines(text)
    for number, value in enumerate(islice(values, limit)):
        if isinstance(value, Unusable):
            parsed.reject(
                value.reason,
                _numbered(parsed, number),
                f"record {number}: {value.detail}",
                value.raw,
            )
        elif not isinstance(value, dict):
            kind = type(value).__name__
            parsed.reject(
                "wrong_shape",
                _numbered(parsed, number),
                f"record {number}: an object was expected, not {kind}",
                json.dumps(value, ensure_ascii=False),
            )
        else:
            yield number, value


def _numbered(parsed: Parsed, number: int) -> str:
    return f"{stem(parsed.name)}#{number}"


def _list_items(text: str) -> Iterator[Any]:
    try:
        yield from json.loads(text)
        return
    except RecursionError:
        yield Unusable("broken_json", "nested too deeply", text[:2000])
        return
    except ValueError:
        pass
    decoder = json.JSONDecoder()
    between = re.compile(r"\s*[\[,]?\s*")
    start = text.index("[")
    while True:
        start = between.match(text, start).end()  # type: ignore[union-attr]
        if text.startswith("]", start):
            rest = text[start + 1 :].strip()
            if rest:
                yield Unusable("broken_json", "text after the end of the list", rest[:2000])
            return
        try:
            value, start = decoder.raw_decode(text, start)
        except ValueError as error:
            yield Unusable("broken_json", f"the list breaks off: {error}", text[start:][:2000])
            return
        yield value


def _lines(text: str) -> Iterator[Any]:
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            yield load_json(line)
        except Unusable as error:
            yield error


def arrange(pairs: Sequence[Pair], changes: Counter[str]) -> list[Turn]:
    """Turns that alternate, the client first and the counselor last.

    Empty turns are dropped, neighbours of one speaker are joined with a newline, a counselor turn
    before the client's first and a client turn after the counselor's last are dropped; `changes`
    counts each. Raises Unusable: empty, one_sided, no_exchange.
    """
    merged: list[tuple[Role, list[str]]] = []
    for role, content in pairs:
        content = content.strip()
        if not content:
            changes["empty_turns_dropped"] += 1
        elif merged and merged[-1][0] == role:
            merged[-1][1].append(content)
            changes["turns_merged"] += 1
        else:
            merged.append((role, [content]))
    if not merged:
        raise Unusable("empty", "no turn holds text")
    if len(merged) == 1:
        raise Unusable("one_sided", f"only the {merged[0][0]} speaks")
    if merged[0][0] == "counselor":
        del merged[0]
        changes["leading_counselor_turns_dropped"] += 1
    if merged[-1][0] == "client":
        del merged[-1]
        changes["trailing_client_turns_dropped"] += 1
    if not merged:
        raise Unusable("no_exchange", "the counselor never answers the client")
    return [Turn(role, "\n".join(parts)) for role, parts in merged]


def text_of(value: Any, what: str) -> str:
    """A string field of a record; a missing one is empty. Raises Unusable("wrong_shape")."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    raise Unusable("wrong_shape", f"{what} must be text, not {type(value).__name__}")


def items_of(value: Any, what: str) -> list[dict[str, Any]]:
    """A list of objects in a record. Raises Unusable("wrong_shape")."""
    if not isinstance(value, list):
        raise Unusable("wrong_shape", f"{what} must be a list, not {type(value).__name__}")
    for item in value:
        if not isinstance(item, dict):
            kind = type(item).__name__
            raise Unusable("wrong_shape", f"{what} must hold objects, not {kind}")
    return value


def role_of(roles: Mapping[str, Role], speaker: Any) -> Role:
    """The role of a corpus's own speaker name. Raises Unusable("unknown_speaker")."""
    try:
        return roles[speaker]
    except (KeyError, TypeError):
        names = ", ".join(roles)
        raise Unusable("unknown_speaker", f"{speaker!r} is none of {names}") from None
