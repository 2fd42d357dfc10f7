"""BLEU-4 and ROUGE of the same pairs by LLaMA-Factory's composition and by ours, one core.

    python benchmarks/overlap.py --replies FOLDER [--pairs 10000]
    python benchmarks/overlap.py --replies FOLDER --ray 1000000

The second scores so many predictions through Ray Data on two cores, from Parquet to Parquet as the
score job does, and prints the memory of all its processes as it goes: it must not grow.

FOLDER holds CPsyCounD's case_*.txt (the shipped samples by default, which are few: pairs then
repeat). A pair is two successive counsellor replies of one dialogue, so that its texts are real,
of real length, and share words. The peer's code is nltk, jieba and rouge_chinese, composed as in
src/llamafactory/train/sft/metric.py. Both sides are warm: dictionaries loaded, code compiled.
"""

import argparse
import itertools
import logging
import tempfile
import threading
import time
from pathlib import Path

SAMPLES = Path(__file__).parent.parent / "milm_ray" / "samples" / "CPsyCounD"
NAMES = ("bleu_4", "rouge_1", "rouge_2", "rouge_l")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replies", type=Path, default=SAMPLES)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--ray", type=int, default=0, help="score so many through Ray Data instead")
    options = parser.parse_args()
    if options.ray:
        with tempfile.TemporaryDirectory() as folder:
            through_ray(read_pairs(options.replies), options.ray, Path(folder))
        return 0

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


def through_ray(pairs: list[tuple[str, str]], count: int, folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray

    from milm_ray.evaluation.score import score_predictions
    from milm_ray.schema import PREDICTIONS, ROUNDS

    rounds = [
        {"dialogue_id": f"d{n // 10}", "round_index": n % 10, "topic": "", "output": ref}
        for n, (ref, _) in enumerate(pairs)
    ]
    (folder / "in").mkdir()
    passes = -(-count // len(pairs))
    for seed in range(passes):
        rows = [
            {
                "dialogue_id": row["dialogue_id"],
                "round_index": row["round_index"],
                "model": "m",
                "variant": "base",
                "sampling": f"seed-{seed}",
                "text": pairs[(n + seed) % len(pairs)][1],
                "finish_reason": "stop",
            }
            for n, row in enumerate(rounds[: count - seed * len(pairs)])
        ]
        pq.write_table(
            pa.Table.from_pylist(rows, PREDICTIONS), folder / "in" / f"{seed:05d}.parquet"
        )
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=512 * 2**20,
        include_dashboard=False,
        logging_level="WARNING",
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    memory = Memory()
    start = time.perf_counter()
    predictions = ray.data.read_parquet(str(folder / "in"))
    scored = score_predictions(predictions, pa.Table.from_pylist(rounds, ROUNDS))
    scored.write_parquet(str(folder / "out"))
    wall = time.perf_counter() - start
    memory.stop()
    done = sum(pq.ParquetFile(p).metadata.num_rows for p in (folder / "out").glob("*.parquet"))
    print(f"{done:,} pairs in {wall:.1f} s, {done / wall:,.0f} a second, 2 cores")
    print("peak memory in each tenth of the run, MiB")
    for what, samples in (("private", memory.private), ("shared", memory.shared)):
        tenths = [samples[len(samples) * n // 10 : len(samples) * (n + 1) // 10] for n in range(10)]
        print(f"  {what}: " + ", ".join(f"{max(part, default=0):,.0f}" for part in tenths))
    ray.shutdown()


class Memory:
    """Memory of this process and all below it, twice a second, in MiB.

    private: the processes' own pages; shared: what they share, Ray's object store above all.
    """

    def __init__(self) -> None:
        self.private: list[float] = []
        self.shared: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        import psutil

        while not self._ended.wait(0.5):
            private = shared = 0
            for process in [me := psutil.Process(), *me.children(recursive=True)]:
                try:
                    found = process.memory_full_info()
                except psutil.Error:
                    continue
                private += found.uss
                shared += found.pss - found.uss
            self.private.append(private / 2**20)
            self.shared.append(shared / 2**20)

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()


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
