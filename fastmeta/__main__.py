"""`python -m fastmeta`: the command line."""

from fastmeta.cli import main

main(prog_name="fastmeta")
