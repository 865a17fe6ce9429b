"""Rationales from a teacher: its prompt, what is accepted of its answers, the client, the cost."""
