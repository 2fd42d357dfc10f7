"""A client played by a language model under the state model: it reads, the rules move, it speaks.

Three questions, each with its own prompt: what the counselor's last reply meets in this client
(strict JSON), what the client says to carry out the action that the rules chose, and, when the
session is over, which action each of its turns looks like. The last is asked without telling what
was intended, so it shows how faithfully the turns carry the model out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from milm_ray.llm.client import LLMClient, Rejected
from milm_ray.llm.exchange import Row, Task, Unusable, Usage, exchange
from milm_ray.llm.replies import Request, Subject, json_object
from milm_ray.miti.client_model import ACTIONS, Assignment, ClientModel, Profile, Reading, Step
from milm_ray.prompts import load
from milm_ray.schema import Turn

READING, TURN, RECOGNISE = (
    "client_reading.zh.md",
    "client_turn.zh.md",
    "client_actions.zh.md",
)
_RECENT = 6  # turns of the session that a reading sees
_LONGEST = 400  # characters; a longer reply is no turn but a confusion of roles
_EVERY_ACTION = sorted({action for allowed in ACTIONS.values() for action in allowed})
_SPEAKER = {"client": "来访者", "counselor": "咨询师"}
_LEAK = re.compile(r"作为(?:一个|一名)?(?:AI|人工智能|语言模型)|^(?:咨询师|来访者)\s*[:：]|\{|\}")
MEANING = {
    "deny": "否认有问题", "downplay": "把问题说轻", "blame": "怪别人或环境",
    "inform": "说明自己的情况（只用资料里的事实）", "engage": "表示愿意接着谈",
    "hesitate": "说出妨碍改变的顾虑（从资料里还没被回应的想法中选）", "doubt": "怀疑自己或办法",
    "acknowledge": "承认改变的理由", "reject": "不接受刚才的办法", "accept": "接受一个办法",
    "plan": "说出自己的打算（从资料里能接受的打算中选）", "terminate": "道谢，准备结束谈话",
}  # fmt: skip


class SimulatorFailed(Exception):
    """The model that plays the client gave no usable turn; the session cannot go on."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


class _Read:
    """Row: profile, state, turns. Value: a Reading."""

    reply_tokens = 90

    def request(self, row: Row) -> Request:
        state, profile = row["model"].state, row["model"].profile
        allowed = {action: MEANING[action] for action in ACTIONS[state]}
        text = (
            f"{describe(profile)}\n\n当前状态：{state}\n可选动作：{_json(allowed)}\n\n"
            f"最近的对话：\n{transcript(row['turns'][-_RECENT:])}"
        )
        return _request(READING, text, row["subject"], _reading_schema(list(allowed)))

    def parse(self, row: Row, text: str) -> Reading:
        data = _object(text)
        model: ClientModel = row["model"]
        actions = ACTIONS[model.state]
        weights = data.get("weights")
        if not isinstance(weights, dict) or not set(weights) <= set(actions):
            raise Unusable("off_schema", f"weights must be for {', '.join(actions)}")
        given = {name: _whole(weight, name, 0, 100) for name, weight in weights.items()}
        engagement = _whole(data.get("engagement"), "engagement", 1, 5)
        met = _whole(data.get("met_belief"), "met_belief", 0, len(model.profile.beliefs))
        flags = [data.get(name) for name in ("touches_reason", "offers_plan")]
        if not all(isinstance(flag, bool) for flag in flags):
            raise Unusable("off_schema", "touches_reason and offers_plan must be true or false")
        return Reading(engagement, bool(flags[0]), met - 1 if met else None, bool(flags[1]), given)


class _Say:
    """Row: model, step, turns. Value: the client's words."""

    reply_tokens = 50

    def request(self, row: Row) -> Request:
        model: ClientModel = row["model"]
        step: Step = row["step"]
        unmet = "；".join(model.unmet_beliefs()) or "没有了"
        so_far = transcript(row["turns"]) or "（对话还没有开始，请说开场的第一句话）"
        text = (
            f"{describe(model.profile)}\n还没有被回应的想法：{unmet}\n\n当前状态：{step.state}\n"
            f"接受程度：{step.receptivity:g}（1 封闭，5 开放）\n"
            f"这一轮的动作：{step.action}，{MEANING[step.action]}\n\n到目前为止的对话：\n{so_far}"
        )
        return _request(TURN, text, row["subject"], None)

    def parse(self, row: Row, text: str) -> str:
        said = re.sub(r"^\s*<think>.*?</think>", "", text, flags=re.DOTALL).strip().strip('“”"')
        if not said:
            raise Unusable("empty", "no words")
        if len(said) > _LONGEST or _LEAK.search(said):
            raise Unusable("not_a_turn", "more than one client turn, or words about the role play")
        return said


