import sys

from lab.ladder.study import main

if __name__ == "__main__":
    sys.exit(main())
