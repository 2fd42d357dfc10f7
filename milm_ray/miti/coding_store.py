"""What coders do on the coding page, kept from the moment they do it.

One SQLite file in the workspace, every change a committed transaction, so that a server killed at
any moment has lost nothing that it had acknowledged. The rules of the volley hold at every change:
what breaks them is refused with the reason.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from milm_ray.errors import UserError
from milm_ray.miti.coding_scheme import GLOBAL_NAMES, code_name, volley_faults
from milm_ray.miti.packet import Item
from milm_ray.miti.sheet import CodedItem
from milm_ray.miti.sheet_checks import NO_CODES
from milm_ray.workspace import Workspace

FOLDER, FILE = "coding", "coding.sqlite"
ADJUDICATED = "adjudicated"
_TABLES = """
create table if not exists packet (digest text primary key);
create table if not exists codes (
  coder text, item text, volley integer, utterance integer, code text,
  primary key (coder, item, volley, utterance));
create table if not exists items (
  coder text, item text, target_behavior text default '', comment text default '',
  scores text default '{}', finished integer default 0, updated real,
  primary key (coder, item));
create table if not exists log (at real, coder text, item text, change text);
"""


class Refused(Exception):
    """A change that the coding rules or the state of an item forbid; the message is for coders."""


class CodingStore:
    """The page's store. One instance serves one process; SQLite orders the writers."""

    def __init__(self, path: Path, items: Sequence[Item]) -> None:
        """Opens or makes the file. Raises UserError when it belongs to another packet."""
        self._items = {item.item_id: item for item in items}
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        mark = _packet_mark(items)
        with self._open() as db:
            db.executescript(_TABLES)
            known = [row[0] for row in db.execute("select digest from packet")]
            if known and known != [mark] and not _begun(db):
                db.execute("delete from packet")
            elif known and known != [mark]:
                raise UserError(
                    f"{path} holds codes of another packet: its dialogues have changed since",
                    "finish the old packet first, or move the file away to start anew",
                )
            db.execute("insert or ignore into packet values (?)", (mark,))

    @classmethod
    def of(cls, workspace: Workspace, items: Sequence[Item]) -> CodingStore:
        """The store of a workspace on a local or mounted path."""
        return cls(workspace.local(FOLDER, FILE), items)

    @staticmethod
    def begun(workspace: Workspace) -> bool:
        """Whether anybody has coded anything on the page."""
        if not workspace.exists(FOLDER, FILE):
            return False
        db = sqlite3.connect(workspace.local(FOLDER, FILE))
        try:
            return _begun(db)
        finally:
            db.close()

    @staticmethod
    def digest_of(workspace: Workspace) -> str:
        """sha256 of everything coded on the page; "" where nothing was."""
        if not workspace.exists(FOLDER, FILE):
            return ""
        db = sqlite3.connect(workspace.local(FOLDER, FILE))
        try:
            rows = [
                db.execute(f"select * from {name} order by 1, 2, 3, 4").fetchall()
                for name in ("codes", "items")
            ]
        finally:
            db.close()
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @classmethod
    def finished_items(cls, workspace: Workspace, items: Sequence[Item]) -> list[CodedItem]:
        """Everything that coders finished on the page, by coder and in packet order."""
        if not workspace.exists(FOLDER, FILE):
            return []
        store = cls.of(workspace, items)
        return [coded for coder in store.coders() for coded in store.finished(coder)]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self._path, timeout=30)
        try:
            db.execute("pragma journal_mode = wal")
            db.execute("pragma synchronous = full")
            with db:
                yield db
        finally:
            db.close()

    def coders(self) -> list[str]:
        with self._open() as db:
            return [row[0] for row in db.execute("select distinct coder from items order by 1")]

    def state(self, coder: str, item_id: str) -> dict[str, Any]:
        """One coder's work on one item: codes by "volley.utterance", scores, target, comment."""
        self._item(item_id)
        with self._open() as db:
            return _state(db, coder, item_id)

    def set_code(
        self, coder: str, item_id: str, volley: int, utterance: int, code: str | None
    ) -> dict[str, Any]:
        """Give an utterance a code, or None; returns the item's state.

        A complex reflection takes the place of the volley's simple one. Raises Refused.
        """
        item = self._item(item_id)
        name = code_name(code) if code else None
        if code and name is None:
            raise Refused(f"unknown code {code!r}")
        place = next((v for v in item.volleys if v.number == volley), None)
        if place is None or not 1 <= utterance <= len(place.utterances):
            raise Refused(f"{item_id} has no utterance {volley}.{utterance}")
        if place.role != "counselor":
            raise Refused("only the counselor's utterances are coded")
        with self._open() as db:
            db.execute("begin immediate")
            self._unfinished(db, coder, item_id)
            given = {
                int(k): v
                for k, v in db.execute(
                    "select utterance, code from codes where coder=? and item=? and volley=?",
                    (coder, item_id, volley),
                )
            }
            given.pop(utterance, None)
            if name == "complex_reflection":
                given = {k: v for k, v in given.items() if v != "simple_reflection"}
            if name:
                given[utterance] = name
            if faults := volley_faults(given.values()):
                raise Refused(faults[0])
            db.execute(
                "delete from codes where coder=? and item=? and volley=?", (coder, item_id, volley)
            )
            db.executemany(
                "insert into codes values (?,?,?,?,?)",
                [(coder, item_id, volley, k, v) for k, v in given.items()],
            )
            _touch(db, coder, item_id, f"code {volley}.{utterance} {name}")
            return _state(db, coder, item_id)

    def set_score(self, coder: str, item_id: str, name: str, score: int | None) -> dict[str, Any]:
        """Set one global score, or clear it. Raises Refused."""
        self._item(item_id)
        whole = isinstance(score, int) and not isinstance(score, bool)
        if name not in GLOBAL_NAMES or not (score is None or (whole and 1 <= score <= 5)):
            raise Refused(f"{name} takes a whole number from 1 to 5")
        with self._open() as db:
            db.execute("begin immediate")
            self._unfinished(db, coder, item_id)
            scores = _state(db, coder, item_id)["scores"]
            scores.pop(name, None)
            if score is not None:
                scores[name] = score
            _touch(db, coder, item_id, f"score {name} {score}", scores=json.dumps(scores))
            return _state(db, coder, item_id)

    def set_text(self, coder: str, item_id: str, field: str, text: str) -> dict[str, Any]:
        """Set target_behavior or comment. Raises Refused."""
        self._item(item_id)
        if field not in ("target_behavior", "comment"):
            raise Refused(f"unknown field {field!r}")
        with self._open() as db:
            db.execute("begin immediate")
            self._unfinished(db, coder, item_id)
            _touch(db, coder, item_id, f"text {field}", **{field: text[:2000]})
            return _state(db, coder, item_id)

    def finish(self, coder: str, item_id: str, done: bool = True) -> dict[str, Any]:
        """Close an item, or open it again. Raises Refused naming what is still missing."""
        self._item(item_id)
        with self._open() as db:
            db.execute("begin immediate")
            state = _state(db, coder, item_id)
            missing = [name for name in GLOBAL_NAMES if name not in state["scores"]]
            if not state["target_behavior"].strip():
                missing.insert(0, "target_behavior")
            if not state["codes"] and NO_CODES not in state["comment"].lower():
                missing.append("codes")
            if done and missing:
                raise Refused("missing: " + ", ".join(missing))
            _touch(db, coder, item_id, f"finished {done}", finished=int(done))
            return _state(db, coder, item_id)

    def work(self, coder: str) -> list[CodedItem]:
        """All items that a coder has begun, finished or not, in packet order."""
        return self._coded(coder, finished_only=False)

    def finished(self, coder: str) -> list[CodedItem]:
        """The items that a coder has finished, in packet order."""
        return self._coded(coder, finished_only=True)

    def _coded(self, coder: str, finished_only: bool) -> list[CodedItem]:
        found = []
        with self._open() as db:
            for item_id in self._items:
                state = _state(db, coder, item_id)
                if state["begun"] and (state["finished"] or not finished_only):
                    codes = {_place(key): code for key, code in state["codes"].items()}
                    found.append(
                        CodedItem(
                            item_id,
                            coder,
                            state["target_behavior"].strip(),
                            codes,
                            state["scores"],
                            state["comment"].strip(),
                        )
                    )
        return found

    def _item(self, item_id: str) -> Item:
        if item_id not in self._items:
            raise Refused(f"{item_id!r} is not in the packet")
        return self._items[item_id]

    def _unfinished(self, db: sqlite3.Connection, coder: str, item_id: str) -> None:
        if _state(db, coder, item_id)["finished"]:
            raise Refused("this dialogue is finished; open it again to change it")


