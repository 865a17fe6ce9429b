"""From operators' corrections to the next revision of a guard, or to a reasoned refusal."""
