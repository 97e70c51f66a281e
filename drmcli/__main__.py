"""`python -m drmcli`, so that `accelerate launch -m drmcli train-reward ...` works."""

from drmcli.cli.app import main

if __name__ == "__main__":
    main()
