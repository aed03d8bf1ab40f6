"""`python -m robustfair.cli` is the command `robustfair`."""

import sys

from robustfair.cli.app import main

sys.exit(main())
