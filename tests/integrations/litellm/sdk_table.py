"""The calls of LiteLLM's SDK that docs/litellm-sdk.md is about, by what a caller writes."""

from __future__ import annotations

from typing import Final

#: call -> the API whose dialect reads it
CALLS: Final = {
    "completion()": "chat_completions",
    "completion(), positional": "chat_completions",
    "completion(), imported before": "chat_completions",
    "completion(stream=True)": "chat_completions",
    "acompletion()": "chat_completions",
    "acompletion(), positional": "chat_completions",
    "acompletion(), imported before": "chat_completions",
    "acompletion(stream=True)": "chat_completions",
    "batch_completion()": "chat_completions",
    "Router.completion()": "chat_completions",
    "Router.completion(stream=True)": "chat_completions",
    "Router.acompletion()": "chat_completions",
    "Router.acompletion(stream=True)": "chat_completions",
    "text_completion()": "completions",
    "text_completion(), positional": "completions",
    "text_completion(stream=True)": "completions",
    "atext_completion()": "completions",
    "atext_completion(), positional": "completions",
    "atext_completion(stream=True)": "completions",
    "Router.atext_completion()": "completions",
    "responses()": "responses",
    "responses(), positional": "responses",
    "responses(stream=True)": "responses",
    "responses(stream=True), played by LiteLLM": "responses",
    "aresponses()": "responses",
    "aresponses(), positional": "responses",
    "aresponses(stream=True)": "responses",
    "aresponses(stream=True), of a chat model": "responses",
    "Router.aresponses()": "responses",
    "Router.aresponses(stream=True)": "responses",
    "anthropic_messages()": "messages",
    "anthropic_messages(stream=True)": "messages",
    "anthropic_messages(stream=True), of a chat model": "messages",
    "anthropic.messages.acreate()": "messages",
    "anthropic.messages.create(), of a chat model": "messages",
    "Router.aanthropic_messages()": "messages",
    "Router.aanthropic_messages(stream=True)": "messages",
}
