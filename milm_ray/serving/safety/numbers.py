"""Numbers to call in a reply: any that is not configured is the model's invention."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator

# In a sentence with one of these every number may be one to call. The last few count only where a
# number follows closely: what people find, hit or reach is mostly none.
_CALL = re.compile(
    r"热线|专线|电话|号码|拨|致电|来电|打给|求助|\b(?:call|dial|phone|hotline|helpline)"
    r"|(?:联系|联络)[^\d。！？]{0,4}(?=\d{3})|(?:打|打通|找|咨询)\s?(?=\d{3})"
    r"|\b(?:contact|text)\b\D{0,12}(?=\d{3})|\breach\b\D{0,12}\b(?:at|on|to) (?=\d{3})",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[。！？!?]|\.(?=\s)")
_BEFORE = 12  # characters read of the sentence before: "有一条热线。12320就是。"
_RUN = re.compile(r"\d(?:[\d\-–— ]*\d)?")
_LONGEST = 13  # digits, with a country's code
_MEASURE_WORD = (
    r"[年天周次个岁秒元块步克斤米字页条遍名位件杯支根瓶包盒层楼级度倍种套集万亿多余升卡]"
    r"|分(?!机)|人(?!工)"
)
_MEASURE = (
    r"[%‰]|分钟|小时|钟头|公[斤里分升]|[千毫][卡克升米]|大卡|[美日欧]元|平[米方]"
    r"|左右|以[上下内]|之[间内]"
    r"|(?:calories|kcal|steps?|(?:kilo|milli|centi)?(?:met(?:er|re)|gram|lit(?:er|re))s?|k[gm]|m[gl]"
    r"|seconds?|minutes?|hours?|days?|weeks?|months?|years?|times|people|pounds?|lbs?|dollars?"
    r"|bucks|percent|words?|miles?|points?|cigarettes?)\b"
)
_TO = r"(?:[~至到]\s?\d+\s?)?"
_AMOUNT_AFTER, _AMOUNT_CLOSE_AFTER = (
    re.compile(
        rf"[./]\d{{1,2}}(?!\d)|\s?{_TO}(?:{_MEASURE})|{space}{_TO}(?:{_MEASURE_WORD})",
        re.IGNORECASE,
    )
    # "拨打95003 天津热线": a character behind a space need not belong to a number to call.
    for space in (r"\s?", "")
)
_AMOUNT_BEFORE = re.compile(r"(?:(?:第|[¥$€£])\s?|\d\.)$")
_YEAR = r"(?:19|20)\d\d"
_DATE = re.compile(
    rf"{_YEAR}-\d{{1,2}}(?:-\d{{1,2}})?|{_YEAR}[01]\d[0-3]\d|{_YEAR}(?:[-–— ]+{_YEAR})+"
)
_YEAR_AFTER = re.compile(r"\b(?:in|since|from|until|by|before|after|during|year)\s$", re.IGNORECASE)


def invents_number(text: str, known: Collection[str]) -> bool:
    """Whether `text` gives a number to call that is none of `known`, which are digits only."""
    text = unicodedata.normalize("NFKC", text)
    for run in _RUN.finditer(text):
        for start, number in _unknown(text, run, known):
            to_call = _is_to_call(text, start, number)
            if (to_call or _looks_like_a_phone(number)) and not _is_amount(
                text, start, number, _AMOUNT_CLOSE_AFTER if to_call else _AMOUNT_AFTER
            ):
                return True
    return False


def digits(number: str) -> str:
    return re.sub(r"\D", "", number)


def _unknown(text: str, run: re.Match[str], known: Collection[str]) -> Iterator[tuple[int, str]]:
    """Place and text of what is unknown in a run of digits: one number with spaces, or several."""
    parts = list(re.finditer(r"\S+", run.group()))
    if len(parts) > 1 and _AMOUNT_AFTER.match(text, run.end()):
        last = parts.pop()  # "1-800-273-8255 24 hours": the amount is not part of the number
        yield run.start() + last.start(), last.group()
    whole = run.group()[: parts[-1].end()]
    if digits(whole) in known:
        return
    unknown = [part for part in parts if digits(part.group()) not in known]
    if len(unknown) == len(parts) and len(digits(whole)) <= _LONGEST:
        yield run.start(), whole
    else:
        yield from ((run.start() + part.start(), part.group()) for part in unknown)


def _is_amount(text: str, start: int, number: str, after: re.Pattern[str]) -> bool:
    before = text[max(0, start - 8) : start]
    return bool(
        _DATE.fullmatch(number)
        or after.match(text, start + len(number))
        or _AMOUNT_BEFORE.search(before)
        or (re.fullmatch(_YEAR, number) and _YEAR_AFTER.search(before))
    )


def _looks_like_a_phone(number: str) -> bool:
    """Whether a number is one to call whatever is said about it."""
    groups = re.findall(r"\d+", number)
    if len(groups) == 2 and all(3 <= len(group) <= 4 for group in groups):
        # 800-1200 is a range.
        return groups[0].startswith("0") or int(groups[0]) >= int(groups[1])
    return 7 <= sum(map(len, groups)) <= _LONGEST and max(map(len, groups)) >= 3


def _is_to_call(text: str, start: int, number: str) -> bool:
    if len(digits(number)) < 3:
        return False
    ends = [match.end() for match in _SENTENCE_END.finditer(text, 0, start)]
    end = _SENTENCE_END.search(text, start)
    first = max(0, ends[-1] - _BEFORE) if ends else 0
    return _CALL.search(text[first : end.start() if end else len(text)]) is not None
