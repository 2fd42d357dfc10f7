"""Where each corpus comes from, under what terms, and whether what arrived is what was published.

The terms are those found on the pages named here; they bind whoever downloads. Only corpora under
an open licence are ever downloaded by this code.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from milm_ray.corpora.files import chunks, contents, cut, list_location
from milm_ray.corpora.readers import READERS
from milm_ray.corpora.reading import Unusable
from milm_ray.errors import UserError


@dataclass(frozen=True)
class Source:
    """A published corpus. command: how a person gets it; {to} is the folder it will be in.

    folder: where in it the corpus lies; open_licence: whether its licence lets anyone download it;
    url: its git repository.
    dialogues: as published and as the reader sees them before duplicates are removed; digest: of
    the copy this code was tried on (see `digest_of`), None where none could be had.
    """

    name: str
    page: str
    licence: str
    command: str
    dialogues: int
    folder: str = ""
    open_licence: bool = False
    url: str = ""
    digest: str | None = None
    note: str = ""


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            name="cpsycound",
            page="https://github.com/CAS-SIAT-XinHai/CPsyCoun",
            licence="CC BY 4.0 on GitHub, CC BY-SA 4.0 on its model hub page: keep to the latter",
            command="git clone --depth 1 https://github.com/CAS-SIAT-XinHai/CPsyCoun {to}",
            folder="CPsyCounD/Data",
            open_licence=True,
            url="https://github.com/CAS-SIAT-XinHai/CPsyCoun",
            dialogues=3084,
            digest="50f6ad7f73d421a1ce3439c933e4fc05dba17ea1355be9117b25049491c71a96",
            note="the paper counts 3,134",
        ),
        Source(
            name="psydtcorpus",
            page="https://modelscope.cn/datasets/YIRONGCHEN/PsyDTCorpus",
            licence="none was found for the data (the code is Apache-2.0): ask its authors",
            command="modelscope download --dataset YIRONGCHEN/PsyDTCorpus --local_dir {to}",
            dialogues=5000,
            note="4,760 dialogues to train on and 240 to test, the latter split by round",
        ),
        Source(
            name="smilechat",
            page="https://github.com/qiuhuachuan/smile",
            licence="CC0 1.0",
            command="git clone --depth 1 https://github.com/qiuhuachuan/smile {to}",
            folder="data",
            open_licence=True,
            url="https://github.com/qiuhuachuan/smile",
            dialogues=55_165,
            digest="5b8713a3d9188b13ef1f82008cb0211ba91b040d0bb6eff07aa382a1d6926303",
        ),
        Source(
            name="efaqa",
            page="https://github.com/chatopera/efaqa-corpus-zh",
            licence="research only, with a certificate bought at store.chatopera.com (efaqa001)",
            command="EFAQA_DL_LICENSE=<certificate> python -c 'import efaqa_corpus_zh'",
            dialogues=20_000,
            note="after `pip install efaqa-corpus-zh`; the file lies in that package's data folder",
        ),
        Source(
            name="psy_insight",
            page="https://github.com/ckqqqq/Psy-Insight",
            licence="no licence file: for your own study, not to be handed on",
            command="git clone --depth 1 https://github.com/ckqqqq/Psy-Insight {to}",
            dialogues=431,
            digest="5510c1a997a7390781b1e997dec1669db0bb9bfc2afca4ef892c24042c97796d",
            folder="data",
            note="the Chinese half is read",
        ),
        Source(
            name="annomi",
            page="https://github.com/uccollab/AnnoMI",
            licence="no licence file: publish labels and figures, not its text",
            command="git clone --depth 1 https://github.com/uccollab/AnnoMI {to}",
            dialogues=133,
            digest="97d06fe3b4e06a9cc9378403c65f0088b092d4b1a1527b273cf9f390f32ef5ae",
        ),
    )
}


@dataclass(frozen=True)
class Arrived:
    """What lies at a place: files, dialogues before duplicates are removed, rejects, digest."""

    files: int
    dialogues: int
    rejects: int
    digest: str

    def problems(self, source: Source) -> list[str]:
        """How this differs from what was published; empty when it does not."""
        found = []
        if self.dialogues + self.rejects != source.dialogues:
            found.append(f"{self.dialogues + self.rejects:,} dialogues, not {source.dialogues:,}")
        if source.digest and self.digest != source.digest:
            found.append(f"digest {self.digest}, not {source.digest}")
        return found


def inspect(name: str, location: str) -> Arrived:
    """Count and digest a corpus, whatever it is packed in. Reads everything, on this machine.

    Raises UserError when nothing is there.
    """
    reader = READERS[name]
    files = dialogues = rejects = 0
    digests: list[tuple[str, str]] = []
    for path, data in _contents(name, location):
        files += 1
        if isinstance(data, Unusable):
            rejects += 1
            continue
        digests.append(
            (path.rsplit("/", 1)[-1].removesuffix(".gz"), hashlib.sha256(data).hexdigest())
        )
        parsed = reader.read(path, data)
        dialogues += len(parsed.dialogues)
        rejects += len(parsed.rejects)
    return Arrived(files, dialogues, rejects, digest_of(digests))


def digest_of(files: list[tuple[str, str]]) -> str:
    """sha256 of the lines `<sha256 of the file>  <its name>`, sorted by name: `sha256sum`'s form.

    Folders, archives and gzip do not change it.
    """
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def _contents(name: str, location: str) -> Iterator[tuple[str, bytes | Unusable]]:
    reader = READERS[name]
    try:
        listing = list_location(location, reader)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{location} cannot be listed: {error}", "check the path") from error
    if not listing.files and not listing.archives:
        raise UserError(
            f"{location} holds nothing named {', '.join(reader.patterns)} and no archive",
            f"give the folder, file or archive that holds {name}",
        )
    for chunk in chunks(listing, reader, None):
        for piece in cut(chunk, reader):
            yield from contents(piece, reader)


def download(source: Source, folder: Path) -> Path:
    """Clone a corpus under an open licence into folder/<name>; returns where its files lie.

    Raises UserError for any other corpus, for a folder that exists, and when git fails.
    """
    to = folder / source.name
    if not source.open_licence:
        raise UserError(
            f"{source.name} is not downloaded for you: {source.licence}",
            f"if these terms allow it, run: {source.command.format(to=to)}",
        )
    if to.exists():
        raise UserError(f"{to} exists already", f"check it with --check {to}, or remove it first")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(
            ["git", "clone", "--quiet", "--depth", "1", "--", source.url, str(to)], check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"{source.url} could not be cloned: {error}", "check the network and that git is there"
        ) from error
    return to / source.folder
