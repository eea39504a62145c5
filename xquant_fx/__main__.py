"""``python -m xquant_fx``: the command ``xquant``."""

from __future__ import annotations

from xquant_fx.evaluate.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
