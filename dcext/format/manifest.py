"""``dcext.json``: sizes and hashes of everything in a checkpoint's folder."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable
from typing import Any

import xxhash

from dcext.errors import FormatError

MANIFEST_NAME = "dcext.json"
# Not "model": a loader that does not know dcext must not find what it could take for a plain checkpoint.
SHARD_STEM = "dcext"
INDEX_NAME = f"{SHARD_STEM}.safetensors.index.json"
FORMAT_VERSION = 1
MAX_MANIFEST_NBYTES = 1 << 26  # half a million tensors
MAX_SIZE = 2**63 - 1  # of anything counted: what torch and the file system can hold
MAX_FILE_NAME_NBYTES = 255

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200


def hash_bytes(data: Any) -> str:
    """XXH3-64 of a bytes-like object, as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def shorten(value: Any) -> str:
    """``repr`` for messages: whatever a damaged file holds, it stays a line."""
    return _short.repr(value)


def is_size(value: Any) -> bool:
    """Whether a JSON value is a number that can count bytes or elements."""
    return type(value) is int and 0 <= value <= MAX_SIZE


def is_plain_name(name: str) -> bool:
    """Whether a name is a file directly in the folder, on any file system."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    return len(name.encode("utf-8", "replace")) <= MAX_FILE_NAME_NBYTES


def canonical_json(value: Any) -> bytes:
    """The one way to write a JSON value that hashes are taken of: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def dump_manifest(files: dict[str, dict[str, Any]]) -> bytes:
    """The bytes of a manifest, its own hash included."""
    body: dict[str, Any] = {"format_version": FORMAT_VERSION, "files": files}
    body["xxh3_64"] = hash_bytes(canonical_json(body))
    return json.dumps(body, indent=1, sort_keys=True).encode("ascii") + b"\n"


def parse_manifest(data: bytes) -> dict[str, dict[str, Any]]:
    """Checks a manifest and returns its ``files``.

    Raises:
        FormatError: not JSON, another version, another hash, or a field that is missing or of another type.
    """
    body = parse_json_object(data, MANIFEST_NAME)
    version = body.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{MANIFEST_NAME}: format_version: expected {FORMAT_VERSION}, found {shorten(version)}"
        )
    stated = body.pop("xxh3_64", None)
    try:
        found = hash_bytes(canonical_json(body))
        # The layout of the text is part of what is checked: a manifest has exactly one form.
        same = stated == found and dump_manifest(body.get("files", {})) == data
    except RecursionError:
        raise FormatError(f"{MANIFEST_NAME}: expected two levels of JSON, found many") from None
    if not same:
        raise FormatError(
            f"{MANIFEST_NAME}: checksum: expected {shorten(stated)}, found {found!r} (the file was altered)"
        )
    files = body.get("files")
    if not isinstance(files, dict) or not all(
        _is_entry(name, entry) for name, entry in files.items()
    ):
        raise FormatError(
            f"{MANIFEST_NAME}: files: expected names with nbytes and hashes, found something else"
        )
    return files


def parse_json_object(data: bytes, name: str) -> dict[str, Any]:
    """Parses a JSON object without duplicate keys.

    Raises:
        FormatError: anything else.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name}: expected JSON, found: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{name}: expected a JSON object, found {type(value).__name__}")
    return value


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {shorten(key)}")
        result[key] = value
    return result


def _is_entry(name: str, entry: Any) -> bool:
    if not is_plain_name(name) or not isinstance(entry, dict) or not is_size(entry.get("nbytes")):
        return False
    hashes = [entry.get("header_xxh3_64" if "tensors" in entry else "xxh3_64")]
    tensors = entry.get("tensors", {})
    if not isinstance(tensors, dict):
        return False
    return all(isinstance(value, str) for value in [*hashes, *tensors.values()])
