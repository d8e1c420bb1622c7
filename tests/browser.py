"""A real headless Chromium, for the tests of pages (its fixture, chromium, is in conftest.py)."""

from __future__ import annotations

import re
import shutil
import time
import urllib.parse
from html.parser import HTMLParser

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
# without the requests that it makes for itself
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
FLAGS += ["--disable-component-update", "--disable-sync"]

# Selector → (lighter + 0.05) / (darker + 0.05), as WCAG defines it; the opacity of a text counts, its ground is opaque.
CONTRAST = """(selectors) => {
  const parse = (color) => {
    const context = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d");
    context.fillStyle = color; context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data; return [[r, g, b], a / 255];
  };
  const luminance = (rgb) => rgb.map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const found = {};
  for (const selector of selectors) for (const element of document.querySelectorAll(selector)) {
    let opacity = 1, ground = null;
    for (let e = element; e && !ground; e = e.parentElement) {
      const [rgb, alpha] = parse(getComputedStyle(e).backgroundColor);
      opacity *= getComputedStyle(e).opacity;
      if (alpha > 0.99) ground = rgb;
    }
    ground ??= parse(getComputedStyle(document.body).backgroundColor)[0];
    const text = parse(getComputedStyle(element).color)[0].map((c, i) => c * opacity + ground[i] * (1 - opacity));
    const [low, high] = [luminance(text), luminance(ground)].sort((a, b) => a - b);
    const key = `${selector} ${element.tagName}`;
    found[key] = Math.min(found[key] ?? 21, (high + 0.05) / (low + 0.05));
  }
  return found;
}"""


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

    def stands_out(self, scheme, *selectors):
        """The texts of all that is selected can be read on their ground, and the page is light or dark as asked."""
        contrast = self.page.evaluate(CONTRAST, selectors)
        assert {key.split(" ")[0] for key in contrast} == {selector.split(" ")[0] for selector in selectors}
        assert min(contrast.values()) >= 4.5, contrast  # WCAG 2.2, 1.4.3
        ground = self.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", ground)[:3])) < 60) == (scheme == "dark")

    def close(self):
        """It must have kept to 127.0.0.1 and run without an error."""
        self.page.close()
        assert self.asked_hosts <= {"127.0.0.1", None, ""} and not self.errors


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class References(HTMLParser):
    """What a page asks for from elsewhere, and the pictures in it."""

    def __init__(self, text: str):
        super().__init__()
        self.outside, self.images = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes)
        for name in ("src", "href", "srcset", "poster", "data"):
            if name in attributes and not attributes[name].startswith("data:"):
                self.outside.append((tag, attributes[name]))
        if tag in ("script", "link", "iframe", "object"):
            self.outside.append((tag, None))
