"""`python -m pcc.cli`."""

from pcc.cli import main

main()
