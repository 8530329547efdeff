"""Readers, one file a family of input: raw record -> Conversation or Drop."""
