"""Fetching and checking corpora, with a git repository made here in the place of the published."""

from __future__ import annotations

import dataclasses
import subprocess
import tarfile
from pathlib import Path

import pytest

from milm_ray import samples
from milm_ray.config import CORPORA
from milm_ray.corpora import fetch, sources
from milm_ray.corpora.sources import SOURCES, download, inspect
from milm_ray.errors import UserError

CASES = Path(samples.__file__).parent / "CPsyCounD" / "Data"


def git(*arguments: str, where: Path) -> None:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", *who, *arguments], cwd=where, check=True, capture_output=True)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> sources.Source:
    """CPsyCounD as if the sample were what is published, in a local git repository."""
    repository = tmp_path / "published"
    (repository / "Data").mkdir(parents=True)
    for case in CASES.iterdir():
        (repository / "Data" / case.name).write_bytes(case.read_bytes())
    git("init", "-q", where=repository)
    git("add", ".", where=repository)
    git("commit", "-q", "-m", "x", where=repository)
    source = dataclasses.replace(
        SOURCES["cpsycound"],
        url=repository.as_uri(),
        folder="Data",
        dialogues=42,
        digest=inspect("cpsycound", str(CASES)).digest,
    )
    monkeypatch.setitem(SOURCES, "cpsycound", source)
    return source


def test_every_corpus_has_a_source_with_terms_and_a_command() -> None:
    assert set(SOURCES) == set(CORPORA)
    for source in SOURCES.values():
        assert source.licence
        assert source.page.startswith("https://")
        assert "{to}" not in fetch.describe(source)


def test_only_open_licences_are_downloaded(tmp_path: Path) -> None:
    assert {name for name, source in SOURCES.items() if source.open_licence} == {
        "cpsycound",
        "smilechat",
    }
    for name in set(CORPORA) - {"cpsycound", "smilechat"}:
        with pytest.raises(UserError, match="not downloaded for you"):
            download(SOURCES[name], tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


def test_download_and_check(
    tmp_path: Path, published: sources.Source, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch.main("", ["cpsycound", "--download", str(tmp_path / "raw")]) == 0
    assert "as published: count and digest" in capsys.readouterr().out
    assert fetch.main("", ["cpsycound", "--download", str(tmp_path / "raw")]) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_repository_that_is_not_there(tmp_path: Path, published: sources.Source) -> None:
    gone = dataclasses.replace(published, url=(tmp_path / "gone").as_uri())
    with pytest.raises(UserError, match="could not be cloned"):
        download(gone, tmp_path / "raw")


def test_a_changed_or_missing_file_is_told(
    tmp_path: Path, published: sources.Source, capsys: pytest.CaptureFixture[str]
) -> None:
    place = download(published, tmp_path / "raw")
    case = place / "case_3.txt"
    case.write_text(case.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert fetch.main("", ["cpsycound", "--check", str(place)]) == 1
    assert "digest" in capsys.readouterr().out
    case.unlink()
    assert fetch.main("", ["cpsycound", "--check", str(place)]) == 1
    assert "41 dialogues, not 42" in capsys.readouterr().out


def test_the_digest_does_not_depend_on_the_container(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "cases.tar.gz", "w:gz") as archive:
        archive.add(CASES, "other/name")
    assert inspect("cpsycound", str(tmp_path / "cases.tar.gz")) == inspect("cpsycound", str(CASES))


def test_wrong_arguments_and_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        fetch.main("", ["--check", str(tmp_path)])
    assert caught.value.code == 2
    assert fetch.main("", ["smilechat", "--check", str(tmp_path)]) == 1
    assert fetch.main("", ["smilechat", "--check", str(tmp_path / "gone")]) == 1
    assert "cannot be listed" in capsys.readouterr().err
    assert fetch.main("", []) == 0
    assert capsys.readouterr().out.count("licence:") == 6
