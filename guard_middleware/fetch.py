"""Fetching an image by URL, once, from a public address only.

The bytes fetched here are what guard and upstream both get; the upstream never sees the URL. The host is resolved
once, every address must be public, and the connection goes to a checked address itself: the URL given to httpx
holds the address, the Host header and the TLS server name (so also certificate verification) hold the name.
Nothing resolves twice, so a name that changes its answer (DNS rebinding) gains nothing.

Refuses:
- URLs that ``references.parse_http`` refuses, and ports but 80 and 443;
- hosts of which any address is not public: private, loopback, link-local, shared, multicast, reserved, and IPv6
  forms that carry such an IPv4 address (mapped, compatible, 6to4, Teredo, NAT64). A host that does not resolve is
  refused in the same words, so that answers do not map the inner network;
- every status but 200 (no redirect is followed), any Content-Encoding, a type other than image/*;
- more than ``limits.image_bytes``, or more than ``limits.fetch_seconds`` from first to last.

Proxies and other settings of the environment are ignored.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor

import httpx

from guard_middleware.errors import RejectKind, RequestRejected
from guard_middleware.limits import Limits
from guard_middleware.references import HttpUrl, parse_http

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_MAX_ADDRESSES = 4
_HEADERS = {
    "accept": "image/png, image/jpeg, image/webp",
    "accept-encoding": "identity",
    "connection": "close",
    "user-agent": "guard-middleware",
}


class Fetcher:
    """Fetches images by URL. Safe to share between requests of one event loop.

    ``allow`` names hosts that may be at any address and port, each as "host:port" ("images.internal:8080",
    "[::1]:80"); it is the operator's word, never a client's. ``tls`` replaces the default trust store.
    """

    def __init__(
        self, limits: Limits, *, allow: frozenset[str] = frozenset(), tls: ssl.SSLContext | None = None
    ) -> None:
        self._limits = limits
        self._allow = frozenset(entry.lower() for entry in allow)
        self._tls = tls or ssl.create_default_context()
        # Its own threads: lookups that hang must not take those which decode images.
        self._lookups = ThreadPoolExecutor(max_workers=8, thread_name_prefix="fetch-lookup")

    def close(self) -> None:
        self._lookups.shutdown(wait=False, cancel_futures=True)

    async def fetch(self, uri: str) -> bytes:
        """The body behind ``uri``, at most ``limits.image_bytes``; one GET at most.

        Raises ``RequestRejected`` with fixed words: forbidden_url, image_fetch_failed, image_too_large.
        """
        url = parse_http(uri)
        try:
            async with asyncio.timeout(self._limits.fetch_seconds):
                return await self._get(url, await self._resolve(url))
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, OSError):
            raise _failed() from None

    async def _resolve(self, url: HttpUrl) -> list[_Address]:
        """The addresses that may be connected to, in the resolver's order."""
        allowed = _authority(url.host, url.port) in self._allow
        if not allowed and url.port not in (80, 443):
            raise _forbidden()
        try:
            addresses = [ipaddress.ip_address(url.host)]
        except ValueError:
            addresses = await self._lookup(url)
        if not addresses or not (allowed or all(map(is_public, addresses))):
            raise _forbidden()
        return addresses[:_MAX_ADDRESSES]

    async def _lookup(self, url: HttpUrl) -> list[_Address]:
        def lookup() -> list[_Address]:
            flags = socket.AI_ADDRCONFIG
            found = socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM, flags=flags)
            return [ipaddress.ip_address(sockaddr[0]) for *_, sockaddr in found]

        try:
            return await asyncio.get_running_loop().run_in_executor(self._lookups, lookup)
        except (OSError, UnicodeError):
            raise _forbidden() from None

    async def _get(self, url: HttpUrl, addresses: list[_Address]) -> bytes:
        default_port = url.port == (443 if url.scheme == "https" else 80)
        headers = {**_HEADERS, "host": _authority(url.host, None if default_port else url.port)}
        timeout = httpx.Timeout(self._limits.fetch_seconds, connect=self._limits.fetch_seconds / 3)
        # A client per fetch: a pool would know a TLS connection by its address, and give it to another name there.
        async with httpx.AsyncClient(verify=self._tls, trust_env=False, timeout=timeout) as client:
            for address in addresses:
                request = client.build_request(
                    "GET",
                    f"{url.scheme}://{_authority(str(address), url.port)}",
                    headers=headers,
                    # target: as it was written, not as httpx would normalise it; httpx's log does not show it
                    extensions={"sni_hostname": url.host, "target": url.target.encode("ascii")},
                )
                try:
                    response = await client.send(request, stream=True, follow_redirects=False)
                except (httpx.ConnectError, httpx.ConnectTimeout):
                    continue
                try:
                    return await self._read(response)
                finally:
                    await response.aclose()
        raise _failed()

    async def _read(self, response: httpx.Response) -> bytes:
        if (
            response.status_code != 200
            or response.headers.get("content-encoding", "identity").lower() != "identity"
            or not response.headers.get("content-type", "").lower().startswith("image/")
        ):
            raise _failed()
        body = bytearray()
        async for piece in response.aiter_raw():
            body += piece
            if len(body) > self._limits.image_bytes:
                raise _too_large()
        return bytes(body)


def is_public(address: _Address) -> bool:
    """Whether an address is one of the public internet, and so is any IPv4 address that it carries."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not (address.is_multicast or address.is_reserved)
    if address.ipv4_mapped or address in _NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    if address.sixtofour and not is_public(address.sixtofour):
        return False
    # Teredo, documentation and local use are not is_global; every other special range is outside 2000::/3.
    return address in _UNICAST and address.is_global


def _authority(host: str, port: int | None) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if port is None else f"{name}:{port}"


def _forbidden() -> RequestRejected:
    return RequestRejected(RejectKind.FORBIDDEN_URL, "an image URL's host is unknown or not allowed")


def _failed() -> RequestRejected:
    return RequestRejected(RejectKind.IMAGE_FETCH_FAILED, "an image could not be fetched")


def _too_large() -> RequestRejected:
    return RequestRejected(RejectKind.IMAGE_TOO_LARGE, "an image exceeds the size limit")
