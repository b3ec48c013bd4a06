"""Each room of the package imports only from those below it, in the order that docs/contributing.md gives."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "contributing.md"
EXTENSION = "_C"


def rooms_in_order():
    """The rank of each folder or module of dcext/, from the bottom."""
    block = re.search(r"```rooms\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    lines = [line.partition("#")[0].split() for line in block.strip().splitlines()]
    return {room: rank for rank, line in enumerate(reversed(lines)) for room in line}


def imported_rooms(path):
    """Rooms that a file imports, wherever in it; names that ``dcext`` itself exports count as ``dcext``."""
    for node in ast.walk(ast.parse(path.read_text())):
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


def test_every_room_is_on_the_page():
    found = {path.stem for path in (ROOT / "dcext").glob("*.py")} - {"__init__"}
    found |= {path.parent.name for path in (ROOT / "dcext").glob("*/__init__.py")}
    assert found == set(rooms_in_order())


def test_rooms_import_only_from_below():
    ranks = rooms_in_order()
    upwards = []
    for path in sorted((ROOT / "dcext").rglob("*.py")):
        room = path.relative_to(ROOT / "dcext").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for other in imported_rooms(path):
            if other in (EXTENSION, room):
                continue
            # What is no room is a name of the whole package, which only the command line uses.
            if ranks.get(other, max(ranks.values())) >= ranks[room] and not (
                room == "cli" and other not in ranks
            ):
                upwards.append(f"{path.relative_to(ROOT)} imports {other or 'dcext'}")
    assert upwards == []
