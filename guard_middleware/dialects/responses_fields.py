"""Every field of the Responses API and what is done with it: the one table of this dialect.

Each table is one object of the API; None refuses the whole object. ``tests/dialects/test_responses_fields.py``
compares names and types with the installed openai SDK, so that whatever OpenAI adds fails the build until it is
decided here. Names after the line ``vendors`` are not OpenAI's: fields of vLLM, OpenRouter, Azure and others for
which the general rule (numbers pass, anything that can carry content is refused) would be wrong or unhelpful.

Tools that the upstream runs itself are refused: what they bring into the prompt (pages, files, answers of other
servers) reaches the model before anybody screened it, and what they make (pictures, files, effects) cannot be taken
back. Of the tools that the client runs, those pass whose calls and results are read whole.
"""

from __future__ import annotations

from typing import Final

from guard_middleware.dialects.fields import RESIZING, Rule, Table

REQUEST: Final[Table] = {
    "access_programs": Rule.WORDS,
    "background": Rule.OFF,  # the answer would be fetched later, past us
    "background_options": Rule.REFUSED,
    "context_management": Rule.REFUSED,  # the upstream would read less than the guard
    "conversation": Rule.REFUSED,  # items that the upstream keeps, whoever wrote them
    "image": Rule.WORDS,
    "include": Rule.NESTED,
    "input": Rule.NESTED,
    "instructions": Rule.TEXT,
    "max_output_tokens": Rule.SCALAR,
    "max_tool_calls": Rule.SCALAR,
    "metadata": Rule.NESTED,
    "model": Rule.IDENTIFIER,
    "moderation": Rule.DROPPED,  # the client cannot configure the guard; annotations follow the operator's policy
    "parallel_tool_calls": Rule.SCALAR,
    "previous_response_id": Rule.IDENTIFIER,  # served where that answer went through us
    "prompt": Rule.REFUSED,  # a stored template that nobody screened
    "prompt_cache_key": Rule.IDENTIFIER,
    "prompt_cache_options": Rule.WORDS,
    "prompt_cache_retention": Rule.WORD,
    "reasoning": Rule.NESTED,
    "safety_identifier": Rule.IDENTIFIER,
    "service_tier": Rule.WORD,
    "store": Rule.SCALAR,  # stored answers cannot be read back through us
    "stream": Rule.NESTED,
    "stream_options": Rule.NUMBERS,
    "temperature": Rule.SCALAR,
    "text": Rule.NESTED,
    "tool_choice": Rule.CHOICE,
    "tools": Rule.NESTED,
    "top_logprobs": Rule.OFF,  # returns the answer's tokens a second time
    "top_p": Rule.SCALAR,
    "truncation": Rule.NESTED,  # not "auto": the upstream would read less than the guard
    "user": Rule.IDENTIFIER,
    # vendors
    "chat_template": Rule.REFUSED,
    "chat_template_kwargs": Rule.REFUSED,
    "documents": Rule.REFUSED,
    "enable_response_messages": Rule.OFF,
    "media_io_kwargs": Rule.REFUSED,
    "mm_processor_kwargs": Rule.REFUSED,
    "plugins": Rule.REFUSED,
    "previous_input_messages": Rule.REFUSED,
    "return_hidden_states": Rule.OFF,
    "return_token_ids": Rule.OFF,
    "return_tokens_as_token_ids": Rule.OFF,
    "truncate_prompt_tokens": Rule.REFUSED,
    **RESIZING,
}
#: what ``include`` may ask for; the rest is about tools of the upstream or gives tokens a second way out
INCLUDE: Final = frozenset({"reasoning.encrypted_content"})
REASONING: Final[Table] = {
    "context": Rule.WORD,
    "effort": Rule.CHOICE,  # templates print it
    "generate_summary": Rule.WORD,
    "mode": Rule.WORD,
    "summary": Rule.WORD,
}
TEXT: Final[Table] = {"format": Rule.NESTED, "verbosity": Rule.CHOICE}
#: output formats by ``type``; what they hold beside it is moderated as a whole
FORMATS: Final[dict[str, Table]] = {
    "text": {"type": Rule.WORD},
    "json_object": {"type": Rule.WORD},
    "json_schema": {
        "type": Rule.WORD,
        "name": Rule.TEXT,
        "schema": Rule.JSON,
        "description": Rule.TEXT,
        "strict": Rule.SCALAR,
    },
}

