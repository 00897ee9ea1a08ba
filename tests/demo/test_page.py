"""The report in a real browser: it opens, draws, fits its window, and asks nobody for anything."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lorafleet.demo import report
from tests.demo.test_report import figures

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.mark.process
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_draws_and_fits(tmp_path: Path, width: int) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
    report.write(report.with_targets(figures()), tmp_path)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": 900})
        requests: list[str] = []
        problems: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto((tmp_path / "report.html").as_uri())
        assert page.title() == "lorafleet: the loop on this machine"
        assert page.locator("section").count() == 8
        boxes = [svg.bounding_box() for svg in page.locator("svg").all()]
        assert len(boxes) == 5 and all(box and box["height"] > 60 for box in boxes)
        # Wide tables scroll in their own box; the page itself does not.
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
    assert requests == [(tmp_path / "report.html").as_uri()]
    assert problems == []
