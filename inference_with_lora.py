"""Old name for `vesselrl predict`; every option is passed on unchanged."""

import sys

from vesselrl.launch import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
