"""BLEU-4 and ROUGE-1/2/L of Chinese replies, equal to LLaMA-Factory's and much faster.

The paper scored with LLaMA-Factory (``train/sft/metric.py``), which composes three libraries:

* BLEU-4: nltk's ``sentence_bleu`` over characters, blanks and newlines included, smoothing
  method 3;
* ROUGE: jieba's tokens joined by spaces, then rouge_chinese, F values. ROUGE-1 and ROUGE-2
  compare sets of n-grams, ROUGE-L is the longest common subsequence of the token lists.
  Where either side has no word all three are 0;
* every score times 100, rounded to 4 places.

Ours counts in compiled code (`segmenter`, `counting`) and leaves each division and
logarithm to the same Python operations in the same order, so the results are equal and not
merely close. Its habits are kept, too: a reply with a newline after a full stop holds an
empty "word", and the empty reply scores 0.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from milm_ray.evaluation import lexicon

METRICS = ("bleu_4", "rouge_1", "rouge_2", "rouge_l")
_CHUNK = 8192  # pairs whose texts are held as arrays at one time: bounds memory, not results


def score_pair(reference: str, prediction: str) -> dict[str, float]:
    """BLEU-4, ROUGE-1, ROUGE-2 and ROUGE-L of one prediction, in percent (0 to 100).

    >>> score_pair("你最近睡得怎么样？", "你最近睡得好吗？")["rouge_1"]
    72.7273
    """
    return {name: float(v[0]) for name, v in score_pairs([reference], [prediction]).items()}


def score_pairs(
    references: Sequence[str], predictions: Sequence[str]
) -> dict[str, NDArray[np.float64]]:
    """The scores of `score_pair` for many pairs, one float64 array per metric.

    A text that occurs many times (a reference, against six models) is segmented once per
    chunk. One core; call it from several processes to use more.
    Raises ValueError when the two lists differ in length.
    """
    if len(references) != len(predictions):
        raise ValueError(
            f"{len(references)} references but {len(predictions)} predictions: "
            "pass one prediction for each reference"
        )
    scores = np.zeros((len(references), len(METRICS)))
    for at in range(0, len(references), _CHUNK):
        chunk = slice(at, at + _CHUNK)
        scores[chunk] = _score_chunk(references[chunk], predictions[chunk])
    return {name: scores[:, i].copy() for i, name in enumerate(METRICS)}


def _score_chunk(references: Sequence[str], predictions: Sequence[str]) -> list[list[float]]:
    from milm_ray.evaluation import counting, segmenter

    index: dict[str, int] = {}
    refs = np.array([index.setdefault(t, len(index)) for t in references], np.int64)
    hyps = np.array([index.setdefault(t, len(index)) for t in predictions], np.int64)
    text, offsets = lexicon.code_points(list(index))

    ends = np.zeros(len(text), np.int64)
    tokens = np.zeros(len(index), np.int64)
    segmenter.token_ends(text, offsets, lexicon.load(), ends, tokens)
    starts = np.zeros(len(text), np.int64)
    stops = np.zeros(len(text), np.int64)
    words = np.zeros(len(index), np.int64)
    counting.rouge_words(text, offsets, ends, tokens, starts, stops, words)
    counts = np.zeros((len(refs), 11), np.int64)
    counting.pair_counts(text, offsets, starts, stops, words, refs, hyps, counts)

    result = []
    for ref, hyp, row in zip(references, predictions, counts.tolist(), strict=True):
        hyp_words, ref_words = words[index[hyp]], words[index[ref]]
        result.append(
            [
                round(_bleu(row[:4], len(ref), len(hyp)) * 100, 4),
                round(_f_value(row[4], row[5], row[6]) * 100, 4),
                round(_f_value(row[7], row[8], row[9]) * 100, 4),
                round(_f_value(int(hyp_words), int(ref_words), row[10]) * 100, 4),
            ]
        )
    return result


@lru_cache(maxsize=65536)
def _weighted_log(numerator: int, denominator: int) -> float:
    return 0.25 * math.log(numerator / denominator)


def _bleu(matches: list[int], ref_length: int, hyp_length: int) -> float:
    """Sentence BLEU from clipped matches; smoothing method 3 halves for each order without."""
    if matches[0] == 0:
        return 0.0
    penalty = 1.0 if hyp_length > ref_length else math.exp(1 - ref_length / hyp_length)
    logs = []
    halvings = 1
    for order, match in enumerate(matches):
        total = max(1, hyp_length - order)
        if match:
            logs.append(_weighted_log(match, total))
        else:
            logs.append(_weighted_log(1, 2**halvings * total))
            halvings += 1
    return penalty * math.exp(math.fsum(logs))


def _f_value(hyp_count: int, ref_count: int, overlap: int) -> float:
    precision = overlap / hyp_count if hyp_count else 0.0
    recall = overlap / ref_count if ref_count else 0.0
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))
