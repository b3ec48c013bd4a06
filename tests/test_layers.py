"""Each room of the package, and of the C++ sources, uses only those below it, in the order of docs/contributing.md."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "contributing.md"
EXTENSION = "_C"
CPP = (".h", ".cpp", ".cu", ".cuh")


def rooms_in_order(block):
    """The rank of each room, from the bottom; ``block`` is what follows the page's three backquotes."""
    text = re.search(rf"```{block}\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    lines = [line.partition("#")[0].split() for line in text.strip().splitlines()]
    return {room: rank for rank, line in enumerate(reversed(lines)) for room in line}


def imported_rooms(source):
    """Rooms that Python source imports, wherever in it; empty for the package itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "dcext":
            names = [f"dcext.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "dcext":
                yield rest.partition(".")[0]


def is_below(other, room, ranks):
    """Whether a room may use another, or a name of the whole package, which only the command line may."""
    if other not in ranks:
        return room == "cli"
    return ranks[other] < ranks[room]


def upwards_of(room, source, ranks):
    """What Python source of a room imports and must not."""
    others = {other for other in imported_rooms(source) if other not in (EXTENSION, room)}
    return sorted(other for other in others if not is_below(other, room, ranks))


def test_every_room_is_on_the_page():
    found = {path.stem for path in (ROOT / "dcext").glob("*.py")} - {"__init__"}
    found |= {path.parent.name for path in (ROOT / "dcext").glob("*/__init__.py")}
    assert found == set(rooms_in_order("rooms"))
    folders = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    assert folders == set(rooms_in_order("rooms csrc"))


def test_rooms_import_only_from_below():
    ranks, upwards = rooms_in_order("rooms"), {}
    for path in sorted((ROOT / "dcext").rglob("*.py")):
        room = path.relative_to(ROOT / "dcext").parts[0].removesuffix(".py")
        found = [] if room == "__init__" else upwards_of(room, path.read_text(), ranks)
        if found:
            upwards[str(path.relative_to(ROOT))] = found
    assert upwards == {}


@pytest.mark.parametrize(
    "line",
    [
        "from dcext.pretrained import from_pretrained",
        "def f():\n    import dcext.cli.app",
        "from dcext import hub",
        "import dcext",
        "from dcext import encode",
    ],
)
def test_what_is_above_is_found(line):
    assert upwards_of("nn", line, rooms_in_order("rooms"))


def test_cpp_folders_include_only_from_below():
    ranks, upwards = rooms_in_order("rooms csrc"), []
    for path in sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in CPP):
        room, text = path.parent.name, path.read_text()
        for other in re.findall(r'#include "(\w+)/', text):
            if other != room and ranks[other] >= ranks[room]:
                upwards.append(f"{path.relative_to(ROOT)} includes {other}/")
        if room != "torch" and re.search(r"#include <(ATen|c10|torch|pybind11)/", text):
            upwards.append(f"{path.relative_to(ROOT)} includes torch or pybind11")
    assert upwards == []
