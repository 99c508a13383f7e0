"""`python -m earthprior <verb>`."""

import sys

try:
    from earthprior.cli import main
except KeyboardInterrupt:
    # While modules are imported nobody listens for it yet.
    print("earthprior: stopped before it began; nothing was done, the same command begins", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    main()
