"""Every field of the Messages API and what is done with it: the one table of this dialect.

Each table is one object of the API. ``tests/dialects/test_messages_fields.py`` compares the names with the types of
the installed anthropic SDK, stable and beta, so that a field that Anthropic adds fails the build until it is decided
here. A block or tool whose table is None is refused: what a server-run tool brings in from outside (web search, web
fetch, MCP, another model) reaches the model before anyone could screen it, and part of it comes back encrypted.
Server-run tools that work on what was screened (code execution, search among the tools of the request) are served;
their inputs and results are read. Names after the line ``vendors`` are not Anthropic's (vLLM, LiteLLM, Bedrock), or
no longer are.
"""

from __future__ import annotations

from typing import Final

from guard_middleware.dialects import chat_fields
from guard_middleware.dialects.fields import RESIZING, Rule, Table

REQUEST: Final[Table] = {
    "max_tokens": Rule.SCALAR,
    "messages": Rule.NESTED,
    "model": Rule.IDENTIFIER,
    "billing_policy": Rule.WORDS,
    "cache_control": Rule.WORDS,
    "compaction": Rule.REFUSED,  # the service would rewrite the conversation
    "container": Rule.REFUSED,  # files and state that the guard has not seen
    "context_management": Rule.REFUSED,  # the model would read less than the guard
    "diagnostics": Rule.WORDS,
    "fallback_credit_token": Rule.REFUSED,
    "fallbacks": Rule.REFUSED,  # a second answer, of a model that is chosen inside the service
    "inference_geo": Rule.WORD,
    "mcp_servers": Rule.REFUSED,  # the client would choose hosts, whose answers nobody screens
    "metadata": Rule.NESTED,
    "output_config": Rule.NESTED,
    "service_tier": Rule.WORD,
    "speed": Rule.WORD,
    "stop_sequences": Rule.NESTED,
    "stream": Rule.NESTED,
    "system": Rule.NESTED,
    "thinking": Rule.WORDS,
    "thread": Rule.NESTED,
    "tool_choice": Rule.NESTED,
    "tools": Rule.NESTED,
    # vendors
    **{name: rule for name, rule in chat_fields.REQUEST.items() if rule in (Rule.OFF, Rule.REFUSED)},
    "output_format": Rule.JSON,
    "prompt": Rule.REFUSED,
    "temperature": Rule.SCALAR,
    "top_k": Rule.SCALAR,
    "top_p": Rule.SCALAR,
}
#: a conversation that the service keeps: works where every turn of it went through here
THREAD: Final[Table] = {"type": Rule.NESTED, "previous_message_id": Rule.IDENTIFIER}
METADATA: Final[Table] = {"user_id": Rule.IDENTIFIER}
OUTPUT_CONFIG: Final[Table] = {"effort": Rule.CHOICE, "format": Rule.JSON, "task_budget": Rule.WORDS}
TOOL_CHOICE: Final[Table] = {
    "type": Rule.CHOICE,
    "name": Rule.TEXT,
    "disable_parallel_tool_use": Rule.SCALAR,
}

#: messages by ``role``
ROLES: Final[dict[str, Table]] = {
    "user": {"role": Rule.WORD, "content": Rule.NESTED},
    "assistant": {"role": Rule.WORD, "content": Rule.NESTED},
    "system": {
        "role": Rule.WORD,
        "content": Rule.NESTED,
        "clear_at": Rule.REFUSED,  # the model would not see what the guard judged
        "output_config": Rule.WORDS,
    },
}

