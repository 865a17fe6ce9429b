"""For every test: no deadline on a hypothesis example, because machines that run tests are shared."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("shared", deadline=None)
settings.load_profile("shared")
