"""How hypothesis searches: the same examples each run, unless `make soak` asks for new ones.

A red build is then about the change in it. Loaded before the test modules, whose `@settings` add to
the profile that is loaded when they are read.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile("repeatable")
