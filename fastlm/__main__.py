"""``python -m fastlm`` is the ``fastlm`` command."""

from __future__ import annotations

from fastlm.cli import main

raise SystemExit(main())
