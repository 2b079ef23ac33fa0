"""Why an input could not be used, as data: reports count the reasons and list the places."""

from dataclasses import dataclass
from enum import StrEnum


class RefusalReason(StrEnum):
    UNREADABLE = "unreadable"  # the system does not let us read it
    NOT_A_FILE = "not_a_file"  # a folder, a pipe, a device
    EMPTY = "empty"
    LFS_POINTER = "lfs_pointer"  # Git LFS left a pointer where the content should be
    CORRUPT = "corrupt"  # a compressed file, an archive or a table that cannot be unpacked
    BINARY = "binary"  # bytes of no kind that is read here
    PLAIN_TEXT = "plain_text"  # text without structure: who said what is not known
    NOT_UTF8 = "not_utf8"
    NOT_JSON = "not_json"
    TRUNCATED = "truncated"  # JSON that ends too early
    TOO_LARGE = "too_large"  # over the limit on one transcript
    UNKNOWN_FORMAT = "unknown_format"
    MALFORMED = "malformed"  # of a known format, but a field is missing or has the wrong type
    NO_TURN = "no_turn"  # not one message of the model


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """source: file, with the row where there are several."""

    source: str
    reason: RefusalReason
    detail: str


class MalformedRow(ValueError):
    """Raised by an importer for a row of its format that it cannot use; the message names the field."""
