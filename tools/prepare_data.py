import sys

from dedistill.cli.prepare import main

sys.exit(main())  # the same as: dedistill prepare
