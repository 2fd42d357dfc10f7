"""The live chat: a page, its API, the database of its sessions, the safety check around a model."""
