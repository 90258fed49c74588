"""`python -m dinocell`: the command line, for `torchrun` and for places without the script."""

from dinocell.cli import main

if __name__ == "__main__":
    main()
