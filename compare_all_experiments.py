"""Old name for `vesselrl compare`; every option is passed on unchanged."""

import sys

from vesselrl.launch import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
