"""Every field of the legacy Completions API and what is done with it: the one table of this dialect.

Each table is one object of the API. ``tests/dialects/test_completions_fields.py`` compares the names with the types
of the installed openai SDK. Names after the line ``vendors`` are not OpenAI's: fields of vLLM, llama.cpp and others
for which the general rule (numbers pass, anything that can carry content is refused) would be wrong or unhelpful.
"""

from __future__ import annotations

from typing import Final

from guard_middleware.dialects.fields import Rule, Table

REQUEST: Final[Table] = {
    "model": Rule.IDENTIFIER,
    "prompt": Rule.NESTED,
    "best_of": Rule.NESTED,
    "echo": Rule.OFF,  # an answer that begins with the prompt would be judged by what its asker wrote
    "frequency_penalty": Rule.SCALAR,
    "logit_bias": Rule.NESTED,  # numbers by token id; words would be text for the model
    "logprobs": Rule.REFUSED,  # returns the answer's tokens a second time; 0 asks for them too
    "max_tokens": Rule.SCALAR,
    "n": Rule.NESTED,
    "presence_penalty": Rule.SCALAR,
    "seed": Rule.SCALAR,
    "stop": Rule.NESTED,
    "stream": Rule.NESTED,
    "stream_options": Rule.NUMBERS,
    "suffix": Rule.TEXT,
    "temperature": Rule.SCALAR,
    "top_p": Rule.SCALAR,
    "user": Rule.IDENTIFIER,
    # vendors
    "documents": Rule.REFUSED,
    "image_data": Rule.REFUSED,
    "mm_processor_kwargs": Rule.REFUSED,
    "moderation": Rule.DROPPED,  # the client cannot configure the guard
    "n_discard": Rule.REFUSED,  # the upstream would read less than the guard
    "n_keep": Rule.REFUSED,
    "n_probs": Rule.OFF,
    "prompt_embeds": Rule.REFUSED,
    "prompt_logprobs": Rule.REFUSED,
    "response_format": Rule.JSON,
    "return_hidden_states": Rule.OFF,
    "return_token_ids": Rule.OFF,
    "return_tokens_as_token_ids": Rule.OFF,
    "store": Rule.OFF,
    "truncate": Rule.OFF,
    "truncate_prompt_tokens": Rule.REFUSED,
}

#: an answer and a streamed chunk have the same shape
COMPLETION: Final[Table] = {
    "id": Rule.IDENTIFIER,
    "choices": Rule.NESTED,
    "created": Rule.SCALAR,
    "model": Rule.IDENTIFIER,
    "object": Rule.WORD,
    "system_fingerprint": Rule.IDENTIFIER,
    "usage": Rule.NUMBERS,
    # vendors
    "error": Rule.NESTED,
    "kv_transfer_params": Rule.DROPPED,
    "moderation": Rule.DROPPED,  # ours takes its place
    "obfuscation": Rule.DROPPED,
    "prompt_filter_results": Rule.DROPPED,
    "prompt_logprobs": Rule.DROPPED,
    "prompt_token_ids": Rule.DROPPED,
    "provider": Rule.DROPPED,
    "service_tier": Rule.WORD,
    "timings": Rule.NUMBERS,
    "x_groq": Rule.DROPPED,
    "x_guard": Rule.DROPPED,
}
CHOICE: Final[Table] = {
    "index": Rule.NESTED,
    "finish_reason": Rule.WORD,
    "logprobs": Rule.DROPPED,
    "text": Rule.TEXT,
    # vendors
    "content_filter_results": Rule.DROPPED,
    "matched_stop": Rule.DROPPED,
    "native_finish_reason": Rule.WORD,
    "prompt_logprobs": Rule.DROPPED,
    "prompt_token_ids": Rule.DROPPED,
    "reasoning": Rule.TEXT,
    "routed_experts": Rule.DROPPED,
    "stop_reason": Rule.DROPPED,
    "token_ids": Rule.DROPPED,
}
