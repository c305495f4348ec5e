import sys

from medusa_apar.commands.cli import main

sys.exit(main())
