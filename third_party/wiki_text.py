"""Plain English text from enwik8, in two parts that never overlap: one to calibrate on, one to evaluate on.

    python third_party/wiki_text.py calibration|evaluation [--print-path]

The parts are whole articles from fixed byte ranges of enwik8 with the XML and the wiki markup stripped; titles stay, as
a line of their own. The result is the same bytes everywhere (its SHA-256 is pinned), so perplexities may be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import fetch


@dataclass(frozen=True)
class Part:
    """A byte range of enwik8 and the SHA-256 of the text that it yields."""

    first_byte: int
    end_byte: int
    sha256: str


PARTS = {
    "calibration": Part(
        85_000_000, 95_000_000, "6f97dfeca7fdea85d1c767365f36a922df490dffefb9873b2ca45e3b46f4b261"
    ),
    "evaluation": Part(
        95_000_000, 100_000_000, "36cb02e09484de6761d524b7b97f93217a7d535a150050333f58adfabcacc42b"
    ),  # the usual test part
}

_PAGE = re.compile(
    r"<page>\s*<title>([^<]*)</title>.*?<text[^>]*>([^<]*)</text>.*?</page>", re.DOTALL
)
_NOT_AN_ARTICLE = re.compile(
    r"(Wikipedia|Template|Image|Category|Portal|MediaWiki|Help|User|Talk|Special):"
)
_REDIRECT = re.compile(r"\s*#\s*redirect", re.IGNORECASE)
_INNERMOST_BRACES = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_WITH_CONTENT = re.compile(
    r"<!--.*?-->|<(ref|math|gallery|timeline|code|pre|nowiki|div|table)\b[^>]*(?<!/)>.*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_INNERMOST_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_DROPPED_LINK = re.compile(
    r"(image|category|media|[a-z]{2,3}|[a-z]{2,3}-[a-z-]+|simple)\s*:", re.IGNORECASE
)
_URL_LINK = re.compile(r"\[(?:https?|ftp|mailto|news)[^\s\]]*\s*([^\]]*)\]")
_URL = re.compile(r"https?://\S+")
_QUOTES = re.compile(r"'{2,5}")
_HEADING = re.compile(r"^=+\s*(.*?)\s*=+\s*$", re.MULTILINE)
_LIST_MARK = re.compile(r"^[*#:;]+[ \t]*", re.MULTILINE)
_TABLE_REST = re.compile(r"^[ \t]*(?:[|!].*|\{\|.*|-{4,}.*|__[A-Z]+__.*)$", re.MULTILINE)
_TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)
_SPACES = re.compile(r"[ \t\u00a0]{2,}")
_EMPTY_LINES = re.compile(r"\n{3,}")


def strip_markup(wiki: str) -> str:
    """The readable text of one article's wiki source: no templates, tables, tags, footnotes, formulas or link targets."""
    text = html.unescape(html.unescape(wiki))
    text = _WITH_CONTENT.sub("", text)
    text = _until_stable(_INNERMOST_BRACES, "", text)
    text = _TAG.sub("", text)
    text = _until_stable(_INNERMOST_LINK, _link_text, text)
    text = _URL.sub("", _URL_LINK.sub(r"\1", text))
    text = _HEADING.sub(r"\1", _QUOTES.sub("", text))
    text = _LIST_MARK.sub("", _TABLE_REST.sub("", text))
    text = _TRAILING.sub("", _SPACES.sub(" ", text))
    return _EMPTY_LINES.sub("\n\n", text).strip()


def articles(xml: str) -> list[str]:
    """Each whole article in a piece of the dump, its title on the first line; redirects and project pages left out."""
    found = []
    for title, wiki in _PAGE.findall(xml):
        if not _NOT_AN_ARTICLE.match(title) and not _REDIRECT.match(wiki):
            found.append(f"{html.unescape(title)}\n\n{strip_markup(wiki)}")
    return found


def enwik8_text(part: str) -> Path:
    """The text of a part as a UTF-8 file in the cache, articles separated by two empty lines.

    Args:
        part: ``"calibration"`` or ``"evaluation"``.
    Raises:
        ValueError: another name.
        fetch.FetchError: enwik8 cannot be had, or the text is not what was pinned.
    """
    if part not in PARTS:
        raise ValueError(f"enwik8_text: part: expected one of {', '.join(PARTS)}, got {part!r}")
    wanted = PARTS[part]
    target = fetch.cache_dir() / f"enwik8-{part}-{wanted.sha256[:12]}.txt"
    with fetch.locked(target.with_suffix(".lock")):
        if target.is_file() and fetch.sha256_of(target) == wanted.sha256:
            return target
        with open(fetch.enwik8(), "rb") as file:
            file.seek(wanted.first_byte)
            xml = file.read(wanted.end_byte - wanted.first_byte).decode("utf-8", errors="ignore")
        data = ("\n\n\n".join(articles(xml)) + "\n").encode()
        found = hashlib.sha256(data).hexdigest()
        if found != wanted.sha256:
            raise fetch.FetchError(
                f"enwik8, {part} text: expected SHA-256 {wanted.sha256}, found {found}"
            )
        fetch.write_atomically(target, io.BytesIO(data))
    return target


def _until_stable(pattern: re.Pattern[str], replacement: object, text: str) -> str:
    """Replaces innermost matches until none is left: the markup nests."""
    while True:
        text, count = pattern.subn(replacement, text)  # type: ignore[call-overload]
        if count == 0:
            return text


def _link_text(match: re.Match[str]) -> str:
    target = match.group(1)
    return "" if _DROPPED_LINK.match(target) else target.rpartition("|")[2]


def main() -> None:
    """Command line: makes the text of a part and says where it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--print-path", action="store_true", help="print the path alone")
    arguments = parser.parse_args()
    try:
        path = enwik8_text(arguments.part)
    except fetch.FetchError as error:
        sys.exit(f"error: {error}")
    print(path if arguments.print_path else f"{arguments.part}: {path}")


if __name__ == "__main__":
    main()
