"""The ``priorhole`` command's first moments: while it is being imported, a signal ends it without Python's own words."""

import signal


def main() -> None:
    """Import the command, and run it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as under nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from pipelines import cli

    cli.main()


if __name__ == "__main__":
    main()
