from fastprompt.cli import main

main()
