"""`python -m lgmp` is `lgmp`."""

import sys

from lgmp.cli import main

sys.exit(main())
