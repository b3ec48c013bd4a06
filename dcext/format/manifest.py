"""``dcext.json``: sizes and hashes of everything in a checkpoint's folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import xxhash

from dcext.errors import FormatError

MANIFEST_NAME = "dcext.json"
INDEX_NAME = "model.safetensors.index.json"
FORMAT_VERSION = 1
MAX_MANIFEST_NBYTES = 1 << 28


def hash_bytes(data: Any) -> str:
    """XXH3-64 of a bytes-like object, as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


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
            f"{MANIFEST_NAME}: format_version: expected {FORMAT_VERSION}, found {version!r}"
        )
    stated = body.pop("xxh3_64", None)
    found = hash_bytes(canonical_json(body))
    # The layout of the text is part of what is checked: a manifest has exactly one form.
    if stated != found or dump_manifest(body.get("files", {})) != data:
        raise FormatError(
            f"{MANIFEST_NAME}: checksum: expected {stated!r}, found {found!r} (the file was altered)"
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
        value = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name}: expected JSON, found: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{name}: expected a JSON object, found {type(value).__name__}")
    return value


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key!r}")
        result[key] = value
    return result


def _is_entry(name: str, entry: Any) -> bool:
    if "/" in name or name in ("", ".", "..") or not isinstance(entry, dict):
        return False
    if not isinstance(entry.get("nbytes"), int) or entry["nbytes"] < 0:
        return False
    hashes = [entry.get("header_xxh3_64" if "tensors" in entry else "xxh3_64")]
    tensors = entry.get("tensors", {})
    if not isinstance(tensors, dict):
        return False
    return all(isinstance(value, str) for value in [*hashes, *tensors.values()])