_FLAGS: Final[Table] = {"allowed_callers": Rule.WORDS, "async": Rule.SCALAR, "defer_loading": Rule.SCALAR}
#: tools by ``type``: texts and schemas of a definition are moderated together
TOOLS: Final[dict[str, Table | None]] = {
    "function": {
        "type": Rule.WORD,
        "name": Rule.TEXT,
        "description": Rule.TEXT,
        "parameters": Rule.JSON,
        "output_schema": Rule.JSON,
        "strict": Rule.SCALAR,
        **_FLAGS,
    },
    "custom": {"type": Rule.WORD, "name": Rule.TEXT, "description": Rule.TEXT, "format": Rule.JSON, **_FLAGS},
    "namespace": {"type": Rule.WORD, "name": Rule.TEXT, "description": Rule.TEXT, "tools": Rule.NESTED},
    "computer": {"type": Rule.WORD},
    "computer_use_preview": {
        "type": Rule.WORD,
        "display_height": Rule.SCALAR,
        "display_width": Rule.SCALAR,
        "environment": Rule.WORD,
    },
    "apply_patch": None,
    "code_interpreter": None,
    "file_search": None,
    "image_generation": None,
    "local_shell": None,
    "mcp": None,
    "programmatic_tool_calling": None,
    "shell": None,
    "tool_search": None,
    "web_search": None,
    "web_search_2025_08_26": None,
    "web_search_preview": None,
    "web_search_preview_2025_03_11": None,
}

#: content parts of requests by ``type``
PARTS: Final[dict[str, Table | None]] = {
    "input_text": {"type": Rule.WORD, "text": Rule.TEXT, "prompt_cache_breakpoint": Rule.WORDS},
    "input_image": {
        "type": Rule.WORD,
        "detail": Rule.WORD,
        "file_id": Rule.REFUSED,  # a picture that the upstream keeps
        "image_url": Rule.NESTED,
        "prompt_cache_breakpoint": Rule.WORDS,
        # vendors
        **RESIZING,
    },
    "output_text": {"type": Rule.WORD, "text": Rule.TEXT, "annotations": Rule.NESTED, "logprobs": Rule.DROPPED},
    "refusal": {"type": Rule.WORD, "refusal": Rule.TEXT},
    "reasoning_text": {"type": Rule.WORD, "text": Rule.TEXT},
    "summary_text": {"type": Rule.WORD, "text": Rule.TEXT},
    "computer_screenshot": {
        "type": Rule.WORD,
        "detail": Rule.WORD,
        "file_id": Rule.REFUSED,
        "image_url": Rule.NESTED,
        # vendors
        **RESIZING,
    },
    "input_audio": None,
    "input_file": None,
}
#: part types that a message of each role may hold
ROLE_PARTS: Final[dict[str, frozenset[str]]] = {
    "user": frozenset({"input_text", "input_image"}),
    "system": frozenset({"input_text", "input_image"}),
    "developer": frozenset({"input_text", "input_image"}),
    "assistant": frozenset({"input_text", "output_text", "refusal"}),
}

ANNOTATIONS: Final[dict[str, Table]] = {
    "url_citation": {
        "type": Rule.WORD,
        "title": Rule.TEXT,
        "url": Rule.TEXT,
        "start_index": Rule.SCALAR,
        "end_index": Rule.SCALAR,
    },
    "file_citation": {
        "type": Rule.WORD,
        "file_id": Rule.IDENTIFIER,
        "filename": Rule.TEXT,
        "index": Rule.SCALAR,
    },
    "container_file_citation": {
        "type": Rule.WORD,
        "container_id": Rule.IDENTIFIER,
        "file_id": Rule.IDENTIFIER,
        "filename": Rule.TEXT,
        "start_index": Rule.SCALAR,
        "end_index": Rule.SCALAR,
    },
    "file_path": {"type": Rule.WORD, "file_id": Rule.IDENTIFIER, "index": Rule.SCALAR},
}

