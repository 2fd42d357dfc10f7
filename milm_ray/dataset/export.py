"""Training and test data in LLaMA-Factory's own JSON, so that its users can check ours.

Alpaca (one record per round in the test set, per dialogue in the training set) with the history
apart, Alpaca with the history inside the input as the paper says, and ShareGPT. `dataset_info.json`
is what LLaMA-Factory reads from its `dataset_dir`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from milm_ray.dataset.rounds import inline_input, rounds
from milm_ray.models.messages import INSTRUCTION, dialogue_messages
from milm_ray.schema import turns_of

Record = dict[str, Any]
INDEX = "dataset_info.json"
_FROM = {"user": "human", "assistant": "gpt"}


def alpaca(row: Mapping[str, Any]) -> Record:
    """One round. LLaMA-Factory joins instruction and input by a newline into the last user text.

    So that the conversation is the one trained on here (the instruction once, before the client's
    first words), the instruction stands in the oldest entry of the history, or in its own field
    where there is no history.
    """
    history = [[exchange["client"], exchange["counselor"]] for exchange in row["history"]]
    if not history:
        return {
            "instruction": row["instruction"],
            "input": row["input"],
            "output": row["output"],
            "history": [],
        }
    history[0][0] = f"{row['instruction']}\n{history[0][0]}"
    return {"instruction": row["input"], "input": "", "output": row["output"], "history": history}


def alpaca_inline(row: Mapping[str, Any]) -> Record:
    """One round with the history inside the input."""
    return {"instruction": row["instruction"], "input": inline_input(row), "output": row["output"]}


def sharegpt(dialogue: Mapping[str, Any]) -> Record:
    """One whole dialogue; LLaMA-Factory puts loss on every `gpt` turn, as training does here."""
    messages = dialogue_messages(turns_of(dict(dialogue)), INSTRUCTION)
    return {
        "conversations": [{"from": _FROM[m["role"]], "value": m["content"]} for m in messages],
    }


def files(
    train: Iterable[Mapping[str, Any]], test: Iterable[Mapping[str, Any]]
) -> dict[str, Iterator[Record]]:
    """Every exported file by name: its records, each made when it is asked for.

    train, test: dialogues that can be gone through more than once.
    """

    def each_round(dialogues: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
        return (row for dialogue in dialogues for row in rounds(dialogue))

    return {
        "train_alpaca.json": (alpaca(rounds(dialogue)[-1]) for dialogue in train),
        "train_sharegpt.json": (sharegpt(dialogue) for dialogue in train),
        "train_rounds_inline.json": (alpaca_inline(row) for row in each_round(train)),
        "test_alpaca.json": (alpaca(row) for row in each_round(test)),
        "test_sharegpt.json": (sharegpt(dialogue) for dialogue in test),
        "test_rounds_inline.json": (alpaca_inline(row) for row in each_round(test)),
    }


def index() -> Record:
    """What stands in INDEX about each file."""
    return {f"milm_{name.removesuffix('.json')}": _index(name) for name in files((), ())}


def _index(name: str) -> Record:
    if "sharegpt" in name:
        columns = {"messages": "conversations"}
        return {"file_name": name, "formatting": "sharegpt", "columns": columns}
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    if "alpaca" in name:
        columns["history"] = "history"
    return {"file_name": name, "formatting": "alpaca", "columns": columns}
