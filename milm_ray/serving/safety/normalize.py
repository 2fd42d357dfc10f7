"""Text as the rules and the classifier read it: one script, one width, no disguises.

A client may write 自殺, 自 杀, zi sha, 紫砂 or 🔪 for the same thing, by habit of a platform
that hides the plain word or to get past a filter. `normalize` undoes what can be undone without
changing the meaning of ordinary text; what is ambiguous (紫砂壶 is a teapot) is left alone.
"""

from __future__ import annotations

import re
import unicodedata

from milm_ray.serving.safety import pinyin

BREAK = "，"  # stands for every clause boundary in normalised text

# Only the characters the rules need; a full conversion table would be a dependency for nothing.
_TRADITIONAL = (
    "殺杀 傷伤 樓楼 燒烧 藥药 遺遗 書书 寫写 結结 離离 開开 個个 們们 這这 裡里 裏里 "
    "麼么 麽么 會会 來来 時时 間间 過过 還还 沒没 說说 話话 讓让 對对 給给 從从 後后 "
    "覺觉 難难 愛爱 媽妈 爺爷 兒儿 孫孙 親亲 學学 師师 醫医 體体 頭头 腦脑 聲声 聽听 "
    "見见 點点 歲岁 將将 準准 備备 買买 賣卖 車车 橋桥 繩绳 槍枪 彈弹 毆殴 強强 脅胁 "
    "懷怀 網网 錢钱 煙烟 菸烟 暈晕 氣气 緊紧 劇剧 陣阵 壓压 發发 臉脸 癱瘫 瘋疯 監监 "
    "蹤踪 竊窃 電电 視视 廣广 飯饭 瀉泻 減减 飽饱 廁厕 嘔呕 餓饿 厭厌 絕绝 無无 義义 "
    "願愿 撐撑 繼继 續续 負负 擔担 關关 係系 誰谁 該该 條条 臺台 陽阳 顆颗 農农 滅灭 "
    "斷断 輕轻 尋寻 許许 經经 嗎吗 歡欢 樣样 種种 滿满 現现 實实 處处 罵骂 數数 歷历 "
    "劑剂 導导 飛飞 嚴严 誤误 論论 聞闻 遊游 戲戏 別别 總总 當当 應应 夠够 邊边 進进 "
    "隻只 國国 為为 爲为 與与 長长 門门 問问 馬马 乾干 幹干 復复 聯联 嬰婴 產产 貓猫 "
    "號号 碼码 銀银 鄰邻 顧顾 託托 謝谢 訣诀 淚泪 膚肤 臟脏 髮发 腸肠 膽胆 潰溃 瘍疡 "
    "熱热 選选 擇择 變变 縱纵 縛缚 綁绑 鎖锁 騙骗 誘诱 約约 談谈 戀恋 異异 獨独 鬱郁 "
    "憂忧 慮虑 場场 墜坠 纏缠 麵面 塊块 壞坏 夢梦 靈灵 幾几 鐵铁 軌轨 針针 綠绿 試试 "
    "圍围 終终 於于 歸归 轉转 達达 運运 動动 務务 員员 課课 題题 識识 讀读 語语 證证 "
    "護护 憶忆 悶闷 閉闭 嚇吓 嚐尝 嘗尝 啞哑 嘆叹 噁恶 惡恶 鬧闹 葯药 著着 "
)
_EMOJI = dict(zip("🔪🗡💊🩸🔫⚰🪦", "刀刀药血枪死死", strict=True)) | {"💣": "炸弹"}
_LOOKALIKE = dict(zip("аеіорсухѕкαοε", "aeiopcyxskaoe", strict=True))  # Cyrillic and Greek
_FOLD = str.maketrans(
    {**{pair[0]: pair[1] for pair in _TRADITIONAL.split()}, **_EMOJI, **_LOOKALIKE}
)
_LEET = str.maketrans("01345@$!", "oieasasi")

