"""The many spellings of one host or one path -> the few forms that rules are compared with.

Always (tests/unit/sandbox/test_egress_rules.py): a path is read in every way a server may read it, at each level of
percent-encoding, with its dot segments resolved, ignored, and all that lies between; a rule holds if it holds for one
of the readings. What could only be written to hide something (endless encoding) is an error, which means: refuse.
"""

import ipaddress
import re
import socket
import unicodedata
from collections.abc import Iterator, Sequence
from urllib.parse import parse_qsl, unquote

type Segments = tuple[str, ...]

LONGEST_HOST = 253
_MOST_LEVELS = 16  # of percent-encoding
_MOST_STEPS_UP = 64
_HOST = re.compile(r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?)*")
_NUMBER_LABEL = re.compile(r"(?:0x[0-9a-f]*|[0-9]+)")
# What IDNA drops from a name, and other characters without a width.
_WIDTHLESS = (
    "\u00ad\u034f\u061c\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff"
)
_INVISIBLE = re.compile(rf"[\x00-\x20\x7f\u0085\u00a0\u2028\u2029{_WIDTHLESS}]")
_UNSEEN = re.compile(rf"[{_WIDTHLESS}]")
_NAME = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")  # what the name of an owner or a repository is made of


class Disguised(ValueError):
    """A URL that is encoded, or goes up and down, more than any honest one."""


def normal_host(authority: str) -> str | None:
    """The host of `[user@]host[:port]` as a resolver reads it: lower case, punycode, no trailing dot. None: not one.

    An IP address comes back without brackets, however it is spelled; see `is_ip_literal`.
    """
    if len(authority) > 4 * LONGEST_HOST:
        return None
    text = decodings(authority)[-1].strip().rpartition("@")[2]
    if text.startswith("["):
        return text[1:].partition("]")[0].lower()
    if text.count(":") > 1:
        return text.lower()  # an IPv6 address without brackets
    host = text.partition(":")[0]
    try:
        plain = host.encode("idna").decode("ascii").lower().removesuffix(".")
    except UnicodeError:
        return None
    return plain if len(plain) <= LONGEST_HOST and _HOST.fullmatch(plain) else None


def rule_host(host: str) -> str:
    """A normal host as rules name it: `www.` of a host counts as the host."""
    return host.removeprefix("www.")


def is_ip_literal(host: str) -> bool:
    """Whether a resolver would take it for an address: also 2130706433, 0x7f.1 and 0177.0.0.1."""
    try:
        ipaddress.ip_address(host.strip("[]").partition("%")[0])
        return True
    except ValueError:
        pass
    if _NUMBER_LABEL.fullmatch(host.rpartition(".")[2].lower()):
        return True  # no top-level domain is a number
    try:
        socket.inet_aton(host)
        return True
    except (OSError, UnicodeError):
        return False


def decodings(text: str) -> list[str]:
    """The text, and what further rounds of percent-decoding make of it, to the fixed point. Disguised."""
    found = [text]
    while (decoded := unquote(found[-1], errors="replace")) != found[-1]:
        if len(found) == _MOST_LEVELS:
            raise Disguised(f"percent-encoded more than {_MOST_LEVELS} times")
        found.append(decoded)
    return found


def readings(path: str) -> Iterator[Segments]:
    """The segments of a path in each way that a server may read it; some come twice. Disguised."""
    for level in decodings(path):
        plain = visible(level).lower().replace("\\", "/")
        # a question mark that was encoded may end the path, or be part of a name; `same_segment` copes with the latter
        segments = [segment.partition(";")[0] for segment in re.split(r"[/?#]", plain)]
        yield from _walk([segment for segment in segments if segment not in ("", ".")])


def same_segment(segment: str, wanted: str) -> bool:
    """Whether a segment is that name: also `name.git`, `name.wiki.git`, `name@main`, `name;x=1`."""
    if not segment.startswith(wanted):
        return False
    rest = segment[len(wanted) :].removeprefix(".wiki")
    rest = rest.removeprefix(".git")
    return not rest or rest[0] not in _NAME


def begins_with(segments: Segments, prefix: Segments) -> bool:
    """Whether the path lies at or below the prefix."""
    return len(segments) >= len(prefix) and all(map(same_segment, segments, prefix))


def has_pairs(query: str, wanted: Sequence[tuple[str, str]]) -> bool:
    """Whether a query holds all these pairs, in any order and case. Disguised."""
    for level in decodings(query):
        pairs = {(key.lower(), value.lower()) for key, value in parse_qsl(level, keep_blank_values=True)}
        if pairs.issuperset(wanted):
            return True
    return False


def visible(text: str) -> str:
    """Without what one does not see: control characters, white space, zero-width characters."""
    return _INVISIBLE.sub("", text)


def folded(text: str) -> str:
    """Text in lower case, with look-alikes of ASCII (full-width letters, ideographic full stops) made ASCII, without
    characters that have no width."""
    return _UNSEEN.sub("", unicodedata.normalize("NFKC", text)).replace("\u3002", ".").lower()


def _walk(segments: list[str]) -> Iterator[Segments]:
    """Where the path ends, and each place where it turns back: a server that ignores `..` may stay there."""
    if segments.count("..") > _MOST_STEPS_UP:
        raise Disguised(f"goes up more than {_MOST_STEPS_UP} times")
    kept: list[str] = []
    for segment in segments:
        if segment == "..":
            yield tuple(kept)
            kept = kept[:-1]
        else:
            kept.append(segment)
    yield tuple(kept)
