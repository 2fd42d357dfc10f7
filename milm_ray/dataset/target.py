"""The behaviour a dialogue is about changing, by keywords.

MI, and MITI with it, needs a named target behaviour; general counselling corpora have none. The
tagger counts the turns in which each topic's keywords occur and takes the topic with most (ties:
the order below). It is a filter for rows, not a diagnosis: no hit means no tag.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from milm_ray.schema import Turn

# The paper's study topics (its Table 5) first, then other health behaviours.
KEYWORDS: dict[str, str] = {
    "weight_and_diet": r"减肥|减重|体重|暴食|暴饮暴食|节食|饮食|吃撑|零食|甜食|甜品|夜宵|外卖|胖"
    r"|催吐|吃剩|剩饭|斤|吃到",
    "phone_use": r"刷手机|玩手机|看手机|短视频|刷视频|手机依赖|抖音|离不开手机|手机不离手|屏幕时间"
    r"|刷到|放下手机|手机",
    "insomnia": r"失眠|睡不着|熬夜|入睡|早醒|睡眠|通宵|晚睡|安眠药|凌晨|睡前|补觉|翻来覆去",
    "exercise": r"锻炼|运动|跑步|健身|散步|久坐|快走|游泳|颈椎|爬楼|打球|打篮球|跳操|走路|瑜伽"
    r"|广场舞|步数|拉伸|遛弯|肩颈|腰",
    "advance_consumption": r"信用卡|花呗|借呗|网贷|分期|超前消费|购物车|网购|剁手|最低还款|月光"
    r"|透支|直播间|下单|账单",
    "smoking": r"烟(?!花|雾|台|火|囱)",
    "drinking": r"酒(?!店|精|窝)|喝醉|醉了",
    "gaming": r"打游戏|玩游戏|网游|手游|游戏|网瘾|网吧|排位|开黑|上分",
    "gambling": r"赌|彩票|下注|投注|刮刮乐",
    "caffeine_and_sugary_drinks": r"咖啡|奶茶|可乐|含糖饮料",
    "medication_and_chronic_illness": r"降压药|血压|血糖|胰岛素|糖尿病|停药|药盒|吃药|漏服|服药",
    "procrastination": r"拖延|拖到|拖着|明天再|截止|一拖再拖|论文",
    "social_avoidance": r"社交|不敢(?:见人|出门|说话)|聚会|躲着人|社恐|人多的地方|口罩|见人",
    "parenting": r"孩子|亲子|儿子|女儿|闺女",
    "stress_and_care": r"压力|疲惫|照顾|累垮|考试|考前|焦虑|产后|伺候",
    "relationship": r"丈夫|妻子|老公|老婆|男友|女友|男朋友|女朋友|夫妻|婚姻|吵架",
}
_PATTERNS = {topic: re.compile(pattern) for topic, pattern in KEYWORDS.items()}
# Topics that are rather a setting than a behaviour: taken only where nothing else is found twice.
_SETTINGS = {"parenting", "stress_and_care", "relationship"}
_ENOUGH = 2


def target_behavior(turns: Sequence[Turn], topic: str = "") -> str:
    """The topic of KEYWORDS that is spoken of in most turns, "" where there is none.

    A turn counts once per topic; the client's first turn, where the concern is named, counts as
    three, and so does `topic`, the corpus's own label for the dialogue.
    """
    texts = [turn.content for turn in turns]
    weighted = [(3 if number == 0 else 1, text) for number, text in enumerate(texts)]
    weighted.append((3, topic))
    hits = {
        name: sum(weight for weight, text in weighted if pattern.search(text))
        for name, pattern in _PATTERNS.items()
    }
    for group in ([n for n in hits if n not in _SETTINGS], [n for n in hits if n in _SETTINGS]):
        best = max(group, key=lambda name: hits[name])
        if hits[best] >= _ENOUGH:
            return best
    return ""