_HAN = r"\u3400-\u9fff〇"
# Words re-joined whatever stands between their characters (自.杀, 自~~杀, 自x杀).
_STRONG = [
    "自杀", "自残", "自尽", "自伤", "轻生", "跳楼", "割腕", "上吊", "烧炭", "遗书",
    "想死", "去死", "寻死", "杀人", "杀了", "安眠药", "农药", "不想活", "强奸", "家暴",
    "催吐",
]  # fmt: skip
_APART = [
    (re.compile(rf"(?:[^\w{_HAN}]|[〇xX0oO+]){{1,4}}".join(word), re.ASCII), word)
    for word in _STRONG
]
# One character of the word in letters: 跳lou, 割wan, 自s. Word → pinyin of its characters.
_SPELLED = {
    "自杀": "zi sha", "自残": "zi can", "自尽": "zi jin", "轻生": "qing sheng", "跳楼": "tiao lou",
    "割腕": "ge wan", "上吊": "shang diao", "烧炭": "shao tan", "遗书": "yi shu",
    "农药": "nong yao",
    "安眠药": "an mian yao", "想死": "xiang si", "去死": "qu si", "杀人": "sha ren",
    "吞药": "tun yao", "强奸": "qiang jian", "家暴": "jia bao", "催吐": "cui tu",
    "不想活": "bu xiang huo", "死掉": "si diao", "刀划": "dao hua", "刀割": "dao ge",
}  # fmt: skip


def _spelled_variants() -> dict[str, str]:
    """Every mix of characters and letters for a word: {"自sha": "自杀", "zisha": "自杀", …}.

    A lone initial counts only beside a character: "zs" in letters alone is too common a string.
    """
    variants: dict[str, str] = {}
    for word, sounds in _SPELLED.items():
        mixes = [""]
        for char, sound in zip(word, sounds.split(), strict=True):
            initial = sound[:2] if sound[1] == "h" else sound[0]
            forms = dict.fromkeys((char, sound, initial, sound[0]))
            mixes = [mix + form for mix in mixes for form in forms]
        full = sounds.replace(" ", "")
        for mix in mixes:
            if mix != word and (mix == full or not mix.isascii()):
                variants[mix] = word
    return variants


_VARIANTS = _spelled_variants()
_VARIANT = re.compile(
    r"(?<![a-z])(?:" + "|".join(sorted(_VARIANTS, key=len, reverse=True)) + r")(?![a-z])"
)
_TEAPOT = r"(?![壶茶杯锅煲泥盆器裙窗帘衣巾花陶罐碗瓶艺的色])"
# Same sound or slang, each with the company in which it means something else left out.
_HOMOPHONES = [
    (re.compile(r"(?<=[想要])s(?=了[他她你])"), "杀"),
    (re.compile(rf"(?<![兴泡买喝茶把套件藏])紫[砂莎纱沙鲨]{_TEAPOT}"), "自杀"),
    (re.compile(r"(?<!紫)(?:自|芷|籽|孜|梓|兹|滋)(?:砂|莎|纱|沙|鲨|刹|煞|铩)(?!发|漠)"), "自杀"),
    (re.compile(r"鲨(?=了|死|人|掉|他|她|我|自己)(?!鱼)"), "杀"),
    (re.compile(r"割[碗婉宛万]"), "割腕"),
    (re.compile("亖"), "死"),
    (re.compile(r"(?<=不想)(?:或|货|祸)(?=了|下去|$|，)"), "活"),
    (re.compile(r"跳(?:娄|喽|搂)"), "跳楼"),
    (re.compile(r"(想|去|要|不如)(?:4|s|si|屎|4一4|逝|似)(?:了)?(?=[^0-9a-z\u3400-\u9fff]|了|$|想|天天|一)"
                r"(?!一[个次天些下样])"), r"\1死"),
    (re.compile(r"死一(?:4|死)"), "死"),
    (re.compile(r"(?<![0-9a-z])(?:4|si|s)(?=了(?:算了|得了|一了百了|就)|掉)"), "死"),
    (re.compile(r"自己[嘎噶](?=了|掉|$|，)|[嘎噶](?:了|掉)(?:我)?自己"), "自己杀了自己"),
    (re.compile(r"(?:想|要)[嘎噶](?=了|掉|$|，)"), "想死"),
    (re.compile(r"安眠(?:要|yao|y)(?![a-z])"), "安眠药"),
    (re.compile(r"(?:想|要)(?:kms|zs|自s)(?![a-z])"), "想自杀"),
    (re.compile(r"(?<!王者)(?:白给|下线)人生"), "结束生命"),
]  # fmt: skip
# English words inside a Chinese sentence (真的好想 die), where the rules for either alone miss.
_MIXED = {
    "want to": "想", "wanna": "想", "going to": "要", "gonna": "要", "commit suicide": "自杀",
    "suicide": "自杀", "kill myself": "自杀", "kms": "自杀", "die": "死", "end it all": "结束一切",
    "end it": "结束一切", "end my life": "结束生命", "self harm": "自残", "cutting": "割",
    "cut": "割", "alive": "活", "live": "活", "myself": "自己", "kill": "杀", "jump": "跳下去",
    "pills": "药", "how to": "怎么", "tonight": "今晚", "my": "我的", "i": "我",
}  # fmt: skip
_MIXED_WORD = re.compile(
    r"(?<![a-z])(?:" + "|".join(sorted(_MIXED, key=len, reverse=True)) + r")(?![a-z])"
)
_MARK = r",.!?;:，。！？；：、…—～\n\r\"“”‘’()（）\[\]【】《》「」『』<>"
_CLAUSE_END = re.compile(rf"[{_MARK}][{_MARK} ]*")
_SINGLES = re.compile(rf"(?<![{_HAN}])(?:[{_HAN}][^\w{_HAN}]{{1,3}}){{2,}}[{_HAN}](?![{_HAN}])")
_NOT_WORD = re.compile(rf"[^0-9a-z{_HAN}]+")
_SPACES = re.compile(r"[^\S\n\r]+")
_HAN_GAP = re.compile(rf"(?<=[{_HAN}，0-9]) +| +(?=[{_HAN}，])")
_LETTER_RUN = re.compile(r"(?<![a-z])(?:[a-z][ .*_\-]{1,2}){2,}[a-z](?![a-z])")
_TONED = re.compile(r"(?<![0-9a-z])(?:[a-z]+[1-5] ?){2,}(?![0-9a-z])")
_LEET_WORD = re.compile(r"(?<![0-9a-z])[a-z0-9@$!]*[a-z][a-z0-9@$!]*(?![0-9a-z])")
_LATIN_RUN = re.compile(r"[a-z][a-z ]*[a-z]")


