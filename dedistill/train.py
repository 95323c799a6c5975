"""``python -m dedistill.train RECIPE`` and ``accelerate launch -m dedistill.train RECIPE``: the same as ``dedistill train``."""

import sys

from dedistill.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
