"""The behaviour a dialogue is about changing, by keywords.

MI, and MITI with it, needs a named target behaviour; general counselling corpora have none. The
tagger looks at what the client says, counts keyword hits per topic and takes the topic with most
(ties: the order below). It is a filter for rows, not a diagnosis: no hit means no tag.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from milm_ray.schema import Turn

# The paper's study topics (its Table 5) first, then other health behaviours.
KEYWORDS: dict[str, str] = {
    "weight_and_diet": r"减肥|减重|体重|暴食|暴饮暴食|节食|饮食|吃撑|零食|甜食|夜宵|外卖|肥胖|发胖"
    r"|长胖|变胖|催吐|吃剩|胖了|瘦",
    "phone_use": r"刷手机|玩手机|看手机|短视频|刷视频|手机依赖|抖音|离不开手机|手机不离手|屏幕时间"
    r"|刷到(?:半夜|凌晨)|放下手机",
    "insomnia": r"失眠|睡不着|熬夜|入睡|早醒|睡眠|通宵|晚睡|安眠药|凌晨(?:一|两|二|三|四)点",
    "exercise": r"锻炼|运动|跑步|健身|散步|久坐|快走|游泳|颈椎|爬楼|打球|跳操",
    "advance_consumption": r"信用卡|花呗|借呗|网贷|分期|超前消费|购物车|网购|剁手|最低还款|月光"
    r"|透支|直播间",
    "smoking": r"戒烟|抽烟|吸烟|烟瘾|香烟|电子烟|复吸|一包烟|烟盒",
    "drinking": r"戒酒|喝酒|酗酒|酒瘾|白酒|啤酒|醉|酒局|应酬",
    "gaming": r"打游戏|玩游戏|网游|手游|游戏|网瘾|网吧|排位|开黑",
    "gambling": r"赌|彩票|下注|投注",
    "caffeine_and_sugary_drinks": r"咖啡|奶茶|可乐|含糖饮料",
    "medication_and_chronic_illness": r"服药|吃药|降压药|血压|血糖|胰岛素|糖尿病|高血压|停药|药盒"
    r"|复查|依从",
    "procrastination": r"拖延|拖到|拖着|明天再|截止|作业.{0,6}拖",
    "social_avoidance": r"社交|不敢(?:见人|出门|说话)|聚会|躲着人|社恐|人多的地方",
    "parenting": r"孩子.{0,12}(?:吼|骂|打|手机|游戏|作业|沟通|陪)|亲子|儿子|女儿",
    "stress_and_care": r"压力|疲惫|照顾.{0,8}(?:爸|妈|父|母|老人|病人)|累垮|考试|考前|焦虑|产后",
    "relationship": r"丈夫|妻子|老公|老婆|男友|女友|男朋友|女朋友|夫妻|婚姻|吵架",
}
_PATTERNS = {topic: re.compile(pattern) for topic, pattern in KEYWORDS.items()}
# Topics that are rather a setting than a behaviour: taken only where nothing else was found.
_SETTINGS = {"parenting", "stress_and_care", "relationship"}


def target_behavior(turns: Sequence[Turn], topic: str = "") -> str:
    """The topic of KEYWORDS that the client speaks of most, "" where there is none.

    topic: the corpus's own label for the dialogue; it counts as three mentions.
    """
    text = "\n".join(turn.content for turn in turns if turn.role == "client")
    hits = {
        name: len(pattern.findall(text)) + 3 * len(pattern.findall(topic))
        for name, pattern in _PATTERNS.items()
    }
    for group in ([n for n in hits if n not in _SETTINGS], [n for n in hits if n in _SETTINGS]):
        best = max(group, key=lambda name: hits[name])
        if hits[best]:
            return best
    return ""
