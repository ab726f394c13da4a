"""docs/add-a-policy.md: whoever follows it has a policy that conforms."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.timeout(400)
def test_the_policy_of_the_page_conforms(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "add-a-policy.md").read_text(encoding="utf-8")
    source, entry = re.findall(r"```(?:python|toml)\n(.*?)```", page, re.DOTALL)
    (tmp_path / "sampled.py").write_text(source)
    # What an installation leaves behind.
    (tmp_path / "sampled-1.dist-info").mkdir()
    (tmp_path / "sampled-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: sampled\nVersion: 1\n")
    group, point = re.findall(r'entry-points\."(.*?)"\]\n(.*)', entry)[0]
    (tmp_path / "sampled-1.dist-info" / "entry_points.txt").write_text(f"[{group}]\n{point.replace(chr(34), '')}\n")
    suite = ROOT / "tests" / "guestd" / "tiering" / "test_policy.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite), "-k", "sampled"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert re.search(r"1\d passed", done.stdout), done.stdout
