"""`python -m dscl` is the program `dscl`."""

from dscl.cli.app import program

program()
