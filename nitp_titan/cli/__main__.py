"""``python -m nitp_titan.cli``."""

import sys

from nitp_titan.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
