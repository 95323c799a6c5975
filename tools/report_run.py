import sys

from dedistill.cli.report import main

sys.exit(main())  # the same as: dedistill report
