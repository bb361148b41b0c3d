"""Old name for `vesselrl train`; every option is passed on unchanged."""

import sys

from vesselrl.launch import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
