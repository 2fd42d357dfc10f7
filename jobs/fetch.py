"""Say where the corpora come from and under what terms; fetch the open ones; check what arrived.

    python jobs/fetch.py                               # every corpus: page, licence, command
    python jobs/fetch.py smilechat --download raw      # clones into raw/smilechat, then checks it
    python jobs/fetch.py psydtcorpus --check DIR       # count and digest of a copy you have

Only corpora under an open licence (CPsyCounD, SmileChat) are downloaded, and only when asked to.
Needs no cluster. Exit codes: 0 as published, 1 different or failed, 2 wrong arguments.
"""

import sys

from milm_ray.corpora.fetch import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
