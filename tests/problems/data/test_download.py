"""Downloads are tested against a server on this machine, never the network."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.problems.data_files import write_mnist
from thalweg.errors import IntegrityError, InvalidInput
from thalweg.problems.data import download
from thalweg.problems.data.download import RemoteFile, fetch
from thalweg.problems.data.images import MNIST


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address under which its files are served."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THALWEG_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    logging.getLogger("pooch").setLevel(logging.WARNING)


def checksum(content: bytes) -> str:
    return f"md5:{hashlib.md5(content).hexdigest()}"


def test_a_file_is_fetched_once_and_kept(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = served
    (folder / "a.bin").write_bytes(b"content")
    file = RemoteFile("a.bin", (f"{address}a.bin",), checksum(b"content"))
    path = fetch(file, "set")
    assert path == tmp_path / "cache/set/a.bin"
    assert path.read_bytes() == b"content"
    (folder / "a.bin").unlink()
    assert fetch(file, "set") == path


def test_another_file_than_the_published_one_is_refused_and_not_kept(
    served: tuple[Path, str], tmp_path: Path
) -> None:
    folder, address = served
    (folder / "a.bin").write_bytes(b"something else")
    file = RemoteFile("a.bin", (f"{address}a.bin",), checksum(b"content"))
    with pytest.raises(IntegrityError, match=r"a\.bin: the file that came is not the published"):
        fetch(file, "set")
    assert not list((tmp_path / "cache/set").iterdir())


def test_a_damaged_copy_is_fetched_again(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = served
    (folder / "a.bin").write_bytes(b"content")
    file = RemoteFile("a.bin", (f"{address}a.bin",), checksum(b"content"))
    fetch(file, "set").write_bytes(b"cont")
    assert fetch(file, "set").read_bytes() == b"content"


def test_the_next_address_is_tried(served: tuple[Path, str]) -> None:
    folder, address = served
    (folder / "a.bin").write_bytes(b"content")
    urls = (f"{address}gone/a.bin", f"{address}a.bin")
    assert fetch(RemoteFile("a.bin", urls, checksum(b"content")), "set").is_file()


def test_without_any_answer_the_mend_is_named(served: tuple[Path, str]) -> None:
    file = RemoteFile("a.bin", (f"{served[1]}a.bin", "http://127.0.0.1:9/a.bin"), "md5:00")
    with pytest.raises(InvalidInput, match=r"cannot download a\.bin .*404.* as data_dir"):
        fetch(file, "set")


def test_a_data_set_without_a_folder_is_downloaded(
    served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = served
    for part in ("train", "t10k"):
        write_mnist(folder, part, 20, compressed=True)
    files = {
        name: RemoteFile(
            file.name, (address + file.name,), checksum((folder / file.name).read_bytes())
        )
        for name, file in download.MNIST.items()
    }
    monkeypatch.setattr(MNIST, "remote", files)
    samples = MNIST().build()
    assert len(samples.train_labels) == 20
    assert samples.notes == ()


def test_every_published_file_has_an_address_and_an_md5() -> None:
    files = [*download.MNIST.values(), *download.FASHION_MNIST.values()]
    for file in (*files, download.CIFAR10, download.SST2):
        assert file.urls
        assert all(url.endswith("/" + file.name) for url in file.urls)
        assert len(file.checksum) == len("md5:") + 32
