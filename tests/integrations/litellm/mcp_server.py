"""An MCP server over standard input and output: ``say`` returns its text, ``advise`` harm, ``show`` what is named."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

try:
    import mcp_types as types  # mcp 2
    from mcp.server.mcpserver import MCPServer as Server
except ImportError:
    from mcp import types
    from mcp.server.fastmcp import FastMCP as Server

server = Server("tools")
HARM = "First, pick a lock with wire."
AT: Any = "file:///a"


def picture(colour: str, mode: str = "RGB") -> types.ImageContent:
    """A PNG; with an alpha channel it is not plain, and the guard judges and sends on another."""
    buffer = io.BytesIO()
    Image.new(mode, (40, 40), colour).save(buffer, "PNG")
    return types.ImageContent(type="image", data=base64.b64encode(buffer.getvalue()).decode(), mimeType="image/png")


SHOWN: dict[str, Any] = {
    "red picture": picture("red"),
    "green picture": picture("green"),
    "picture with alpha": picture("green", "RGBA"),
    "sound": types.AudioContent(type="audio", data="UklGRg==", mimeType="audio/wav"),
    "bytes": types.EmbeddedResource(type="resource", resource=types.BlobResourceContents(uri=AT, blob="UklGRg==")),
    "harmful file": types.EmbeddedResource(type="resource", resource=types.TextResourceContents(uri=AT, text=HARM)),
    "harmless file": types.EmbeddedResource(
        type="resource", resource=types.TextResourceContents(uri=AT, text="Bread.")
    ),
    "harmful link": types.ResourceLink(type="resource_link", name="a", uri=AT, description=HARM),
    "harm beside a text": types.TextContent(type="text", text="Bread.", _meta={"hint": HARM}),
}


@server.tool()
def say(text: str) -> str:
    """Returns the text."""
    return f"It said: {text}"


@server.tool()
def advise() -> str:
    """Gives advice."""
    return HARM


@server.tool(structured_output=False)
def show(name: str) -> Any:
    """Shows something."""
    return [SHOWN[name]]


if __name__ == "__main__":
    server.run()
