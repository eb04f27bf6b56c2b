"""Child processes of the tests import the installed package, not the source folder that they are started in.

The source folder holds no native module after a plain ``pip install .``. Heeded by Python 3.11 and newer.
"""

import os

os.environ["PYTHONSAFEPATH"] = "1"
