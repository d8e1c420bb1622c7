"""A real headless Chromium, for the tests of pages (its fixture, chromium, is in conftest.py)."""

from __future__ import annotations

import shutil
import time
import urllib.parse

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
# without the requests that it makes for itself
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
FLAGS += ["--disable-component-update", "--disable-sync"]


class Visit:
    """A page in the browser, and whom it has asked for anything."""

    def __init__(self, page, url, width=1000):
        self.page, self.asked_hosts, self.errors = page, set(), []
        self.page.set_default_timeout(20_000)
        self.page.set_viewport_size({"width": width, "height": 800})
        self.page.on("request", lambda request: self.asked_hosts.add(urllib.parse.urlsplit(request.url).hostname))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)

    def see(self, text, within=".answer"):
        self.page.locator(within).filter(has_text=text).first.wait_for()

    def text(self, which=0):
        return self.page.locator(".answer").nth(which).inner_text()

    def button(self, name):
        return self.page.get_by_role("button", name=name, exact=True)

    def is_as_wide_as_its_window(self):
        return self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    def close(self):
        """It must have kept to 127.0.0.1 and run without an error."""
        self.page.close()
        assert self.asked_hosts <= {"127.0.0.1", None, ""} and not self.errors


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
