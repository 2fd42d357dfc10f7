"""The command line of the corpora's sources: list, download, check."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from milm_ray.corpora.readers import READERS
from milm_ray.corpora.sources import SOURCES, Source, download, inspect
from milm_ray.errors import EXIT_FAILED, UserError


def main(description: str, argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (argparse itself exits with 2)."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", nargs="?", choices=list(SOURCES))
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--download", metavar="DIR", type=Path, help="clone it into DIR/<corpus>")
    action.add_argument("--check", metavar="PATH", help="folder, archive, file or URI to check")
    options = parser.parse_args(argv)
    if (options.download or options.check) and not options.corpus:
        parser.error("name the corpus to download or check")
    chosen = [SOURCES[options.corpus]] if options.corpus else list(SOURCES.values())
    try:
        if options.download:
            place = download(chosen[0], options.download)
            return _check(chosen[0], str(place))
        if options.check:
            return _check(chosen[0], options.check)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("\n\n".join(describe(source) for source in chosen))
    return 0


def describe(source: Source) -> str:
    """What a person needs to know to get a corpus, on a few lines."""
    to = source.name
    place = f"{to}/{source.folder}".rstrip("/")
    lines = [
        f"{source.name}: {READERS[source.name].title}, {source.dialogues:,} dialogues",
        f"  page:     {source.page}",
        f"  licence:  {source.licence}",
        f"  get it:   {source.command.format(to=to)}",
        f"  check it: python jobs/fetch.py {source.name} --check {place}",
        f"  use it:   ingest.corpora.{source.name}.path: {place}",
    ]
    if source.note:
        lines.append(f"  note:     {source.note}")
    return "\n".join(lines)


def _check(source: Source, place: str) -> int:
    arrived = inspect(source.name, place)
    print(
        f"{source.name}: {arrived.files:,} files, {arrived.dialogues:,} dialogues that can be read "
        f"and {arrived.rejects:,} that cannot, digest {arrived.digest}"
    )
    problems = arrived.problems(source)
    for problem in problems:
        print(f"differs from what was published: {problem}")
    if not problems:
        checked = "count and digest" if source.digest else "count (no digest is known)"
        print(f"as published: {checked}")
    return EXIT_FAILED if problems else 0
