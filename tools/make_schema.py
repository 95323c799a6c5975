"""Write dedistill/recipes/schema.json, which editors use to complete and check recipes. ``--check`` only compares."""

import argparse
import json
import sys
from pathlib import Path

from dedistill.recipe.load import json_schema

SCHEMA = Path(__file__).parents[1] / "dedistill" / "recipes" / "schema.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file is not up to date")
    args = parser.parse_args()
    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    if not args.check:
        SCHEMA.write_text(text, encoding="utf-8")
    elif not SCHEMA.exists() or SCHEMA.read_text(encoding="utf-8") != text:
        print(f"{SCHEMA} is not up to date; run: python tools/make_schema.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
