"""The ingest stage: raw corpora → `dialogues/`, `rejects/ingest/` and `repairs/ingest/`.

The driver lists names, workers read. A chunk of files becomes one Parquet file, written by the
worker that read it; only ids come back, by which the driver finds duplicates. File names and row
order depend on the raw files alone, so the artifact is the same on any number of workers.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from milm_ray import metrics
from milm_ray.config import Config
from milm_ray.corpora.duplicates import Found, find_duplicates
from milm_ray.corpora.files import Chunk, Listing, chunks, cut, list_location
from milm_ray.corpora.parts import (
    DIALOGUES_DIR,
    REJECTS_DIR,
    REPAIRS_DIR,
    Part,
    read_chunk,
)
from milm_ray.corpora.readers import READERS
from milm_ray.corpora.reading import STAGE as STAGE_NAME
from milm_ray.errors import ConfigError, UserError
from milm_ray.job import Plan, Stage, finished
from milm_ray.workspace import Workspace, digest

if TYPE_CHECKING:
    import ray.data

log = logging.getLogger("milm_ray")

_PROGRESS_S = 10.0
_READING = 2  # raised where the same files give other dialogues than before


def plan(config: Config, workspace: Workspace) -> Plan:
    """What will be read. Raises ConfigError for every location that holds nothing to read."""
    listings = _list_all(config)
    if workspace.is_done(DIALOGUES_DIR, _fingerprint(config, workspace, listings)):
        return Plan(done=True)
    notes = []
    for name, listing in listings.items():
        what = [f"{len(listing.files):,} file(s)"] if listing.files else []
        what += [f"{len(listing.archives):,} archive(s)"] if listing.archives else []
        ignored = f", {listing.ignored:,} other file(s) ignored" if listing.ignored else ""
        size = listing.size / 1e6
        notes.append(f"{name}: {' and '.join(what)}, {size:,.1f} MB in {listing.location}{ignored}")
    files = sum(len(listing.files) for listing in listings.values())
    archives = sum(len(listing.archives) for listing in listings.values())
    return Plan(rows=None if archives else files, notes=tuple(notes))


def run(config: Config, workspace: Workspace) -> Mapping[str, Any]:
    """Read every configured corpus; returns the manifest of `dialogues/`.

    Raises UserError when a corpus yields nothing or too little of it is usable; the rejects table
    is written before that.
    """
    started = time.time()
    listings = _list_all(config)
    fingerprint = _fingerprint(config, workspace, listings)
    if finished(workspace, DIALOGUES_DIR, fingerprint):
        return workspace.manifest(DIALOGUES_DIR)
    for artifact in (DIALOGUES_DIR, REJECTS_DIR, REPAIRS_DIR):
        workspace.clear(artifact)

    limits = {str(name): source.limit for name, source in config.ingest.corpora.items()}
    work = [
        chunk
        for name, listing in listings.items()
        for chunk in chunks(listing, READERS[name], limits[name])
    ]
    parts = sorted(_progress(_read_all(work, config, workspace)), key=lambda part: part.name)
    summary = _summary(listings, parts, *find_duplicates(parts, config.ingest, workspace))
    common: dict[str, Any] = {
        "stage": STAGE_NAME,
        "settings": config.ingest,
        "fingerprint": fingerprint,
    }
    for artifact, key in ((REJECTS_DIR, "rejects"), (REPAIRS_DIR, "repairs")):
        counts = {name: entry[key] for name, entry in summary.items()}
        workspace.commit(artifact, counts=counts, started=started, **common)
    _check_yield(summary, config.ingest.max_reject_rate, workspace)
    counts = {
        "dialogues": sum(entry["dialogues"] for entry in summary.values()),
        "rejects": dict(_total(summary, "rejects")),
        "repairs": dict(_total(summary, "repairs")),
    }
    return workspace.commit(
        DIALOGUES_DIR, counts=counts, corpora=summary, started=started, **common
    )


STAGE = Stage(STAGE_NAME, plan, run, check_paths=("ingest",))


def _list_all(config: Config) -> dict[str, Listing]:
    """Every corpus's listing by name, in name order. Raises ConfigError with all problems."""
    listings: dict[str, Listing] = {}
    problems = [] if config.ingest.corpora else ["ingest.corpora: no corpus is configured"]
    for name, source in sorted(config.ingest.corpora.items()):
        where = f"ingest.corpora.{name}.path"
        try:
            listing = list_location(source.path, READERS[name], source.limit)
        except (OSError, pa.ArrowInvalid) as error:
            problems.append(f"{where}: {source.path} cannot be listed: {error}")
            continue
        if not listing.files and not listing.archives:
            expected = ", ".join(READERS[name].patterns)
            problems.append(f"{where}: nothing named {expected} and no archive in {source.path}")
        listings[name] = listing
    if problems:
        raise ConfigError(problems)
    return listings


