import sys

from dedistill.cli.check import main

sys.exit(main())  # the same as: dedistill check
