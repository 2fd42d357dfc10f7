"""Changes of the chat's tables, one file each, applied in order when a replica starts."""
