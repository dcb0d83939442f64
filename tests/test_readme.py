"""The README's first example runs and prints what the README says."""

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_first_example_prints_what_it_says():
    (code, *_) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    expected = [line.removeprefix("# ") for line in code.splitlines() if line.startswith("# (")]
    assert expected
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines() == expected


def test_memory_example_prints_what_it_says():
    import torchrec_cafe as tc

    call, expected = re.search(r">>> (tc\.Cafe.*)\n(MemoryBreakdown\(.*\))\n", README).groups()  # pyright: ignore[reportOptionalMemberAccess]
    assert str(eval(call, {"tc": tc})) == expected
