"""Errors that a user can act on: what is wrong and how to put it right, without a traceback.

Exit codes of every job: 0 done, 1 failed, 2 the configuration or its inputs are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_FAILED = 1
EXIT_USAGE = 2


class UserError(Exception):
    """Something the person running the job can put right.

    cause: what is wrong, in one sentence; fix: what to do about it.
    """

    exit_code = EXIT_FAILED

    def __init__(self, cause: str, fix: str = "") -> None:
        self.cause = cause
        self.fix = fix
        super().__init__(f"{cause}\n  fix: {fix}" if fix else cause)

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        # Ray pickles exceptions that cross a process; the default would pass one argument.
        return type(self), (self.cause, self.fix)


class ConfigError(UserError):
    """Every problem found in a configuration and its inputs, reported at once (exit code 2)."""

    exit_code = EXIT_USAGE

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        listed = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{len(self.problems)} problem(s) in the configuration:\n{listed}")

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:  # type: ignore[override]
        return type(self), (self.problems,)
