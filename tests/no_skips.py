"""A pytest plugin for an environment where nothing may be missing: a skipped test fails the run.

    python -m pytest -p tests.no_skips

An extra that stops importing, or a class that a partner renames, makes tests vanish without a sign;
here it shows. Doctests that say ``+SKIP`` themselves are exempt, and what needs a GPU or a
browser.
"""

from __future__ import annotations

import pytest

EXEMPT = "+SKIP", "needs CUDA", "no browser"


def _unexpected(terminal: pytest.TerminalReporter) -> list[str]:
    skipped = terminal.stats.get("skipped", [])
    whys = [(report.nodeid, _why(report)) for report in skipped]
    return [f"{test}: {why}" for test, why in whys if not any(e in why for e in EXEMPT)]


def _why(report: pytest.TestReport | pytest.CollectReport) -> str:
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal and _unexpected(terminal) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    unexpected = _unexpected(terminalreporter)
    if unexpected:
        terminalreporter.section("skipped, though nothing may be missing here", red=True)
        terminalreporter.write_line("\n".join(unexpected))
