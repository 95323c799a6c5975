"""``python -m dedistill COMMAND``."""

import sys

from dedistill.cli.main import main

sys.exit(main())
