import sys

from dedistill.cli.scan import main

sys.exit(main())  # the same as: dedistill scan
