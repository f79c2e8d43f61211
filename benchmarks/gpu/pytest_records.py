"""A plugin of pytest: which tests run, in which order, and a record of what came of them."""

import hashlib
import os
import re
import time
from collections import defaultdict

import pytest

from .records import Records
from .run import BREAKS

BACKENDS = re.compile(r"\b(native|triton|reference|chunked|None)\b")
IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ


def digest(test: str) -> str:
    return hashlib.sha256(test.encode()).hexdigest()[:10]


def in_turns(tests: list[str]) -> list[str]:
    """All of tests/gpu; then of each function, with each backend, the first test, then the second of each, ...

    Tests of one function and backend come in the order of their hashes, whatever order they are given in.
    """
    kinds = defaultdict(list)
    for test in sorted(tests, key=digest):
        function, _, parameters = test.partition("[")
        kinds[function, tuple(BACKENDS.findall(parameters)[:1])].append(test)
    places = {test: n for kind in kinds.values() for n, test in enumerate(kind)}
    return sorted(tests, key=lambda test: (not test.startswith("tests/gpu/"), places[test], digest(test)))


class Recorder:
    def __init__(self) -> None:
        self.records = Records("tests")
        self.passed: list[str] = []
        self.flushed = time.time()
        self.broken = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items) -> None:
        held = {name for record in self.records.known for name in record.get("passed", ())}
        config.hook.pytest_deselected(items=[item for item in items if digest(item.nodeid) in held])
        left = {item.nodeid: item for item in items if digest(item.nodeid) not in held}
        items[:] = [left[name] for name in in_turns(list(left))]

    def pytest_collectreport(self, report) -> None:
        if report.failed and not IN_WORKER:
            kind = "missing" if "ModuleNotFoundError" in report.longreprtext else "error"
            lines = [line.strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
            self.records.add(report.nodeid, **{kind: f"{report.nodeid}: {(lines or ['no message'])[-1]}"[:300]})

    def pytest_runtest_logreport(self, report) -> None:
        if IN_WORKER:
            self.broken |= report.failed and any(word in report.longreprtext for word in BREAKS)
            return
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = crash.message if crash else report.longreprtext
            self.records.add(report.nodeid, error=(text.strip().splitlines() or ["no message"])[0][:300])
        elif report.when == "call" and report.passed:
            self.passed.append(digest(report.nodeid))
        if len(self.passed) >= 100 or time.time() - self.flushed > 2:
            self.flush()

    def pytest_runtest_logfinish(self, nodeid, location) -> None:
        if self.broken:  # the device fails whatever this worker tries: xdist starts another
            time.sleep(0.5)  # so that the report is sent
            os._exit(1)

    def pytest_sessionfinish(self) -> None:
        if not IN_WORKER:
            self.flush()

    def flush(self) -> None:
        if self.passed:
            self.records.add(f"passed from {self.passed[0]}", passed=self.passed)
        self.passed, self.flushed = [], time.time()


def pytest_configure(config) -> None:
    config.pluginmanager.register(Recorder())
