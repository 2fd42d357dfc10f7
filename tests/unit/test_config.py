"""The configuration: every problem at once, environment variables, overrides, hints."""

from pathlib import Path

import pytest

from milm_ray.config import load_config
from milm_ray.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "test.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_all_problems_are_reported_at_once(tmp_path):
    path = write(
        tmp_path,
        "curate: {per_corpu: 3}\nseed: x\nunknown: 1\n"
        "ingest: {corpora: {cpsycound: {path: /no/such/place}}}\n"
        "teacher: {base_url: '${MILM_RAY_TEST_UNSET}'}\n",
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["split.test_dialogues=many", "nonsense"], check_paths=["ingest"])
    text = str(caught.value)
    for fragment in (
        "curate.per_corpu: unknown key; did you mean per_corpus?",
        "seed: ",
        "unknown: unknown key",
        "ingest.corpora.cpsycound.path: no such file or directory: /no/such/place",
        "teacher.base_url: the environment variable MILM_RAY_TEST_UNSET is not set",
        "split.test_dialogues: ",
        "'nonsense': expected section.key=value",
    ):
        assert fragment in text
    assert len(caught.value.problems) == 7


def test_a_folder_in_place_of_a_file_and_a_file_in_place_of_a_folder_are_named(tmp_path):
    path = write(tmp_path, "seed: 1\n")
    wrong = [f"miti.annomi={tmp_path}", f"miti.sheets={path}", "miti.paper_cells=s3://b/cells.csv"]
    with pytest.raises(ConfigError) as caught:
        load_config(path, wrong, check_paths=["miti"])
    for problem in (
        f"miti.annomi: not a file: {tmp_path}",
        f"miti.sheets: not a directory: {path}",
        "miti.paper_cells: no such file: s3://b/cells.csv",
    ):
        assert problem in str(caught.value)


def test_paths_are_checked_only_for_the_sections_a_job_reads(tmp_path):
    path = write(tmp_path, "ingest: {corpora: {cpsycound: {path: /no/such/place}}}\n")
    assert load_config(path).ingest.corpora["cpsycound"].path == "/no/such/place"


def test_overrides_are_yaml_and_reach_into_new_sections(tmp_path):
    path = write(tmp_path, "seed: 1\n")
    config = load_config(
        path,
        ["seed=7", "generate.seeds=[1, 2]", "models.qwen={path: x, chat_format: llama3}"],
    )
    assert config.seed == 7
    assert config.generate.seeds == [1, 2]
    assert config.models["qwen"].path == "x"
    assert config.workspace == "runs/test"


def test_environment_variables_and_defaults(tmp_path, monkeypatch):
    monkeypatch.setenv("MILM_RAY_TEST_ROOT", "/data")
    path = write(tmp_path, "workspace: '${MILM_RAY_TEST_ROOT}/runs/${MILM_RAY_TEST_UNSET:-one}'\n")
    assert load_config(path).workspace == "/data/runs/one"


def test_a_model_needs_exactly_one_source(tmp_path):
    path = write(tmp_path, "models: {m: {chat_format: llama3}}\n")
    with pytest.raises(ConfigError, match=r"models\.m: give either path or hub_id"):
        load_config(path)


def test_a_model_from_the_hub_is_pinned(tmp_path):
    path = write(tmp_path, "models: {q: {hub_id: Qwen/Qwen2.5-7B-Instruct, chat_format: llama3}}\n")
    with pytest.raises(ConfigError, match=r"is not pinned.*Qwen2\.5-7B-Instruct/commits/main"):
        load_config(path)
    pinned = load_config(path, ["models.q.revision=0123abc"]).models["q"]
    assert pinned.revision == "0123abc"


def test_a_chat_format_is_one_that_the_job_knows(tmp_path):
    path = write(tmp_path, "models: {q: {path: /anywhere, chat_format: chatml}}\n")
    assert load_config(path).models["q"].chat_format == "chatml"
    with pytest.raises(ConfigError, match=r"models\.q\.chat_format: .*known are glm4, llama3"):
        load_config(path, chat_formats=["llama3", "glm4"])


@pytest.mark.parametrize("text", ["- a\n- list\n", "a: [unclosed\n"])
def test_a_file_that_is_no_mapping(tmp_path, text):
    with pytest.raises(ConfigError, match="--config"):
        load_config(write(tmp_path, text))


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.yaml")


def test_the_shipped_configurations_are_valid(monkeypatch):
    for name in ("CORPORA", "CPSYCOUND", "RECORDED"):
        monkeypatch.setenv(name, "/data")
    found = sorted(CONFIGS.glob("*.yaml"))
    assert len(found) >= 3
    paper = next(load_config(path) for path in found if path.stem == "paper")
    tune = paper.finetune
    assert (tune.learning_rate, tune.schedule, tune.warmup_ratio) == (1e-4, "cosine", 0.1)
    assert (tune.batch_size, tune.gradient_accumulation, tune.epochs) == (1, 8, 3)
    assert (tune.precision, tune.logging_steps, tune.save_steps) == ("bf16", 10, 500)
    assert sum(paper.transcribe.per_corpus.values()) == 2040
    for path in found:
        load_config(path)
