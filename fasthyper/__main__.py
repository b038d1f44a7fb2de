"""``python -m fasthyper``: the command line."""

import sys

from fasthyper.cli import main

sys.exit(main())
