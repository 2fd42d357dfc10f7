"""A client without a language model: the state model with lines written beforehand.

It exists for runs without any paid or large model (the quickstart, tests). It reads a reply by the
words in it and answers with its profile's own sentences, so it never invents anything, and it never
really listens either: a session with it shows how a counselor model behaves, not how well.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from milm_ray.miti.client_model import Action, Assignment, ClientModel, Reading, Step
from milm_ray.schema import Turn

# {behavior} {goal} {fact} {reason} {belief} {plan}: the profile's own words.
LINES: dict[Action, tuple[str, ...]] = {
    "deny": (
        "我真不觉得这算什么问题，是别人大惊小怪。",
        "没有吧，我自己心里有数，犯不着改。",
        "我不认为{behavior}有多严重。",
    ),
    "downplay": (
        "其实也没那么厉害，身边人都这样。",
        "偶尔多一点而已，过阵子自己就好了。",
        "比我严重的多了去了，我这点算轻的。",
    ),
    "blame": (
        "这也不能全怪我，换谁在我这个处境都一样。",
        "要不是周围这个环境，我也不会这样。",
        "家里人光会说我，他们自己也没做到。",
    ),
    "inform": ("{fact}",),
    "engage": (
        "嗯，您接着说，我听着呢。",
        "您这么一说，我倒想多聊两句。",
        "您问到点子上了，我想想怎么说。",
    ),
    "hesitate": (
        "我也想过{goal}，可是{belief}。",
        "道理我懂，就是{belief}。",
        "一想到{belief}，我又退回去了。",
    ),
    "doubt": (
        "我不知道自己能不能做到，以前也没坚持下来。",
        "真的有用吗？我心里没底。",
        "说起来容易，我怕又是三天热度。",
    ),
    "acknowledge": (
        "是啊，说到底，{reason}。",
        "您说得对，{reason}，这我不能不认。",
    ),
    "reject": (
        "这个办法恐怕不适合我。",
        "不行，我试过差不多的，撑不了几天。",
    ),
    "accept": (
        "{plan}，这个我可以试试。",
        "行，先从{plan}开始，别的再说。",
    ),
    "plan": (
        "我想，{plan}，从这周就能做起来。",
        "要不我就{plan}，您看怎么样？",
    ),
    "terminate": ("今天聊到这儿我心里清楚多了，就按刚才说的先做，谢谢您。",),
}
_PUSHY = re.compile(r"应该|必须|一定要|你要|您要(?!是)|不能再|千万")
_PLAN = re.compile(r"打算|计划|试试|第一步|从哪|怎么开始|安排|下一步|办法")


def read(reply: str, client: ClientModel, said: str) -> Reading:
    """What the counselor's reply touches, by its words. said: the client's own last turn."""
    cues = client.profile.cues
    touches = any(word in reply for word in cues[0])
    met = [
        number
        for number, words in enumerate(cues[1:])
        if client.holds(number) and any(word in reply for word in words)
    ]
    engagement = 3
    if len(reply.strip()) < 6:
        engagement -= 2
    if _bigrams(reply) & _bigrams(said):
        engagement += 1  # takes up something that the client said
    if touches:
        engagement += 1
    if _PUSHY.search(reply):
        engagement -= 1
    return Reading(
        engagement=min(5, max(1, engagement)),
        touches_reason=touches,
        met_belief=met[0] if met else None,
        offers_plan=bool(_PLAN.search(reply)),
    )


def _bigrams(text: str) -> set[str]:
    letters = [c for c in text if c.isalnum()]
    return {a + b for a, b in itertools.pairwise(letters)}


class ScriptedClient:
    """Plays one assignment; see `simulate.Client`."""

    name = "scripted"

    def __init__(self, assignment: Assignment) -> None:
        self.model = ClientModel(assignment.profile, assignment.motivation, assignment.seed)

    async def speak(self, turns: Sequence[Turn]) -> str:
        """The next client turn; turns: the session so far, empty or ended by the counselor."""
        if not turns:
            self.model.open()
            return self.model.profile.opening
        step = self.model.next(read(turns[-1].content, self.model, turns[-2].content))
        return self._line(step)

    async def recognised(self, turns: Sequence[Turn]) -> list[str] | None:
        """None: the lines were written for their actions, there is nothing to recognise."""
        return None

    def _line(self, step: Step) -> str:
        profile, model = self.model.profile, self.model
        line = model.pick(LINES[step.action])
        slots = {
            "fact": profile.facts,
            "belief": tuple(model.unmet_beliefs()) or profile.beliefs,
            "plan": profile.plans,
        }
        words = {name: model.pick(given) for name, given in slots.items() if f"{{{name}}}" in line}
        text = line.format(
            behavior=profile.behavior, goal=profile.goal, reason=profile.reason, **words
        )
        return text
