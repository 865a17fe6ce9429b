"""Every field of the Chat Completions API and what is done with it: the one table of this dialect.

Each table is one object of the API. ``tests/dialects/test_chat_fields.py`` compares the names with the types of
the installed openai SDK, so that a field that OpenAI adds fails the build until it is decided here. Names after
the line ``vendors`` are not OpenAI's: fields of vLLM, SGLang, llama.cpp, LiteLLM, OpenRouter, DeepSeek and Azure
for which the general rule (numbers pass, anything that can carry content is refused) would be wrong or unhelpful.
"""

from __future__ import annotations

from typing import Final

from guard_middleware.dialects.fields import RESIZING, Rule, Table

REQUEST: Final[Table] = {
    "messages": Rule.NESTED,
    "model": Rule.IDENTIFIER,
    "audio": Rule.REFUSED,  # audio output cannot be screened
    "frequency_penalty": Rule.SCALAR,
    "function_call": Rule.CHOICE,
    "functions": Rule.NESTED,
    "logit_bias": Rule.NESTED,  # numbers by token id; words would be text for the model
    "logprobs": Rule.OFF,  # returns the answer's tokens a second time
    "max_completion_tokens": Rule.SCALAR,
    "max_tokens": Rule.SCALAR,
    "metadata": Rule.NESTED,
    "modalities": Rule.NESTED,
    "moderation": Rule.DROPPED,  # the client cannot configure the guard; annotations follow the operator's policy
    "n": Rule.NESTED,
    "parallel_tool_calls": Rule.SCALAR,
    "prediction": Rule.JSON,
    "presence_penalty": Rule.SCALAR,
    "prompt_cache_key": Rule.IDENTIFIER,
    "prompt_cache_options": Rule.WORDS,
    "prompt_cache_retention": Rule.WORD,
    "reasoning_effort": Rule.CHOICE,  # templates print it
    "response_format": Rule.NESTED,
    "safety_identifier": Rule.IDENTIFIER,
    "seed": Rule.SCALAR,
    "service_tier": Rule.WORD,
    "stop": Rule.NESTED,
    "store": Rule.OFF,  # a blocked answer would stay readable at the upstream
    "stream": Rule.NESTED,
    "stream_options": Rule.NUMBERS,
    "temperature": Rule.SCALAR,
    "tool_choice": Rule.CHOICE,
    "tools": Rule.NESTED,
    "top_logprobs": Rule.OFF,
    "top_p": Rule.SCALAR,
    "user": Rule.IDENTIFIER,
    "verbosity": Rule.CHOICE,
    "web_search_options": Rule.REFUSED,  # brings pages into the prompt that nobody screened
    # vendors
    "chat_template": Rule.REFUSED,
    "chat_template_kwargs": Rule.REFUSED,
    "documents": Rule.REFUSED,
    "echo": Rule.OFF,
    "enable_search": Rule.OFF,  # as web_search_options
    "mm_processor_kwargs": Rule.REFUSED,
    "n_discard": Rule.REFUSED,  # the upstream would read less than the guard
    "n_keep": Rule.REFUSED,
    "prompt_embeds": Rule.REFUSED,
    "prompt_logprobs": Rule.REFUSED,  # 0 asks for them too
    "return_hidden_states": Rule.OFF,
    "return_token_ids": Rule.OFF,
    "return_tokens_as_token_ids": Rule.OFF,
    "truncate": Rule.OFF,
    "truncate_prompt_tokens": Rule.REFUSED,
    "web_search": Rule.OFF,
    **RESIZING,
}

#: content parts by ``type``; None refuses the whole part
PARTS: Final[dict[str, Table | None]] = {
    "text": {
        "type": Rule.WORD,
        "text": Rule.TEXT,
        "prompt_cache_breakpoint": Rule.WORDS,
        # vendors
        "cache_control": Rule.WORDS,
    },
    "refusal": {"type": Rule.WORD, "refusal": Rule.TEXT},
    "image_url": {
        "type": Rule.WORD,
        "image_url": Rule.NESTED,
        "prompt_cache_breakpoint": Rule.WORDS,
        # vendors
        "cache_control": Rule.WORDS,
        "uuid": Rule.REFUSED,  # vLLM answers it with an image cached from an earlier request
        **RESIZING,
    },
    "input_audio": None,
    "file": None,
}
IMAGE_URL: Final[Table] = {"url": Rule.NESTED, "detail": Rule.WORD, **RESIZING}