_ITEM: Final[Table] = {"type": Rule.WORD, "id": Rule.IDENTIFIER, "status": Rule.WORD}
_CALL: Final[Table] = {**_ITEM, "call_id": Rule.NESTED}
_NAMED: Final[Table] = {
    **_CALL,
    "name": Rule.TEXT,
    "namespace": Rule.TEXT,
    "async": Rule.SCALAR,
    "caller": Rule.WORDS,
}
#: items that requests and answers share, by ``type``
_BOTH: Final[dict[str, Table]] = {
    "message": {**_ITEM, "role": Rule.WORD, "content": Rule.NESTED, "phase": Rule.WORD},
    "reasoning": {
        **_ITEM,
        "summary": Rule.NESTED,
        "content": Rule.NESTED,
        # The model's own thoughts, sealed by the service: nobody between can write or read them, and an agent that
        # keeps nothing at the upstream cannot go on without them. By its id alone an item says no more than that.
        "encrypted_content": Rule.SEALED,
        # vendors
        "format": Rule.WORD,
        "signature": Rule.SEALED,
    },
    "function_call": {**_NAMED, "arguments": Rule.TEXT},
    "custom_tool_call": {**_NAMED, "input": Rule.TEXT},
    "computer_call": {
        **_CALL,
        "action": Rule.JSON,
        "actions": Rule.JSON,
        "pending_safety_checks": Rule.JSON,
    },
}
_NEITHER: Final[dict[str, None]] = dict.fromkeys(
    (
        "additional_tools",
        "apply_patch_call",
        "apply_patch_call_output",
        "code_interpreter_call",
        "compaction",
        "file_search_call",
        "image_generation_call",
        "local_shell_call",
        "local_shell_call_output",
        "mcp_approval_request",
        "mcp_approval_response",
        "mcp_call",
        "mcp_list_tools",
        "program",
        "program_output",
        "shell_call",
        "shell_call_output",
        "tool_search_call",
        "tool_search_output",
        "web_search_call",
    )
)
#: items of requests by ``type``
INPUT_ITEMS: Final[dict[str, Table | None]] = {
    **_BOTH,
    "function_call_output": {
        **_CALL,
        "output": Rule.NESTED,
        "name": Rule.TEXT,
        "namespace": Rule.TEXT,
        "caller": Rule.WORDS,
    },
    "custom_tool_call_output": {**_CALL, "output": Rule.NESTED, "caller": Rule.WORDS},
    "computer_call_output": {**_CALL, "output": Rule.NESTED, "acknowledged_safety_checks": Rule.JSON},
    **_NEITHER,
    "compaction_trigger": None,
    "configuration_update": None,
    "item_reference": None,  # what the upstream keeps under this id, nobody here has read
}
#: items of answers by ``type``
OUTPUT_ITEMS: Final[dict[str, Table | None]] = {
    **_BOTH,
    **_NEITHER,
    "computer_call_output": None,
    "custom_tool_call_output": None,
    "function_call_output": None,
}
#: what each call says, in the order in which the guard reads it
SAID: Final[dict[str, tuple[str, ...]]] = {
    "function_call": ("arguments",),
    "custom_tool_call": ("input",),
    "computer_call": ("action", "actions", "pending_safety_checks"),
}

