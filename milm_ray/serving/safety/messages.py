"""What the client reads instead of, or beside, the model: preset texts, never generated ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from milm_ray.serving.safety.config import Category, HelpLine, SafetyConfig
from milm_ray.serving.safety.conversation import Assessment, Level

Language = Literal["zh", "en"]

_AI = {
    "zh": "我是一个 AI 程序，不是真人，不能代替医生、心理咨询师或家人朋友。",
    "en": "I am an AI program, not a person, and no substitute for a doctor, a therapist or the "
    "people close to you.",
}
_HIGH: dict[Category, dict[Language, str]] = {
    "suicide": {
        "zh": "谢谢你愿意说出来。你的安全现在最重要，所以我们先放下别的话题。"
        "如果你马上就有危险，请立刻拨打下面的急救或报警电话，离开能伤到自己的东西和地方，"
        "并请一个你信任的人现在就来陪你。",
        "en": "Thank you for saying this. Your safety comes first now, so let us set everything "
        "else aside. If you are in danger right now, call the emergency numbers below, move away "
        "from anything you could hurt yourself with, and ask someone you trust to be with you.",
    },
    "self_harm": {
        "zh": "谢谢你愿意说出来。听起来你很难受，也正在受伤。如果伤口很深或血止不住，请马上叫急救；"
        "请先把能伤到自己的东西放远一些，找一个你信任的人陪着你。",
        "en": "Thank you for saying this. You are in pain and getting hurt. If a wound is deep or "
        "keeps bleeding, call an ambulance now. Put what you could hurt yourself with out of reach "
        "and ask someone you trust to be with you.",
    },
    "violence": {
        "zh": "听起来你现在非常愤怒，可能会有人受伤。"
        "请先离开现场，放下手里的东西，让自己和对方都安全。"
        "如果快要控制不住，或有人有危险，请马上报警。",
        "en": "You sound very angry, and someone could get hurt. Step away, put down what you are "
        "holding, and keep a distance. If you feel you may lose control or someone is in danger, "
        "call the police now.",
    },
    "abuse": {
        "zh": "发生这样的事不是你的错，没有人可以这样伤害你。"
        "如果你现在不安全，请尽快去一个安全的地方，"
        "并马上报警；也可以请一个你信任的人帮你。",
        "en": "What is happening is not your fault, and nobody may hurt you like this. If you are "
        "not safe now, go somewhere safe and call the police; someone you trust can help you.",
    },
    "minors": {
        "zh": "谢谢你告诉我，这不是你的错。"
        "请不要一个人扛着，也不要再和让你害怕的人单独见面或给他发照片。"
        "请现在就告诉一个你信任的大人，例如家人或老师；有危险时马上报警。",
        "en": "Thank you for telling me; this is not your fault. Please do not carry it alone, and "
        "do not meet or send pictures to anyone who frightens you. Tell an adult you trust now, "
        "such as family or a teacher; if you are in danger, call the police.",
    },
    "medical_emergency": {
        "zh": "这听起来可能是紧急的身体情况，需要医生马上处理，我帮不了这个忙。"
        "请现在就拨打急救电话，"
        "或请身边的人帮你打；在医生到来之前不要一个人待着。",
        "en": "This may be a medical emergency that needs a doctor at once; I cannot help with it. "
        "Call an ambulance now or ask someone near you to do so, and do not stay alone.",
    },
    "psychosis": {
        "zh": "你说的经历一定让人很害怕。请今天就和一个你信任的人一起去看医生，"
        "不要照着让你伤害自己或别人的声音去做；如果有危险，请马上叫急救。",
        "en": "What you describe must be frightening. Please see a doctor today together with "
        "someone you trust, and do not act on anything that tells you to hurt yourself or others. "
        "If there is danger, call an ambulance.",
    },
    "eating_disorder": {
        "zh": "你的身体可能正处在危险中，这需要医生来看，不适合只靠聊天。请尽快去医院；"
        "如果晕倒、心慌、吐血或站不稳，请马上叫急救。",
        "en": "Your body may be in danger; this needs a doctor and not only a chat. Please go to a "
        "hospital soon; if you faint, vomit blood, or your heart races, call an ambulance now.",
    },
}
_MEDIUM = {
    "zh": "你说的这些很重要，也不容易。我们可以接着聊；如果你或你担心的人觉得难以承受，"
    "或情况变得危险，请联系能真正帮到你们的人：",
    "en": "What you said matters and is not easy. We can go on talking; if it becomes too much or "
    "dangerous for you or for the person you worry about, please reach people who can help:",
}
_REPLACED = {
    "zh": "抱歉，刚才的回复里有我不该说的内容，所以没有显示。"
    "我不能做诊断，也不能给用药或治疗上的建议，这些请问医生。我们可以接着聊你自己的想法和感受。",
    "en": "Sorry: my reply contained something that I should not say, so it is not shown. I cannot "
    "diagnose, and cannot advise on medicines or treatment; please ask a doctor. We can go on with "
    "your own thoughts and feelings.",
}
_LINES = {"zh": "可以拨打：", "en": "You can call:"}
_HOURS = {
    "zh": "各地服务时间不同；没有接通时请再拨，或拨打其他号码。",
    "en": "Hours differ by place; if a call does not get through, try again or another number.",
}
_CHECKED = {
    "zh": "（号码核对日期：{}）",
    "en": "(Numbers checked on {}.)",
}


def help_message(
    level: Level,
    category: Category | Literal["none"],
    lang: Language = "zh",
    lines: Sequence[HelpLine] | None = None,
    minor: bool = False,
) -> str:
    """The preset text for an assessment, with the help lines that fit it; "" at level none.

    It says that it is an AI and when each number was checked, and states no hours. lines:
    SafetyConfig.help_lines (default: the built-in ones); minor: the client seems to be under 18,
    the youth line is named first.
    """
    if level == "none" or category == "none":
        return ""
    chosen = lines_for(category, SafetyConfig().help_lines if lines is None else lines, minor)
    name = "name_zh" if lang == "zh" else "name_en"
    listed = [f"· {line.number} {getattr(line, name)}" for line in chosen]
    checked = _CHECKED[lang].format(min(line.checked_on for line in chosen))
    if level == "high":
        parts = [_HIGH[category][lang], _LINES[lang], *listed, _HOURS[lang], _AI[lang], checked]
    else:
        parts = [_MEDIUM[lang], *listed, _HOURS[lang], _AI[lang], checked]
    return "\n".join(parts)


def replacement_message(lang: Language = "zh") -> str:
    """The preset text in place of a reply that must not be shown."""
    return _REPLACED[lang]


def lines_for(category: Category, lines: Sequence[HelpLine], minor: bool = False) -> list[HelpLine]:
    """The lines for a category, in the configured order, a youth line first for a minor.

    All lines where none is configured for the category: better a wrong line than none.
    """
    young = minor or category == "minors"
    chosen = [
        line
        for line in lines
        if not line.categories or category in line.categories or (young and line.minors_first)
    ]
    return sorted(chosen or lines, key=lambda line: not (young and line.minors_first))


def intervention_record(
    assessment: Assessment,
    history: Sequence[Mapping[str, Any]],
    config: SafetyConfig | None = None,
) -> dict[str, Any]:
    """What is logged, and sent to a takeover hook, when the check stepped in.

    The client's words are in it only if the configuration says so (log_text).
    """
    record: dict[str, Any] = {
        "level": assessment.level,
        "category": assessment.category,
        "categories": list(assessment.categories),
        "evidence": list(assessment.evidence),
        "score": assessment.score,
        "turn": assessment.turn,
        "minor": assessment.minor,
        "turns": len(history),
    }
    if config is not None and config.log_text and assessment.turn is not None:
        record["text"] = history[assessment.turn]["content"]
    return record
