"""``python -m robustq.cli``."""

from __future__ import annotations

from robustq.cli import main

if __name__ == "__main__":
    main()