def _fingerprint(
    config: Config, workspace: Workspace, listings: Mapping[str, Listing]
) -> dict[str, Any]:
    raw = {name: digest(listing.state()) for name, listing in listings.items()}
    return workspace.fingerprint(config.ingest, {**raw, "reading": _READING})


def _read_all(work: list[Chunk], config: Config, workspace: Workspace) -> Iterator[Part]:
    """Every chunk read, in no particular order.

    chunks of files (1 row each) ─┐
    tars and zips ─cut (1→N rows)─┴─ read (1→1 row)
    """
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    # One segment per block: the default would gather 128 MB before any reader may start.
    context.target_max_block_size = 1 << 20
    fixed = {"workspace": workspace, "sign": config.ingest.near_duplicates != "off"}
    with ray.data.DataContext.current(context):
        dataset = _chunks(work).map(_read_row, fn_kwargs=fixed)  # type: ignore[arg-type]
        for row in dataset.iter_rows():
            yield pickle.loads(row["part"])


def _chunks(work: list[Chunk]) -> ray.data.Dataset:
    """The chunks as a dataset, archives already cut. One column: `chunk`, a pickled Chunk."""
    import ray.data

    datasets: list[ray.data.Dataset] = []
    plain = [chunk.row() for chunk in work if chunk.kind == "files"]
    archives = [chunk.row() for chunk in work if chunk.kind != "files"]
    if plain:
        datasets.append(ray.data.from_items(plain, override_num_blocks=len(plain)))
    if archives:
        whole = ray.data.from_items(archives, override_num_blocks=len(archives))
        # Cutting waits for the readers most of the time: it takes no CPU slot away from them.
        datasets.append(
            whole.flat_map(_cut_row, num_cpus=0, compute=ray.data.TaskPoolStrategy(size=2))
        )
    return datasets[0].union(*datasets[1:]) if len(datasets) > 1 else datasets[0]


def _cut_row(row: dict[str, bytes]) -> Iterator[dict[str, bytes]]:
    chunk = Chunk.of(row)
    for piece in cut(chunk, READERS[chunk.corpus]):
        yield piece.row()


def _read_row(row: dict[str, bytes], workspace: Workspace, sign: bool) -> dict[str, bytes]:
    return {"part": pickle.dumps(read_chunk(Chunk.of(row), workspace, sign))}


def _progress(parts: Iterable[Part]) -> Iterator[Part]:
    """The same parts, with a line in the log at intervals."""
    began = last = time.time()
    files = dialogues = 0
    for part in parts:
        files, dialogues = files + part.files, dialogues + part.dialogues
        metrics.count("milm_dialogues", part.dialogues, corpus=part.corpus)
        if time.time() - last >= _PROGRESS_S:
            last = time.time()
            rate = dialogues / (last - began)
            log.info(
                "ingest | %s files, %s dialogues, %.0f/s", f"{files:,}", f"{dialogues:,}", rate
            )
        yield part


def _summary(
    listings: Mapping[str, Listing], parts: Iterable[Part], rejected: Found, listed: Found
) -> dict[str, dict[str, Any]]:
    """Per corpus: files read and ignored, dialogues, rejects and repairs by reason."""
    summary: dict[str, dict[str, Any]] = {
        name: {
            "title": READERS[name].title,
            "files": 0,
            "files_ignored": listing.ignored,
            "dialogues": -rejected.get(name, Counter()).total(),
            "rejects": Counter(rejected.get(name, {})),
            "repairs": Counter(listed.get(name, {})),
        }
        for name, listing in listings.items()
    }
    for part in parts:
        entry = summary[part.corpus]
        entry["files"] += part.files
        entry["dialogues"] += part.dialogues
        entry["rejects"].update(part.rejects)
        entry["repairs"].update(part.repairs)
    return summary


def _total(summary: Mapping[str, Mapping[str, Any]], key: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for entry in summary.values():
        total.update(entry[key])
    return total


def _check_yield(
    summary: Mapping[str, Mapping[str, Any]], highest: float, workspace: Workspace
) -> None:
    """Raise UserError for a corpus of which too little could be used."""
    for name, entry in summary.items():
        copies = entry["rejects"]["duplicate"] + entry["rejects"]["near_duplicate"]
        bad = entry["rejects"].total() - copies
        if not entry["dialogues"] or bad > highest * (bad + entry["dialogues"]):
            reasons = ", ".join(f"{reason} {n:,}" for reason, n in entry["rejects"].items())
            raise UserError(
                f"{name}: {entry['dialogues']:,} dialogues could be used and {bad:,} could not "
                f"({reasons or 'no file was found'})",
                f"see {workspace.path(REJECTS_DIR)}; check that ingest.corpora.{name}.path is that "
                "corpus in its own layout, or raise ingest.max_reject_rate",
            )
