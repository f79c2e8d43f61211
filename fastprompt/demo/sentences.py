"""The demo's sentences: English and another language, from the translation catalogues that Django ships."""

import hashlib
import re
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from fastprompt._files import cache_folder
from fastprompt.data.examples import Pair
from fastprompt.data.parallel import read_catalogue, split_pairs
from fastprompt.data.reading import tell_left_out
from fastprompt.demo.packages import DJANGO, download

MIN_WORDS = 3  # of the English; with four a scarce language keeps too few
MIN_PAIRS = 64  # that half of them make two batches of training
MAX_TEST, MAX_TRAIN = 100, 400

_CATALOGUE = re.compile(r"django/(?:.+/)?locale/([^/]+)/LC_MESSAGES/django(?:js)?\.po")
# %s, %(name)s, {name}, {{ name }}, <b>, </b>, <br />, &amp;
_PLACEHOLDER = re.compile(r"%[(a-zA-Z]|[{}]|</?[a-zA-Z]|&#?\w+;")


def django_wheel(cache: Path | None = None) -> Path:
    """Return Django's wheel, fetching it where it is not cached yet; its hash is checked either way."""
    cache = cache_folder() if cache is None else cache
    kept = cache / f"{DJANGO.name}-{DJANGO.version}.whl"
    if not kept.is_file() or hashlib.sha256(kept.read_bytes()).hexdigest() != DJANGO.sha256:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="unfinished-") as aside:
            download([DJANGO], Path(aside))[0].replace(kept)
    return kept


def demo_sentences(wheel: Path, language: str) -> tuple[list[Pair], list[Pair]]:
    """Cleaned pairs of `language` for testing and for training: half of what there is for each, up to the limits above.

    Raises:
        ValueError: Django has no such language, or too few sentences of it.
    """
    there = read_language(wheel, language)
    pairs = clean(there)
    tell_left_out(wheel.name, len(there) - len(pairs), len(there), f"pairs of {language!r}, not fit to learn from,")
    if len(pairs) < MIN_PAIRS:
        raise ValueError(
            f"language {language!r} has {len(pairs)} sentences after cleaning, expected {MIN_PAIRS} or more"
        )
    test = min(MAX_TEST, len(pairs) // 2)
    return split_pairs(pairs, test=test, train=min(MAX_TRAIN, len(pairs) - test), seed=0)


def read_language(wheel: Path, language: str) -> list[Pair]:
    """Every translation into `language` in Django's `wheel`, in the order of the catalogues' paths.

    Raises:
        ValueError: Django has no such language; the message lists those it has.
    """
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        catalogues = {path: found[1] for path in archive.namelist() if (found := _CATALOGUE.fullmatch(path))}
        chosen = sorted(path for path, found in catalogues.items() if found == language)
        if not chosen:
            known = " ".join(sorted(set(catalogues.values())))
            raise ValueError(f"no catalogue for language {language!r}, expected one of: {known}")
        return [pair for path in chosen for pair in read_catalogue(archive.extract(path, folder))]


def clean(pairs: Iterable[Pair]) -> list[Pair]:
    """Sentences fit to learn from: English of MIN_WORDS or more, no placeholders or markup, both sides unique.

    White space is brought to single blanks. Of pairs that share a side the first stays.
    """
    kept, sources, targets = [], set(), set()
    for pair in pairs:
        source, target = " ".join(pair.source.split()), " ".join(pair.target.split())
        if len(source.split()) < MIN_WORDS or _PLACEHOLDER.search(source) or _PLACEHOLDER.search(target):
            continue
        if source == target or source in sources or target in targets:
            continue
        sources.add(source)
        targets.add(target)
        kept.append(Pair(source, target))
    return kept
