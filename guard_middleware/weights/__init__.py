"""Weights that change while requests are served: revisions, the state file, golden set, shadow, promotion."""
