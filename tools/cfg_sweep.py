import sys

from dedistill.cli.sweep import main

sys.exit(main())  # the same as: dedistill sweep
