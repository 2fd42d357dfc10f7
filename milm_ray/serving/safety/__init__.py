"""Safety of the live chat: what the client says, what the model answers, what is shown instead.

`assess(history)` before generation, `check_reply(text)` or a `SentenceGuard` on the stream after
it, `help_message(level, category)` for what the client reads when the model must not speak.
"""

from milm_ray.serving.safety.assess import Assessment, HistoryError, assess
from milm_ray.serving.safety.config import HelpLine, SafetyConfig

__all__ = ["Assessment", "HelpLine", "HistoryError", "SafetyConfig", "assess"]
