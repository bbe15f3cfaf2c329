"""Options of `trivit doctor`, told without a heavy import."""

import argparse

MFU = 0.4
"""Share of the peak that a well-fed GPU reaches: a guess, until --mfu gives what a run has measured."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The hardware that the run is meant for; all other options are those of `trivit pretrain`."""
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="default: those of this machine, or 1")
    parser.add_argument("--gpu", metavar="NAME", help="h200, h100, a100, l40s, ... (default: that of this machine)")
    parser.add_argument(
        "--mfu", type=float, default=MFU, metavar="SHARE", help=f"of its peak that is reached (default {MFU})"
    )
    parser.add_argument(
        "--network", type=float, default=200, metavar="GBIT", help="per second into a node, one way (default 200)"
    )
