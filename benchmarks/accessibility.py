"""What axe-core, the accessibility checker, says of every page of the report, wide and light, and narrow and dark.

It takes npm, to fetch axe-core into a temporary folder, and Chromium. Run it with ``tests/support`` in PYTHONPATH. Exits 1
on a serious or critical violation.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from browser import Browser

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Fetch, look, tell."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "install", "--silent", "axe-core"], cwd=folder, check=True)
        script = (Path(folder) / "node_modules" / "axe-core" / "axe.min.js").read_text()
    pages = [ROOT / "reports" / "index.html", *sorted((ROOT / "reports" / "pages").glob("*.html"))]
    serious, passed = 0, 0
    with Browser() as browser:
        for path in pages:
            for width, dark in ((1200, False), (390, True)):
                browser.open(path.as_uri(), width, dark=dark)
                browser.value(f"{script}; 0")
                found = browser.value("axe.run().then(({passes, violations}) => ({passes: passes.length, violations}))")
                passed += found["passes"]
                for violation in found["violations"]:
                    serious += violation["impact"] in ("serious", "critical")
                    print(
                        f"{path.name} at {width}: {violation['impact']}: {violation['help']} {len(violation['nodes'])} nodes"
                    )
        version = browser.value("axe.version")
    print(f"axe-core {version}: {len(pages)} pages, twice each: {passed} rules passed, {serious} serious violations")
    sys.exit(serious > 0)


if __name__ == "__main__":
    main()
