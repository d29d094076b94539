"""`python -m dscl` is the program `dscl`."""

from dscl.cli import program

program()
