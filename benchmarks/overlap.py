"""BLEU-4 and ROUGE of the same pairs by LLaMA-Factory's composition and by ours, one core.

    python benchmarks/overlap.py --replies FOLDER [--pairs 10000]

FOLDER holds CPsyCounD's case_*.txt (the shipped samples by default, which are few: pairs then
repeat). A pair is two successive counsellor replies of one dialogue, so that its texts are real,
of real length, and share words. The peer's code is nltk, jieba and rouge_chinese, composed as in
src/llamafactory/train/sft/metric.py. Both sides are warm: dictionaries loaded, code compiled.
"""

import argparse
import itertools
import logging
import time
from pathlib import Path

SAMPLES = Path(__file__).parent.parent / "milm_ray" / "samples" / "CPsyCounD"
NAMES = ("bleu_4", "rouge_1", "rouge_2", "rouge_l")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replies", type=Path, default=SAMPLES)
    parser.add_argument("--pairs", type=int, default=10_000)
    options = parser.parse_args()

    different = read_pairs(options.replies)
    pairs = list(itertools.islice(itertools.cycle(different), options.pairs))
    refs = [ref for ref, _ in pairs]
    hyps = [hyp for _, hyp in pairs]
    chars = sum(map(len, refs + hyps)) / len(pairs) / 2
    distinct = len(set(pairs))
    print(f"{len(pairs):,} pairs ({distinct:,} different), {chars:.1f} characters a reply")

    peer_scores, peer = timed("peer", peer_scorer(), refs, hyps)
    our_scores, ours = timed("ours", our_scorer(), refs, hyps)
    worst = max(
        abs(a - b)
        for p, o in zip(peer_scores, our_scores, strict=True)
        for a, b in zip(p, o, strict=True)
    )
    print(f"ratio {peer / ours:.1f}x, largest difference of any score {worst:.1e}")
    if worst > 1e-9:
        print("scores differ: the comparison is void")
        return 1
    return 0


def read_pairs(folder: Path) -> list[tuple[str, str]]:
    pairs = []
    for path in sorted(folder.rglob("case_*.txt")):
        lines = path.read_text(encoding="utf-8").splitlines()
        replies = [line.split("：", 1)[1] for line in lines if line.startswith("心理咨询师：")]
        pairs += list(itertools.pairwise(replies))
    if not pairs:
        raise SystemExit(f"no case_*.txt with 心理咨询师： lines under {folder}")
    return pairs


def timed(name, score, refs, hyps):
    """Scores and the seconds of CPU time that they took."""
    start, cpu = time.perf_counter(), time.process_time()
    scores = score(refs, hyps)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"{name}: {cpu:.2f} s CPU, {wall:.2f} s wall, {cpu / len(refs) * 1e6:,.0f} µs a pair")
    return scores, cpu


def peer_scorer():
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    jieba.setLogLevel(logging.CRITICAL)
    jieba.initialize()
    smooth = SmoothingFunction().method3

    def one(ref, hyp):
        hypothesis, reference = " ".join(jieba.cut(hyp)), " ".join(jieba.cut(ref))
        bleu = sentence_bleu([list(ref)], list(hyp), smoothing_function=smooth)
        found = {}
        if hypothesis.split() and reference.split():
            found = Rouge().get_scores(hypothesis, reference)[0]
        f_values = [found[key]["f"] if found else 0.0 for key in ("rouge-1", "rouge-2", "rouge-l")]
        return [round(value * 100, 4) for value in (bleu, *f_values)]

    return lambda refs, hyps: [one(ref, hyp) for ref, hyp in zip(refs, hyps, strict=True)]


def our_scorer():
    from milm_ray.evaluation.overlap import score_pairs

    score_pairs(["热身"], ["热身"])

    def all_pairs(refs, hyps):
        scores = score_pairs(refs, hyps)
        return list(zip(*(scores[name].tolist() for name in NAMES), strict=True))

    return all_pairs


if __name__ == "__main__":
    raise SystemExit(main())
