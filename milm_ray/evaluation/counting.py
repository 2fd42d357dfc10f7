"""Counts behind BLEU and ROUGE in compiled code: n-gram matches, n-gram sets, LCS lengths.

Nothing here rounds, divides or takes a logarithm: the kernels return counts, and `overlap`
turns them into scores with Python's own floats, so that they equal the peers' to the last
bit. Source of the behaviour: nltk's ``modified_precision`` and rouge_chinese 1.0.3
(``cut_sent``, sets of n-grams, longest common subsequence).
"""

import numpy as np

from milm_ray.evaluation.segmenter import compiled, is_space, slot_of

_ONE = np.uint64(1)
_ZERO = np.uint64(0)
_FULL = np.uint64(0xFFFFFFFFFFFFFFFF)


@compiled
def _rouge_words(text, a, ends, n, starts, stops, base):
    """The word list that rouge_chinese sees for the tokens joined by spaces. -> count

    It breaks the text after 。！？?, after six dots and at newlines, and a piece of blanks
    only becomes one empty word. That is how "。\\n" comes to count as a word.
    """
    last = n - 1
    while last >= 0 and is_space(text[ends[last] - 1]):
        last -= 1
    count = 0
    has_word = False
    begin = a
    for i in range(last + 1):
        end = ends[i]
        if is_space(text[begin]):
            if text[end - 1] == 10:
                # Only a newline at the very start leaves a piece of no length at all.
                if not has_word and not (i == 0 and text[begin] == 10):
                    starts[base + count] = 0
                    stops[base + count] = 0
                    count += 1
                has_word = False
            begin = end
            continue
        cut = begin
        p = begin
        while p + 6 <= end:
            dots = True
            for k in range(6):
                if text[p + k] != 46:
                    dots = False
                    break
            if dots and (p + 6 < end or i < n - 1):
                starts[base + count] = cut
                stops[base + count] = p + 6
                count += 1
                cut = p + 6
                p += 7
            else:
                p += 1
        has_word = False
        if cut < end:
            starts[base + count] = cut
            stops[base + count] = end
            count += 1
            c = text[end - 1]
            has_word = not (
                end - begin == 1 and (c == 0x3002 or c == 0xFF01 or c == 0xFF1F or c == 63)
            )
        begin = end
    return count


@compiled
def rouge_words(text, offsets, ends, counts, starts, stops, word_counts):
    """Word spans of every text for ROUGE, text i's from position offsets[i] on."""
    for i in range(len(offsets) - 1):
        a = offsets[i]
        word_counts[i] = _rouge_words(text, a, ends[a:], counts[i], starts, stops, a)


@compiled
def _table_size(n):
    size = 8
    while size < 2 * n:
        size *= 2
    return size


@compiled
def _char_matches(text, ref_a, ref_b, hyp_a, hyp_b, out):
    """Clipped matches of character n-grams, n = 1…len(out), into `out`.

    An n-gram is named by (name of its first n-1 characters, next character), so the names
    stay small and exact at any text length.
    """
    ref_n = ref_b - ref_a
    hyp_n = hyp_b - hyp_a
    ref_id = np.zeros(ref_n, np.int64)
    hyp_id = np.zeros(hyp_n, np.int64)
    size = _table_size(ref_n)
    mask = size - 1
    keys = np.empty(size, np.int64)
    ids = np.empty(size, np.int64)
    left = np.empty(ref_n, np.int64)
    for order in range(1, len(out) + 1):
        keys[:] = -1
        count = 0
        for i in range(ref_n - order + 1):
            key = (ref_id[i] << 21) | np.int64(text[ref_a + i + order - 1])
            slot = slot_of(key, mask)
            while keys[slot] != -1 and keys[slot] != key:
                slot = (slot + 1) & mask
            if keys[slot] == -1:
                keys[slot] = key
                ids[slot] = count
                left[count] = 0
                count += 1
            ref_id[i] = ids[slot]
            left[ids[slot]] += 1
        matches = 0
        for i in range(hyp_n - order + 1):
            if hyp_id[i] < 0:
                continue
            key = (hyp_id[i] << 21) | np.int64(text[hyp_a + i + order - 1])
            slot = slot_of(key, mask)
            while keys[slot] != -1 and keys[slot] != key:
                slot = (slot + 1) & mask
            if keys[slot] == -1:
                hyp_id[i] = -1
                continue
            hyp_id[i] = ids[slot]
            if left[ids[slot]] > 0:
                left[ids[slot]] -= 1
                matches += 1
        out[order - 1] = matches


