"""Check the locked packages: each has a sha256, and none has a known vulnerability.

    python .ci/audit.py [arguments for pip-audit, such as --ignore-vuln ID]

The advisories are PyPI's, or those of the service that PIP_AUDIT_VULNERABILITY_SERVICE and PIP_AUDIT_OSV_URL name.
Where they cannot be had, as behind a mirror that has packages alone, that is said, and the hashes are what is checked.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Old versions on purpose, for the tests alone: their hashes are checked.
OLD = ("requirements-lowest.lock", "requirements-older.lock")
SECONDS = 300  # after which a service counts as one that does not answer


def requirements(lock: str) -> dict[str, bool]:
    """The requirements of a lock file, such as `a==1.0 ; python_version < "3.12"`, and whether each has a sha256."""
    found: dict[str, bool] = {}
    requirement = ""
    for line in lock.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not line[0].isspace():
            requirement = line.partition(" --hash=")[0].rstrip("\\ ")
            found.setdefault(requirement, False)
        if "--hash=sha256:" in line:
            found[requirement] = True
    return found


def ask(pinned: list[str], arguments: list[str]) -> tuple[list[dict], str]:
    """What pip-audit says of each package, and why it says nothing where it does not."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as asked:
        asked.write("\n".join(pinned))
        asked.flush()
        command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner=off"]
        command += ["--format=json", "--timeout=10", f"--requirement={asked.name}", *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return [], f"it did not answer within {SECONDS} seconds"
    try:
        return json.loads(done.stdout)["dependencies"], ""
    except ValueError:
        return [], (done.stderr.strip().splitlines() or ["pip-audit gave no reason"])[-1]


def audited(pinned: list[str], arguments: list[str]) -> tuple[list[dict], str]:
    """The packages of which the service has an entry, and why there are none where there are none."""
    known: list[dict] = []
    for asked in (
        pinned[:1],
        pinned,
    ):  # one first: a service that knows nothing of it is not asked for the others
        found, why = ask(asked, arguments)
        known = [one for one in found if "skip_reason" not in one]
        if not known:
            return [], why or f"it has no entry for {asked[0]}"
    return known, ""


def main(root: Path, arguments: list[str]) -> int:
    """Print what was found; return the exit code: 1 for a missing hash, or a known vulnerability."""
    pinned: dict[str, bool] = {}
    bare: list[str] = []
    for lock in sorted(root.glob("requirements*.lock")):
        found = requirements(lock.read_text(encoding="utf-8"))
        bare += [f"{lock.name}: {name}" for name, hashed in found.items() if not hashed or "==" not in name]
        if lock.name not in OLD:
            pinned |= found
    if bare or not pinned:
        print("audit: without a version and a sha256: " + ("; ".join(bare) or "there is no lock file"))
        return 1
    print(f"audit: each of {len(pinned)} locked packages has a version and a sha256.")
    torch = re.search(r'"(torch==[^"]+)"', (root / "pyproject.toml").read_text(encoding="utf-8"))
    known, why = audited([*pinned, *([torch[1]] if torch else [])], arguments)
    if not known:
        print(f"audit: no advisories could be had, so the hashes alone were checked: {why}")
        return 0
    print(f"audit: advisories were had for {len(known)} packages.")
    bad = [(one, found) for one in known for found in one["vulns"]]
    for one, found in bad:
        fixed = f"fixed in {', '.join(found['fix_versions'])}" if found["fix_versions"] else "not fixed yet"
        print(f"audit: {one['name']} {one['version']} has {found['id']}, {fixed}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(ROOT, sys.argv[1:]))
