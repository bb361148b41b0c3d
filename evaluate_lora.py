"""Old name for `vesselrl evaluate`; every option is passed on unchanged."""

import sys

from vesselrl.launch import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
