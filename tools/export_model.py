import sys

from dedistill.cli.export import main

sys.exit(main())  # the same as: dedistill export