class _Recognise:
    """Row: turns. Value: an action for each client turn after the first."""

    reply_tokens = 80

    def request(self, row: Row) -> Request:
        items = {"type": "string", "enum": _EVERY_ACTION}
        schema = _object_schema({"actions": {"type": "array", "items": items}})
        return _request(RECOGNISE, transcript(row["turns"]), row["subject"], schema)

    def parse(self, row: Row, text: str) -> list[str]:
        wanted = sum(turn.role == "client" for turn in row["turns"]) - 1
        actions = _object(text).get("actions")
        if not isinstance(actions, list) or len(actions) != wanted:
            raise Unusable("off_schema", f"actions must be a list of {wanted}")
        if not set(actions) <= set(_EVERY_ACTION):
            raise Unusable("off_schema", "an unknown action")
        return actions


class LLMSimulator:
    """Plays one assignment through an LLM client; see `simulate.Client`."""

    name = "llm"

    def __init__(self, assignment: Assignment, llm: LLMClient, usage: Usage) -> None:
        self.model = ClientModel(assignment.profile, assignment.motivation, assignment.seed)
        self._llm, self._usage = llm, usage
        self._where = f"{assignment.profile.profile_id}/{assignment.number}"

    async def speak(self, turns: Sequence[Turn]) -> str:
        """The next client turn; turns: the session so far, empty or ended by the counselor.

        Raises SimulatorFailed when the language model gives nothing usable.
        """
        if not turns:
            step = self.model.open()
        else:
            step = self.model.next(await self._ask(_Read(), {"turns": list(turns)}))
        return await self._ask(_Say(), {"step": step, "turns": list(turns)})

    async def recognised(self, turns: Sequence[Turn]) -> list[str] | None:
        """Which action each client turn after the first looks like; None where it cannot be had."""
        try:
            return await self._ask(_Recognise(), {"turns": list(turns)})
        except SimulatorFailed:
            return None

    async def _ask(self, task: Task, row: Row) -> Any:
        steps = exchange(task, {**row, "model": self.model, "subject": self._where})
        request = next(steps)
        while True:
            try:
                reply = await self._llm.complete(request)
            except Rejected as error:
                raise SimulatorFailed(error.reason, error.detail) from None
            try:
                request = steps.send(reply)
            except StopIteration as end:
                answer = end.value
                for used in answer.replies:
                    self._usage.add(used)
                if not answer.ok:
                    raise SimulatorFailed(answer.reason, answer.detail) from None
                return answer.value


def describe(profile: Profile) -> str:
    """A profile as the text that the prompts speak of."""
    beliefs = "；".join(f"{n}. {belief}" for n, belief in enumerate(profile.beliefs, 1))
    return (
        f"来访者资料\n行为：{profile.behavior}\n目标：{profile.goal}\n处境：{profile.persona}\n"
        f"事实：{'；'.join(profile.facts)}\n能打动他的理由：{profile.reason}\n"
        f"妨碍他的想法：{beliefs}\n能接受的打算：{'；'.join(profile.plans)}"
    )


def transcript(turns: Sequence[Turn]) -> str:
    """Turns as lines with their speakers."""
    return "\n".join(f"{_SPEAKER[turn.role]}：{turn.content}" for turn in turns)


def _request(prompt: str, text: str, where: str, schema: dict[str, Any] | None) -> Request:
    return Request(
        messages=[
            {"role": "system", "content": load(prompt).text},
            {"role": "user", "content": text},
        ],
        schema=schema,
        subject=Subject(corpus="simulated", source_id=where, prompt=prompt),
    )


def _reading_schema(actions: list[str]) -> dict[str, Any]:
    whole = {"type": "integer"}
    return _object_schema(
        {
            "engagement": whole,
            "touches_reason": {"type": "boolean"},
            "met_belief": whole,
            "offers_plan": {"type": "boolean"},
            "weights": _object_schema(dict.fromkeys(actions, whole)),
        }
    )


def _object_schema(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _object(text: str) -> dict[str, Any]:
    try:
        return json_object(text)
    except ValueError as error:
        raise Unusable("not_json", str(error)) from None


def _whole(value: Any, name: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise Unusable("off_schema", f"{name} must be a whole number from {low} to {high}")
    return value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
