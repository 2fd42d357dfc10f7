"""The browser that the page tests drive, from the machine's packages."""

from __future__ import annotations

import shutil

import pytest
from playwright.sync_api import expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: apt-get install chromium fonts-noto-cjk"
)
TIMEOUT_MS = 60_000
expect.set_options(timeout=TIMEOUT_MS)  # a page's own default is not that of its assertions
