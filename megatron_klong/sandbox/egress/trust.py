"""Which certificate authorities the proxy trusts, which the sandbox trusts, and how its programs are told.

The proxy trusts the system's and those of the configuration. The sandbox trusts these and the proxy's own, which is
made anew for each run and whose key never leaves the runner's folder: so programs accept both what the proxy opened
and what it let pass untouched.
"""

import os
import ssl
from pathlib import Path

from megatron_klong.sandbox.network import PROXY_HOST, PROXY_PORT

BUNDLE_INSIDE = "/run/egress/ca-certificates.pem"

_PROXY_URL = f"http://{PROXY_HOST}:{PROXY_PORT}"
_NOT_BY_PROXY = "localhost,127.0.0.1,::1"
_SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Arch
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",  # Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",  # Alpine
)
_OVERLAID = ("/etc/ssl/certs/", "/etc/pki/ca-trust/extracted/")  # what of them a sandbox shows

ENVIRONMENT = {
    **dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), _PROXY_URL),
    **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), _PROXY_URL),
    **dict.fromkeys(("no_proxy", "NO_PROXY"), _NOT_BY_PROXY),
    **dict.fromkeys(
        (
            "SSL_CERT_FILE",
            "REQUESTS_CA_BUNDLE",
            "CURL_CA_BUNDLE",
            "GIT_SSL_CAINFO",
            "PIP_CERT",
            "NODE_EXTRA_CA_CERTS",
            "CARGO_HTTP_CAINFO",
            "npm_config_cafile",
            "AWS_CA_BUNDLE",
        ),
        BUNDLE_INSIDE,
    ),
}
"""For each command of a sandbox with a network."""


def upstream_authorities(extra: Path | None) -> bytes:
    """What the proxy trusts, as PEM. OSError, ValueError."""
    bundle = b""
    system = _system_bundle()
    if system is not None:
        bundle += system.read_bytes()
    if extra is not None:
        authorities = extra.read_bytes()
        if b"-----BEGIN CERTIFICATE-----" not in authorities:
            raise ValueError(f"upstream_ca: {extra} holds no certificate in PEM")
        bundle += b"\n" + authorities
    if not bundle:
        raise ValueError("no certificate authorities on this machine: install ca-certificates, or set upstream_ca")
    return bundle


def files_inside(bundle: Path, image: Path | None = None) -> dict[str, Path]:
    """Path in the sandbox -> the bundle: where ENVIRONMENT points, and over the system's own, for programs that look
    nowhere else (wget). image: the root of the file system that the sandbox shows instead of the host's.
    """
    files = {BUNDLE_INSIDE: bundle}
    for name in _SYSTEM_BUNDLES:
        inside = name if image is not None else os.path.realpath(name)
        file = Path(f"{image or ''}{inside}")
        if inside.startswith(_OVERLAID) and file.is_file() and not file.is_symlink():
            files[inside] = bundle
    return files


def _system_bundle() -> Path | None:
    found = ssl.get_default_verify_paths()
    for name in (*_SYSTEM_BUNDLES, found.cafile, found.openssl_cafile):
        if name is not None and os.path.isfile(name):
            return Path(name)
    return None
