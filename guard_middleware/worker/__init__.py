"""The process that owns the guard model: engines behind one protocol, batching, and an ASGI app on a Unix socket."""
