"""A LiteLLM callback that writes each of LiteLLM's logging records as one JSON line to the file ``$SINK``."""

from __future__ import annotations

import json
import os
from typing import Any

from litellm.integrations.custom_logger import CustomLogger


class Sink(CustomLogger):  # type: ignore[misc]
    async def async_log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        self._write(kwargs)

    async def async_log_failure_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        self._write(kwargs)

    def _write(self, kwargs: Any) -> None:
        record = kwargs.get("standard_logging_object")
        if record:
            with open(os.environ["SINK"], "a") as file:
                file.write(json.dumps(record, default=str) + "\n")


instance = Sink()
