"""How hosts load the guard: LiteLLM, vLLM, clients built on httpx, Ray Serve. One module per host."""
