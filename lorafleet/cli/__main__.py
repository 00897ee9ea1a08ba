"""``python -m lorafleet.cli``."""

from lorafleet.cli import main

main()
