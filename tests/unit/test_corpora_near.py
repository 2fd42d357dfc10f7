"""MinHash signatures and near-duplicate search against exact set arithmetic."""

from __future__ import annotations

import random

import numpy as np
import pytest

from milm_ray.corpora.near import BINS, near_pairs, repeats, signatures

ALPHABET = [chr(0x4E00 + n) for n in range(600)]


def essay(rng: random.Random, length: int) -> str:
    return "".join(rng.choice(ALPHABET) for _ in range(length))


def edited(rng: random.Random, text: str, edits: int) -> str:
    letters = list(text)
    for place in rng.sample(range(len(letters)), edits):
        letters[place] = rng.choice(ALPHABET)
    return "".join(letters)


def jaccard(one: str, other: str) -> float:
    first, second = ({t[i : i + 5] for i in range(len(t) - 4)} for t in (one, other))
    return len(first & second) / len(first | second)


@pytest.mark.parametrize(("length", "edits"), [(800, 5), (800, 30), (90, 2), (5000, 400)])
def test_the_estimate_is_the_jaccard_similarity(length: int, edits: int) -> None:
    rng = random.Random(length)
    errors = []
    for _ in range(60):
        text = essay(rng, length)
        other = edited(rng, text, edits)
        rows = signatures([text, other])
        errors.append((rows[0] == rows[1]).mean() - jaccard(text, other))
    assert abs(np.mean(errors)) < 0.03
    assert np.std(errors) < 0.06


def test_a_text_has_the_same_signature_whatever_stands_beside_it() -> None:
    rng = random.Random(1)
    texts = [essay(rng, n) for n in (0, 3, 5, 40, 700)]
    together = signatures(texts)
    for row, text in zip(together, texts, strict=True):
        assert (signatures([text])[0] == row).all()
    assert signatures([]).shape == (0, BINS)


def test_punctuation_and_spaces_do_not_count() -> None:
    rows = signatures(
        ["我最近，总是睡不好。Really！", "我最近 总是——睡不好\nReally", "我最近总是睡得好Really"]
    )
    assert (rows[0] == rows[1]).all()
    assert not (rows[0] == rows[2]).all()


def test_every_near_copy_is_found_and_nothing_else() -> None:
    rng = random.Random(7)
    originals = [essay(rng, 600) for _ in range(300)]
    copies = [edited(rng, text, 6) for text in originals[:100]]
    texts = originals + copies
    pairs, alike = near_pairs(signatures(texts), 0.8)
    assert {tuple(pair) for pair in pairs.tolist()} == {(n, 300 + n) for n in range(100)}
    assert (alike >= 0.8).all()


def test_short_texts_are_no_one_s_copy() -> None:
    assert len(near_pairs(signatures(["嗯", "好", "", "嗯"]), 0.8)[0]) == 0
    assert len(near_pairs(signatures([]), 0.8)[0]) == 0


def test_a_crowd_of_copies_all_repeat_the_first() -> None:
    rng = random.Random(3)
    text = essay(rng, 600)
    texts = [text, essay(rng, 600)] + [edited(rng, text, 2) for _ in range(50)]
    found = repeats(*near_pairs(signatures(texts), 0.8))
    assert {row: earlier for row, (earlier, _) in found.items()} == dict.fromkeys(range(2, 52), 0)


def test_a_repeat_is_named_after_a_row_that_stays() -> None:
    """1 repeats 0 and 2 repeats 1 but not 0: when 1 goes, 2 has no one left to repeat."""
    pairs = np.array([[0, 1], [1, 2], [0, 3], [2, 3]])
    assert repeats(pairs, np.array([0.9, 0.9, 0.8, 0.95])) == {1: (0, 0.9), 3: (2, 0.95)}
