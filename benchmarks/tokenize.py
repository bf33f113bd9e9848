"""How much faster `worldloom tokenize` is with several processes: scaling/tokenizing.py.

    python benchmarks/tokenize.py --help

Not here, because this file has the name of a module of Python's own, which `import inspect` needs:
whoever runs a benchmark has this folder in front of Python's, and gets this file for that one.
"""

import os
import sys

if __name__ == "tokenize":
    path = list(sys.path)
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in path if os.path.abspath(folder) != here]
    del sys.modules["tokenize"]
    __import__("tokenize")  # Python's own; who imported this gets that
    sys.path[:] = path
elif __name__ == "__main__":  # and not in the processes that are started
    from scaling.tokenizing import main

    main()