_CALL_RESULT: Final[Table] = {
    "type": Rule.WORD,
    "tool_use_id": Rule.NESTED,
    "content": Rule.NESTED,
    "cache_control": Rule.WORDS,
}
_CALL: Final[Table] = {
    "type": Rule.WORD,
    "id": Rule.NESTED,
    "name": Rule.TEXT,
    "input": Rule.JSON,
    "caller": Rule.NESTED,
    "cache_control": Rule.WORDS,
}
#: content blocks by ``type``, in requests, answers and streams; None refuses the whole block
BLOCKS: Final[dict[str, Table | None]] = {
    "text": {"type": Rule.WORD, "text": Rule.TEXT, "citations": Rule.NESTED, "cache_control": Rule.WORDS},
    "image": {
        "type": Rule.WORD,
        "source": Rule.NESTED,
        "cache_control": Rule.WORDS,
        "transformations": Rule.WORDS,
        # vendors
        **RESIZING,
    },
    "document": {
        "type": Rule.WORD,
        "source": Rule.NESTED,
        "title": Rule.TEXT,
        "context": Rule.TEXT,
        "citations": Rule.WORDS,
        "cache_control": Rule.WORDS,
    },
    "search_result": {
        "type": Rule.WORD,
        "source": Rule.TEXT,
        "title": Rule.TEXT,
        "content": Rule.NESTED,
        "citations": Rule.WORDS,
        "cache_control": Rule.WORDS,
    },
    "thinking": {"type": Rule.WORD, "thinking": Rule.TEXT, "signature": Rule.SEALED},
    # The model's own thoughts about what was screened, sealed by the service: nobody between can write or read
    # them. To refuse them would end conversations at random.
    "redacted_thinking": {"type": Rule.WORD, "data": Rule.SEALED},
    "tool_use": {**_CALL, "toolset_name": Rule.TEXT},
    "tool_result": {**_CALL_RESULT, "is_error": Rule.SCALAR, "toolset_name": Rule.TEXT},
    "tool_reference": {"type": Rule.WORD, "tool_name": Rule.TEXT, "cache_control": Rule.WORDS},
    "browser_state": {
        "type": Rule.WORD,
        "tabs": Rule.JSON,
        "state_changes": Rule.JSON,
        "cache_control": Rule.WORDS,
    },
    "server_tool_use": _CALL,
    "code_execution_tool_result": _CALL_RESULT,
    "bash_code_execution_tool_result": _CALL_RESULT,
    "text_editor_code_execution_tool_result": _CALL_RESULT,
    "tool_search_tool_result": _CALL_RESULT,
    "advisor_tool_result": None,
    "compaction": None,
    "container_upload": None,  # a file by its id
    "fallback": None,
    "mcp_tool_listing": None,
    "mcp_tool_result": None,
    "mcp_tool_use": None,
    "tool_addition": None,
    "tool_removal": None,
    "web_fetch_tool_result": None,
    "web_search_tool_result": None,  # its pages are encrypted
}
_RUN: Final[frozenset[str]] = frozenset(
    {
        "server_tool_use",
        "code_execution_tool_result",
        "bash_code_execution_tool_result",
        "text_editor_code_execution_tool_result",
        "tool_search_tool_result",
    }
)
#: block types that each place may hold
PLACES: Final[dict[str, frozenset[str]]] = {
    "user": frozenset({"text", "image", "document", "search_result", "tool_result"}),
    "assistant": frozenset({"text", "thinking", "redacted_thinking", "tool_use"}) | _RUN,
    "system": frozenset({"text"}),
    "tool_result": frozenset({"text", "image", "document", "search_result", "tool_reference", "browser_state"}),
    "search_result": frozenset({"text"}),
    "document": frozenset({"text", "image"}),
}
_ERROR: Final[Table] = {"type": Rule.WORD, "error_code": Rule.WORD, "error_message": Rule.TEXT}
#: what a server-run tool answered, by ``type``; None refuses it
RESULTS: Final[dict[str, Table | None]] = {
    "code_execution_result": {
        "type": Rule.WORD,
        "stdout": Rule.TEXT,
        "stderr": Rule.TEXT,
        "return_code": Rule.SCALAR,
        "content": Rule.WORDS,
    },
    "bash_code_execution_result": {
        "type": Rule.WORD,
        "stdout": Rule.TEXT,
        "stderr": Rule.TEXT,
        "return_code": Rule.SCALAR,
        "content": Rule.WORDS,
    },
    "text_editor_code_execution_view_result": {
        "type": Rule.WORD,
        "content": Rule.TEXT,
        "file_type": Rule.WORD,
        "num_lines": Rule.SCALAR,
        "start_line": Rule.SCALAR,
        "total_lines": Rule.SCALAR,
    },
    "text_editor_code_execution_create_result": {"type": Rule.WORD, "is_file_update": Rule.SCALAR},
    "text_editor_code_execution_str_replace_result": {
        "type": Rule.WORD,
        "lines": Rule.JSON,
        "new_lines": Rule.SCALAR,
        "new_start": Rule.SCALAR,
        "old_lines": Rule.SCALAR,
        "old_start": Rule.SCALAR,
    },
    "tool_search_tool_search_result": {"type": Rule.WORD, "tool_references": Rule.JSON},
    "code_execution_tool_result_error": _ERROR,
    "bash_code_execution_tool_result_error": _ERROR,
    "text_editor_code_execution_tool_result_error": _ERROR,
    "tool_search_tool_result_error": _ERROR,
    "encrypted_code_execution_result": None,
}
CALLER: Final[Table] = {"type": Rule.WORD, "tool_id": Rule.NESTED}

