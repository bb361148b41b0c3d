"""Old name for `vesselrl merge`; every option is passed on unchanged."""

import sys

from vesselrl.launch import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]]))
