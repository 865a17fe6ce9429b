"""A guard for vision-language model APIs: moderate prompts and responses, text and images, before they pass."""

__version__ = "0.1.0"
