"""What one can set about the network of sandboxes."""

import ipaddress
from functools import cached_property
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_klong.sandbox.egress.urls import is_ip_literal, normal_host

type Address = tuple[str, int]  # an IP address and a port

HTTP_PORT, HTTPS_PORT = 80, 443
_PORTS = range(1, 65536)


class EgressConfig(BaseModel):
    """The network of the sandboxes of one process; what a single task forbids is in its blacklist."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    mode: Literal["off", "open", "listed"] = "off"
    """off: no network; open: every public host that the task does not forbid; listed: of those only the hosts in
    `allow`."""
    allow: tuple[str, ...] = Field(default=(), strict=False)  # a list where it is read back from a log's JSON
    """Hosts for mode listed, package indexes for instance; ".example.org" is a host with all its subdomains."""
    addresses: dict[str, str] = {}
    """Where internal services are: "index.example.org" or "index.example.org:8443" = "10.0.0.7:3141". Only these may
    have private addresses and ports other than 80 and 443."""
    fetchers: tuple[str, ...] = Field(default=(), strict=False)
    """Further hosts that fetch a URL named in their own (mirrors, archives): their TLS is opened to look for one that
    the task forbids, and what has a body is refused, for it could be named there."""
    upstream_ca: str | None = None
    """PEM file of certificate authorities to trust besides the system's own, for internal services."""
    connections: int = Field(default=128, ge=1, le=4096)
    """Open connections of one sandbox; further ones wait."""
    log_mib: float = Field(default=8, gt=0)
    """Log of one sandbox's requests; beyond it they are only counted."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        listed = self.mode == "listed"
        assert self._hosts is not None, "each of these checks what it is made of"
        assert self._domains is not None
        for host, _ in self._targets:
            if listed and not self.allows(host):
                raise ValueError(f"addresses names {host}, which mode listed forbids: add it to allow")
        for host in self.fetchers:
            _checked_host(host, "fetchers")
        if listed and not self.allow:
            raise ValueError(
                'mode listed allows only the hosts in allow, and there are none: fill it, or set mode "off"'
            )
        return self

    def allows(self, host: str) -> bool:
        """Whether the mode allows a (normal) host."""
        if self.mode != "listed":
            return self.mode == "open"
        return host in self._hosts or any(host == name or host.endswith(f".{name}") for name in self._domains)

    def address(self, host: str, port: int) -> Address | None:
        """Where `addresses` says that a (normal) host is, if it does."""
        return self._targets.get((host, port))

    @cached_property
    def _hosts(self) -> frozenset[str]:
        return frozenset(_checked_host(host, "allow") for host in self.allow if not host.startswith("."))

    @cached_property
    def _domains(self) -> tuple[str, ...]:
        return tuple(_checked_host(host[1:], "allow") for host in self.allow if host.startswith("."))

    @cached_property
    def _targets(self) -> dict[tuple[str, int], Address]:
        targets: dict[tuple[str, int], Address] = {}
        for name, target in sorted(self.addresses.items(), key=lambda item: ":" in item[0]):  # host:port has its way
            host, ports = _named(name)
            targets |= {(host, port): _checked_target(target) for port in ports}
        return targets


def _checked_host(text: str, field: str) -> str:
    host = normal_host(text)
    if host is None or is_ip_literal(host) or ":" in text or "/" in text:
        raise ValueError(f"{field}: {text!r} is not the name of a host")
    return host


def _named(name: str) -> tuple[str, tuple[int, ...]]:
    """A key of `addresses`: the host, and the ports it speaks for."""
    host, colon, port = name.partition(":")
    if not colon:
        return _checked_host(host, "addresses"), (HTTP_PORT, HTTPS_PORT)
    if not port.isdecimal() or int(port) not in _PORTS:
        raise ValueError(f"addresses: {name!r} is neither a host nor host:port")
    return _checked_host(host, "addresses"), (int(port),)


def _checked_target(target: str) -> Address:
    address, _, port = target.rpartition(":")
    try:
        found = ipaddress.ip_address(address.strip("[]"))
    except ValueError:
        raise ValueError(f"addresses: {target!r} is not an IP address and a port, as 10.0.0.7:3141") from None
    if not port.isdecimal() or int(port) not in _PORTS:
        raise ValueError(f"addresses: {target!r} lacks a port, as 10.0.0.7:3141")
    return str(found), int(port)