#: where an image or a document comes from, by ``type``; None refuses it
IMAGE_SOURCES: Final[dict[str, Table | None]] = {
    "base64": {"type": Rule.WORD, "media_type": Rule.WORD, "data": Rule.NESTED, **RESIZING},
    "url": {"type": Rule.WORD, "url": Rule.NESTED, **RESIZING},
    "file": None,
}
DOCUMENT_SOURCES: Final[dict[str, Table | None]] = {
    "text": {"type": Rule.WORD, "media_type": Rule.WORD, "data": Rule.TEXT},
    "content": {"type": Rule.WORD, "content": Rule.NESTED},
    "base64": None,  # a PDF
    "url": None,
    "file": None,
}

_CITED: Final[Table] = {"type": Rule.WORD, "cited_text": Rule.TEXT}
_IN_DOCUMENT: Final[Table] = {
    **_CITED,
    "document_index": Rule.SCALAR,
    "document_title": Rule.TEXT,
    "file_id": Rule.IDENTIFIER,
}
CITATIONS: Final[dict[str, Table]] = {
    "char_location": {**_IN_DOCUMENT, "start_char_index": Rule.SCALAR, "end_char_index": Rule.SCALAR},
    "page_location": {**_IN_DOCUMENT, "start_page_number": Rule.SCALAR, "end_page_number": Rule.SCALAR},
    "content_block_location": {**_IN_DOCUMENT, "start_block_index": Rule.SCALAR, "end_block_index": Rule.SCALAR},
    "search_result_location": {
        **_CITED,
        "search_result_index": Rule.SCALAR,
        "source": Rule.TEXT,
        "title": Rule.TEXT,
        "start_block_index": Rule.SCALAR,
        "end_block_index": Rule.SCALAR,
    },
    "web_search_result_location": {
        **_CITED,
        "encrypted_index": Rule.SEALED,
        "title": Rule.TEXT,
        "url": Rule.TEXT,
    },
}

_TOOL: Final[Table] = {
    "type": Rule.WORD,
    "name": Rule.TEXT,
    "allowed_callers": Rule.WORDS,
    "cache_control": Rule.WORDS,
    "defer_loading": Rule.SCALAR,
    "strict": Rule.SCALAR,
}
_CLIENT_TOOL: Final[Table] = {**_TOOL, "input_examples": Rule.JSON}
_COMPUTER: Final[Table] = {
    **_CLIENT_TOOL,
    "display_height_px": Rule.SCALAR,
    "display_width_px": Rule.SCALAR,
    "display_number": Rule.SCALAR,
    "enable_zoom": Rule.SCALAR,
}
_TOOLSET: Final[Table] = {"type": Rule.WORD, "cache_control": Rule.WORDS, "configs": Rule.JSON}
#: tools that the service itself runs, while it answers
SERVER_TOOLS: Final[frozenset[str]] = frozenset(
    {
        "code_execution_20250522",
        "code_execution_20250825",
        "code_execution_20260120",
        "code_execution_20260521",
        "tool_search_tool_bm25",
        "tool_search_tool_bm25_20251119",
        "tool_search_tool_regex",
        "tool_search_tool_regex_20251119",
    }
)
#: tools by ``type``: their definition is moderated as a whole; None refuses the tool
TOOLS: Final[dict[str, Table | None]] = {
    "custom": {
        **_CLIENT_TOOL,
        "description": Rule.TEXT,
        "input_schema": Rule.JSON,
        "eager_input_streaming": Rule.SCALAR,
    },
    **dict.fromkeys(("bash_20241022", "bash_20250124", "memory_20250818"), _CLIENT_TOOL),
    **dict.fromkeys(("text_editor_20241022", "text_editor_20250124", "text_editor_20250429"), _CLIENT_TOOL),
    "text_editor_20250728": {**_CLIENT_TOOL, "max_characters": Rule.SCALAR},
    **dict.fromkeys(("computer_20241022", "computer_20250124", "computer_20251124"), _COMPUTER),
    **dict.fromkeys(("browser_toolset_20260801", "computer_toolset_20260801"), _TOOLSET),
    **dict.fromkeys(sorted(SERVER_TOOLS), _TOOL),
    **dict.fromkeys(("web_search_20250305", "web_search_20260209", "web_search_20260318")),
    **dict.fromkeys(("web_fetch_20250910", "web_fetch_20260209", "web_fetch_20260309", "web_fetch_20260318")),
    "advisor_20260301": None,
    "mcp_toolset": None,
}

