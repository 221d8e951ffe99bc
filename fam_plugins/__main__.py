"""``python -m fam_plugins`` is the command ``fam-plugins``."""

import sys

from fam_plugins.cli import main

if __name__ == "__main__":
    sys.exit(main())
