import sys

from dedistill.cli.pairs import main

sys.exit(main())  # the same as: dedistill pairs