RESPONSE: Final[Table] = {
    "id": Rule.IDENTIFIER,
    "access_programs": Rule.WORDS,
    "background": Rule.SCALAR,
    "completed_at": Rule.SCALAR,
    "conversation": Rule.DROPPED,
    "created_at": Rule.SCALAR,
    "error": Rule.NESTED,
    "image": Rule.WORDS,
    "incomplete_details": Rule.WORDS,
    "input_transformations": Rule.DROPPED,
    # What a request said comes back as that request says it, not as the upstream repeats it.
    "instructions": Rule.NESTED,
    "max_output_tokens": Rule.SCALAR,
    "max_tool_calls": Rule.SCALAR,
    "metadata": Rule.NESTED,
    "model": Rule.IDENTIFIER,
    "moderation": Rule.DROPPED,  # ours takes its place
    "object": Rule.WORD,
    "output": Rule.NESTED,
    "parallel_tool_calls": Rule.SCALAR,
    "previous_response_id": Rule.IDENTIFIER,
    "prompt": Rule.DROPPED,
    "prompt_cache_diagnostics": Rule.DROPPED,
    "prompt_cache_key": Rule.IDENTIFIER,
    "prompt_cache_options": Rule.WORDS,
    "prompt_cache_retention": Rule.WORD,
    "reasoning": Rule.WORDS,
    "safety_identifier": Rule.IDENTIFIER,
    "service_tier": Rule.WORD,
    "status": Rule.WORD,
    "temperature": Rule.SCALAR,
    "text": Rule.NESTED,
    "tool_choice": Rule.NESTED,
    "tool_usage": Rule.NUMBERS,
    "tools": Rule.NESTED,
    "top_logprobs": Rule.SCALAR,
    "top_p": Rule.SCALAR,
    "truncation": Rule.WORD,
    "usage": Rule.NUMBERS,
    "user": Rule.IDENTIFIER,
    # vendors
    "billing": Rule.DROPPED,
    "content_filters": Rule.DROPPED,
    "input_messages": Rule.DROPPED,
    "kv_transfer_params": Rule.DROPPED,
    "output_messages": Rule.DROPPED,
    "output_text": Rule.DROPPED,
    "provider": Rule.DROPPED,
    "x_guard": Rule.DROPPED,
}
_EVENT: Final[Table] = {"type": Rule.WORD, "sequence_number": Rule.SCALAR}
_LIFE: Final[Table] = {**_EVENT, "response": Rule.NESTED}
_OF_ITEM: Final[Table] = {**_EVENT, "output_index": Rule.NESTED, "item_id": Rule.IDENTIFIER}
_OF_PART: Final[Table] = {**_OF_ITEM, "content_index": Rule.NESTED}
_OF_SUMMARY: Final[Table] = {**_OF_ITEM, "summary_index": Rule.NESTED}
_DELTA: Final[Table] = {"delta": Rule.TEXT, "logprobs": Rule.DROPPED, "obfuscation": Rule.DROPPED}
#: streamed events by ``type``
EVENTS: Final[dict[str, Table | None]] = {
    "response.created": _LIFE,
    "response.queued": _LIFE,
    "response.in_progress": _LIFE,
    "response.completed": _LIFE,
    "response.incomplete": _LIFE,
    "response.failed": _LIFE,
    "error": {
        **_EVENT,
        "code": Rule.DROPPED,
        "message": Rule.DROPPED,
        "param": Rule.DROPPED,
    },
    "response.output_item.added": {**_OF_ITEM, "item": Rule.NESTED},
    "response.output_item.done": {**_OF_ITEM, "item": Rule.NESTED},
    "response.content_part.added": {**_OF_PART, "part": Rule.NESTED},
    "response.content_part.done": {**_OF_PART, "part": Rule.NESTED},
    "response.output_text.delta": {**_OF_PART, **_DELTA},
    "response.output_text.done": {**_OF_PART, "text": Rule.TEXT, "logprobs": Rule.DROPPED},
    "response.output_text.annotation.added": {
        **_OF_PART,
        "annotation": Rule.NESTED,
        "annotation_index": Rule.SCALAR,
    },
    "response.refusal.delta": {**_OF_PART, **_DELTA},
    "response.refusal.done": {**_OF_PART, "refusal": Rule.TEXT},
    "response.reasoning_text.delta": {**_OF_PART, **_DELTA},
    "response.reasoning_text.done": {**_OF_PART, "text": Rule.TEXT},
    "response.reasoning_summary_part.added": {**_OF_SUMMARY, "part": Rule.NESTED},
    "response.reasoning_summary_part.done": {**_OF_SUMMARY, "part": Rule.NESTED, "status": Rule.WORD},
    "response.reasoning_summary_text.delta": {**_OF_SUMMARY, **_DELTA},
    "response.reasoning_summary_text.done": {**_OF_SUMMARY, "text": Rule.TEXT},
    "response.function_call_arguments.delta": {**_OF_ITEM, **_DELTA},
    "response.function_call_arguments.done": {**_OF_ITEM, "arguments": Rule.TEXT, "name": Rule.TEXT},
    "response.custom_tool_call_input.delta": {**_OF_ITEM, **_DELTA},
    "response.custom_tool_call_input.done": {**_OF_ITEM, "input": Rule.TEXT},
    # vendors: vLLM's names for parts of its reasoning
    "response.reasoning_part.added": {**_OF_PART, "part": Rule.NESTED},
    "response.reasoning_part.done": {**_OF_PART, "part": Rule.NESTED},
    **dict.fromkeys(
        (
            "response.audio.delta",
            "response.audio.done",
            "response.audio.transcript.delta",
            "response.audio.transcript.done",
            "response.code_interpreter_call.completed",
            "response.code_interpreter_call.in_progress",
            "response.code_interpreter_call.interpreting",
            "response.code_interpreter_call_code.delta",
            "response.code_interpreter_call_code.done",
            "response.compaction.compacting",
            "response.file_search_call.completed",
            "response.file_search_call.in_progress",
            "response.file_search_call.searching",
            "response.image_generation_call.completed",
            "response.image_generation_call.generating",
            "response.image_generation_call.in_progress",
            "response.image_generation_call.partial_image",
            "response.mcp_call.completed",
            "response.mcp_call.failed",
            "response.mcp_call.in_progress",
            "response.mcp_call_arguments.delta",
            "response.mcp_call_arguments.done",
            "response.mcp_list_tools.completed",
            "response.mcp_list_tools.failed",
            "response.mcp_list_tools.in_progress",
            "response.shell_call_command.added",
            "response.shell_call_command.delta",
            "response.shell_call_command.done",
            "response.shell_call_output_content.delta",
            "response.shell_call_output_content.done",
            "response.web_search_call.completed",
            "response.web_search_call.in_progress",
            "response.web_search_call.searching",
        )
    ),
}
