"""Where do the official data files come from, and are they what was published?

Files are kept in the user's cache folder (`THALWEG_CACHE` names another one) and verified against
the checksum each time. The checksums are as published: by the authors for Fashion-MNIST (in their
README) and CIFAR-10 (on their page); for MNIST and SST-2 by torchvision and torchtext, which load
the same files; for Tiny Shakespeare by many projects that use it. That one is SHA-256, the others
are MD5.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from thalweg.errors import FULL_DISK, IntegrityError, InvalidInput


@dataclass(frozen=True)
class RemoteFile:
    """A published file: its name, the addresses that serve it, its checksum, such as "md5:..."."""

    name: str
    urls: tuple[str, ...]
    checksum: str


def _idx_files(bases: tuple[str, ...], checksums: dict[str, str]) -> dict[str, RemoteFile]:
    return {
        name: RemoteFile(
            f"{name}.gz", tuple(f"{base}{name}.gz" for base in bases), f"md5:{checksum}"
        )
        for name, checksum in checksums.items()
    }


MNIST = _idx_files(
    ("https://ossci-datasets.s3.amazonaws.com/mnist/",),
    {
        "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
    },
)

FASHION_MNIST = _idx_files(
    (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
    {
        "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
    },
)

CIFAR10 = RemoteFile(
    "cifar-10-binary.tar.gz",
    ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
    "md5:c32a1d4ab5d03f1284b67883e8d87530",
)

SST2 = RemoteFile(
    "SST-2.zip",
    ("https://dl.fbaipublicfiles.com/glue/data/SST-2.zip",),
    "md5:9f81648d4199384278b86e315dac217c",
)

TINY_SHAKESPEARE = RemoteFile(
    "input.txt",
    ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
    "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)


def cache_folder() -> Path:
    """The folder of downloaded files: `THALWEG_CACHE`, or the system's place for caches."""
    import pooch

    return Path(os.environ.get("THALWEG_CACHE") or pooch.os_cache("thalweg"))


def fetch(file: RemoteFile, folder: str) -> Path:
    """The path of a verified copy, downloaded on first use.

    Args:
        file: what to fetch.
        folder: the data set's folder within `cache_folder()`.

    Raises:
        InvalidInput: no address answered, or the cache folder cannot be written.
        IntegrityError: what came is not the published file; it is not kept.
    """
    import pooch

    place = cache_folder() / folder
    failures: list[str] = []
    for url in file.urls:
        try:
            return Path(pooch.retrieve(url, file.checksum, file.name, path=place))
        except ValueError as error:
            if "hash" not in str(error):
                raise
            raise IntegrityError(
                f"{url}: the file that came is not the published one ({file.checksum}) and was "
                "not kept; try again, or fetch it yourself and give its folder as data_dir"
            ) from error
        except OSError as error:  # also what requests raises: no network, an error status
            if error.errno in FULL_DISK:
                raise  # another address would not help
            failures.append(f"{url}: {' '.join(str(error).split())[:200]}")
    raise InvalidInput(
        f"cannot download {file.name} to {place}: {'; '.join(failures)}; "
        "give a folder that holds the files as data_dir"
    )
