"""``python -m xquant_fx``: the command ``xquant``."""

from __future__ import annotations

from xquant_fx.evaluate.cli import main

raise SystemExit(main())
