"""`python -m bnbench.cli`."""

from bnbench.cli import main

if __name__ == "__main__":
    main()
