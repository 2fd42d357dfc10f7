"""Table 3: how many dialogues and rounds, and how long the turns are.

Counting rule: the length of a turn is its number of characters without punctuation, symbols and
white space (Unicode classes P, S and Z). The paper calls this "words"; counted so, the public
CPsyCounD comes near its figures (client 29.95, counselor 47.76 there).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

COUNTING_RULE = "characters per turn without punctuation, symbols and white space"
_NOT_COUNTED = r"[\p{P}\p{S}\p{Z}\p{C}]"


class Lengths:
    """Table 3's figures of one set of dialogues, added up batch by batch."""

    def __init__(self) -> None:
        self._dialogues = 0
        self._turns = {"client": 0, "counselor": 0}
        self._characters = {"client": 0, "counselor": 0}

    def add(self, turns: pa.Array | pa.ChunkedArray) -> None:
        """Count dialogues: an array of lists of turns, as in the column `turns` of DIALOGUES."""
        self._dialogues += len(turns)
        flat = pc.list_flatten(turns)
        roles = pc.struct_field(flat, "role")
        contents = pc.struct_field(flat, "content")
        bare = pc.replace_substring_regex(contents, pattern=_NOT_COUNTED, replacement="")
        lengths = pc.utf8_length(bare)
        for role in self._turns:
            mine = pc.equal(roles, role)
            self._turns[role] += pc.sum(mine).as_py() or 0
            self._characters[role] += pc.sum(pc.filter(lengths, mine)).as_py() or 0

    def row(self, name: str) -> dict[str, Any]:
        """One row of Table 3. A round is one client turn and its answer; means over turns."""
        rounds = self._turns["counselor"]

        def mean(total: int, number: int) -> float | None:
            return round(total / number, 2) if number else None

        return {
            "set": name,
            "dialogues": self._dialogues,
            "rounds": rounds,
            "rounds_per_dialogue": mean(rounds, self._dialogues),
            "client_characters": mean(self._characters["client"], self._turns["client"]),
            "counselor_characters": mean(self._characters["counselor"], rounds),
        }


def table_row(name: str, batches: Iterable[pa.Array | pa.ChunkedArray]) -> dict[str, Any]:
    """One row of Table 3 over batches of the column `turns`."""
    lengths = Lengths()
    for turns in batches:
        lengths.add(turns)
    return lengths.row(name)
