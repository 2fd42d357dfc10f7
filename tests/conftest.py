"""What holds for every test: hypothesis draws the same examples each run, and how a run ends."""

from __future__ import annotations

import atexit
import os

import pytest
from hypothesis import HealthCheck, settings

# Before any library that would tell its makers about each run.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# A red build is then about the change in it; `make soak` asks for new examples. Loaded before the
# test modules, whose `@settings` add to the profile that is loaded when they are read.
# No check of how fast examples are drawn: that is about the machine.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "explore",
    max_examples=1000,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End with the tests' own result, without the interpreter's teardown.

    Ray, DeepSpeed, gRPC, Chromium's driver and Arrow leave threads in this one process, and their
    destructors race with them: a run has crashed there after its last test had passed. The jobs,
    which are processes of their own in the tests, end as they do elsewhere.
    """
    session = config.pluginmanager.get_plugin("session")
    # What a usage error is, pytest says after this.
    if session is not None and session.exitstatus != pytest.ExitCode.USAGE_ERROR:
        config.get_terminal_writer().flush()
        atexit._run_exitfuncs()
        os._exit(int(session.exitstatus))
