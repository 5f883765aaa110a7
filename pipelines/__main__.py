"""The ``priorhole`` command's first moments, in which a signal ends it without Python's own words, and its last."""

import atexit
import gc
import signal


def main() -> None:
    """Import the command, and run it."""
    # Python would look through all that was imported for what nobody uses any more, just before it drops everything.
    atexit.register(gc.freeze)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as under nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from pipelines import cli

    cli.main()


if __name__ == "__main__":
    main()