_PLAIN: Final[Table] = {"role": Rule.WORD, "content": Rule.NESTED, "name": Rule.TEXT}
#: messages by ``role``
ROLES: Final[dict[str, Table]] = {
    "system": _PLAIN,
    "developer": _PLAIN,
    "user": _PLAIN,
    "assistant": {
        "role": Rule.WORD,
        "content": Rule.NESTED,
        "name": Rule.TEXT,
        "audio": Rule.REFUSED,  # names audio that the upstream keeps
        "function_call": Rule.NESTED,
        "refusal": Rule.TEXT,
        "tool_calls": Rule.NESTED,
        # vendors
        "annotations": Rule.NESTED,  # clients send back the message they got
        "partial": Rule.SCALAR,  # with prefix: vendors' switch to continue this message
        "prefix": Rule.SCALAR,
        "reasoning": Rule.TEXT,
        "reasoning_content": Rule.TEXT,
    },
    "tool": {
        "role": Rule.WORD,
        "content": Rule.NESTED,
        "tool_call_id": Rule.NESTED,
        # vendors
        "name": Rule.TEXT,
    },
    "function": {"role": Rule.WORD, "content": Rule.NESTED, "name": Rule.TEXT},
}
#: part types that each role may hold
ROLE_PARTS: Final[dict[str, frozenset[str]]] = {
    "system": frozenset({"text"}),
    "developer": frozenset({"text"}),
    "user": frozenset({"text", "image_url"}),
    "assistant": frozenset({"text", "refusal"}),
    "tool": frozenset({"text", "image_url"}),
    "function": frozenset({"text"}),
}

#: tools by ``type``: their definition is moderated as a whole. Any other type runs at the upstream: refused.
TOOLS: Final[dict[str, Table]] = {
    "function": {"type": Rule.WORD, "function": Rule.JSON},
    "custom": {"type": Rule.WORD, "custom": Rule.JSON},
}
#: calls by ``type``, in requests and in answers; ``index`` is for streams
TOOL_CALLS: Final[dict[str, Table]] = {
    "function": {"id": Rule.NESTED, "type": Rule.WORD, "function": Rule.NESTED, "index": Rule.SCALAR},
    "custom": {"id": Rule.NESTED, "type": Rule.WORD, "custom": Rule.NESTED, "index": Rule.SCALAR},
}
CALL: Final[dict[str, Table]] = {
    "function": {"name": Rule.TEXT, "arguments": Rule.TEXT},
    "custom": {"name": Rule.TEXT, "input": Rule.TEXT},
}
ANNOTATION: Final[Table] = {"type": Rule.WORD, "url_citation": Rule.NESTED}
URL_CITATION: Final[Table] = {
    "title": Rule.TEXT,
    "url": Rule.TEXT,
    "start_index": Rule.SCALAR,
    "end_index": Rule.SCALAR,
}

_ENVELOPE: Final[Table] = {
    "id": Rule.IDENTIFIER,
    "choices": Rule.NESTED,
    "created": Rule.SCALAR,
    "model": Rule.IDENTIFIER,
    "moderation": Rule.DROPPED,  # ours takes its place
    "object": Rule.WORD,
    "service_tier": Rule.WORD,
    "system_fingerprint": Rule.IDENTIFIER,
    "usage": Rule.NUMBERS,
    # vendors
    "citations": Rule.DROPPED,
    "error": Rule.NESTED,
    "kv_transfer_params": Rule.DROPPED,
    "prompt_filter_results": Rule.DROPPED,
    "prompt_logprobs": Rule.DROPPED,
    "prompt_token_ids": Rule.DROPPED,
    "provider": Rule.DROPPED,
    "search_results": Rule.DROPPED,
    "timings": Rule.NUMBERS,
    "x_groq": Rule.DROPPED,
    "x_guard": Rule.DROPPED,
}
COMPLETION: Final[Table] = {**_ENVELOPE, "metadata": Rule.DROPPED}
CHUNK: Final[Table] = {**_ENVELOPE, "obfuscation": Rule.DROPPED}

_CHOICE: Final[Table] = {
    "index": Rule.NESTED,
    "finish_reason": Rule.WORD,
    "logprobs": Rule.DROPPED,  # the answer's tokens a second time
    # vendors
    "content_filter_offsets": Rule.DROPPED,
    "content_filter_raw": Rule.DROPPED,
    "content_filter_results": Rule.DROPPED,
    "matched_stop": Rule.DROPPED,
    "native_finish_reason": Rule.WORD,
    "provider_specific_fields": Rule.DROPPED,
    "routed_experts": Rule.DROPPED,
    "stop_reason": Rule.DROPPED,
    "token_ids": Rule.DROPPED,
}
CHOICE: Final[Table] = {**_CHOICE, "message": Rule.NESTED}
CHUNK_CHOICE: Final[Table] = {**_CHOICE, "delta": Rule.NESTED}

_SAID: Final[Table] = {
    "role": Rule.WORD,
    "content": Rule.TEXT,
    "refusal": Rule.TEXT,
    "audio": Rule.REFUSED,
    "function_call": Rule.NESTED,
    "tool_calls": Rule.NESTED,
    "annotations": Rule.NESTED,
    # vendors
    "images": Rule.REFUSED,  # pictures made by the upstream are not screened
    "provider_specific_fields": Rule.DROPPED,
    "reasoning": Rule.TEXT,
    "reasoning_content": Rule.TEXT,
    "reasoning_details": Rule.DROPPED,  # a second copy of the reasoning, partly encrypted
    "thinking_blocks": Rule.DROPPED,
}
MESSAGE: Final[Table] = _SAID
DELTA: Final[Table] = _SAID
