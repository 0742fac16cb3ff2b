"""`python -m twinserve` is the command `twinserve`."""

from twinserve.cli import main

main()
