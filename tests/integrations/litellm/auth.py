"""LiteLLM's ``custom_auth`` in place of its database: ``sk-key-ALIAS`` and ``sk-team-ID`` are virtual keys."""

from __future__ import annotations

from typing import Any

from litellm.proxy._types import LitellmUserRoles, UserAPIKeyAuth


async def user_api_key_auth(request: Any, api_key: str) -> UserAPIKeyAuth:
    alias = api_key.removeprefix("sk-key-") if api_key.startswith("sk-key-") else None
    team = api_key.removeprefix("sk-team-") if api_key.startswith("sk-team-") else None
    return UserAPIKeyAuth(
        api_key=api_key, key_alias=alias, team_id=team, user_id="u", user_role=LitellmUserRoles.PROXY_ADMIN
    )