def _begun(db: sqlite3.Connection) -> bool:
    return db.execute("select 1 from items limit 1").fetchone() is not None


def _state(db: sqlite3.Connection, coder: str, item_id: str) -> dict[str, Any]:
    row = db.execute(
        "select target_behavior, comment, scores, finished from items where coder=? and item=?",
        (coder, item_id),
    ).fetchone()
    codes = db.execute(
        "select volley, utterance, code from codes where coder=? and item=? order by 1, 2",
        (coder, item_id),
    )
    target, comment, scores, done = row or ("", "", "{}", 0)
    return {
        "item": item_id,
        "codes": {f"{volley}.{utterance}": code for volley, utterance, code in codes},
        "scores": json.loads(scores),
        "target_behavior": target,
        "comment": comment,
        "finished": bool(done),
        "begun": row is not None,
    }


def _touch(
    db: sqlite3.Connection, coder: str, item_id: str, change: str, **values: str | int
) -> None:
    now = time.time()
    db.execute("insert or ignore into items (coder, item) values (?, ?)", (coder, item_id))
    for field, value in {**values, "updated": now}.items():
        db.execute(f"update items set {field}=? where coder=? and item=?", (value, coder, item_id))
    db.execute("insert into log values (?,?,?,?)", (now, coder, item_id, change))


def _place(key: str) -> tuple[int, int]:
    volley, utterance = key.split(".")
    return int(volley), int(utterance)


def _packet_mark(items: Sequence[Item]) -> str:
    text = [[i.item_id, [[v.number, v.role, v.utterances] for v in i.volleys]] for i in items]
    return hashlib.sha256(json.dumps(text, ensure_ascii=False).encode()).hexdigest()
