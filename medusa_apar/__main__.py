"""`python -m medusa_apar` is the command `medusa-apar`."""

import sys

from medusa_apar.commands.cli import main

if __name__ == "__main__":  # processes that vLLM spawns import this file
    sys.exit(main())
