"""The example scripts are run as `python examples/NAME.py`, so their folder is on the path here too."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
