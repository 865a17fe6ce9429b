"""The sub-commands of ``guard-train``, a module each."""
