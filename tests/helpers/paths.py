"""Where things lie."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REAL_CORPORA = ROOT.parent / "shared" / "corpora"
SCREENSHOTS = ROOT / ".screenshots"
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
