"""A small workspace with every artifact that a report reads, made from tables written here."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from milm_ray import schema
from milm_ray.config import Config, load_config
from milm_ray.evaluation import stage as score
from milm_ray.workspace import Workspace

MODELS = ("baichuan2", "glm4", "llama3")
CORPORA = ("cpsycound", "psydtcorpus", "smilechat")
CLIENT = "我想少喝一点酒，可是每次聚会都停不下来<b>。"
REFERENCE = "您想少喝一点，又不想扫朋友的兴。"
SOURCE_REPLY = "你应该马上戒酒，喝酒对身体不好。"

REPLIES = {"base": "多喝水。", "adapter": "您想少喝一点，朋友在场时最难。"}
AFTER_DPO = "您想少喝一点，又怕扫朋友的兴。"
REJECT = schema.Reject("transcribe", "not_json", "cpsycound", "case_9", raw="好的，我来改写")
TRANSCRIBED = {
    "asked": 9,
    "transcribed": 8,
    "rejected": 1,
    "repaired": 2,
    "by_target_behavior": {"drinking": 7, "none": 1},
}
TEACHER = {
    "llm": {"model": "teacher-1"},
    "prompt": {"name": "mi_transcription.zh.md", "version": "0123456789ab"},
    "usage": {
        "replies": 11,
        "prompt_tokens": 12_345,
        "completion_tokens": 6_789,
        "replies_with_unknown_tokens": 0,
        "cost_usd": 1.25,
        "replies_with_unknown_cost": 0,
    },
}
TABLE_3 = {
    "counting_rule": "characters per turn",
    "rows": [
        {
            "set": name,
            "dialogues": 4,
            "rounds": 8,
            "rounds_per_dialogue": 2.0,
            "client_characters": 21.5,
            "counselor_characters": 15.25,
        }
        for name in ("corpus cpsycound", "MI train", "MI test")
    ],
}


def config_file(folder: Path) -> Path:
    """A configuration of three models whose workspace lies in `folder`."""
    settings = {
        "workspace": str(folder / "workspace"),
        "models": {
            name: {"hub_id": f"tiny/{name}", "revision": "main", "chat_format": name}
            for name in MODELS
        },
        "score": {"bootstrap": 100},
    }
    path = folder / "sample.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def build(folder: Path, tuned: Sequence[str] = ()) -> tuple[Config, Workspace]:
    """Write the configuration and every artifact but the report.

    tuned: models whose adapter was tuned further on preferences.
    """
    config = load_config(config_file(folder))
    ws = Workspace.open(config.workspace)
    sources = [_dialogue(corpus, number) for corpus in CORPORA for number in range(4)]
    rewritten = [_rewritten(source) for source in sources if source.corpus != "smilechat"]
    table = pa.Table.from_pylist([d.row() for d in sources], schema.DIALOGUES)
    read = {name: _ingested(name) for name in CORPORA}
    counts = {"dialogues": len(sources), "rejects": {"one_sided": 1}}
    _commit(ws, "dialogues", "ingest", table, counts=counts, corpora=read)
    table = pa.Table.from_pylist(rewritten, schema.MI_DIALOGUES)
    _commit(ws, "mi_dialogues", "transcribe", table, counts=TRANSCRIBED, **TEACHER)
    ws.write_table(pa.Table.from_pylist([REJECT.row()], schema.REJECTS), "rejects/transcribe")
    ws.write_text(json.dumps(TABLE_3), "statistics", "table3.json")
    _record(ws, "statistics", "split", {"train": 4, "test": 4})
    rounds = [row for dialogue in rewritten[:4] for row in _rounds(dialogue)]
    table = pa.Table.from_pylist(rounds, schema.ROUNDS)
    _commit(ws, "test_rounds", "split", table, counts={"rounds": len(rounds)})
    for model in MODELS:
        log = [
            {"model": model, "step": step, "epoch": step / 8, "loss": 3.0 - step / 10}
            for step in (2, 4, 6, 8)
        ]
        _commit(
            ws,
            f"adapters/{model}",
            "finetune",
            pa.Table.from_pylist(log, schema.TRAINING_LOG),
            "training_log.parquet",
            settings={"finetune": config.finetune.model_dump(mode="json")},
            base=f"tiny/{model}",
            name=f"{model}-mi",
        )
    ws.write_bytes(png(), "adapters", "loss_curves.png")
    for model in tuned:
        _preference_tuned(ws, model)
    said = {m: {**REPLIES, **({"dpo": AFTER_DPO} if m in tuned else {})} for m in MODELS}
    predictions = [
        _prediction(row, model, variant, text)
        for row in rounds
        for model, replies in said.items()
        for variant, text in replies.items()
    ]
    table = pa.Table.from_pylist(predictions, schema.PREDICTIONS)
    runs = {f"{m}/{v}/greedy": _run(len(rounds)) for m, replies in said.items() for v in replies}
    _commit(ws, "predictions", "generate", table, runs=runs)
    _score(config, ws, table)
    return config, ws


def _preference_tuned(ws: Workspace, model: str) -> None:
    place = f"adapters/{model}/dpo"
    log = [{"model": model, "step": step, "loss": 0.7 - step / 10} for step in (1, 2)]
    ws.write_bytes(png(), place, "loss.png")
    _commit(
        ws,
        place,
        "finetune",
        pa.Table.from_pylist(log, schema.PREFERENCE_LOG),
        "rewards.parquet",
        counts={"pairs": 12, "steps": 2, "final_loss": 0.5, "final_accuracy": 0.75},
        base=f"tiny/{model}",
        name=f"{model}-mi-dpo",
        judges=["judge-1"],
    )


def _score(config: Config, ws: Workspace, predictions: pa.Table) -> None:
    from milm_ray.evaluation.score import score_predictions

    scores = score_predictions(predictions, ws.read_table("test_rounds"))
    made_from = ws.fingerprint({}, ws.input_digests(*score.INPUTS))
    score.record(config, ws, scores, made_from, time.time())


def _run(rounds: int) -> dict[str, int]:
    return {
        "predictions": rounds,
        "empty": 0,
        "cut_at_max_new_tokens": 1,
        "prompts_shortened": 0,
        "dropped_rounds": 0,
        "prompt_tokens": 500,
        "completion_tokens": 77,
    }


def _ingested(corpus: str) -> dict[str, Any]:
    return {
        "title": f"The corpus {corpus}",
        "files": 4,
        "dialogues": 4,
        "rejects": {"one_sided": 1} if corpus == "smilechat" else {},
        "repairs": {},
    }


def _dialogue(corpus: str, number: int) -> schema.Dialogue:
    turns = []
    for k in range(3):
        turns.append(schema.Turn("client", f"{CLIENT}（{number}之{k}）"))
        turns.append(schema.Turn("counselor", SOURCE_REPLY))
    return schema.Dialogue(corpus, f"case_{number}", turns, "饮酒")


def _rewritten(source: schema.Dialogue) -> dict[str, Any]:
    asked = f"{CLIENT}（{source.source_id}）"
    turns = [schema.Turn("client", asked), schema.Turn("counselor", REFERENCE)] * 2
    made = schema.Dialogue(source.corpus, f"{source.source_id}-mi", turns, source.topic)
    return {
        **made.row(),
        "source_dialogue_id": source.dialogue_id,
        "target_behavior": "少喝酒",
        "reply_key": "",
    }


def _rounds(dialogue: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "dialogue_id": dialogue["dialogue_id"],
            "round_index": k,
            "topic": dialogue["topic"],
            "instruction": "你是一位心理咨询师。",
            "input": CLIENT,
            "output": REFERENCE,
            "history": [{"client": CLIENT, "counselor": REFERENCE}] * (k - 1),
        }
        for k in (1, 2)
    ]


def _prediction(row: dict[str, Any], model: str, variant: str, text: str) -> dict[str, Any]:
    return {
        "dialogue_id": row["dialogue_id"],
        "round_index": row["round_index"],
        "model": model,
        "variant": variant,
        "sampling": "greedy",
        "text": text,
        "finish_reason": "stop",
    }


def _commit(
    ws: Workspace,
    artifact: str,
    stage: str,
    table: pa.Table,
    file: str = "part-0.parquet",
    counts: dict[str, Any] | None = None,
    **facts: Any,
) -> None:
    ws.write_table(table, artifact, file)
    _record(ws, artifact, stage, counts or {"rows": table.num_rows}, **facts)


def _record(ws: Workspace, artifact: str, stage: str, counts: dict[str, Any], **facts: Any) -> None:
    ws.commit(
        artifact,
        stage=stage,
        settings=facts.pop("settings", {}),
        fingerprint={},
        counts=counts,
        started=time.time(),
        **facts,
    )


def png() -> bytes:
    """A white picture of two by two pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\x00\xff\xff" * 2)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks
