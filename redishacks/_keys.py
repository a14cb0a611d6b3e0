"""Key names: `<prefix>:<tool letter><version>:{<tag>}:<rest>`, and what may stand in them.

Keys that one command touches share the `{tag}`, so that they live in one slot of a cluster. Braces,
`%` and control characters are percent-encoded: an empty or nested tag would split the keys.
"""

from __future__ import annotations

import re
import reprlib

from redishacks.errors import UsageError

#: What a tool takes as an id or key; `42`, `"42"` and `b"42"` are the same.
Id = str | int | bytes
#: The longest id or key that a tool accepts, in bytes.
MAX_ID = 2048

_UNSAFE_BYTE = re.compile(r"[%{}\x00-\x1f\x7f-\xff]")
_QUOTED = re.compile(rb"%([0-9A-F]{2})")
_GLOB = re.compile(r"([*?\[\]\\])")
_UNSAFE = re.compile(r"[%{}\x00-\x1f\x7f]")


def quote(text: str) -> str:
    """Percent-encode what would break a key's structure; everything else stays readable."""
    return _UNSAFE.sub(lambda found: f"%{ord(found[0]):02X}", text)


def check_name(value: object, what: str) -> str:
    """Return a prefix or a tool's name fit for a key, or raise `UsageError`."""
    try:
        fits = isinstance(value, str) and 0 < len(value.encode()) <= 256
    except UnicodeEncodeError:
        fits = False
    if not isinstance(value, str) or not fits:
        shown = reprlib.repr(value)
        raise UsageError(f"{what} must be a string of 1 to 256 bytes of UTF-8, not {shown}")
    return quote(value)


def make(prefix: str, tool: str, tag: str, *rest: str) -> bytes:
    """Build a key; the prefix and the tag are already quoted."""
    return ":".join((prefix, tool, f"{{{tag}}}", *rest)).encode()


def quote_bytes(raw: bytes) -> str:
    """Percent-encode a key of any content, as `quote` does; bytes that are no UTF-8 as well."""
    try:
        return quote(raw.decode())
    except UnicodeDecodeError:
        return _UNSAFE_BYTE.sub(lambda found: f"%{ord(found[0]):02X}", raw.decode("latin-1"))


def unquote_bytes(quoted: bytes) -> bytes:
    """Return the key that `quote_bytes` made this of."""
    return _QUOTED.sub(lambda found: bytes((int(found[1], 16),)), quoted)


def literal(text: str) -> str:
    """Return a pattern for SCAN that matches this text alone."""
    return _GLOB.sub(r"\\\1", text)


def id_bytes(value: Id, what: str = "id") -> bytes:
    """Return an id as the bytes Redis holds: `42`, `"42"` and `b"42"` are the same id."""
    if isinstance(value, str):
        try:
            raw = value.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{what} {value!r} is not encodable as UTF-8") from None
    elif isinstance(value, bytes):
        raw = value
    elif isinstance(value, int) and not isinstance(value, bool):
        raw = b"%d" % value
    else:
        kind = type(value).__name__
        raise UsageError(f"{what}: a str, an int or bytes is accepted, not {kind}: {value!r}")
    if 0 < len(raw) <= MAX_ID:
        return raw
    raise UsageError(f"{what}: accepted are 1 to {MAX_ID} bytes, and this one has {len(raw)}")


def id_shown(raw: bytes) -> str | bytes:
    """Return an id as readers get it: `str`, or `bytes` when it is not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw
