import sys

from dedistill.cli.measure import main

sys.exit(main())  # the same as: dedistill measure
