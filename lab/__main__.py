import sys

from lab.study import main

if __name__ == "__main__":
    sys.exit(main())
