"""``python -m captum_llm_ext``: see `captum_llm_ext.cli`."""

import sys

from captum_llm_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
