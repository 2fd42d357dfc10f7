"""Our overlap scores against the libraries that LLaMA-Factory composes, run as it runs them."""

import logging

import jieba
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge
from sacrebleu.metrics import CHRF

from milm_ray.evaluation import lexicon, segmenter
from milm_ray.evaluation.overlap import METRICS, chrf_pairs, score_pair, score_pairs

jieba.setLogLevel(logging.CRITICAL)

# Written for this test: replies with the marks, blanks and numbers that trip tokenizers.
REPLIES = [
    "听起来，你一直在努力照顾家里人，却很少有人问你累不累。",
    "你刚才说“再也不想熬夜了”，是什么让你今天想谈这件事？",
    "嗯……我明白。\n\n你愿意的话，我们可以先看看这周的睡眠记录？",
    "体重从72.5kg降到70kg，也就是3.4%，这不是小事！你是怎么做到的？",
    "如果用0到10分来表示信心，你会打几分？为什么不是更低？",
    "OK，那我们下周三15:30见。",
    "你担心......说出来会被笑话。.......其实很多人都有过。",
    "  开头有空格，结尾也有空格  ",
    "第一段。\r\n第二段。\r\n\r\n第三段。",
    "\n回答前面带一个换行",
    "\r\n回答前面带一个回车换行",
    "欧阳震华和诸葛亮都失眠，㐂䶮𠮷是少见的字。",
    "哈哈哈哈哈哈哈哈哈哈哈哈",
    "😀🙂 开心就好~",
    "。。。？？！！",
    "C++和A/B测试，user_name@example.com，https://example.com/a?b=1&c=2",
    "？”他说。”对吗？”",
    "再",
    "",
    " \n\t　",
]


def peer(reference: str, prediction: str) -> dict[str, float]:
    """LLaMA-Factory's metric for one pair (src/llamafactory/train/sft/metric.py)."""
    hyp = " ".join(jieba.cut(prediction))
    ref = " ".join(jieba.cut(reference))
    if not hyp.split() or not ref.split():
        rouge = {key: {"f": 0.0} for key in ("rouge-1", "rouge-2", "rouge-l")}
    else:
        rouge = Rouge().get_scores(hyp, ref)[0]
    bleu = sentence_bleu(
        [list(reference)], list(prediction), smoothing_function=SmoothingFunction().method3
    )
    return {
        "bleu_4": round(bleu * 100, 4),
        "rouge_1": round(rouge["rouge-1"]["f"] * 100, 4),
        "rouge_2": round(rouge["rouge-2"]["f"] * 100, 4),
        "rouge_l": round(rouge["rouge-l"]["f"] * 100, 4),
    }


def test_every_pair_of_realistic_replies_scores_as_the_peer_does():
    refs = [a for a in REPLIES for _ in REPLIES]
    hyps = REPLIES * len(REPLIES)
    ours = score_pairs(refs, hyps)
    for i, (ref, hyp) in enumerate(zip(refs, hyps, strict=True)):
        assert {m: ours[m][i] for m in METRICS} == peer(ref, hyp), (ref, hyp)


PIECES = st.sampled_from(
    [*"我你的了是不想睡觉减肥手机运动。！？?，、“”’…·% -+#&._12ab\n\r\t　", "......", "。\n", "𠮷"]
)
CHINESE = st.lists(PIECES, max_size=40).map("".join)


@settings(max_examples=300, deadline=None)
@given(CHINESE, CHINESE)
@example("甲。\n乙", "甲。乙")
@example(".......", "...... .")
@example("\n", "\n\n你好")
def test_generated_chinese_scores_as_the_peer_does(reference, prediction):
    assert score_pair(reference, prediction) == peer(reference, prediction)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_arbitrary_unicode_scores_as_the_peer_does(reference, prediction):
    assert score_pair(reference, prediction) == peer(reference, prediction)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), max_size=30))
def test_han_text_that_is_no_word_is_segmented_as_jieba_does(text):
    """Random characters leave nearly everything to the HMM, unknown emissions included."""
    assert lexicon.segment([text]) == [list(jieba.cut(text))]


def test_long_texts_cross_the_64_bit_blocks_of_the_lcs():
    reference = "".join(f"{i}号来访者说晚上睡不好，" for i in range(60))
    prediction = "".join(f"{i}号来访者觉得白天很困。" for i in range(0, 90, 2))
    assert score_pair(reference, prediction) == peer(reference, prediction)
    assert score_pair(prediction, reference) == peer(prediction, reference)


def test_blanks_are_pythons_blanks():
    differing = [c for c in range(0x110000) if segmenter.is_space(c) != chr(c).isspace()]
    assert differing == []


def test_identical_texts_score_100_but_for_the_peers_epsilon():
    scores = score_pair("我想早点睡觉，可是总放不下手机。", "我想早点睡觉，可是总放不下手机。")
    assert scores == {"bleu_4": 100.0, "rouge_1": 100.0, "rouge_2": 100.0, "rouge_l": 100.0}


def test_an_empty_side_scores_zero():
    zero = dict.fromkeys(METRICS, 0.0)
    assert score_pair("你好。", "") == zero
    assert score_pair("", "你好。") == zero
    assert score_pair("", "") == zero


def test_rouge_is_zero_but_bleu_is_not_when_only_blanks_agree():
    scores = score_pair("a b", " ")
    assert scores["rouge_1"] == scores["rouge_l"] == 0.0
    assert scores["bleu_4"] == peer("a b", " ")["bleu_4"] > 0


def test_many_pairs_in_one_call_keep_their_order(monkeypatch):
    monkeypatch.setattr("milm_ray.evaluation.overlap._CHUNK", 7)
    hyps = REPLIES[::-1]
    scores = score_pairs(REPLIES, hyps)
    for i, (ref, hyp) in enumerate(zip(REPLIES, hyps, strict=True)):
        assert {m: scores[m][i] for m in METRICS} == score_pair(ref, hyp)
    assert score_pairs([], [])["bleu_4"].shape == (0,)


@pytest.mark.parametrize("pair", [(None, "好"), ("好", None), ("好", 3)])
def test_what_is_no_text_is_refused(pair):
    with pytest.raises(TypeError, match="not a text"):
        score_pair(*pair)


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="2 references but 1 predictions"):
        score_pairs(["甲", "乙"], ["甲"])
    with pytest.raises(ValueError, match="2 references but 1 predictions"):
        chrf_pairs(["甲", "乙"], ["甲"])


@settings(max_examples=200, deadline=None)
@given(CHINESE, CHINESE)
@example("", "好")
@example("好", "好")
def test_chrf_is_sacrebleus(reference, prediction):
    expected = CHRF().sentence_score(prediction, [reference]).score
    assert chrf_pairs([reference], [prediction])[0] == round(expected, 4)
