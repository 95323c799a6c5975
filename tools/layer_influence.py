import sys

from dedistill.cli.influence import main

sys.exit(main())  # the same as: dedistill influence
