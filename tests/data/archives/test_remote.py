"""Shards on other machines: fsspec's memory, and a server of this machine where aiohttp is installed."""

import errno
import http.server
import multiprocessing
import shutil
import threading

import fsspec
import numpy as np
import pytest

from command import smalti
from smalti.data.archives import members, remote
from smalti.data.archives.remote import as_url
from smalti.data.archives.shard_writer import write_shards
from smalti.data.images.folders import open_images
from smalti.errors import ConfigError, DataError, RunError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, and no pauses between attempts."""
    monkeypatch.setenv("SMALTI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_PAUSES_S", (0.0, 0.0))
    yield tmp_path / "cache/images"
    members._opened.clear()


@pytest.fixture
def folder(write, tmp_path):
    """Two classes of three images."""
    for number in range(6):  # of different names: else opening looks for masks among them
        write(f"images/{'cat' if number < 3 else 'dog'}/{number}.png")
    return tmp_path / "images"


@pytest.fixture
def url(folder, tmp_path):
    """Shards of the folder in memory."""
    write_shards(open_images(folder), tmp_path / "shards")
    files = fsspec.filesystem("memory")
    for path in (tmp_path / "shards").iterdir():
        files.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    shutil.make_archive(str(tmp_path / "x"), "zip", folder)
    files.pipe_file("/bucket/x.zip", (tmp_path / "x.zip").read_bytes())
    yield "memory://bucket/*.tar"
    files.rm("/bucket", recursive=True)


def fetched(monkeypatch):
    """The ranges that are fetched from now on."""
    ranges = []
    read = remote.Remote.read
    monkeypatch.setattr(remote.Remote, "read", lambda self, *words: ranges.append(words) or read(self, *words))
    return ranges


def same(images, folder):
    expected = open_images(folder)
    assert images.names == expected.names and images.classes == expected.classes
    return all(np.array_equal(a.read(), b.read()) for a, b in zip(images.samples, expected.samples, strict=True))


@pytest.mark.parametrize("name", ["*.tar", "000000.tar", "x.zip"])
def test_remote_archives_are_read_as_the_folder_and_fetched_once(name, url, folder, cache, monkeypatch):
    images = open_images(f"memory://bucket/{name}")
    ranges = fetched(monkeypatch)
    assert same(images, folder) and len(ranges) == 6
    assert same(images, folder) and same(open_images(f"memory://bucket/{name}"), folder) and len(ranges) == 6
    assert remote._used_bytes(cache) > 0


def test_the_index_is_fetched_or_made_once(url, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(remote.INDEXERS, ".tar", None)
        assert same(open_images(url), folder), "by the index beside the shards"
    fsspec.filesystem("memory").rm("/bucket/.smalti_index")
    assert same(open_images(url), folder)
    shutil.rmtree(remote.cache_folder() / "indices")
    assert same(open_images(url), folder)
    monkeypatch.setitem(remote.INDEXERS, ".tar", None)
    assert same(open_images(url), folder), "by the index in the cache folder"


def test_the_cache_has_a_bound_and_a_damaged_one_does_no_harm(url, folder, cache, monkeypatch):
    monkeypatch.setenv("SMALTI_CACHE_GIB", str(6000 / 2**30))
    monkeypatch.setattr(remote, "_MEASURED_EVERY", 1)
    images = open_images(url)
    ranges = fetched(monkeypatch)
    assert same(images, folder) and same(images, folder)
    assert 6 < len(ranges) < 12
    [data] = cache.glob("*/data")
    data.write_bytes(bytes(data.stat().st_size))
    assert same(images, folder)
    monkeypatch.setenv("SMALTI_CACHE_GIB", "0")
    shutil.rmtree(cache)
    assert same(open_images(url), folder) and not cache.exists()
    monkeypatch.setenv("SMALTI_CACHE_GIB", "much")
    with pytest.raises(ConfigError, match=r"SMALTI_CACHE_GIB=much: a number of GiB is needed"):
        open_images(url)


def test_other_data_sets_make_room(url, folder, cache, monkeypatch):
    old = cache / "old"
    old.mkdir(parents=True)
    (old / "data").write_bytes(bytes(100_000))
    assert same(open_images(url), folder) and old.exists()
    monkeypatch.setenv("SMALTI_CACHE_GIB", str(100_000 / 2**30))
    assert same(open_images(url), folder) and not old.exists()


def test_a_full_disk_is_one_line_and_nothing_is_lost(url, folder, monkeypatch):
    images = open_images(url)
    monkeypatch.setattr(remote, "_RESERVE", 2**70)
    with pytest.warns(UserWarning, match=r"no more images are kept \(No space left on device\).*read from memory://"):
        assert same(images, folder)


def test_a_remote_that_can_not_be_reached_is_one_line(url, folder, monkeypatch):
    with pytest.raises(DataError, match=r"memory://nothing/x\.tar: can't be reached"):
        open_images("memory://nothing/x.tar")
    with pytest.raises(DataError, match=r"names no tar or zip file"):
        open_images("memory://nothing/*.tar")
    with pytest.raises(DataError, match=r"only tar and zip files are read from other machines"):
        open_images("memory://bucket/folder")
    images = open_images(url)
    attempts = []

    def broken(self, path, **_):
        attempts.append(path)
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(type(fsspec.filesystem("memory")), "cat_file", broken)
        with pytest.raises(RunError, match=r"000000\.tar: can't be reached \(Connection reset by peer\); start"):
            images.samples[0].read()
        assert len(attempts) == 3
    assert same(images, folder)


def test_a_shard_that_changes_is_not_mixed_with_its_cache(url, folder, write, tmp_path):
    images = open_images(url)
    assert same(images, folder)
    write("other/cat/0.png"), write("other/dog/7.png")
    write_shards(open_images(tmp_path / "other"), tmp_path / "more")
    files = fsspec.filesystem("memory")
    files.pipe_file("/bucket/000000.tar", (tmp_path / "more/000000.tar").read_bytes())
    assert same(open_images(url), tmp_path / "other")


def _read_there(source, index):
    return source.read(index)


def test_workers_read_remote_images(url, folder):
    source = open_images(url).source(3)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert np.array_equal(pool.apply(_read_there, (source, 4)), open_images(folder).samples[4].read())


def test_commands_take_addresses(url, tmp_path):
    out = smalti("doctor", url).stdout
    assert "classes: 6 images in a tar file, 2 classes" in out and "unreadable   0" in out
    assert "can't be reached" in smalti("doctor", "memory://no/x.tar", code=2).stderr


def test_what_is_an_address(tmp_path, monkeypatch):
    assert as_url(remote.Path("s3://bucket/a b/*.tar")) == "s3://bucket/a b/*.tar"
    for text in ("x/y.tar", "C:/x.tar", "nosuch://x.tar", "/s3:/x.tar"):
        assert as_url(remote.Path(text)) is None


class _Ranges(http.server.SimpleHTTPRequestHandler):
    """Files of a folder by ranges."""

    def do_GET(self):
        content = (remote.Path(self.directory) / self.path.lstrip("/")).read_bytes()
        first, last = 0, len(content) - 1
        if asked := self.headers.get("Range"):
            first, last = (int(part) for part in asked.removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("name", ["000000.tar", "x.zip"])
def test_http_is_read(name, url, folder, tmp_path):
    pytest.importorskip("aiohttp", reason="needs the extra remote")
    (tmp_path / "x.zip").rename(tmp_path / "shards/x.zip")
    handler = lambda *words: _Ranges(*words, directory=str(tmp_path / "shards"))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        images = open_images(f"http://127.0.0.1:{server.server_port}/{name}")
        assert same(images, folder)
        source = images.source(3)
        members._opened[str(images.root)]._fetch.__self__._checks.clear()
        shutil.rmtree(remote.cache_folder())
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert np.array_equal(pool.apply(_read_there, (source, 4)), open_images(folder).samples[4].read())
        server.shutdown()
