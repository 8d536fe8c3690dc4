"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def test_pieces_in_your_own_code(capsys):
    """All Python of its section, in order, as one session."""
    section = README.read_text().partition("## Use one piece in your own code\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(blocks) >= 2
    session: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), session)
    assert "layer_norm: " in capsys.readouterr().out
