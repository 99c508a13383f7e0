"""`python -m earthprior <verb>`."""

from earthprior.cli import main

if __name__ == "__main__":
    main()
