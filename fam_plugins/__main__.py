"""``python -m fam_plugins`` is the command ``fam-plugins``."""

from fam_plugins.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
