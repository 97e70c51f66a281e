"""`drm`, and `python -m drmcli`, so that `accelerate launch -m drmcli train-reward ...` works."""

import sys


def main() -> None:
    """Run the command line and leave with its exit code; a signal is heard from the first import on."""
    from drmcli import signals

    signals.watch()
    try:
        from drmcli.cli.app import invoke

        code = invoke(sys.argv[1:])
        signals.ignore()  # all is done and said: what is left is the interpreter's own end
    except KeyboardInterrupt:
        signals.ignore()
        sys.stderr.write(f"error: interrupted\nhint: {signals.AGAIN}\n")
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
