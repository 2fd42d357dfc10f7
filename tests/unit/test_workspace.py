"""The workspace: an artifact counts only when whole, and only for what it was made from."""

import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from milm_ray.errors import UserError
from milm_ray.workspace import MANIFEST, Workspace, children, digest, home_for


@pytest.fixture
def workspace(tmp_path):
    return Workspace.open(str(tmp_path / "run"))


def make(workspace, rows, settings=None):
    made_from = workspace.fingerprint(settings or {"n": 1}, {"input": "abc"})
    workspace.clear("train")
    workspace.write_table(pa.table({"x": rows}), "train")
    workspace.commit(
        "train",
        stage="split",
        settings=settings or {"n": 1},
        fingerprint=made_from,
        counts={"rows": len(rows)},
        started=time.time(),
    )
    return made_from


def test_opening_writes_nothing(tmp_path):
    Workspace.open(str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_is_done_only_for_what_it_was_made_from(workspace):
    made_from = make(workspace, [1, 2])
    assert workspace.is_done("train", made_from)
    assert not workspace.is_done("train", workspace.fingerprint({"n": 2}, {"input": "abc"}))
    assert not workspace.is_done("train", workspace.fingerprint({"n": 1}, {"input": "abd"}))


def test_without_its_manifest_an_artifact_does_not_count(workspace):
    made_from = make(workspace, [1])
    workspace.local("train", MANIFEST).unlink()
    assert not workspace.is_done("train", made_from)
    with pytest.raises(UserError, match=r"train/ is not in the workspace .*\n.*jobs/split.py"):
        workspace.read_table("train")


def test_clear_removes_what_an_interrupted_run_left(workspace):
    workspace.write_text("half", "train", "part-0.parquet")
    made_from = make(workspace, [5])
    assert workspace.read_table("train")["x"].to_pylist() == [5]
    assert workspace.is_done("train", made_from)


def test_the_digest_follows_the_content_not_the_time(workspace):
    make(workspace, [1, 2])
    first = workspace.manifest("train")
    make(workspace, [1, 2])
    assert workspace.manifest("train")["digest"] == first["digest"]
    make(workspace, [1, 3])
    assert workspace.manifest("train")["digest"] != first["digest"]


def test_a_failed_write_leaves_no_partial_file(workspace):
    workspace.write_text("old", "train", "note.txt")
    assert workspace.read_text("train", "note.txt") == "old"
    workspace.local("train").chmod(0o755)
    workspace.local("blocked").write_text("a file where a directory must go")
    with pytest.raises((UserError, OSError)):
        workspace.write_text("x", "blocked", "note.txt")
    assert [p.name for p in workspace.local("train").iterdir()] == ["note.txt"]


def test_digest_ignores_key_order():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_manifest_is_json_with_versions(workspace):
    make(workspace, [1])
    manifest = json.loads(workspace.local("train", MANIFEST).read_text())
    assert manifest["versions"]["pyarrow"] == pa.__version__
    assert manifest["counts"] == {"rows": 1}


def test_relative_workspaces_outlive_a_submitted_jobs_directory(tmp_path, monkeypatch):
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert home_for("runs/one") == str(tmp_path / "home" / "runs" / "one")
    assert home_for("/abs/one") == "/abs/one"
    assert home_for("s3://bucket/one") == "s3://bucket/one"


def test_an_unknown_store_is_named():
    with pytest.raises(UserError, match="nosuch://x/y"):
        Workspace.open("nosuch://x/y")


def test_credentials_in_the_uri_are_refused_without_repeating_them():
    with pytest.raises(UserError) as refused:
        Workspace.open("s3://AKIDEXAMPLE:hunter2@bucket/run")
    assert "hunter2" not in str(refused.value)
    assert "AKIDEXAMPLE" not in str(refused.value)
    assert "AWS_ACCESS_KEY_ID" in refused.value.fix


def test_a_place_inside_keeps_the_uris_options(tmp_path):
    import pyarrow.fs as pafs

    remote = Workspace("s3://bucket/run?scheme=http", pafs.LocalFileSystem(), "bucket/run")
    assert remote.uri_of("adapters", "glm4") == "s3://bucket/run/adapters/glm4?scheme=http"
    local = Workspace.open(str(tmp_path / "odd?name"))
    assert local.uri_of("adapters") == str(tmp_path / "odd?name" / "adapters")


def test_a_directory_that_another_process_is_just_making_is_empty(tmp_path: Path) -> None:
    class Racing:
        """Not there when it is listed, there when it is looked for."""

        def get_file_info(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
            raise FileNotFoundError(selector.base_dir)

    assert children(Racing(), "replies") == []
    (tmp_path / "a.jsonl").touch()
    local = pafs.LocalFileSystem()
    assert [info.base_name for info in children(local, str(tmp_path))] == ["a.jsonl"]
    assert children(local, str(tmp_path / "absent")) == []
