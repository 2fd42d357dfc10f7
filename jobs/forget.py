"""Delete a person's chat sessions for good, from the database and from what was exported of it.

    python jobs/forget.py --config jobs/configs/paper.yaml --participant P07
    python jobs/forget.py --config jobs/configs/paper.yaml --session SESSION_ID

What coders' packets still hold of deleted sessions is named, to be deleted by hand; copies made
outside of the workspace are not found. People can delete their sessions in the chat, too.
"""

import sys

from milm_ray.serving.chat.export import forget

if __name__ == "__main__":
    sys.exit(forget(__doc__))
