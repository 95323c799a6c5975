import sys

from dedistill.cli.posthoc import main

sys.exit(main())  # the same as: dedistill posthoc
