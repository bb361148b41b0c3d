"""`python -m vesselrl VERB` is the same as `vesselrl VERB`."""

import sys

from vesselrl.launch import main

if __name__ == "__main__":
    sys.exit(main())
