"""third_party/: only what is pinned gets into the cache, once, whole, and without a network the second time."""

import hashlib
import io
import itertools
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

import fetch
import wiki_text
from conftest import ROOT

WHEEL_INFO = {
    "dcext_fake-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: dcext-fake\nVersion: 1.0\n",
    "dcext_fake-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n",
    "dcext_fake-1.0.dist-info/RECORD": b"",
}
DATA = b"weights " * 1000


def pin(source: Path, **fields: object) -> fetch.Archive:
    content = source.read_bytes()
    return fetch.Archive(
        name="dcext-fake",
        version="1.0",
        sha256=hashlib.sha256(content).hexdigest(),
        nbytes=len(content),
        keep=r"data/.*",
        **{"binary": True, **fields},
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DCEXT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "links" / "dcext_fake-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**WHEEL_INFO, "data/a.bin": DATA, "other/b.bin": b"no"}.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def local_pip(tmp_path, monkeypatch):
    """Pip finds packages in the folder ``links`` alone."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


@pytest.fixture
def downloads(wheel, monkeypatch):
    """Replaces pip by a copy of the fake wheel; the list grows by one with each download."""
    calls = []

    def download(archive, scratch):
        calls.append(archive.requirement)
        time.sleep(0.05)
        (scratch / "archive").mkdir()
        return Path(shutil.copy(wheel, scratch / "archive"))

    monkeypatch.setattr(fetch, "_download", download)
    return calls


def files_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_download_through_pip_keeps_only_what_is_needed(cache, wheel, local_pip, monkeypatch):
    monkeypatch.setitem(fetch.ARCHIVES, "fake", pin(wheel))
    folder = fetch.obtain("fake")
    assert files_below(folder) == ["data/a.bin", fetch.STAMP]
    assert (folder / "data/a.bin").read_bytes() == DATA
    assert [p.name for p in cache.iterdir() if p.is_dir()] == [folder.name]  # no scratch left


@pytest.mark.parametrize("through_pip", [True, False])
def test_other_hash_is_refused(cache, wheel, monkeypatch, request, through_pip):
    request.getfixturevalue("local_pip" if through_pip else "downloads")
    archive = pin(wheel)
    with open(wheel, "r+b") as file:  # one flipped bit, in the name of a member
        file.seek(40)
        byte = file.read(1)[0]
        file.seek(40)
        file.write(bytes([byte ^ 1]))
    monkeypatch.setitem(fetch.ARCHIVES, "fake", archive)
    with pytest.raises(fetch.FetchError) as error:
        fetch.obtain("fake")
    message = str(error.value)
    assert archive.sha256 in message
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in message
    assert not [p for p in cache.iterdir() if p.is_dir()]


def test_code_of_a_wrong_source_distribution_never_runs(cache, tmp_path, local_pip, monkeypatch):
    (tmp_path / "links").mkdir()
    path = tmp_path / "links" / "dcext_fake-1.0.tar.gz"
    witness = tmp_path / "ran"
    with tarfile.open(path, "w:gz") as sdist:
        code = f"open({str(witness)!r}, 'w')".encode()
        member = tarfile.TarInfo("dcext_fake-1.0/setup.py")
        member.size = len(code)
        sdist.addfile(member, io.BytesIO(code))
    archive = pin(path, binary=False)
    path.write_bytes(path.read_bytes() + b"\0")
    monkeypatch.setitem(fetch.ARCHIVES, "fake", archive)
    with pytest.raises(fetch.FetchError, match=archive.sha256):
        fetch.obtain("fake")
    assert not witness.exists()


def test_second_call_needs_no_network(cache, wheel, downloads, monkeypatch):
    monkeypatch.setitem(fetch.ARCHIVES, "fake", pin(wheel))
    assert fetch.obtain("fake") == fetch.obtain("fake")
    assert len(downloads) == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "stamp"])
def test_damaged_cache_is_replaced(cache, wheel, downloads, monkeypatch, damage):
    monkeypatch.setitem(fetch.ARCHIVES, "fake", pin(wheel))
    folder = fetch.obtain("fake")
    file = folder / "data/a.bin"
    if damage == "flip":
        file.write_bytes(DATA[:-1] + b"x")
    elif damage == "truncate":
        file.write_bytes(DATA[:-1])
    elif damage == "remove":
        file.unlink()
    else:
        (folder / fetch.STAMP).write_text("[]")
    assert fetch.obtain("fake") == folder
    assert file.read_bytes() == DATA
    assert len(downloads) == 2


def test_two_at_once_download_once(cache, wheel, downloads, monkeypatch):
    monkeypatch.setitem(fetch.ARCHIVES, "fake", pin(wheel))
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch.obtain("fake"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 4
    assert len(downloads) == 1


def test_lock_holds_other_processes(cache, tmp_path):
    cache.mkdir()
    lock = cache / "x.lock"
    code = f"import fetch, pathlib\nwith fetch.locked(pathlib.Path({str(lock)!r})): print('in')"
    with fetch.locked(lock):
        other = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT / "third_party",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert other.stderr.readline().startswith("waiting for another process")
        assert other.poll() is None
    assert other.communicate(timeout=30)[0] == "in\n"


def test_leftovers_of_a_killed_process_are_removed(cache, wheel, downloads, monkeypatch):
    archive = pin(wheel)
    monkeypatch.setitem(fetch.ARCHIVES, "fake", archive)
    leftover = cache / f".dcext-fake-1.0-{archive.sha256[:12]}-abc"
    leftover.mkdir(parents=True)
    fetch.obtain("fake")
    assert not leftover.exists()


def test_pinned_member_is_checked(cache, wheel, downloads, monkeypatch):
    monkeypatch.setitem(fetch.ARCHIVES, "fake", pin(wheel, pinned={"data/a.bin": "0" * 64}))
    with pytest.raises(fetch.FetchError, match=r"data/a\.bin: expected SHA-256 0{64}, found"):
        fetch.obtain("fake")
    assert not [p for p in cache.iterdir() if p.is_dir()]


def test_path_outside_the_folder_is_refused(cache, wheel, downloads, tmp_path, monkeypatch):
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("data/../../evil", b"")
    monkeypatch.setitem(fetch.ARCHIVES, "fake", pin(wheel))
    with pytest.raises(fetch.FetchError, match="unsafe path"):
        fetch.obtain("fake")


@pytest.mark.parametrize("key", sorted(fetch.ARCHIVES))
def test_no_network_names_the_variable_that_helps(cache, tmp_path, local_pip, monkeypatch, key):
    (tmp_path / "links").mkdir()
    archive = fetch.ARCHIVES[key]
    if archive.override:
        monkeypatch.delenv(archive.override, raising=False)
    with pytest.raises(fetch.FetchError) as error:
        fetch.obtain(key)
    assert archive.requirement in str(error.value)
    assert f"without a network set {archive.override or 'DCEXT_CACHE'}" in str(error.value)
    assert "\n" not in str(error.value)


def make_zstd(folder: Path, version: str) -> None:
    for name in ("common", "compress", "decompress"):
        (folder / name).mkdir(parents=True)
    fields = zip(("MAJOR", "MINOR", "RELEASE"), version.split("."), strict=True)
    text = "".join(f"#define ZSTD_VERSION_{name}    {value}\n" for name, value in fields)
    (folder / "zstd.h").write_text(text)


def test_zstd_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("DCEXT_ZSTD_DIR", str(tmp_path / "lib"))
    with pytest.raises(fetch.FetchError, match=r"DCEXT_ZSTD_DIR=.*expected a folder with zstd\.h"):
        fetch.zstd_lib_dir()
    make_zstd(tmp_path / "lib", "1.5.7")
    assert fetch.zstd_lib_dir() == tmp_path / "lib"


def test_zstd_dir_of_another_version(tmp_path, monkeypatch):
    make_zstd(tmp_path, "1.5.6")
    monkeypatch.setenv("DCEXT_ZSTD_DIR", str(tmp_path))
    with pytest.raises(fetch.FetchError, match=r"expected version 1\.5\.7, found 1\.5\.6"):
        fetch.zstd_lib_dir()


def test_xxhash_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("DCEXT_XXHASH_DIR", str(tmp_path))
    with pytest.raises(fetch.FetchError, match=r"DCEXT_XXHASH_DIR=.*xxhash\.h"):
        fetch.xxhash_dir()
    for name in fetch.ARCHIVES["xxhash"].markers:
        (tmp_path / name).touch()
    assert fetch.xxhash_dir() == tmp_path


def test_pins_and_licences_agree_with_the_table():
    table = (ROOT / "third_party" / "README.md").read_text()
    for archive in fetch.ARCHIVES.values():
        assert f"`{archive.name}` {archive.version}" in table
        assert archive.sha256 in table
    assert "Meta Platforms" in (ROOT / "third_party" / "LICENSE.zstd").read_text()
    assert "Yann Collet" in (ROOT / "third_party" / "LICENSE.xxhash").read_text()


@pytest.mark.parametrize(
    ("wiki", "expected"),
    [
        ("'''Bold''' and ''it''", "Bold and it"),
        ("a [[target|shown]] b [[plain]]", "a shown b plain"),
        ("x[[Image:a.jpg|thumb|of [[this]]]]y[[Category:Z]][[de:Z]]", "xy"),
        ("a {{t|{{inner}}|x}}b", "a b"),
        ("{| class=x\n|-\n| cell\n|}\ntext", "text"),
        ("a&lt;ref name=&quot;q&quot;&gt;note&lt;/ref&gt; b&lt;br /&gt;", "a b"),
        ("f is &lt;math&gt;x^2&lt;/math&gt;.", "f is ."),
        ("== Title ==\n* one\n*# two", "Title\none\ntwo"),
        ("see [http://a.b/c the page] and http://a.b", "see the page and"),
        ("2 &amp;ndash; 3", "2 \N{EN DASH} 3"),
        ("a\n\n\n\nb", "a\n\nb"),
    ],
)
def test_markup_is_stripped(wiki, expected):
    assert wiki_text.strip_markup(wiki) == expected


def test_redirects_and_project_pages_are_left_out():
    page = "<page>\n <title>{}</title>\n <text xml:space='preserve'>{}</text>\n</page>\n"
    xml = (
        page.format("A &amp; B", "text")
        + page.format("C", "#REDIRECT [[A]]")
        + page.format("Template:D", "text")
    )
    assert wiki_text.articles(xml + "<page><title>cut</title>") == ["A & B\n\ntext"]


def test_parts_do_not_overlap():
    ranges = sorted((part.first_byte, part.end_byte) for part in wiki_text.PARTS.values())
    for (_, end), (begin, _) in itertools.pairwise(ranges):
        assert end <= begin
    with pytest.raises(ValueError, match="expected one of calibration, evaluation, got 'x'"):
        wiki_text.enwik8_text("x")
