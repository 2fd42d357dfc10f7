"""jieba's own dictionary and HMM as arrays for the compiled segmenter.

Only jieba's default dictionary is used, as in LLaMA-Factory's metric: words that a program
has added to jieba at run time do not change a score.
"""

from functools import lru_cache
from itertools import pairwise
from math import log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Lexicon(NamedTuple):
    """What the kernels need; the field order is the kernels' own."""

    keys: NDArray[np.int64]  # open addressing: (parent node << 21) | code point, or -1
    nodes: NDArray[np.int32]  # the child node at the same position
    is_word: NDArray[np.bool_]  # by node
    log_probability: NDArray[np.float64]  # by node: log frequency - log total
    unknown: float  # the same for a character that is no word
    start: NDArray[np.float64]  # by state, states in the order B, E, M, S
    transition: NDArray[np.float64]  # from, to
    emission: NDArray[np.float64]  # by han code point - 0x4E00, state


def code_points(texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """All texts end to end as code points, and the len(texts) + 1 offsets between them."""
    joined = "".join(texts).encode("utf-32-le", "surrogatepass")
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    return np.frombuffer(joined, dtype="<i4").astype(np.int32), offsets


def _frequencies() -> tuple[dict[str, int], int]:
    """Word frequencies and their total, as jieba counts them (a repeated word counts twice)."""
    from jieba import get_module_res

    frequencies: dict[str, int] = {}
    total = 0
    with get_module_res("dict.txt") as file:
        for line in file.read().decode("utf-8").splitlines():
            word, count = line.strip().split(" ")[:2]
            frequencies[word] = int(count)
            total += int(count)
    return frequencies, total


@lru_cache(maxsize=1)
def load() -> Lexicon:
    """jieba's dictionary and HMM, once per process (about a second, 40 MB)."""
    from jieba.finalseg import MIN_FLOAT
    from jieba.finalseg.prob_emit import P as emit
    from jieba.finalseg.prob_start import P as start
    from jieba.finalseg.prob_trans import P as trans

    from milm_ray.evaluation import segmenter

    frequencies, total = _frequencies()
    text, offsets = code_points(list(frequencies))
    size = 1 << (2 * len(frequencies)).bit_length()
    keys = np.full(size, -1, np.int64)
    nodes = np.zeros(size, np.int32)
    words = np.zeros(len(frequencies), np.int64)
    count = segmenter.build_trie(text, offsets, keys, nodes, words)

    # math.log and this order of operations are jieba's: equal sums decide between words.
    log_total = log(total)
    is_word = np.zeros(count, np.bool_)
    log_probability = np.zeros(count, np.float64)
    is_word[words] = [n > 0 for n in frequencies.values()]
    log_probability[words] = [log(n or 1) - log_total for n in frequencies.values()]

    states = "BEMS"
    emission = np.full((segmenter.LAST_HAN - segmenter.FIRST_HAN + 1, 4), MIN_FLOAT)
    for i, state in enumerate(states):
        for char, p in emit[state].items():
            if segmenter.FIRST_HAN <= ord(char) <= segmenter.LAST_HAN:
                emission[ord(char) - segmenter.FIRST_HAN, i] = p
    return Lexicon(
        keys,
        nodes,
        is_word,
        log_probability,
        log(1) - log_total,
        np.array([start[s] for s in states]),
        np.array([[trans[a].get(b, MIN_FLOAT) for b in states] for a in states]),
        emission,
    )


def segment(texts: list[str]) -> list[list[str]]:
    """The tokens of each text, equal to ``list(jieba.cut(text))``.

    >>> segment(["我想早点睡。"])
    [['我', '想', '早点', '睡', '。']]
    """
    from milm_ray.evaluation import segmenter

    text, offsets = code_points(texts)
    ends = np.zeros(len(text), np.int64)
    counts = np.zeros(len(texts), np.int64)
    segmenter.token_ends(text, offsets, load(), ends, counts)
    result = []
    for i, source in enumerate(texts):
        at = int(offsets[i])
        cuts = [0, *(ends[at : at + counts[i]] - at).tolist()]
        result.append([source[a:b] for a, b in pairwise(cuts)])
    return result
