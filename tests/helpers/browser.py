"""Pages in a real browser: what it complains of, what it loads, and whether they fit and can be read."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")

MIN_CONTRAST = 4.5
"""Of text and its background, as WCAG 2.1 (AA) has it."""

FRAMES = [(width, scheme) for width in (360, 1200) for scheme in ("light", "dark")]

INSPECT = """
function luminance(color) {
  const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(Number).map(one => one / 255)
    .map(one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(one, other) {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}
function inspect(frame) {
  const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow;
  const dim = [];
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest('style, defs')) continue;
    let behind = element;
    while (behind && /^rgba\\(.*, 0\\)$/.test(view.getComputedStyle(behind).backgroundColor))
      behind = behind.parentElement;
    const style = view.getComputedStyle(element);
    const color = element.closest('svg') ? style.fill : style.color;
    const ratio = contrast(color, view.getComputedStyle(behind || root).backgroundColor);
    if (ratio < %MIN%) dim.push(`${ratio.toFixed(1)}: ${walker.currentNode.data.trim()}`);
  }
  return {
    overflow: root.scrollWidth - frame.clientWidth,
    background: view.getComputedStyle(page.body).backgroundColor,
    loaded: view.performance.getEntriesByType('resource').map(one => one.name),
    dim: dim,
  };
}
window.addEventListener('load', () => {
  document.body.textContent = JSON.stringify([...document.querySelectorAll('iframe')].map(inspect));
});
"""


@dataclass(frozen=True)
class View:
    """A page in a frame.

    Attributes:
        overflow: pixels by which it is wider than the frame.
        background: its colour.
        loaded: addresses of what it has loaded.
        dim: texts of too little contrast, with it.
    """

    width: int
    scheme: str
    overflow: int
    background: str
    loaded: list[str]
    dim: list[str]


def open_page(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """What the browser prints of a page, and on the standard error what it complains of."""
    with TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        flags += ["--enable-logging=stderr", "--hide-scrollbars", f"--user-data-dir={profile}", *options]
        command = [str(BROWSER), *flags, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def take_picture(page: Path, picture: Path, width: int, height: int, *, is_dark: bool = False) -> Any:
    """A screenshot in a file; returns its pixels as an array of shape [height, width, 3]."""
    from matplotlib.image import imread

    scheme = ["--blink-settings=preferredColorScheme=0"] if is_dark else []
    open_page(page, f"--screenshot={picture}", f"--window-size={width},{height}", *scheme)
    return imread(picture)[..., :3]


def view_page(page: Path) -> list[View]:
    """The page in frames of several widths and both schemes; fails if the browser complains of anything."""
    frames = "".join(
        f'<iframe src="{page.as_uri()}" style="width: {width}px; border: 0; color-scheme: {scheme}"></iframe>'
        for width, scheme in FRAMES
    )
    with TemporaryDirectory() as folder:
        outer = Path(folder) / "frames.html"
        script = INSPECT.replace("%MIN%", str(MIN_CONTRAST))
        outer.write_text(f"<!DOCTYPE html><body>{frames}<script>{script}</script></body>", encoding="utf-8")
        result = open_page(outer, "--dump-dom", "--allow-file-access-from-files")
    assert "CONSOLE" not in result.stderr, result.stderr
    found = re.search(r"<body>(\[.*\])</body>", result.stdout, re.DOTALL)
    assert found, result.stdout[:2000]
    return [View(*frame, **one) for frame, one in zip(FRAMES, json.loads(unescape(found[1])), strict=True)]


def check_page(page: Path) -> None:
    """Assert that a page fits a phone, can be read in both schemes, and loads nothing."""
    views = view_page(page)
    for view in views:
        assert not (view.overflow > 0 or view.loaded or view.dim), view
    backgrounds = {scheme: {one.background for one in views if one.scheme == scheme} for _, scheme in FRAMES}
    assert all(len(one) == 1 for one in backgrounds.values()) and backgrounds["light"] != backgrounds["dark"]
