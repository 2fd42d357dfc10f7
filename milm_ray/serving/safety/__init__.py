"""Safety of the live chat: what the client says, what the model answers, what is shown instead.

`assess(history)` before generation, `check_reply(text)` or a `SentenceGuard` on the stream after
it, `help_message(level, category)` for what the client reads when the model must not speak.
"""

from milm_ray.serving.safety.config import CATEGORIES, Category, HelpLine, SafetyConfig
from milm_ray.serving.safety.conversation import Assessment, HistoryError, Level, assess
from milm_ray.serving.safety.messages import (
    help_message,
    intervention_record,
    lines_for,
    replacement_message,
)
from milm_ray.serving.safety.reply import SentenceGuard, Violation, check_reply

__all__ = [
    "CATEGORIES",
    "Assessment",
    "Category",
    "HelpLine",
    "HistoryError",
    "Level",
    "SafetyConfig",
    "SentenceGuard",
    "Violation",
    "assess",
    "check_reply",
    "help_message",
    "intervention_record",
    "lines_for",
    "replacement_message",
]