def normalize(text: str, mixed: bool = True) -> str:
    """`text` folded for matching; clause boundaries become `，`. Total: any str is accepted.

    Width and case folded (NFKC), accents and invisible characters dropped, traditional to
    simplified, look-alike letters and emoji replaced, separators inside words removed, pinyin
    that spells a risk word and known homophones turned into the plain word. mixed: English words
    in a Chinese text are turned into Chinese ones too.
    """
    text = unicodedata.normalize("NFKD", text).lower()
    text = "".join(char for char in text if unicodedata.category(char) not in ("Mn", "Cf", "Cs"))
    text = text.translate(_FOLD)
    text = text.replace("'", "").replace("’", "").replace("_", " ").replace("`", "")
    if not text.isascii():
        # Before anything else looks at neighbours: 洗 脑，控 制 is 洗脑，控制.
        text = _HAN_GAP.sub("", _SPACES.sub(" ", text))
        for pattern, word in _APART:
            text = pattern.sub(word, text)
        text = _SINGLES.sub(lambda m: _NOT_WORD.sub("", m.group()), text)
    text = _TONED.sub(_untoned, text)
    text = _LEET_WORD.sub(_unleet, text)
    text = _LETTER_RUN.sub(lambda m: re.sub("[^a-z]", "", m.group()), text)
    text = text.replace("《", "，书里，")  # a title: the rules read it as a story
    text = _CLAUSE_END.sub(BREAK, text)
    text = re.sub(rf"[^0-9a-z{_HAN}，]+", " ", text)
    text = _HAN_GAP.sub("", text)
    if mixed and re.search(f"[{_HAN}]", text) and re.search("[a-z]{2}", text):
        text = _HAN_GAP.sub("", _MIXED_WORD.sub(lambda m: _MIXED[m.group()], text))
    text = _VARIANT.sub(lambda m: _VARIANTS[m.group()], text)
    text = _LATIN_RUN.sub(lambda m: pinyin.to_hanzi(m.group()) or m.group(), text)
    for pattern, plain in _HOMOPHONES:
        text = pattern.sub(plain, text)
    return text.strip(" ，")


def _unleet(match: re.Match[str]) -> str:
    """The word that digits and marks among its letters spell; one they cannot spell is a code."""
    word = match.group()
    if word.isalpha() or not re.search(r"[a-z][0-9@$!]+[a-z]", word):
        return word  # 13f, 2b: letters on one side only are a quantity or a name
    plain = word.translate(_LEET)
    return plain if plain.isalpha() else word


def _untoned(match: re.Match[str]) -> str:
    """Pinyin without its tone numbers (wo3 xiang3 si3), where it spells a risk word."""
    letters = re.sub("[1-5] ?", " ", match.group())
    return letters if pinyin.to_hanzi(letters) else match.group()
