"""Delete a person's chat sessions for good, from the database and from what was exported of it.

    python jobs/forget.py --config jobs/configs/paper.yaml --participant P07
    python jobs/forget.py --config jobs/configs/paper.yaml --session SESSION_ID

Copies that were made outside of the workspace are not found. People can do the same in the chat.
"""

import sys

from milm_ray.serving.chat.export import forget

if __name__ == "__main__":
    sys.exit(forget(__doc__))
