"""python -m fastprompt: the command line."""

from fastprompt.cli import main

main()
