import sys

from dedistill.cli.merge import main

sys.exit(main())  # the same as: dedistill merge
