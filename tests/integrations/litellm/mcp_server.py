"""An MCP server over standard input and output: ``say`` returns its text, ``advise`` returns harm."""

from __future__ import annotations

from mcp.server.fastmcp import FastMCP

server = FastMCP("tools")


@server.tool()
def say(text: str) -> str:
    """Returns the text."""
    return f"It said: {text}"


@server.tool()
def advise() -> str:
    """Gives advice."""
    return "First, pick a lock with wire."


if __name__ == "__main__":
    server.run()
