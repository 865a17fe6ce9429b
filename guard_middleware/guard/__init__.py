"""The guard as the gateway sees it, and the model's contract: what it reads (prompt) and what it writes (parse)."""
