"""`python -m dinocell.cli`: the same as `python -m dinocell`."""

from dinocell.cli import main

if __name__ == "__main__":
    main()
