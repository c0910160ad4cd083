"""`python -m pcc.train CONFIG` is `pcc train CONFIG`."""

import sys

from pcc.train.cli import main

sys.exit(main())
