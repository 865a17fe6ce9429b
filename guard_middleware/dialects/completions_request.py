"""A legacy Completions request, read into a Conversation and a body that holds nothing else.

All prompts are one message of the user, so that what is split over prompts is judged together; the suffix, stop
strings and output schemas are definitions.

Refuses:
- prompts of token ids, which no guard reads, and embeddings; no prompt at all;
- ``echo`` and ``logprobs``, which give the answer's text a second way out;
- more answers (prompts times ``n``) or candidates (``best_of``) than the limit; a streamed ``best_of``;
- unknown fields that can carry content, values of the wrong type.
"""

from __future__ import annotations

from guard_middleware.dialects.base import Options, ParsedRequest
from guard_middleware.dialects.completions_fields import REQUEST
from guard_middleware.dialects.fields import (
    Rule,
    admit,
    as_flag,
    as_list,
    as_object,
    in_order,
    invalid,
    refuse_guards,
    unsupported_content,
)
from guard_middleware.dialects.request_shared import bounded, read_bias, read_stops, rejecting
from guard_middleware.limits import Limits
from guard_middleware.references import to_data_url
from guard_middleware.strictjson import JSONValue
from guard_middleware.types import Conversation, Definition, Message, Text

_READ = tuple(name for name, rule in REQUEST.items() if rule is Rule.NESTED)


def parse_request(body: JSONValue, limits: Limits, options: Options) -> ParsedRequest:
    """Read a request body; raises ``RequestRejected`` and nothing else."""
    return rejecting(lambda: _request(body, limits, options))


def _request(body: JSONValue, limits: Limits, options: Options) -> ParsedRequest:
    source = as_object(body, "")
    refuse_guards(source.keys() - REQUEST.keys() - options.extra_fields.keys())
    admitted = admit(REQUEST, source, "", options)
    kept = admitted.kept
    definitions = [Definition(name, text) for name, text in (admitted.texts | admitted.extras).items()]
    if source.get("stop") is not None:
        definitions += read_stops(source["stop"])
    if source.get("logit_bias") is not None:
        read_bias(source["logit_bias"])
    prompts = _prompts(source.get("prompt"), limits.choices)
    n = bounded(source.get("n"), "n", limits.choices)
    stream = as_flag(source.get("stream"), "stream")
    best_of = bounded(source.get("best_of"), "best_of", limits.choices)
    if source.get("best_of") is not None and best_of < n:
        raise invalid("best_of", "must not be less than n")
    if len(prompts) * max(n, best_of) > limits.choices:
        raise invalid("prompt", f"asks for more than {limits.choices} answers")
    if stream and best_of > n:
        raise invalid("best_of", "cannot be streamed")
    kept |= {name: source[name] for name in _READ if name in source}
    stream_options = as_object(kept.get("stream_options") or {}, "stream_options")
    model = kept.get("model")
    return ParsedRequest(
        dialect="completions",
        conversation=Conversation((Message("user", tuple(map(Text, prompts))),), tuple(definitions)),
        body=in_order(source, kept),
        model=model if isinstance(model, str) else None,
        stream=stream,
        choices=len(prompts) * n,
        include_usage=as_flag(stream_options.get("include_usage"), "stream_options.include_usage"),
        sites=(),
        place=to_data_url,
    )


def _prompts(value: JSONValue, most: int) -> list[str]:
    if isinstance(value, str):
        return [value]
    prompts: list[str] = []
    if value is not None:
        for index, item in enumerate(as_list(value, "prompt", 1 << 20)):
            if not isinstance(item, str):
                raise unsupported_content(f"prompt[{index}]", "only text can be moderated, not token ids")
            prompts.append(item)
    if not prompts:
        raise invalid("prompt", "must be a string or an array of strings")
    if len(prompts) > most:
        raise invalid("prompt", f"asks for more than {most} answers")
    return prompts
