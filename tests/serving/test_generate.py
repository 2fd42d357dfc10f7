"""Batch prediction through real endpoints: whole, in order, resumable."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from milm_ray.config import Config
from milm_ray.errors import ConfigError
from milm_ray.llm.reply_store import ReplyStore
from milm_ray.schema import PREDICTIONS
from milm_ray.serving import batch
from milm_ray.serving import predict as stage
from tests.serving.conftest import Served, commit, random_adapter, sample_rounds

pytestmark = pytest.mark.slow


def test_every_round_is_predicted_by_every_run_and_nothing_is_asked_twice(served: Served) -> None:
    wanted = batch.runs(served.config, served.workspace, served.bases)
    assert len(wanted) == 8  # two models, base and adapter, greedy and one seed
    tally = write(served, wanted)
    table = predictions(served)
    assert table.schema.equals(PREDICTIONS)
    keys = list(zip(*(table[name].to_pylist() for name in PREDICTIONS.names[:5]), strict=True))
    assert len(keys) == len(set(keys)) == 4 * 6 * 8
    assert [key[:2] for key in keys] == sorted(key[:2] for key in keys)
    assert tally.counts()["rows"] == 4 * 6 * 8
    assert tally.counts()["rejected"] == 0
    replies = len(ReplyStore(served.workspace))

    again = write(served, wanted)
    assert predictions(served).equals(table)
    assert len(ReplyStore(served.workspace)) == replies
    assert again.by_run() == tally.by_run()


def test_a_long_history_loses_its_oldest_rounds_and_is_counted(served: Served) -> None:
    served.workspace.write_table(sample_rounds(1, 40), "long_rounds")
    wanted = batch.runs(served.config, served.workspace, served.bases)[:1]
    files = served.workspace.parquet_files("long_rounds")
    tally = write(served, wanted, files)
    rows = predictions(served).to_pylist()
    assert tally.counts()["rejected"] == 0
    assert rows[0]["dropped_rounds"] == 0
    assert rows[-1]["dropped_rounds"] > 0
    assert tally.counts()["prompts_shortened"] == sum(r["dropped_rounds"] > 0 for r in rows)
    room = served.config.serve.max_model_len - served.config.generate.max_new_tokens
    assert all(0 < row["prompt_tokens"] <= room for row in rows)


def test_adapters_reply_to_a_round_once_per_seed(served: Served) -> None:
    wanted = batch.sampled_runs(served.config, served.workspace, served.bases, [1, 2, 3])
    served.workspace.write_table(sample_rounds(1, 2), "preference_rounds")
    files = served.workspace.parquet_files("preference_rounds")
    outcomes = batch.predict(served.config, served.workspace, wanted, served.url, files)
    tally = stage.write(served.workspace, outcomes, "candidates", "rejects/candidates")
    assert tally.counts()["rejected"] == 0
    rows = pq.read_table(served.workspace.parquet_files("candidates")).to_pylist()
    assert {(row["model"], row["variant"], row["sampling"]) for row in rows} == {
        (model, "adapter", f"seed-{seed}") for model in served.bases for seed in (1, 2, 3)
    }
    assert len(rows) == 2 * 3 * 2
    # Sampled with different seeds, replies differ: there is something to rank.
    for model in served.bases:
        assert len({row["text"] for row in rows if row["model"] == model}) > 2


@pytest.fixture
def preference_tuned(served: Served) -> Iterator[str]:
    """A model that has another adapter beside its own, as preference tuning leaves one."""
    model = "glm4"
    place = served.workspace.local("adapters", model, "dpo")
    random_adapter(served.bases[model], place, model, 7)
    commit(served.workspace, f"adapters/{model}/dpo")
    yield model
    shutil.rmtree(place)


def test_an_adapter_tuned_on_preferences_replies_beside_the_others(
    served: Served, preference_tuned: str
) -> None:
    before = stage._fingerprint(replying(served.config, "base", "adapter"), served.workspace)
    assert stage._fingerprint(served.config, served.workspace) != before
    wanted = batch.runs(served.config, served.workspace, served.bases)
    assert [run.endpoint for run in wanted if run.variant == "dpo"] == ["glm4:dpo"] * 2
    assert "glm4 (base, adapter, dpo)" in stage.plan(served.config, served.workspace).notes[0]
    greedy = [run for run in wanted if run.model == preference_tuned and run.seed is None]
    tally = write(served, greedy)
    assert tally.by_run()["glm4/dpo/greedy"]["predictions"] == 4 * 6
    said: dict[str, list[str]] = {}
    for row in predictions(served).to_pylist():
        said.setdefault(row["variant"], []).append(row["text"])
    for other in ("base", "adapter"):
        apart = [a != b for a, b in zip(said["dpo"], said[other], strict=True)]
        assert sum(apart) > len(apart) / 2


def test_without_one_its_variant_alone_is_refused(served: Served) -> None:
    with pytest.raises(ConfigError, match=r"generate\.variants: no model has a dpo adapter"):
        stage.plan(replying(served.config, "dpo"), served.workspace)


def replying(config: Config, *variants: str) -> Config:
    generate = config.generate.model_copy(update={"variants": list(variants)})
    return config.model_copy(update={"generate": generate})


def predictions(served: Served) -> pa.Table:
    return pq.read_table(served.workspace.parquet_files(stage.ARTIFACT))


def write(served: Served, wanted: list[batch.Run], rounds: Sequence[str] = ()) -> stage.Tally:
    outcomes = batch.predict(served.config, served.workspace, wanted, served.url, rounds)
    return stage.write(served.workspace, outcomes)
