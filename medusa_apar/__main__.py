"""`python -m medusa_apar` is the command `medusa-apar`."""

import sys

from medusa_apar.commands.cli import main

sys.exit(main())
