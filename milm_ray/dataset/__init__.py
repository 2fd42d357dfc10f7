"""From dialogues to training and test data: curate, transcribe, split."""