MESSAGE: Final[Table] = {
    "id": Rule.IDENTIFIER,
    "type": Rule.WORD,
    "role": Rule.NESTED,
    "content": Rule.NESTED,
    "container": Rule.DROPPED,  # cannot be used again through this gateway
    "context_management": Rule.DROPPED,
    "diagnostics": Rule.WORDS,
    "input_transformations": Rule.DROPPED,
    "model": Rule.IDENTIFIER,
    "stop_details": Rule.NESTED,
    "stop_reason": Rule.WORD,
    "stop_sequence": Rule.TEXT,
    "usage": Rule.NUMBERS,
    # vendors
    "kv_transfer_params": Rule.DROPPED,
    "provider_specific_fields": Rule.DROPPED,
    "x_guard": Rule.DROPPED,  # ours takes its place
}
STOP_DETAILS: Final[Table] = {
    "type": Rule.WORD,
    "category": Rule.WORD,
    "explanation": Rule.TEXT,
    "fallback_credit_token": Rule.DROPPED,
    "fallback_has_prefill_claim": Rule.SCALAR,
    "recommended_model": Rule.IDENTIFIER,
}
COUNT: Final[Table] = {"input_tokens": Rule.SCALAR, "context_management": Rule.NUMBERS}

#: events by ``type``
EVENTS: Final[dict[str, Table]] = {
    "message_start": {"type": Rule.WORD, "message": Rule.NESTED},
    "content_block_start": {"type": Rule.WORD, "index": Rule.SCALAR, "content_block": Rule.NESTED},
    "content_block_delta": {"type": Rule.WORD, "index": Rule.SCALAR, "delta": Rule.NESTED},
    "content_block_stop": {"type": Rule.WORD, "index": Rule.SCALAR},
    "message_delta": {
        "type": Rule.WORD,
        "delta": Rule.NESTED,
        "usage": Rule.NUMBERS,
        "context_management": Rule.DROPPED,
        "input_transformations": Rule.DROPPED,
        # vendors
        "x_guard": Rule.DROPPED,
    },
    "message_stop": {
        "type": Rule.WORD,
        # vendors
        "amazon-bedrock-invocationMetrics": Rule.NUMBERS,
    },
    "ping": {"type": Rule.WORD},
}
#: deltas of a block by ``type``; None refuses it
DELTAS: Final[dict[str, Table | None]] = {
    "text_delta": {"type": Rule.WORD, "text": Rule.TEXT},
    "thinking_delta": {"type": Rule.WORD, "thinking": Rule.TEXT, "estimated_tokens": Rule.SCALAR},
    "signature_delta": {"type": Rule.WORD, "signature": Rule.SEALED},
    "input_json_delta": {"type": Rule.WORD, "partial_json": Rule.TEXT},
    "citations_delta": {"type": Rule.WORD, "citation": Rule.NESTED},
    "compaction_delta": None,
}
ENDING: Final[Table] = {
    "container": Rule.DROPPED,
    "stop_details": Rule.NESTED,
    "stop_reason": Rule.WORD,
    "stop_sequence": Rule.TEXT,
}
