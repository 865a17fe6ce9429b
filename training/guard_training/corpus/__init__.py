"""Labelled rows: what they are, where they come from, and whether they leak into an evaluation set."""
