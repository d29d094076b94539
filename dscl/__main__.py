"""`python -m dscl` runs the command line interface."""

from dscl.cli.app import run_and_exit

run_and_exit()
