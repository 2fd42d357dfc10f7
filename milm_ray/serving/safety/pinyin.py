"""Pinyin that spells a risk sentence ("wo bu xiang huo le"), back to characters.

Not an input method: it knows the words that the rules need. A run of letters that does not parse
as pinyin, or parses to nothing of interest, is left as it was, so English stays English.
"""

from __future__ import annotations

import itertools
import re

_INITIALS = ("", "zh", "ch", "sh", *"bpmfdtnlgkhjqxrzcsyw")
_FINALS = [
    "iang", "iong", "uang", "ang", "eng", "ing", "ong", "ian", "iao", "uai", "uan", "van", "ai",
    "ei", "ao", "ou", "an", "en", "in", "un", "ie", "ia", "iu", "ui", "uo", "ua", "ue", "ve",
    *"aoeiuv",
]  # fmt: skip
_SYLLABLES = {"er"} | {a + b for a, b in itertools.product(_INITIALS, _FINALS)}
_LETTERS = max(map(len, _SYLLABLES))
_WORDS = {
    "zi sha": "自杀", "zi can": "自残", "zi jin": "自尽", "zi shang": "自伤", "qing sheng": "轻生",
    "tiao lou": "跳楼", "tiao he": "跳河", "tiao xia qu": "跳下去", "ge wan": "割腕",
    "shang diao": "上吊", "shao tan": "烧炭", "yi shu": "遗书", "an mian yao": "安眠药",
    "nong yao": "农药", "si le suan le": "死了算了", "bu xiang huo": "不想活",
    "xiang si": "想死", "qu si": "去死", "huo bu xia qu": "活不下去", "huo zhe": "活着",
    "mei yi si": "没意思", "mei you yi si": "没意思", "jie shu sheng ming": "结束生命",
    "yi liao bai liao": "一了百了", "sha ren": "杀人", "sha le": "杀了", "sha si": "杀死",
    "kan si": "砍死", "nong si": "弄死", "da si": "打死", "jia bao": "家暴", "qiang jian": "强奸",
    "cui tu": "催吐", "jie shu zi ji": "结束自己", "li kai zhe ge shi jie": "离开这个世界",
    "bu xiang xing lai": "不想醒来", "si le": "死了", "xiang qing": "想轻",
    "yi ping": "一瓶", "tun": "吞", "wo": "我", "bu": "不", "xiang": "想", "yao": "要", "le": "了",
    "zhen de": "真的", "mei": "没", "mei you": "没有", "you": "有", "cong lai": "从来",
    "guo": "过", "jin wan": "今晚", "jin tian": "今天", "ming tian": "明天", "jiu": "就",
    "ta": "他", "ta men": "他们", "ni": "你", "huo": "活", "si": "死", "he": "喝", "chi": "吃",
    "zi ji": "自己", "hao": "好", "he ni": "和你", "peng you": "朋友", "shuo": "说", "qu": "去",
    "zhi xiang": "只想", "yi zhi": "一直", "mei tian": "每天", "zai": "在", "dou": "都",
    "zen me": "怎么", "ba": "爸", "ma": "妈", "lao gong": "老公", "da wo": "打我",
    "sha": "杀", "de": "的", "yi": "一", "ge": "个", "ren": "人", "ye": "也", "hen": "很",
    "dao": "刀", "gao su wo": "告诉我", "xie hao": "写好", "xie le": "写了", "yi jing": "已经",
    "zhun bei": "准备", "zui kuai": "最快", "fang fa": "方法", "shi": "是",
}  # fmt: skip
_LONGEST = max(key.count(" ") for key in _WORDS) + 1
_RISK = re.compile(
    "自杀|自残|自尽|自伤|轻生|跳楼|跳河|跳下去|割腕|上吊|烧炭|遗书|安眠药|农药|不想活|想死|去死"
    "|活不下去|没意思|结束|一了百了|杀人|杀了|杀死|砍死|弄死|打死|家暴|强奸|催吐|离开这个世界"
    "|不想醒来|死了|打我"
)


def to_hanzi(run: str) -> str | None:
    """The characters a run of lower-case letters and spaces spells, or None if no risk word does.

    Syllables without a known character become 〇, so that a rule cannot match across them.
    """
    syllables: list[str] = []
    for token in run.split():
        parse = _split(token)
        if parse is None:
            return None
        syllables += parse
    out: list[str] = []
    at = 0
    while at < len(syllables):
        for size in range(min(_LONGEST, len(syllables) - at), 0, -1):
            word = _WORDS.get(" ".join(syllables[at : at + size]))
            if word or size == 1:
                out.append(word or "〇")
                at += size
                break
    text = "".join(out)
    return text if _RISK.search(text) else None


def _split(token: str) -> list[str] | None:
    """One parse of `token` into syllables, longest first (xianghuo, gewan); None: there is none."""
    # Whether the letters from each place on parse, from the end: a search would try the parses of
    # a long ambiguous run ("aiaiai…") one by one.
    size = len(token)
    parses = [False] * size + [True]
    for start in reversed(range(size)):
        parses[start] = any(
            parses[end] and token[start:end] in _SYLLABLES
            for end in range(start + 1, min(start + _LETTERS, size) + 1)
        )
    if not parses[0]:
        return None
    pieces: list[str] = []
    start = 0
    while start < size:
        start, piece = next(
            (end, token[start:end])
            for end in range(min(start + _LETTERS, size), start, -1)
            if parses[end] and token[start:end] in _SYLLABLES
        )
        pieces.append(piece)
    return pieces
