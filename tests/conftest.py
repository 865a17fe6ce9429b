"""For every test: hypothesis draws the same examples each time, so that a change is judged by what it changed.

``make fuzz`` draws new ones; what it finds becomes a case in a table. No deadline on an example, because machines that
run tests are shared.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("fuzz", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
