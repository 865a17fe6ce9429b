"""The services that the gateway calls: the upstream API and the workers that hold guards, with their weights.

Refuses a worker at two places or at none, keys that have no effect on a worker that is started elsewhere, options of
the worker that the gateway sets, and headers that the gateway writes itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from pydantic import Field, field_validator, model_validator

from guard_middleware.config.section import Section
from guard_middleware.configtypes import Age, Env, HeaderName, Url, refuse

#: the name of the guard that the section ``worker`` describes
DEFAULT_GUARD = "worker"


_NOT_FOR_UPSTREAM = {
    "host", "content-length", "content-type", "content-encoding", "accept-encoding", "transfer-encoding",
    "connection", "te", "trailer", "upgrade", "keep-alive", "expect",
}  # fmt: skip


class Upstream(Section):
    url: Url | None = Field(
        default=None, description="the API's base URL, such as http://127.0.0.1:8000/v1 (--upstream wins)"
    )
    headers_from_env: Mapping[HeaderName, Env] = Field(
        default={},
        description="header: NAME of the environment variable that holds its value (authorization: UPSTREAM_AUTH)",
    )

    @field_validator("headers_from_env")
    @classmethod
    def _forwardable(cls, headers: Mapping[str, str]) -> Mapping[str, str]:
        result: dict[str, str] = {}
        for name, variable in headers.items():
            if name.lower() in _NOT_FOR_UPSTREAM:
                raise refuse(f"the header `{name}` is the gateway's own", "remove it", name)
            if name.lower() in result:
                raise refuse(f"the header `{name}` is given twice", "keep one of the two", name)
            result[name.lower()] = variable
        return result


class Weights(Section):
    """Weights that change while the gateway runs; ``worker.model`` serves until the first promotion."""

    directory: str = Field(
        min_length=1, description="the folder that holds the revisions and says which one serves: /srv/guard-weights"
    )
    golden: str | None = Field(
        default=None, min_length=1, description="a JSONL file of verdicts to keep; left out, the mild set that ships"
    )
    shadow: float = Field(
        default=0.05, ge=0, le=1, description="the share of live questions that staged weights get too, from 0 to 1"
    )
    keep: Age = Field(
        default=600.0, description="an age such as 10m: how long the weights before a promotion stay loaded"
    )


_OWN_OPTIONS = {"--model", "--socket", "--port", "--host", "--allow-remote", "--threads", "--exit-with-parent"}


class Worker(Section):
    model: str = Field(default="nano", min_length=1, description="nano, a folder, or a hub id")
    socket: str | None = Field(
        default=None, min_length=1, max_length=100, description="the Unix socket's path (at most 100 characters)"
    )
    url: Url | None = Field(
        default=None, description="where a worker that is started elsewhere listens: http://127.0.0.1:8900"
    )
    manage: bool | None = Field(
        default=None, description="true or false: whether the gateway starts and restarts the worker"
    )
    balanced: bool = Field(
        default=False,
        description="true where a load balancer, such as Ray Serve, stands at the URL: each question is a request then",
    )
    threads: int | None = Field(default=None, ge=1, le=256, description="CPU threads of the worker, 1 to 256")
    options: tuple[str, ...] = Field(
        default=(),
        description="a list of more options of `guard-gateway worker`, such as [--engine, vllm, --max-batch, '64']",
    )
    weights: Weights | None = Field(
        default=None, description="a mapping, such as {directory: /srv/guard-weights}; left out, `model` alone serves"
    )

    @property
    def managed(self) -> bool:
        """Whether the gateway owns the worker's process: yes, unless it is at a URL or ``manage`` is false."""
        return self.url is None if self.manage is None else self.manage

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.url is not None and self.socket is not None:
            raise refuse("the worker has both `url` and `socket`", "keep one of them", "url")
        if self.url is not None and self.manage:
            raise refuse("a worker at a URL is started elsewhere", "write manage: false, or use socket", "manage")
        if self.url is not None and self.threads is not None:
            raise refuse("`threads` has no effect on a worker that is started elsewhere", "remove it", "threads")
        if self.options and not self.managed:
            raise refuse("`options` have no effect on a worker that is started elsewhere", "remove them", "options")
        for index, option in enumerate(self.options):
            if option.partition("=")[0] in _OWN_OPTIONS:
                raise refuse(
                    f"`{option[:80]}` is the gateway's own", "leave it to the keys beside it", "options", index
                )
        if self.balanced and self.url is None:
            raise refuse("`balanced` has no effect without a URL", "write url beside it, or remove it", "balanced")
        if self.weights is not None and not self.managed:
            raise refuse("weights of a worker that is started elsewhere", "change what listens there", "weights")
        if self.weights is not None and self.socket is not None:
            raise refuse("`socket` beside `weights`: each of two workers needs its own", "remove it", "socket")
        if self.manage is False and self.url is None and self.socket is None:
            raise refuse("a worker that nobody starts and that is nowhere", "write socket or url beside it", "manage")
        return self