@compiled
def _word_ids(text, starts, stops, a, n, ids, table, first, count):
    """Number the words of one list, equal words alike; `first[id]` is a word with that id."""
    mask = len(table) - 1
    for i in range(n):
        s = starts[a + i]
        e = stops[a + i]
        h = np.int64(e - s)
        for p in range(s, e):
            h = (h * 1000003) ^ np.int64(text[p])
        slot = slot_of(h, mask)
        while table[slot] != -1:
            other = first[table[slot]]
            t = starts[other]
            same = stops[other] - t == e - s
            if same:
                for k in range(e - s):
                    if text[s + k] != text[t + k]:
                        same = False
                        break
            if same:
                break
            slot = (slot + 1) & mask
        if table[slot] == -1:
            table[slot] = count
            first[count] = a + i
            count += 1
        ids[i] = table[slot]
    return count


@compiled
def _unigram_sets(ref, hyp, n_ref, n_ids, out):
    """Distinct words of hypothesis and reference, and those in both."""
    seen = np.zeros(n_ids, np.uint8)
    hyp_distinct = 0
    overlap = 0
    for x in hyp:
        if seen[x] == 0:
            seen[x] = 1
            hyp_distinct += 1
            if x < n_ref:
                overlap += 1
    out[0] = hyp_distinct
    out[1] = n_ref
    out[2] = overlap


@compiled
def _bigram_sets(ref, hyp, out):
    """Distinct word pairs of hypothesis and reference, and those in both."""
    size = _table_size(len(ref) + len(hyp))
    mask = size - 1
    keys = np.full(size, -1, np.int64)
    owner = np.zeros(size, np.uint8)
    ref_distinct = 0
    hyp_distinct = 0
    overlap = 0
    for i in range(len(ref) - 1):
        key = (ref[i] << 32) | ref[i + 1]
        slot = slot_of(key, mask)
        while keys[slot] != -1 and keys[slot] != key:
            slot = (slot + 1) & mask
        if keys[slot] == -1:
            keys[slot] = key
            owner[slot] = 1
            ref_distinct += 1
    for i in range(len(hyp) - 1):
        key = (hyp[i] << 32) | hyp[i + 1]
        slot = slot_of(key, mask)
        while keys[slot] != -1 and keys[slot] != key:
            slot = (slot + 1) & mask
        if keys[slot] == -1:
            keys[slot] = key
            owner[slot] = 2
            hyp_distinct += 1
        elif owner[slot] == 1:
            owner[slot] = 3
            hyp_distinct += 1
            overlap += 1
    out[0] = hyp_distinct
    out[1] = ref_distinct
    out[2] = overlap


@compiled
def _lcs(ref, hyp, n_ref):
    """Length of the longest common subsequence, bit-parallel (Hyyrö 2004), 64 words a step."""
    blocks = (len(ref) + 63) // 64
    masks = np.zeros((n_ref, blocks), np.uint64)
    for i in range(len(ref)):
        masks[ref[i], i >> 6] |= _ONE << np.uint64(i & 63)
    state = np.full(blocks, _FULL, np.uint64)
    for x in hyp:
        if x >= n_ref:
            continue
        carry = _ZERO
        for w in range(blocks):
            s = state[w]
            u = s & masks[x, w]
            t = s + u
            over = _ONE if t < s else _ZERO
            t2 = t + carry
            if t2 < t:
                over = _ONE
            carry = over
            state[w] = t2 | (s - u)
    length = 0
    for i in range(len(ref)):
        if (state[i >> 6] >> np.uint64(i & 63)) & _ONE == _ZERO:
            length += 1
    return length


@compiled
def pair_counts(text, offsets, starts, stops, word_counts, refs, hyps, out):
    """Counts for each pair of texts (refs[k], hyps[k]) into the int64 row out[k].

    Columns: 0-3 clipped character n-gram matches; 4-6 ROUGE-1 and 7-9 ROUGE-2 as
    (hypothesis, reference, overlap) set sizes; 10 LCS length.
    """
    for k in range(len(refs)):
        r = refs[k]
        h = hyps[k]
        _char_matches(text, offsets[r], offsets[r + 1], offsets[h], offsets[h + 1], out[k, 0:4])
        n_r = word_counts[r]
        n_h = word_counts[h]
        if n_r == 0 or n_h == 0:
            out[k, 4:11] = 0
            continue
        ref = np.empty(n_r, np.int64)
        hyp = np.empty(n_h, np.int64)
        table = np.full(_table_size(n_r + n_h), -1, np.int64)
        first = np.empty(n_r + n_h, np.int64)
        n_ref = _word_ids(text, starts, stops, offsets[r], n_r, ref, table, first, np.int64(0))
        n_ids = _word_ids(text, starts, stops, offsets[h], n_h, hyp, table, first, n_ref)
        _unigram_sets(ref, hyp, n_ref, n_ids, out[k, 4:7])
        _bigram_sets(ref, hyp, out[k, 7:10])
        out[k, 10] = _lcs(ref, hyp, n_ref)


@compiled
def char_matches(text, offsets, refs, hyps, out):
    """Clipped character n-gram matches of each pair of texts, n = 1…out.shape[1]."""
    for k in range(len(refs)):
        r = refs[k]
        h = hyps[k]
        _char_matches(text, offsets[r], offsets[r + 1], offsets[h], offsets[h + 1], out[k])
