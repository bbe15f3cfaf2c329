"""Where the installed `trivit` command begins: Ctrl-C while Python is still importing ends it without a traceback."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job ignores it, and goes on doing so
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start() -> int:
    """`pretrain.cli.main`, which tells of an interruption itself."""
    from pretrain.cli import main

    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return main()
