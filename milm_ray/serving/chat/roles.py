"""What the client plays: the topics of the paper's Table 5, and how ready for change they are."""

from __future__ import annotations

import random
from dataclasses import dataclass

from milm_ray.schema import MOTIVATIONS, TOPICS, Motivation

TOPIC_CARDS: dict[str, dict[str, dict[str, str]]] = {
    "weight_and_diet": {
        "zh": {
            "title": "体重与饮食",
            "card": "这两年体重涨了不少，体检有几项指标偏高。晚上常吃宵夜、喝奶茶，"
            "节食过几次，都没坚持下来。",
        },
        "en": {
            "title": "Weight and diet",
            "card": "You have put on weight over two years, and a check-up came back with some "
            "values too high. You often eat late at night and drink sweet tea; you have tried to "
            "diet and never kept it up.",
        },
    },
    "phone_use": {
        "zh": {
            "title": "手机使用",
            "card": "每天刷手机五六个小时，睡前也停不下来。工作和学习常被打断，"
            "家人说你总盯着屏幕。",
        },
        "en": {
            "title": "Phone use",
            "card": "You spend five or six hours a day on your phone and cannot put it down at "
            "night. It breaks into your work or studies, and your family says that you only look "
            "at the screen.",
        },
    },
    "insomnia": {
        "zh": {
            "title": "失眠",
            "card": "最近两三个月睡不好，躺下一两个小时才睡着，白天没精神。"
            "睡前看手机，下午喝咖啡。",
        },
        "en": {
            "title": "Insomnia",
            "card": "For two or three months you have slept badly: it takes you an hour or two to "
            "fall asleep, and you are tired all day. You look at your phone in bed and drink "
            "coffee in the afternoon.",
        },
    },
    "exercise": {
        "zh": {
            "title": "运动",
            "card": "工作久坐，几乎不运动，爬几层楼就喘。办过健身卡，去了几次就不去了。",
        },
        "en": {
            "title": "Exercise",
            "card": "You sit at work all day and hardly move; a few flights of stairs leave you "
            "out of breath. You once joined a gym and went only a few times.",
        },
    },
    "advance_consumption": {
        "zh": {
            "title": "超前消费",
            "card": "常用信用卡和分期买东西，每月还完账单所剩无几。看到促销就忍不住，事后又后悔。",
        },
        "en": {
            "title": "Spending ahead of income",
            "card": "You buy on credit and by instalments, and little is left each month after the "
            "bills. You cannot resist a sale, and regret it afterwards.",
        },
    },
}
MOTIVATION_CARDS: dict[Motivation, dict[str, dict[str, str]]] = {
    "low": {
        "zh": {
            "title": "低",
            "card": "你觉得现在这样也还行，是别人让你来聊的。你不太想改，会说出不改的理由；"
            "只有对方真正理解你的时候，才愿意多说一点。",
        },
        "en": {
            "title": "low",
            "card": "You think that things are fine as they are; somebody else wanted you to come. "
            "You do not really want to change and say why; only when you feel understood do you "
            "open up a little.",
        },
    },
    "medium": {
        "zh": {
            "title": "中",
            "card": "你想改，也不想改，两边都有道理。你会一会儿说想改变，一会儿又说太难。",
        },
        "en": {
            "title": "medium",
            "card": "You want to change and you do not; both have their reasons. At times you "
            "speak of changing, at times of how hard it is.",
        },
    },
    "high": {
        "zh": {
            "title": "高",
            "card": "你已经想改，也想过怎么做，只是还没有把握。你愿意谈具体的第一步。",
        },
        "en": {
            "title": "high",
            "card": "You want to change and have thought about how; you are just not sure that you "
            "can. You are willing to talk about a first concrete step.",
        },
    },
}


@dataclass(frozen=True)
class Role:
    model: str
    topic: str
    motivation: Motivation


def assigned(number: int, seed: int, models: list[str]) -> Role:
    """The `number`-th (from 0) blind assignment: the same for the same seed and models.

    Every run of len(models) × 5 sessions has each model with each topic once, in an order of its
    own; the motivation level is drawn at random, as in the paper.
    """
    cells = [(model, topic) for model in sorted(models) for topic in TOPICS]
    block, place = divmod(number, len(cells))
    random.Random(f"{seed}/{block}").shuffle(cells)
    model, topic = cells[place]
    return Role(model, topic, random.Random(f"{seed}/{number}/motivation").choice(MOTIVATIONS))
