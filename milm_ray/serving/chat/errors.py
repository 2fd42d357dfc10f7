"""What the chat's API answers when it cannot do what it was asked."""

from __future__ import annotations


class Refused(Exception):
    """status: HTTP's; code: for the page, which says it in the reader's language."""

    def __init__(
        self, status: int, code: str, message: str, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.retry_after = retry_after


def not_found() -> Refused:
    # Somebody else's session is answered alike: its existence is nobody's business.
    return Refused(404, "no_session", "there is no such session")


def unavailable() -> Refused:
    return Refused(503, "database", "the database does not answer; try again in a moment", 2)
