"""Listing and cutting raw files: directories, tars, zips, gzip files, and broken ones."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from milm_ray.corpora import files
from milm_ray.corpora.files import Chunk, chunks, contents, cut, list_location
from milm_ray.corpora.readers import READERS
from milm_ray.corpora.reading import Unusable

SMILE = READERS["smilechat"]
LONG_NAME = "data/" + "很长的名字" * 30 + ".json"


def dialogue(number: int) -> bytes:
    turns = [{"role": "client", "content": f"问{number}"}, {"role": "counselor", "content": "答"}]
    return json.dumps(turns, ensure_ascii=False).encode()


NAMES = [f"data/{n}.json" for n in range(12)]
MEMBERS = {name: dialogue(n) for n, name in enumerate(NAMES)}


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    mode = {".xz": "w:xz", ".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2"}.get(path.suffix, "w")
    with tarfile.open(path, mode, format=form) as archive:  # type: ignore[call-overload]
        folder = tarfile.TarInfo("data")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def write_files(folder: Path, members: dict[str, bytes]) -> Path:
    for name, data in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def everything(
    location: Path, reader: files.Reader = SMILE, limit: int | None = None
) -> tuple[dict[str, bytes], dict[str, str]]:
    """All contents of a location by path after `data/`, and the reasons of what was unusable."""
    good, bad = {}, {}
    for chunk in chunks(list_location(str(location), reader, limit), reader, limit):
        for piece in cut(chunk, reader):
            # A row is what travels between the workers.
            for name, data in contents(Chunk.of(piece.row()), reader):
                if isinstance(data, Unusable):
                    bad[Path(name).name] = data.reason
                else:
                    good["data/" + name.split("data/")[-1]] = data
    return good, bad


@pytest.mark.parametrize(
    "name", ["c.tar", "c.tar.gz", "c.tgz", "c.tar.xz", "c.tar.bz2", "c.zip", "folder"]
)
def test_every_container_gives_the_same_files_in_the_same_order(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BYTES_PER_CHUNK", 300)
    monkeypatch.setattr(files, "FILES_PER_CHUNK", 5)
    make = write_zip if name.endswith("zip") else write_files if name == "folder" else write_tar
    good, bad = everything(make(tmp_path / name, MEMBERS))
    assert list(good) == NAMES
    assert good == MEMBERS
    assert not bad


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_headers_stay_with_their_members(
    tmp_path: Path, form: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BYTES_PER_CHUNK", 1)  # every member a segment of its own
    members = dict(MEMBERS)
    if form != tarfile.USTAR_FORMAT:
        members[LONG_NAME] = dialogue(99)
    path = write_tar(tmp_path / "c.tar", members, form)
    good, bad = everything(path)
    assert good == members
    assert not bad


def test_segments_depend_on_bytes_alone_and_have_ordered_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BYTES_PER_CHUNK", 200)
    path = write_tar(tmp_path / "c.tar.xz", MEMBERS)
    [chunk] = chunks(list_location(str(path), SMILE), SMILE, None)
    pieces = list(cut(chunk, SMILE))
    assert len(pieces) > 3
    assert [piece.part for piece in pieces] == sorted(piece.part for piece in pieces)
    assert all(len(piece.data) < 200 + 100 for piece in pieces)


@pytest.mark.parametrize("name", ["c.tar", "c.tar.gz", "c.tar.xz", "c.tar.bz2"])
def test_a_tar_that_breaks_off_keeps_what_came_before(tmp_path: Path, name: str) -> None:
    # Incompressible, so that cutting the file cuts the members too.
    noise = {f"data/{n}.json": bytes((n * i * i) % 251 for i in range(30_000)) for n in range(9)}
    path = write_tar(tmp_path / name, noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    good, bad = everything(path)
    assert bad == {name: "broken_archive"}
    assert len(good) < 9
    assert all(noise[member] == data for member, data in good.items())
    if name in ("c.tar", "c.tar.gz"):
        assert good


@pytest.mark.parametrize("name", ["c.tar", "c.tar.gz", "c.tar.xz", "c.tar.bz2", "c.zip"])
@pytest.mark.parametrize("data", [b"", b"not an archive at all" * 100])
def test_what_is_no_archive_is_rejected_by_name(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    good, bad = everything(tmp_path / name)
    assert not good
    assert bad == {name: "broken_archive"}


def test_one_damaged_zip_member_costs_only_itself(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "c.zip", MEMBERS)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("data/4.json")
    data[info.header_offset + 30 + len(info.filename) + 5] ^= 0xFF
    path.write_bytes(data)
    good, bad = everything(path)
    assert bad == {"4.json": "broken_archive"}
    assert len(good) == 11


def test_gzip_files_alone_in_folders_and_in_archives(tmp_path: Path) -> None:
    efaqa = READERS["efaqa"]
    packed = gzip.compress(b"{}")
    (tmp_path / "efaqa-corpus-zh.utf8.gz").write_bytes(packed)
    (tmp_path / "b.jsonl.gz").write_bytes(packed[:-6])
    alone = everything(tmp_path / "efaqa-corpus-zh.utf8.gz", efaqa)
    assert list(alone[0].values()) == [b"{}"]
    assert everything(tmp_path / "b.jsonl.gz", efaqa)[1] == {"b.jsonl.gz": "broken_archive"}
    path = write_tar(tmp_path / "c.tar", {"data/x.utf8.gz": packed})
    assert everything(path, efaqa)[0] == {"data/x.utf8.gz": b"{}"}


def test_other_files_are_ignored_and_counted(tmp_path: Path) -> None:
    write_files(tmp_path, {**MEMBERS, "data/README.md": b"x", "data/.DS_Store": b"x"})
    listing = list_location(str(tmp_path), SMILE)
    assert [Path(f.path).name for f in listing.files] == [f"{n}.json" for n in range(12)]
    assert listing.ignored == 1
    path = write_tar(tmp_path / "m.tar", {"__MACOSX/data/1.json": b"x", "data/._1.json": b"x"})
    assert everything(path) == ({}, {})


def test_the_best_pattern_wins_in_a_folder(tmp_path: Path) -> None:
    for name in ("AnnoMI-full.csv", "AnnoMI-simple.csv"):
        (tmp_path / name).write_bytes(b"x")
    listing = list_location(str(tmp_path), READERS["annomi"])
    assert [Path(f.path).name for f in listing.files] == ["AnnoMI-simple.csv"]
    assert listing.ignored == 1


@pytest.mark.parametrize("name", ["c.tar", "c.tar.xz", "c.zip", "folder"])
def test_the_best_pattern_wins_wherever_the_files_lie(tmp_path: Path, name: str) -> None:
    make = write_zip if name.endswith("zip") else write_files if name == "folder" else write_tar
    both = {"data/a_english.json": b"{}", "data/cn_data.json": b"{}", "data/.cn_data.json": b"x"}
    path = make(tmp_path / name, both)
    assert list(everything(path, READERS["psy_insight"])[0]) == ["data/cn_data.json"]


@pytest.mark.parametrize("name", ["c.tar.xz", "c.zip", "folder"])
def test_a_limit_counts_files(tmp_path: Path, name: str) -> None:
    make = write_zip if name.endswith("zip") else write_files if name == "folder" else write_tar
    path = make(tmp_path / name, {"data/LICENSE": b"x", **MEMBERS})
    assert list(everything(path, limit=3)[0]) == NAMES[:3]


def test_nothing_there() -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        list_location("/nowhere/at/all", SMILE)


def test_a_location_by_uri(tmp_path: Path) -> None:
    write_files(tmp_path, MEMBERS)
    listing = list_location(tmp_path.as_uri(), SMILE)
    [chunk] = chunks(listing, SMILE, None)
    assert [name.split("/")[-1] for name, _ in contents(chunk, SMILE)] == [
        f"{n}.json" for n in range(12)
    ]


def test_the_state_changes_when_a_file_does(tmp_path: Path) -> None:
    write_files(tmp_path, MEMBERS)
    before = list_location(str(tmp_path), SMILE).state()
    assert list_location(str(tmp_path), SMILE).state() == before
    (tmp_path / NAMES[3]).write_bytes(dialogue(300))
    assert list_location(str(tmp_path), SMILE).state() != before


def test_a_file_that_cannot_be_opened_is_rejected(tmp_path: Path) -> None:
    write_files(tmp_path, MEMBERS)
    [chunk] = chunks(list_location(str(tmp_path), SMILE), SMILE, None)
    (tmp_path / NAMES[2]).unlink()
    unusable = {Path(n).name for n, data in contents(chunk, SMILE) if isinstance(data, Unusable)}
    assert unusable == {"2.json"}
