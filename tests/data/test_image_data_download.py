"""Downloads: only when asked for, with their checksum, whole or not at all. The server is on this machine."""

from __future__ import annotations

import hashlib
import http.server
import threading

import pytest
import torch

import f2d2_lightning as f2
from f2d2_lightning.data.images import celeba, cifar, fashion
from f2d2_lightning.data.images._download import Source, fetch
from made_data import listing, make_celeba, make_cifar, make_fashion


class Server:
    """Serves contents by path, and counts requests."""

    def __init__(self):
        self.contents, self.requests, self.claimed = {}, [], {}
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path)
                if self.path not in outer.contents:
                    self.send_error(404)
                    return
                content = outer.contents[self.path]
                self.send_response(200)
                self.send_header("Content-Length", str(outer.claimed.get(self.path, len(content))))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"

    def offer(self, path, content):
        self.contents[path] = content
        return Source(self.address + path, hashlib.md5(content).hexdigest())


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.http.shutdown()
    thread.join()
    made.http.server_close()


@pytest.fixture
def remote_cifar(server, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "ROWS", 6)
    images, _ = make_cifar(tmp_path / "made", "cifar-10-python.tar.gz", rows=6)
    content = (tmp_path / "made" / "cifar-10-python.tar.gz").read_bytes()
    monkeypatch.setattr(cifar, "SOURCE", server.offer("/cifar-10-python.tar.gz", content))
    return images


def test_cifar_is_fetched_when_asked_for_and_once(server, remote_cifar, tmp_path):
    folder = tmp_path / "data"
    with pytest.raises(FileNotFoundError, match="download=True"):
        f2.data.CIFAR10(str(folder), val=5).setup()
    assert server.requests == []
    assert not folder.exists()
    data = f2.data.CIFAR10(str(folder), val=5, download=True)
    data.prepare_data()
    assert torch.equal(data.dataset("test").values, remote_cifar[5])
    f2.data.CIFAR10(str(folder), val=5, download=True).setup()
    f2.data.CIFAR10(str(folder), val=5).setup()
    assert server.requests == ["/cifar-10-python.tar.gz"]
    assert listing(folder) == ["cifar-10-python.tar.gz"]


WRONG = {
    "another file": (ValueError, r"gave 27 bytes with MD5 .* is expected.*nothing was kept"),
    "half a file": ((ValueError, FileNotFoundError), "cifar-10-python.tar.gz"),
    "none": (FileNotFoundError, r"404.*get it by other means, with MD5 .*put it there"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_a_wrong_answer_says_what_to_do_and_is_not_kept(server, remote_cifar, tmp_path, case):
    name, folder = "/cifar-10-python.tar.gz", tmp_path / "data"
    content = server.contents.pop(name)
    if case == "another file":
        server.contents[name] = b"<html>quota exceeded</html>"
    elif case == "half a file":
        server.contents[name], server.claimed[name] = content[: len(content) // 2], len(content)
    kind, message = WRONG[case]
    with pytest.raises(kind, match=message) as error:
        f2.data.CIFAR10(str(folder), val=5, download=True).setup()
    assert str(folder) + name in str(error.value)
    assert server.address in str(error.value)
    assert listing(folder) == []


def test_no_network_or_folder_says_what_to_do(server, tmp_path, monkeypatch):
    # a port that was free a moment ago
    made = Server()
    made.http.server_close()
    (tmp_path / "file").write_text("x")
    for source, folder in ((Source(made.address + "/a", "0"), "data"), (server.offer("/a", b"x"), "file")):
        with pytest.raises(FileNotFoundError, match="cannot be brought to"):
            fetch(source, tmp_path / folder / "a")
    assert server.requests == []
    assert listing(tmp_path) == ["file"]


def test_several_processes_fetch_once(server, tmp_path):
    source = server.offer("/a", b"x" * 100_000)
    threads = [threading.Thread(target=fetch, args=(source, tmp_path / "a")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.requests == ["/a"]
    assert listing(tmp_path) == ["a"]


def test_celeba_fetches_what_is_missing(server, tmp_path, monkeypatch):
    counts = (4, 2, 2)
    monkeypatch.setattr(celeba, "COUNTS", dict(zip(celeba.COUNTS, counts, strict=True)))
    make_celeba(tmp_path / "made", counts, zipped=True)
    sources = {path.name: server.offer(f"/{path.name}", path.read_bytes()) for path in (tmp_path / "made").iterdir()}
    assert sources.keys() == celeba.SOURCES.keys()
    monkeypatch.setattr(celeba, "SOURCES", sources)
    data = f2.data.CelebA64(str(tmp_path / "data"), download=True)
    data.setup()
    assert listing(tmp_path / "data") == ["img_align_celeba.zip", "list_eval_partition.txt"]
    labelled = f2.data.CelebA64(str(tmp_path / "data"), attribute="Young", download=True)
    assert len(labelled.dataset("train")) == 4
    assert sorted(server.requests) == sorted(f"/{name}" for name in sources)
    existing = f2.data.CelebA64(str(tmp_path / "made"))
    assert torch.equal(existing.dataset("val").values[:], data.dataset("val").values[:])


def test_fashion_fetches_what_is_missing(server, tmp_path, monkeypatch):
    make_fashion(tmp_path / "made", 30, 12)
    sources = {
        path.name.removesuffix(".gz"): server.offer(f"/{path.name}", path.read_bytes())
        for path in (tmp_path / "made").iterdir()
    }
    assert sources.keys() == fashion.SOURCES.keys()
    monkeypatch.setattr(fashion, "SOURCES", sources)
    data = f2.data.FashionMNIST(str(tmp_path / "data"), val=10, download=True)
    assert len(data.dataset("train")) == 20
    assert sorted(server.requests) == sorted(f"/{name}.gz" for name in sources)


def test_official_addresses_are_official():
    """Of the authors' own sites, with checksums that look like it."""
    assert cifar.SOURCE.url.startswith("https://www.cs.toronto.edu/~kriz/")
    found = [cifar.SOURCE, *celeba.SOURCES.values(), *fashion.SOURCES.values()]
    assert all(len(source.md5) == 32 and int(source.md5, 16) for source in found)
    assert len({source.url for source in found}) == len(found) == 8
