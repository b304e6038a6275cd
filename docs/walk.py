"""Draw docs/images/walk.png: a page of `python -m cupyflash trace`, as a browser shows it.

    python docs/walk.py [--browser chromium]

The browser is any of Chromium's kin.  Fonts differ from machine to machine, so nothing compares the picture.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout around this file

from cupyflash.__main__ import main as cupyflash

PICTURE = Path(__file__).with_name("images") / "walk.png"
STEP = "#4,3"  # the last block of the first head, its third step
SIZE = "1120,1542"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw docs/images/walk.png.")
    parser.add_argument("--browser", default="chromium", help="the program (chromium)")
    browser = parser.parse_args(arguments).browser
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "walk.html"
        if status := cupyflash(["trace", "--causal", "--out", str(page)]):
            return status
        page.write_text(page.read_text(encoding="utf-8").replace(str(page), page.name), encoding="utf-8")
        options = [
            "--headless",
            "--no-sandbox",
            "--hide-scrollbars",
            f"--window-size={SIZE}",
            f"--screenshot={PICTURE}",
        ]
        subprocess.run([browser, *options, page.as_uri() + STEP], check=True, capture_output=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
