"""`python -m nemotron_h` is the `nemotron-h` command."""

from nemotron_h.cli.main import main

main()
