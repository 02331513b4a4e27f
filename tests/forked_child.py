"""What the children of the fork server under test do: say what they see, or wait to be ended."""

import json
import os
import sys
import time
from pathlib import Path

from pipelines.engine import die_with_parent


def main() -> int:
    """Return 7 after saying what is seen; with WAIT, wait for a minute."""
    die_with_parent()
    seen = {
        "variable": os.environ.get("SEEN"),
        "directory": str(Path.cwd()),
        "path": sys.path,
        "leads": os.getsid(0) == os.getpid(),
        "name": Path("/proc/self/comm").read_text().strip(),
        "parent": os.environ["GRISTMILL_PARENT"] == str(os.getppid()),
        "torch": "torch" in sys.modules,
    }
    sys.stdout.write(json.dumps(seen) + "\n")
    sys.stdout.flush()
    if os.environ.get("WAIT"):
        time.sleep(60)
    return 7
