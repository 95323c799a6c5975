import sys

from dedistill.cli.evaluate import main

sys.exit(main())  # the same as: dedistill evaluate
