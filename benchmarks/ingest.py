"""Ingest of SmileChat beside a plain two-process Python script, in one run on one machine.

    python benchmarks/ingest.py --corpus smile-data.tar.xz
    python benchmarks/ingest.py --corpus smile-data.tar.xz --files 5000 --copies 10

Both read the same tar: parse, check, put in order, hash, write Parquet. They take turns and the
best time of each counts. Ray's start-up is reported apart; memory is the proportional set size of
all processes of this run above what Ray holds before it has work. `--copies N` reads N copies of
the corpus whose dialogues differ by a mark, so that none is a duplicate.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import shutil
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from milm_ray.config import Config
from milm_ray.corpora.ingest import STAGE
from milm_ray.job import connect
from milm_ray.schema import DIALOGUES, Turn, dialogue_id
from milm_ray.workspace import Workspace

BATCH = 1700  # files a task, about what one of our segments holds


def peer_batch(work: tuple[int, list[tuple[str, bytes]], str]) -> int:
    """The plain script's work on one batch; returns the number of dialogues written."""
    number, files, folder = work
    rows = []
    for name, data in files:
        try:
            messages = json.loads(data.decode("utf-8"))
        except ValueError:
            continue
        turns: list[Turn] = []
        for message in messages:
            content = message["content"].strip()
            if not content:
                continue
            if turns and turns[-1].role == message["role"]:
                turns[-1] = Turn(message["role"], turns[-1].content + "\n" + content)
            else:
                turns.append(Turn(message["role"], content))
        if turns and turns[0].role == "counselor":
            del turns[0]
        if turns and turns[-1].role == "client":
            del turns[-1]
        if not turns:
            continue
        rows.append(
            {
                "dialogue_id": dialogue_id("smilechat", turns),
                "corpus": "smilechat",
                "source_id": Path(name).stem,
                "topic": "",
                "turns": [{"role": turn.role, "content": turn.content} for turn in turns],
            }
        )
    table = pa.Table.from_pylist(rows, schema=DIALOGUES)
    pq.write_table(table, f"{folder}/part-{number:05d}.parquet", compression="zstd")
    return len(rows)


def peer(paths: list[Path], folder: Path, limit: int | None) -> int:
    """Two worker processes; this one unpacks the tars for them."""

    def batches() -> Iterator[tuple[int, list[tuple[str, bytes]], str]]:
        number, files, seen = 0, [], 0
        for path in paths:
            with tarfile.open(path, "r|*") as archive:
                for member in archive:
                    stream = archive.extractfile(member) if member.isfile() else None
                    if stream is None:
                        continue
                    files.append((member.name, stream.read()))
                    seen += 1
                    if len(files) == BATCH:
                        slots.acquire()
                        yield number, files, str(folder)
                        number, files = number + 1, []
                    if seen == limit:
                        break
        yield number, files, str(folder)

    folder.mkdir()
    slots = threading.Semaphore(4)  # batches in flight: the pool itself would read all of the tar
    total = 0
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for written in pool.imap(peer_batch, batches()):
            slots.release()
            total += written
    return total


def ours(paths: list[Path], folder: Path, limit: int | None, near: str) -> int:
    source: dict[str, Any] = {"path": str(paths[0].parent if len(paths) > 1 else paths[0])}
    if limit:
        source["limit"] = limit
    ingest = {"corpora": {"smilechat": source}, "near_duplicates": near}
    config = Config.model_validate({"workspace": str(folder), "ingest": ingest})
    manifest = STAGE.run(config, Workspace.open(config.workspace))
    return int(manifest["counts"]["dialogues"])


class Memory:
    """Samples the proportional set size of this process and all of its children, in bytes."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()

    @staticmethod
    def now() -> int:
        import psutil

        total = 0
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        for process in processes:
            try:
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return total

    def __enter__(self) -> Memory:
        def watch() -> None:
            while not self._stop.wait(0.5):
                self.peak = max(self.peak, self.now())

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def timed(work: Callable[[], int]) -> tuple[int, float, int]:
    """Dialogues, seconds, peak bytes."""
    with Memory() as memory:
        started = time.perf_counter()
        dialogues = work()
        seconds = time.perf_counter() - started
    return dialogues, seconds, memory.peak


def marked_copies(corpus: Path, folder: Path, copies: int, files: int | None) -> list[Path]:
    """Plain tars of the corpus, the first words of every dialogue marked with the copy's number."""
    folder.mkdir()
    paths = [folder / f"copy-{copy:02d}.tar" for copy in range(copies)]
    with contextlib.ExitStack() as stack:
        archives = [stack.enter_context(tarfile.open(path, "w")) for path in paths]
        source = stack.enter_context(tarfile.open(corpus, "r|*"))
        seen = 0
        for member in source:
            stream = source.extractfile(member) if member.isfile() else None
            if stream is None:
                continue
            data = stream.read()
            for copy, archive in enumerate(archives):
                marked = data.replace(b'"content": "', f'"content": "{copy}-'.encode(), 1)
                info = tarfile.TarInfo(f"data/{copy * 1_000_000 + seen}.json")
                info.size = len(marked)
                archive.addfile(info, io.BytesIO(marked))
            seen += 1
            if seen == files:
                break
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="SmileChat as a tar")
    parser.add_argument("--files", type=int, help="read the first N files only")
    parser.add_argument("--copies", type=int, default=1, help="read N marked copies")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--near", choices=["off", "report"], default="off")
    parser.add_argument("--no-peer", action="store_true", help="time our side only")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        limit = options.files if options.copies == 1 else None
        paths = [options.corpus.resolve()]
        if options.copies > 1:
            paths = marked_copies(paths[0], root / "raw", options.copies, options.files)

        started = time.perf_counter()
        connect(Config.model_validate({"ray": {"num_cpus": 2}}))
        ours(paths, root / "warm", 1, "off")  # the workers import what they need
        print(f"Ray's start-up: {time.perf_counter() - started:.1f} s", flush=True)
        idle = Memory.now()

        best: dict[str, float] = {}
        for repeat in range(options.repeats):
            place = root / str(repeat)
            runs: dict[str, Callable[[], int]] = {
                "ours": partial(ours, paths, place / "ours", limit, options.near)
            }
            if not options.no_peer:
                runs["peer"] = partial(peer, paths, place / "peer", limit)
            place.mkdir()
            for name, work in runs.items():
                dialogues, seconds, peak = timed(work)
                best[name] = min(best.get(name, seconds), seconds)
                print(
                    f"{name}: {dialogues:,} dialogues in {seconds:.2f} s, "
                    f"{dialogues / seconds:,.0f}/s, {(peak - idle) / 2**20:+,.0f} MiB",
                    flush=True,
                )
            shutil.rmtree(place)
        if "peer" in best:
            print(f"ours / peer: {best['ours'] / best['peer']:.2f} of its time")


if __name__ == "__main__":
    main()
