"""``python -m hvd_hetero`` is the command ``hvd-hetero``."""

import sys

from hvd_hetero.cli import main

sys.exit(main())
